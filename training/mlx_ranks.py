"""The processes that mlx.launch starts: `training.ranks.Ranks` over mx.distributed.

    mlx.launch -n 2 python sft.py --train

Gradients are sums over tokens, divided by the token count of the whole batch, so they are summed here, a few large
arrays at a time; mlx.nn.average_gradients would average them over processes whose token counts differ.
"""

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from common.errors import UserError, reason
from common.watchdog import Watchdog
from training.ranks import ALONE, Ranks, digest_of

LAUNCHED = "MLX_RANK"  # the environment variable by which the launcher says a process's rank
# Taken out of the environment once they are read: a script that this one starts is no part of the launch.
LAUNCH_VARIABLES = (LAUNCHED, "MLX_HOSTFILE", "MLX_WORLD_SIZE", "MLX_JACCL_COORDINATOR", "MLX_IBV_DEVICES")
BUCKET = 64 * 2**20  # bytes that are summed at once, or one array where it is larger
SAMPLED = 64  # numbers of every weight that a digest reads


@contextmanager
def launched() -> Iterator[Ranks]:
    """The ranks of the launch that this process belongs to; of a process started by itself, it alone.

    Where a rank is lost, the process ends, and the first rank that is left says so in one line.
    """
    if LAUNCHED not in os.environ:
        yield ALONE
        return
    host, local = _first_host()
    try:
        group = mx.distributed.init(strict=True)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the processes of this launch cannot reach each other ({reason(error)}); check the hosts file, or choose "
            "other ports by mlx.launch --starting-port"
        ) from None
    for name in LAUNCH_VARIABLES:
        os.environ.pop(name, None)
    if group.size() == 1:
        yield ALONE
        return
    ranks = MLXRanks(group, host, local)
    with ranks.watchdog.ending_together():
        try:
            yield ranks
        except RuntimeError as error:
            if "connection to a peer was lost" in str(error):  # mlx's ring
                ranks.watchdog.cut_off()
            raise


def _first_host() -> tuple[str, bool]:
    """The address of rank 0, and whether all processes are on its machine, by what the launcher has set."""
    if "MLX_HOSTFILE" in os.environ:  # [["ADDRESS:PORT", ...] of each rank]; empty for a single process
        text = Path(os.environ["MLX_HOSTFILE"]).read_text(encoding="utf-8").strip()
        hosts = [addresses[0].rpartition(":")[0] for addresses in json.loads(text)] if text else [""]
        return hosts[0], len(set(hosts)) == 1
    if "MLX_JACCL_COORDINATOR" in os.environ:
        return os.environ["MLX_JACCL_COORDINATOR"].rpartition(":")[0], False
    return os.environ.get("NCCL_HOST_IP", "127.0.0.1"), True


class MLXRanks(Ranks):
    """The processes of one launch, joined by ring, jaccl or nccl (docs/many_macs.md)."""

    def __init__(self, group: Any, host: str, local: bool):
        """host: of rank 0, as the others reach it; local: whether all processes are on one machine."""
        self.group, self.rank, self.size = group, group.rank(), group.size()
        self.ahead = mx.array(0)  # the last `of_first`: samplers evaluate ahead, on a stream of their own
        self.launcher = f"mlx.launch -n {self.size} python" if local else "mlx.launch --hostfile HOSTS python"
        self.watchdog = Watchdog(self.rank, self.size, host)
        self.watchdog.start(self.from_writer)

    def continued_by(self, words: str) -> None:
        self.watchdog.continued_by = f"{self.launcher} {words}"

    def sum(self, arrays: Sequence[mx.array]) -> list[mx.array]:
        """Each array summed over the ranks, in float32, as many at once as a bucket holds."""
        mx.eval(list(arrays))
        summed: list[mx.array] = []
        for bucket in _buckets(arrays):
            whole = self._all_sum(mx.concatenate([array.astype(mx.float32).reshape(-1) for array in bucket]))
            parts = mx.split(whole, np.cumsum([array.size for array in bucket])[:-1].tolist())
            summed += [part.reshape(a.shape).astype(a.dtype) for a, part in zip(bucket, parts, strict=True)]
        return summed

    def sum_host(self, array: np.ndarray) -> np.ndarray:
        wide = array.astype(np.int32) if array.dtype.kind in "bui" else array  # which every backend can add
        return np.array(self._all_sum(mx.array(wide))).astype(array.dtype)

    def placed(self, values: mx.array, places: mx.array, count: int) -> mx.array:
        return mx.distributed.all_sum(mx.zeros(count).at[places].add(values), group=self.group)

    def of_first(self, tokens: mx.array) -> mx.array:
        # A product, as zeros of their own would not wait for the sums that the tokens are made by.
        self.ahead = mx.distributed.all_sum(tokens.astype(mx.int32) * int(self.writes), group=self.group)
        return self.ahead

    def _all_sum(self, array: mx.array) -> mx.array:
        mx.eval(self.ahead)
        mx.eval(array)
        started = time.perf_counter()
        self.sums += 1
        self.watchdog.exchange = self.sums
        whole = mx.distributed.all_sum(array, group=self.group)
        mx.eval(whole)
        self.watchdog.exchange = 0
        self.waited += time.perf_counter() - started
        self.summed_bytes += array.nbytes
        return whole


def _buckets(arrays: Sequence[mx.array]) -> Iterator[list[mx.array]]:
    """Consecutive arrays of about BUCKET bytes together, as float32."""
    bucket: list[mx.array] = []
    size = 0
    for array in arrays:
        bucket.append(array)
        size += 4 * array.size
        if size >= BUCKET:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket


def sum_tree(ranks: Ranks, tree: Any) -> Any:
    """The sums of a tree's arrays over the ranks, where one that is read from a file may have another order."""
    if ranks.size == 1:
        return tree
    names, arrays = zip(*sorted(tree_flatten(tree), key=lambda named: named[0]), strict=True)
    return tree_unflatten(list(zip(names, ranks.sum(arrays), strict=True)))


def from_first(ranks: Ranks, tree: Any) -> Any:
    """Rank 0's tree of float arrays; that of the others has the same shapes."""
    return sum_tree(ranks, tree if ranks.writes else tree_map(mx.zeros_like, tree))


def weights_digest(model: nn.Module) -> str:
    """A digest of a model's weights: of their names, sizes, types and a sample of their numbers."""
    flat = [(name, array.reshape(-1)) for name, array in sorted(tree_flatten(model.parameters()))]
    sampled = ((name, array[:: max(array.size // SAMPLED, 1)]) for name, array in flat)
    return digest_of([name, array.size, str(array.dtype), array.astype(mx.float32).tolist()] for name, array in sampled)
