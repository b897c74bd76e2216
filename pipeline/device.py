"""Where the networks run: device, precision, batch, threads, and what happens when memory runs out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

import SimpleITK as sitk  # noqa: N813
import torch

from pipeline.errors import PipelineError

CPU_BATCH = 16  # measured: the fastest of 8, 16, 32 and 64 windows at once on 2 cores
GPU_BATCH = 128  # windows of 32 cubed at width 64: some 6 GiB of activations
GPU_BYTES_PER_WINDOW = 64 * 2**20  # a generous bound for the same network

# what torch says in a plain RuntimeError, or (CUDA) in its AcceleratorError, where it has no class for it
OUT_OF_MEMORY_WORDS = (
    "DefaultCPUAllocator",
    "CUDA error: out of memory",  # outside of torch's own allocator: the context, a kernel's stack
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)

Result = TypeVar("Result")


class DeviceError(PipelineError):
    """The device that the options name is not there: an operator's matter (code device_missing)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Compute:
    """One way to run a network: where, in what precision ("fp32", "bf16"), how many windows at once."""

    device: torch.device
    precision: str
    batch: int

    @property
    def name(self) -> str:
        """For the provenance: "cpu", "cuda:0 NVIDIA H100"."""
        if self.device.type != "cuda":
            return str(self.device)
        return f"{self.device} {torch.cuda.get_device_name(self.device)}"


ON_CPU = Compute(device=torch.device("cpu"), precision="fp32", batch=CPU_BATCH)


def choose_compute(
    device: str = "auto", precision: str = "auto", batch: int = 0, *, report: Callable[[str], None] = lambda _: None
) -> Compute:
    """What the options ask for on this machine; "auto" and 0 are filled in.

    The GPU is taken when there is one. bf16 is chosen on a GPU that has it; never by itself on a CPU, where it
    was measured three times slower than fp32. A GPU so full that it cannot even be asked leaves an "auto" to the CPU,
    and `report` gets one sentence about it.

    Raises:
        DeviceError: a GPU is asked for by name and is not there.
        RuntimeError: a GPU that is asked for by name is full, or a GPU has another fault.
    """
    chosen = _device(device)
    try:
        if precision == "auto":
            precision = "bf16" if chosen.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
        return Compute(device=chosen, precision=precision, batch=batch or default_batch(chosen))
    except RuntimeError as error:
        if device != "auto" or not is_out_of_memory(error):
            raise
    report(f"out of memory on {chosen} before the first window: on the cpu")
    return ON_CPU


def _device(name: str) -> torch.device:
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    device = torch.device("cuda" if name == "auto" else name)
    index = device.index or 0
    if index >= torch.cuda.device_count():
        found = f"{torch.cuda.device_count()} CUDA devices"
        raise DeviceError("device_missing", f"device {name!r} is asked for, this machine has {found}")
    return torch.device("cuda", index)


def default_batch(device: torch.device) -> int:
    """Windows at once: on a GPU what half of its free memory holds, at most GPU_BATCH."""
    if device.type != "cuda":
        return CPU_BATCH
    free_bytes, _ = torch.cuda.mem_get_info(device)
    return max(1, min(GPU_BATCH, int(free_bytes / 2 / GPU_BYTES_PER_WINDOW)))


def set_threads(threads: int) -> None:
    """CPU threads of torch and SimpleITK for this process; 0: all cores that it may use."""
    count = threads or _cores()
    torch.set_num_threads(count)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(count)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # Linux: a container or taskset may allow fewer than there are
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def rungs(first: Compute) -> Iterator[Compute]:
    """The ladder: `first`, then half as many windows at once down to 1, then the same on the CPU in fp32."""
    rung = first
    while True:
        yield rung
        if rung.batch > 1:
            rung = replace(rung, batch=rung.batch // 2)
        elif rung.device.type != "cpu":
            rung = ON_CPU
        else:
            return


def with_fallbacks(
    work: Callable[[Compute], Result], first: Compute, report: Callable[[str], None]
) -> tuple[Result, Compute]:
    """Do the work on the first rung of the ladder that has the memory; also say which one that was.

    `report` gets one sentence for each step down. Anything but a lack of memory is passed on at once, and so is
    the lack on the last rung.
    """
    ladder = list(rungs(first))
    for rung, lower in zip(ladder, [*ladder[1:], None], strict=True):
        try:
            return work(rung), rung
        except (RuntimeError, MemoryError) as error:  # torch has no class of its own for the CPU's allocator
            if lower is None or not is_out_of_memory(error):
                raise
            report(f"out of memory on {rung.device} with {rung.batch} windows at once: {_words(rung, lower)}")
        # outside the handler: the traceback holds the tensors that did not fit
        if rung.device.type == "cuda":
            torch.cuda.empty_cache()
    raise AssertionError("the last rung returns or raises")


def _words(rung: Compute, lower: Compute) -> str:
    return f"{lower.batch} at once" if lower.device == rung.device else f"on the {lower.device}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory, of the GPU or of the machine, ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY_WORDS)
