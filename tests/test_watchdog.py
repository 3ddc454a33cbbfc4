"""The watch of the processes of a job over each other (common/watchdog.py), here of two in one process."""

import threading
import time
from queue import Queue

import pytest

from common import watchdog
from common.watchdog import Watchdog

LIMIT = 20.0  # seconds


@pytest.fixture
def pair(monkeypatch):
    """Two watches, connected, with what each would have ended by: (its rank, the rank that is lost)."""
    monkeypatch.setattr(watchdog, "BEAT", 0.05)
    monkeypatch.setattr(watchdog, "SILENCE", 1.0)
    ended: Queue[tuple[int, int]] = Queue()
    told: Queue[list] = Queue()

    def end(self, lost):
        ended.put((self.rank, lost))
        self.left.set()

    def of_first(make):
        if threading.current_thread() is not threading.main_thread():
            return told.get(timeout=LIMIT)
        told.put(made := make())
        return made

    monkeypatch.setattr(Watchdog, "_end", end)
    first, second = (Watchdog(rank, 2, "127.0.0.1") for rank in (0, 1))
    starting = threading.Thread(target=second.start, args=(of_first,))
    starting.start()
    first.start(of_first)
    starting.join()
    yield first, second, ended
    first.leave()
    second.leave()


def test_two_that_wait_for_each_other_without_an_end_are_cut_off(pair):
    first, second, ended = pair
    first.exchange = second.exchange = 7
    assert ended.get(timeout=LIMIT) == (0, 1)


@pytest.mark.parametrize("exchanges", [(0, 0), (7, 0), (0, 7)])
def test_one_that_computes_is_waited_for(pair, exchanges):
    first, second, ended = pair
    first.exchange, second.exchange = exchanges
    time.sleep(1.6)
    assert ended.empty()


def test_exchanges_that_follow_each_other_are_no_standstill(pair):
    first, second, ended = pair
    for number in range(1, 35):
        first.exchange = second.exchange = number
        time.sleep(0.05)
    assert ended.empty()
