"""Ends all processes of a job when one of them has ended, whatever the others are waiting for.

A collective operation whose peer is gone may wait for ever, deaf to signals. So every process has a thread with a
connection of its own: all to rank 0, which tells the others.
"""

import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from common.cli import Stopped
from common.errors import UserError

BEAT = 1.0  # seconds between signs of life
SILENCE = 40.0  # seconds without any, after which a process or its connection counts as gone
STANDSTILL = 5.0  # seconds without a look at the others, after which this process itself has stood still
CONNECTING = 30.0  # seconds
# What processes say: I live, I wait for the others, I am done, I failed, another is gone, I am cut off from another.
ALIVE, WAITING, DONE, FAILED, GONE, CUT = b".", b"w", b"q", b"e", b"x", b"c"
LOST = 3  # exit code


class Watchdog:
    """The watch of one process over the others: `start`, and in the end `leave` or `fail`."""

    def __init__(self, rank: int, size: int, host: str):
        """host: of rank 0, as the others reach it."""
        self.rank, self.size, self.host = rank, size, host
        self.continued_by = ""  # the command that goes on where this run ends
        self.exchange = 0  # the number of what this process does with all others now, in which it waits; 0: nothing
        self.peers: dict[int, socket.socket] = {}
        self.heard: dict[int, float] = {}  # when each spoke last
        self.moved: dict[int, float] = {}  # when each last did something else than wait, as rank 0 knows it
        self.left, self.failing, self.first_failed = (threading.Event() for _ in range(3))
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def start(self, from_first: Callable[[Callable[[], Any]], Any]) -> None:
        """Connect all processes. from_first: gives every process what its argument returns on rank 0."""
        server = socket.create_server((self.host, 0)) if self.rank == 0 else None
        port, token = from_first(lambda: [server.getsockname()[1], secrets.token_hex(16)] if server else [])
        if server is not None:
            self._accept(server, token.encode())
        else:
            peer = socket.create_connection((self.host, port), timeout=CONNECTING)
            peer.sendall(token.encode() + bytes([self.rank]))
            self.peers[0] = peer
        for peer in self.peers.values():
            peer.settimeout(0)
        self.heard = dict.fromkeys(self.peers, time.monotonic())
        self.moved = dict.fromkeys(range(self.size), time.monotonic())
        self.thread.start()

    def _accept(self, server: socket.socket, token: bytes) -> None:
        """Wait for every other rank, which has the token; whoever else calls is sent away."""
        with server:
            server.settimeout(CONNECTING)
            while len(self.peers) < self.size - 1:
                peer, _ = server.accept()
                peer.settimeout(CONNECTING)
                said = b""
                while len(said) <= len(token) and (more := peer.recv(len(token) + 1 - len(said))):
                    said += more
                if len(said) > len(token) and secrets.compare_digest(said[:-1], token):
                    self.peers[said[-1]] = peer
                else:
                    peer.close()

    @contextmanager
    def ending_together(self) -> Iterator[None]:
        """What is done here by all processes ends for all of them at once.

        Other ranks than 0 print nothing but their own errors; one that rank 0 has as well is said once.
        """
        if self.rank:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            os.close(nowhere)
        try:
            yield
        except Stopped:
            self.leave()
            if self.rank:
                raise SystemExit(130) from None
            raise
        except (SystemExit, KeyboardInterrupt):
            self.fail()  # as of --help, for which the others would wait
            raise
        except UserError as error:
            if self.fail():
                raise SystemExit(2) from None
            raise UserError(f"rank {self.rank}: {error}" if self.rank else str(error)) from None
        self.leave()

    def leave(self) -> None:
        """This process ends as it should."""
        self.left.set()
        self.thread.join()
        self._tell(DONE)

    def fail(self) -> bool:
        """This process ends by an error, which ends the others. Returns whether rank 0 did first, and so says it."""
        self.failing.set()
        if self.rank:
            self.first_failed.wait(2 * BEAT)
        self._tell(FAILED)
        return self.first_failed.is_set()

    def cut_off(self) -> NoReturn:
        """A connection other than this watch's has broken, so all end; rank 0 names the rank that told it first.

        Where a process has ended, which breaks connections as well, the watch ends this one before that.
        """
        time.sleep(2 * BEAT)
        if self.rank:
            self._tell(CUT)
            time.sleep(SILENCE)
        time.sleep(2 * BEAT)
        self._end(0 if self.rank else self._other)

    @property
    def _other(self) -> int | None:
        """The rank that is not 0, if there is but one."""
        return 1 if self.size == 2 else None

    def _tell(self, word: bytes, but: int | None = None) -> None:
        for rank, peer in self.peers.items():
            if rank != but:
                with suppress(OSError):
                    peer.send(word)

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for rank, peer in self.peers.items():
                selector.register(peer, selectors.EVENT_READ, rank)
            beaten, looked, exchange = 0.0, time.monotonic(), 0
            while not self.left.is_set() and selector.get_map():
                for key, _ in selector.select(BEAT / 4):
                    if self._hear(key.data):
                        selector.unregister(key.fileobj)
                now = time.monotonic()
                if now - looked > STANDSTILL:  # this process stood still: what was said meanwhile is yet to be read
                    self.heard, self.moved = dict.fromkeys(self.heard, now), dict.fromkeys(self.moved, now)
                looked = now
                if now - beaten >= BEAT:
                    beaten = now
                    waits, exchange = self.exchange == exchange != 0, self.exchange
                    self._tell(WAITING if waits else ALIVE)
                    if not waits:
                        self.moved[self.rank] = now
                    if self.rank == 0 and now - max(self.moved.values()) > SILENCE:
                        self._end(self._other)  # all wait for each other, for longer than any exchange takes
                    for key in list(selector.get_map().values()):
                        if now - self.heard[key.data] > SILENCE:
                            self._end(key.data)

    def _hear(self, rank: int) -> bool:
        """Take in what a peer says; returns whether it has ended as it should."""
        try:
            said = self.peers[rank].recv(64)
        except BlockingIOError:
            return False
        except OSError:
            said = b""
        self.heard[rank] = time.monotonic()
        if ALIVE in said:
            self.moved[rank] = self.heard[rank]
        if DONE in said:
            return True
        if self.failing.is_set():
            if rank == 0 and FAILED in said:
                self.first_failed.set()
            return not said
        if FAILED in said or GONE in said:  # whoever failed, or rank 0, says it
            self._tell(GONE, but=rank)
            os._exit(LOST)
        if not said or CUT in said:
            self._end(rank)
        return False

    def _end(self, lost: int | None) -> NoReturn:
        """End this process, and tell the others, the lost one, too; say why if it is the first that is left.

        lost: the rank, or None where it is known only that some cannot reach each other.
        """
        self._tell(GONE)
        if self.rank == (1 if lost == 0 else 0):
            go_on = f"; the last checkpoint stands; continue with: {self.continued_by}" if self.continued_by else ""
            which = f"rank {lost} of {self.size} has ended or cannot be reached"
            if lost is None:
                which = f"some of the {self.size} ranks cannot reach each other"
            # mlx or a progress line may be in the middle of a line of its own: begin a new one
            os.write(2, f"\nerror: {which}, so all end{go_on}\n".encode())
        os._exit(LOST)
