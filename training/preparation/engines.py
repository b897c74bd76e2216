"""Where the work on studies runs: here, in processes beside this one, or on Ray."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Literal, Protocol, TypeVar

import SimpleITK as sitk  # noqa: N813 - the name its own manual uses
import torch

from training.errors import DataError

Engine = Literal["processes", "ray"]
T = TypeVar("T")
R = TypeVar("R")


class Run(Protocol):
    """Does `do` for every task; the results come in any order, as they are ready."""

    def __call__(self, do: Callable[[T], R], tasks: Sequence[T], /) -> Iterator[R]: ...


def run_here(do: Callable[[T], R], tasks: Sequence[T], /) -> Iterator[R]:
    """One after the other in this process."""
    return map(do, tasks)


@contextmanager
def started(engine: Engine, workers: int) -> Iterator[Run]:
    """`run(do, tasks)` yields the results as they come, in any order. One worker of "processes" is this process.

    Raises:
        DataError: engine_missing: Ray is not installed. From `run`, worker_died.
    """
    if engine == "ray":
        with _ray(workers) as run:
            yield run
    elif workers > 1:
        with _processes(workers) as run:
            yield run
    else:
        yield run_here


def check_engine(engine: Engine) -> None:
    """Raises DataError (engine_missing) where Ray is wanted and not installed."""
    if engine == "ray" and importlib.util.find_spec("ray") is None:
        raise DataError("engine_missing", 'the engine "ray" is not installed: pip install "dicom-node[ray]"')


@contextmanager
def _processes(workers: int) -> Iterator[Run]:
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker)

    def run(do: Callable[[T], R], tasks: Sequence[T]) -> Iterator[R]:
        for future in as_completed([pool.submit(do, task) for task in tasks]):
            yield future.result()

    try:
        yield run
    except BrokenProcessPool as error:
        text = "a worker process was ended from outside, most often for want of memory"
        raise DataError("worker_died", f"{text}; the same command with fewer --workers goes on") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    """One thread each; gone at once with Ctrl-C, and with the process that started it however that ended."""
    _one_thread()
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # ignored: started in the background, like its parent
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    if parent is not None:

        def follow() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=follow, name="follow-parent", daemon=True).start()


def _one_thread() -> None:
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    torch.set_num_threads(1)


@contextmanager
def _ray(workers: int) -> Iterator[Run]:
    """Ray tasks of one CPU each: on the cluster that RAY_ADDRESS names, else on `workers` CPUs of this machine.

    On a cluster, DATA and OUT must be folders that every machine sees under the same path.
    """
    check_engine("ray")
    import ray

    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False)
    else:
        ray.init(address="local", num_cpus=workers, include_dashboard=False, log_to_driver=False)

    def run(do: Callable[[T], R], tasks: Sequence[T]) -> Iterator[R]:
        def work(task: T) -> R:
            _one_thread()
            return do(task)

        remote = ray.remote(num_cpus=1, max_retries=0)(work)
        waiting = [remote.remote(task) for task in tasks]
        while waiting:
            ready, waiting = ray.wait(waiting)
            yield ray.get(ready[0])

    try:
        yield run
    except ray.exceptions.WorkerCrashedError as error:
        raise DataError("worker_died", "a Ray worker was ended from outside; the same command goes on") from error
    finally:
        ray.shutdown()
