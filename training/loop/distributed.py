"""One training in several processes, one per device: each draws its share of every batch, gradients are averaged.

Start it with `torchrun --nproc_per_node N -m dicom_node train run …`, which sets RANK, WORLD_SIZE and LOCAL_RANK.
Every loss is a mean over the batch, so the average of the processes' gradients is the gradient of the whole batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from training.errors import RunError

# The others wait at the next gradient while rank 0 validates on whole volumes or writes a checkpoint.
PATIENCE = timedelta(hours=2)
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """This process among those of one training; `ALONE` is the usual case."""

    rank: int = 0
    world: int = 1
    device: torch.device = CPU

    @property
    def first(self) -> bool:
        """Whether this process writes and reports."""
        return self.rank == 0

    def share(self, batch: int) -> range:
        """Which samples of a batch this process draws.

        Raises:
            RunError: batch_share, the batch cannot be shared evenly.
        """
        if batch % self.world:
            text = f"a batch of {batch} cannot be shared by {self.world} processes; choose a number that divides it"
            raise RunError("batch_share", text)
        return range(self.rank, batch, self.world)

    def wrap(self, module: nn.Module) -> nn.Module:
        """Average the module's gradients over the processes in every backward pass."""
        if self.world == 1:
            return module
        devices = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(module, device_ids=devices)  # no network here has buffers to agree on

    def any(self, flag: bool) -> bool:
        """Whether the flag is up in any process. All of them must ask at the same step."""
        if self.world == 1:
            return flag
        votes = torch.tensor([float(flag)], device=self.device)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX)
        return bool(votes.item())

    def barrier(self) -> None:
        """Wait for the others."""
        if self.world > 1:
            self.any(False)


ALONE = Ranks()


@contextmanager
def joined(environment: Mapping[str, str], device: str) -> Iterator[Ranks | None]:
    """Join the processes that torchrun started, gloo on CPUs and nccl on GPUs; None when it did not.

    Args:
        environment: where RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT are read.
        device: "cpu", or "cuda": the device of the local rank.
    """
    if int(environment.get("WORLD_SIZE", "1")) == 1:
        yield None
        return
    rank, world, local = (int(environment[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    on_gpu = device.startswith("cuda")
    place = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(place)
    dist.init_process_group("nccl" if on_gpu else "gloo", rank=rank, world_size=world, timeout=PATIENCE)
    try:
        yield Ranks(rank=rank, world=world, device=place)
    finally:
        dist.destroy_process_group()
