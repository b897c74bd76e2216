"""Every network of a recipe, side by side: one process per run, the longest first.

A run has a process of its own, so that one that fails or is killed for its memory takes no other with it. On a
shared machine two processes of one thread are several times faster than one of two, whose threads wait for each other.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path

import torch

from pipeline.device import choose_compute
from training.errors import RunError, TrainingError
from training.loop.pace import TrainProgress
from training.loop.start import check_prepared, check_run
from training.loop.stopping import Interrupted, stop_on_signals
from training.loop.train_network import fresh_record, train_network
from training.prepared import open_prepared
from training.recipe import MODELS, ModelName, Recipe
from training.runs import RunRecord, read_record

# of a step against Pix2Pix's, until it is measured: two generators and discriminators, each generator twice
STEP_COST: Mapping[ModelName, float] = {"pix2pix": 1.0, "cyclegan": 6.0}
POLL_S = 1.0
GRACE_S = 60.0  # a training that was told to stop ends its step and its validation first


@dataclass(frozen=True, kw_only=True, slots=True)
class RunPlan:
    """One run to be done. `steps` is an estimate until the run reports it."""

    model: ModelName
    network: str
    seed: int
    steps: int

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.model} {self.network} seed {self.seed}"


@dataclass(frozen=True, kw_only=True, slots=True)
class AllProgress:
    """How far everything is. `done` and `total` are steps; `report` is what one run just said."""

    done: int
    total: int
    finished: int
    runs: int
    failed: int = 0
    seconds_left: float | None = None
    report: TrainProgress | None = None
    text: str = ""


@dataclass(slots=True)
class _Job:
    """A plan and the process that does it."""

    plan: RunPlan
    step: int = 0
    steps_per_s: float = math.nan
    device: str = ""
    process: SpawnProcess | None = None
    pipe: Connection | None = None
    error: str = ""
    done: bool = False

    @property
    def over(self) -> bool:
        return self.done or bool(self.error)


def plan_runs(
    recipe: Recipe,
    studies: int,
    *,
    models: Sequence[ModelName],
    networks: Sequence[str],
    seeds: Sequence[int],
    steps: int | None = None,
) -> list[RunPlan]:
    """Every run, the longest first; of runs that are as long, those of an earlier seed first.

    Args:
        studies: training studies, for a recipe that counts epochs.
        steps: instead of the recipe's.
    """
    plans = [
        RunPlan(model=m, network=n, seed=s, steps=steps or recipe.train.steps_for(m, n, studies))
        for s in seeds
        for m in models
        for n in networks
    ]
    return sorted(plans, key=lambda plan: -plan.steps * STEP_COST[plan.model])


def train_all(
    recipe: Recipe,
    prepared: Path,
    runs: Path,
    *,
    seeds: Sequence[int],
    models: Sequence[ModelName] = MODELS,
    networks: Sequence[str] | None = None,
    workers: int | None = None,
    threads: int = 1,
    device: str = "auto",
    steps: int | None = None,
    on_progress: Callable[[AllProgress], None] = lambda _: None,
) -> list[RunRecord]:
    """Train every run that is not finished; one that fails does not stop the others.

    Args:
        recipe: of all of them.
        prepared: what `train prepare` wrote; verified once, here.
        runs: their run directories.
        seeds: each network is trained once for each.
        models: which of "pix2pix" and "cyclegan".
        networks: which of the recipe's networks; None for all.
        workers: runs side by side; None: one per GPU, on CPUs as many as `threads` leaves room for.
        threads: of each run, on CPUs.
        device: "auto", "cpu", "cuda" (all of them), or one, "cuda:1".
        steps: instead of the recipe's (a trial).
        on_progress: called from this process.

    Returns:
        The records of all runs, in the order of the plan.

    Raises:
        DataError: what is wrong with the data as a whole.
        RunError: run_foreign before anything is started; runs_failed at the end, naming each with its reason.
        Interrupted: a signal came; every run has written its checkpoint.
    """
    opened = open_prepared(prepared)
    check_prepared(recipe, opened)
    devices = _devices(device)
    networks = recipe.networks if networks is None else networks
    plans = plan_runs(recipe, len(opened.studies("train")), models=models, networks=networks, seeds=seeds, steps=steps)
    jobs = []
    for plan in plans:
        wanted = fresh_record(recipe, opened, plan.model, plan.network, plan.seed, torch.device("cpu"))
        found = check_run(runs, wanted, steps=steps)
        ended = found is not None and found.state == "done"
        jobs.append(_Job(plan, step=plan.steps if ended else found.step if found else 0, done=ended))
    slots = workers or (len(devices) if devices[0] != "cpu" else max(1, len(os.sched_getaffinity(0)) // threads))
    board = _Board(jobs, slots, on_progress)
    board.tell(f"{len(jobs)} runs, {sum(job.done for job in jobs)} of them finished before; {slots} side by side")
    with stop_on_signals() as stop:
        _work_off(jobs, _Order(recipe, prepared, runs, threads, steps), devices, slots, board, stop)
    if stop():
        raise Interrupted(f"{runs}: the same command goes on")
    if failed := [job for job in jobs if not job.done]:
        listed = "; ".join(f"{job.plan.name}: {job.error or 'told to stop by someone else'}" for job in failed)
        raise RunError("runs_failed", f"{len(failed)} of {len(jobs)} runs failed: {listed}")
    return [read_record(runs / p.model / p.network / f"seed-{p.seed}") for p in plans]


def _devices(wanted: str) -> list[str]:
    chosen = choose_compute(wanted).device
    if chosen.type != "cuda":
        return [str(chosen)]
    return [f"cuda:{n}" for n in range(torch.cuda.device_count())] if wanted in ("auto", "cuda") else [wanted]


class _Board:
    """What everyone is told: steps, failures, and the time left from the measured cost of each model's step."""

    def __init__(self, jobs: Sequence[_Job], slots: int, on_progress: Callable[[AllProgress], None]) -> None:
        self._jobs, self._slots, self._on_progress = jobs, slots, on_progress
        self._total = sum(job.plan.steps for job in jobs)
        self._cost: dict[ModelName, float] = {}  # seconds per step, the last that a run of the model reported

    def heard(self, job: _Job, report: TrainProgress) -> None:
        """A run reported."""
        job.step = report.step
        self._total += report.steps - job.plan.steps
        job.plan = RunPlan(model=job.plan.model, network=job.plan.network, seed=job.plan.seed, steps=report.steps)
        if report.steps_per_s > 0:  # False for NaN
            self._cost[job.plan.model] = 1 / report.steps_per_s
        self.tell(report.text, report)

    def tell(self, text: str, report: TrainProgress | None = None) -> None:
        """Pass on where everything is."""
        self._on_progress(
            AllProgress(
                done=sum(job.step for job in self._jobs),
                total=self._total,
                finished=sum(job.done for job in self._jobs),
                runs=len(self._jobs),
                failed=sum(bool(job.error) for job in self._jobs),
                seconds_left=self.seconds_left(),
                report=report,
                text=text,
            )
        )

    def seconds_left(self) -> float | None:
        """All that is left shared by the workers, but no less than the longest run alone; None before a report."""
        if not self._cost:
            return None
        unit = next(cost / STEP_COST[model] for model, cost in self._cost.items())
        left = [
            (job.plan.steps - job.step) * self._cost.get(job.plan.model, unit * STEP_COST[job.plan.model])
            for job in self._jobs
            if not job.over
        ]
        return max(sum(left) / self._slots, *left, 0.0) if left else 0.0


# --- processes ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Order:
    """What every run's process is given."""

    recipe: Recipe
    prepared: Path
    runs: Path
    threads: int
    steps: int | None


@dataclass(frozen=True, slots=True)
class _Outcome:
    """The last word of a run's process."""

    error: str = field(default="")


def _work_off(
    jobs: Sequence[_Job], order: _Order, devices: Sequence[str], slots: int, board: _Board, stop: Callable[[], bool]
) -> None:
    """Keep `slots` processes busy until every job is over, or all have ended after a signal."""
    waiting = [job for job in jobs if not job.over]
    running: list[_Job] = []
    told = False
    try:
        while running or (waiting and not stop()):
            while waiting and len(running) < slots and not stop():
                job = waiting.pop(0)
                busy = [other.device for other in running]
                job.device = min(devices, key=busy.count)
                _start(job, order)
                running.append(job)
            if stop() and not told:
                told = True
                board.tell("ending: every run finishes its step and writes a checkpoint")
                for job in running:
                    _process(job).terminate()
            _listen(running, board)
            running = [job for job in running if job.process is not None]
    finally:  # an error here, or a second Ctrl-C: nobody is left behind
        for job in running:
            _process(job).terminate()
        for job in running:
            _process(job).join(GRACE_S)
            _process(job).kill()


def _start(job: _Job, order: _Order) -> None:
    context = multiprocessing.get_context("spawn")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads sleep: they share the cores with the others
    job.pipe, theirs = context.Pipe(duplex=False)
    job.process = context.Process(
        target=_train, args=(job.plan, order, job.device, theirs), name=job.plan.name, daemon=True
    )
    with _interrupts_ignored():
        job.process.start()
    theirs.close()


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """A process started in here ignores Ctrl-C for good: the terminal sends it to all, and this one passes it on."""
    try:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    except ValueError:  # not in the main thread, so the signal is someone else's matter
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _listen(running: Sequence[_Job], board: _Board) -> None:
    """Take what the processes say for a second; a job whose process has ended has none any more."""
    pipes = {job.pipe: job for job in running}
    for ready in wait([pipe for pipe in pipes if pipe is not None], timeout=POLL_S):
        assert isinstance(ready, Connection)
        job = pipes[ready]
        try:
            said = ready.recv()
        except EOFError:
            _end(job, "")
        else:
            if isinstance(said, TrainProgress):
                board.heard(job, said)
                continue
            _end(job, said)
        board.tell(f"{job.plan.name}: {job.error or 'finished' if job.over else 'interrupted'}")


def _end(job: _Job, said: object) -> None:
    process = _process(job)
    process.join()
    if isinstance(said, _Outcome):
        job.error, job.done = said.error, not said.error
        if job.done:
            job.step = job.plan.steps
    elif process.exitcode not in (0, -signal.SIGTERM):
        job.error = f"its process ended with {process.exitcode}; {_cause(process.exitcode)}"
    if job.pipe is not None:
        job.pipe.close()
    job.process = job.pipe = None


def _cause(code: int | None) -> str:
    return "killed, most often for its memory" if code == -signal.SIGKILL else "see its messages above"


def _process(job: _Job) -> SpawnProcess:
    assert job.process is not None
    return job.process


def _train(plan: RunPlan, order: _Order, device: str, pipe: Connection) -> None:
    """One run in a process of its own. Its last word is an outcome, none when it was told to stop."""
    torch.set_num_threads(order.threads)
    try:
        train_network(
            order.recipe,
            open_prepared(order.prepared, verify=False),
            model=plan.model,
            network=plan.network,
            seed=plan.seed,
            runs=order.runs,
            device=torch.device(device),
            steps=order.steps,
            on_progress=pipe.send,
        )
    except TrainingError as error:
        pipe.send(_Outcome(error.text))
    except Interrupted:
        return
    except BrokenPipeError:  # nobody listens any more: the command itself was killed
        return
    except Exception as error:
        pipe.send(_Outcome(f"{type(error).__name__}: {error}"))
        raise
    else:
        pipe.send(_Outcome())
