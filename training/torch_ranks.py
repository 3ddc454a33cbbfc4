"""The processes that torchrun and accelerate start: `training.ranks.Ranks` over torch.distributed.

    torchrun --nproc-per-node 2 pytorch_ppo_training.py --model ./sft_fine_tune/ --ground-truth-reward

The twin of training.mlx_ranks. Both launchers say by the same environment variables which process one is. Sums are made
by gloo, of what is on a GPU by nccl. Gradients are sums over tokens, divided by the token count of the whole batch;
DistributedDataParallel would average them over processes whose token counts differ. Not here: FSDP.
"""

import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from common.errors import UserError, reason
from common.watchdog import Watchdog
from training.ranks import ALONE, Ranks

BUCKET = 64 * 2**20  # bytes that are summed at once, or one array where it is larger
PATIENCE = timedelta(days=1)  # with the slowest rank of a step; one that is lost is the watchdog's matter
SAMPLED = 64  # numbers of every weight that a digest reads


@contextmanager
def launched() -> Iterator[Ranks]:
    """The ranks of the launch that this process belongs to; of a process started by itself, it alone.

    Where a rank is lost, the process ends, and the first rank that is left says so in one line.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    for name in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true":
            raise UserError(
                f"accelerate's configuration asks for {name}, which divides a model; here every process holds the "
                "whole of it; choose multi-GPU or multi-CPU without it by: accelerate config"
            )
    try:
        ranks = TorchRanks()
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the processes of this launch cannot reach each other ({reason(error)}); check the addresses "
                        "that the launcher was given") from None  # fmt: skip
    with ranks.watchdog.ending_together():
        yield ranks
    dist.destroy_process_group()


class TorchRanks(Ranks):
    """The processes of one launch, joined by gloo, for GPUs by nccl."""

    def __init__(self) -> None:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        here = int(os.environ.get("LOCAL_WORLD_SIZE", self.size))
        nodes = "" if here == self.size else f"--nnodes {self.size // here} "
        self.launcher = f"torchrun {nodes}--nproc-per-node {here}"
        self.watchdog = Watchdog(self.rank, self.size, os.environ["MASTER_ADDR"])
        self.watchdog.start(self.from_writer)

    def continued_by(self, words: str) -> None:
        self.watchdog.continued_by = f"{self.launcher} {words}"

    def sum(self, arrays: Sequence[Tensor]) -> list[Tensor]:
        """Each tensor summed over the ranks, those of one type together, as many at once as a bucket holds."""
        summed: list[Tensor] = []
        for bucket in _buckets(arrays):
            whole = self._all_sum(torch.cat([array.flatten() for array in bucket]))
            parts = whole.split([array.numel() for array in bucket])
            summed += [part.view(array.shape) for array, part in zip(bucket, parts, strict=True)]
        return summed

    def sum_host(self, array: np.ndarray) -> np.ndarray:
        return self._all_sum(torch.tensor(array)).numpy()

    def _all_sum(self, tensor: Tensor) -> Tensor:
        """The sum, in the memory of `tensor`."""
        started = time.perf_counter()
        self.sums += 1
        self.watchdog.exchange = self.sums
        try:
            dist.all_reduce(tensor)
        except RuntimeError:
            self.watchdog.cut_off()
        self.watchdog.exchange = 0
        self.waited += time.perf_counter() - started
        self.summed_bytes += tensor.nbytes
        return tensor


def _buckets(arrays: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Consecutive arrays of one type and device, of about BUCKET bytes together."""
    bucket: list[Tensor] = []
    for array in arrays:
        alike = bucket and (array.dtype, array.device) == (bucket[0].dtype, bucket[0].device)
        if bucket and (not alike or sum(each.nbytes for each in bucket) >= BUCKET):
            yield bucket
            bucket = []
        bucket.append(array)
    if bucket:
        yield bucket


def own_device(ranks: Ranks, device: torch.device) -> torch.device:
    """The device of this process, of the kind that `device` is. Raises UserError where there are too few."""
    if ranks.size == 1 or device.type == "cpu":
        return device
    if device.type != "cuda":
        raise UserError(f"{ranks.size} processes cannot share this machine's GPU; start one, or add --device cpu")
    number, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= there:
        raise UserError(f"this machine has {there} GPUs, fewer than processes; use --nproc-per-node {there}")
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def weights_digest(model: nn.Module) -> str:
    """A digest of a model's weights: of their names, shapes, types and a sample of their numbers."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        flat = weight.detach().flatten()
        sampled = flat[:: max(len(flat) // SAMPLED, 1)].float().cpu()
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(sampled.numpy().tobytes())
    return digest.hexdigest()
