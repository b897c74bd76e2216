"""Training one network: the loop, from a recipe and prepared studies to a run directory.

Step i draws sample j from (recipe seed, seed, network, model, i, j) alone, so a run that was cut off sees the same
patches when it goes on, and ends with the same weights.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from pipeline.bundle import NETWORK_KEYS
from training.errors import DataError, RunError
from training.files import sha256_of, write_whole
from training.loop.checkpoint import drop_previous, load_checkpoint, save_checkpoint
from training.loop.distributed import ALONE, Ranks
from training.loop.pace import Means, OnProgress, Pace, TrainProgress
from training.loop.start import check_prepared, check_run
from training.loop.stopping import Interrupted, locked, stop_on_signals
from training.loop.tensorboard import RunLog, middle_slices
from training.loop.validation import Validation, validate
from training.patches.sampler import Batch, PatchSampler
from training.prepared import PreparedSet, PreparedStudy
from training.recipe import MODELS, ModelName, Recipe
from training.runs import WEIGHTS, RunRecord, read_record, write_record

CHECKPOINT_S = 60.0
REPORT_S = 1.0
LOGGED = 400  # points of a curve in TensorBoard
LOGGED_AT_LEAST_EVERY = 1000  # steps, in a long run
PICTURES = 12  # over a run
PICTURE_STEP = 2**40  # the entropy of the patches that are shown: no step has this number
PICTURE_PATCHES = 4
VOTE_EVERY = 10  # steps: how often several processes ask each other whether one was told to stop


class Model(Protocol):
    """What the loop asks of Pix2Pix and CycleGAN."""

    generator: nn.Module
    averaged: nn.Module

    def step(self, batch: Batch, rate: float, entropy: tuple[int, ...]) -> dict[str, Tensor]: ...
    def state(self) -> dict[str, Any]: ...
    def restore(self, state: dict[str, Any]) -> None: ...


def learning_rate_factor(step: int, steps: int, decay_fraction: float) -> float:
    """1 until the decay begins, then linearly to 0 at the last step (the paper: over the last third)."""
    decay = decay_fraction * steps
    return 1.0 if decay <= 0 else min(1.0, (steps - step) / decay)


def train_network(
    recipe: Recipe,
    prepared: PreparedSet,
    *,
    model: ModelName,
    network: str,
    seed: int,
    runs: Path,
    device: torch.device,
    steps: int | None = None,
    on_progress: OnProgress = lambda _: None,
    ranks: Ranks = ALONE,
    checkpoint_s: float = CHECKPOINT_S,
) -> RunRecord:
    """Train one network to its end, going on from its checkpoint where there is one.

    A finished run is returned at once. SIGINT and SIGTERM end it after the step, with a checkpoint.

    Args:
        recipe: everything that decides the weights, with `seed`.
        prepared: opened; its digests are taken as checked.
        model: "pix2pix" or "cyclegan".
        network: "head", "trunk", "arms", "legs" or "whole_body".
        runs: the run directory is `runs`/model/network/seed-n.
        steps: instead of the recipe's (a trial).
        on_progress: called about once a second, by rank 0 only.
        ranks: this process among those of one training.
        checkpoint_s: seconds between checkpoints; 0 is after every step.

    Raises:
        DataError: prepared_foreign, no_training, no_district.
        RunError: run_foreign, run_invalid, run_busy, no_steps, batch_share, checkpoint_torn, diverged.
        Interrupted: a signal came; the same call goes on.
    """
    check_prepared(recipe, prepared)
    ranks.share(recipe.train.batch)
    wanted = fresh_record(recipe, prepared, model, network, seed, device)
    if (found := check_run(runs, wanted, steps=steps)) and found.state == "done":
        return found
    sampler, validation = _studies(recipe, prepared, network, device)
    length = steps or recipe.train.steps_for(model, network, len(sampler))
    if length < 1:
        raise RunError("no_steps", f"recipe {recipe.name}: neither steps for {model} {network} nor epochs")
    wanted = wanted.model_copy(update={"steps": length})
    check_run(runs, wanted, steps=length)
    folder = runs / wanted.folder_name
    with locked(folder) if ranks.first else nullcontext(), stop_on_signals() as stop:
        ranks.barrier()
        training = _Training(wanted, folder, sampler, validation, device, ranks, on_progress)
        training.resume(seconds=found.seconds if found else 0.0)
        with RunLog(folder, training.step, wanted=ranks.first) as log:
            training.run(log, stop, checkpoint_s)
        return training.finish(runs)


def fresh_record(
    recipe: Recipe, prepared: PreparedSet, model: ModelName, network: str, seed: int, device: torch.device
) -> RunRecord:
    """The record that a run starts with; its steps are not known yet."""
    name = str(device) if device.type != "cuda" else f"{device} {torch.cuda.get_device_name(device)}"
    return RunRecord(
        recipe=recipe,
        training_digest=recipe.training_digest(model, network),
        prepared_folder=str(prepared.folder),
        prepared_digest=prepared.manifest.digest,
        split_digest=prepared.manifest.split_digest,
        model=model,
        network=network,
        seed=seed,
        steps=0,
        device=name,
        torch=torch.__version__,
    )


def _studies(
    recipe: Recipe, prepared: PreparedSet, network: str, device: torch.device
) -> tuple[PatchSampler, list[PreparedStudy]]:
    """The sampler of the training studies, and the validation studies where they are asked for."""
    training = prepared.load_split("train")
    validation = prepared.load_split("validation") if recipe.validation.every_steps else []
    try:
        sampler = PatchSampler(
            training,
            network,
            window=recipe.window,
            input_mask=recipe.inference.input_mask,
            train=recipe.train,
            augment=recipe.augment,
            device=device,
        )
    except ValueError as error:
        text = f"{prepared.folder}: none of {len(training)} training studies shows {network}"
        raise DataError("no_district", text) from error
    return sampler, validation


def entropy_of(record: RunRecord) -> tuple[int, int, int, int]:
    """The integers that every random number of a run follows from, together with the step and the sample."""
    return record.recipe.seed, record.seed, NETWORK_KEYS.index(record.network), MODELS.index(record.model)


def build_model(model: ModelName, recipe: Recipe, device: torch.device, ranks: Ranks = ALONE) -> Model:
    """Fresh weights, drawn from torch's generator."""
    if model == "pix2pix":
        from training.models.pix2pix import Pix2Pix

        return Pix2Pix(recipe, device, wrap=ranks.wrap)
    from training.models.cyclegan import CycleGAN

    return CycleGAN(recipe, device, wrap=ranks.wrap)


class _Training:
    """One network on its way: what changes from step to step."""

    def __init__(
        self,
        record: RunRecord,
        folder: Path,
        sampler: PatchSampler,
        validation: list[PreparedStudy],
        device: torch.device,
        ranks: Ranks,
        on_progress: OnProgress,
    ) -> None:
        self._record, self._folder, self._device, self._ranks = record, folder, device, ranks
        self._recipe, self._sampler, self._studies = record.recipe, sampler, validation
        self._report = on_progress if ranks.first else lambda _: None
        self._entropy = entropy_of(record)
        torch.manual_seed(int(np.random.SeedSequence(self._entropy).generate_state(1, np.uint64)[0] >> 1))
        if device.type == "cuda":
            torch.backends.cudnn.benchmark = True  # every batch has the same shape
        self._model = build_model(record.model, record.recipe, device, ranks)
        self.step = 0
        self._best: dict[str, Any] = {}  # mae, step, weights: where validation may end the training
        self._losses = Means()
        self._pace = Pace(record.steps, record.recipe.validation.every_steps)

    def resume(self, *, seconds: float) -> None:
        """Take the checkpoint up, where there is one."""
        loaded = load_checkpoint(self._folder)
        if loaded is None:
            return
        content, notice = loaded
        if content["identity"] != self._identity():
            raise RunError("run_foreign", f"{self._folder}: the checkpoint is another run's; remove the folder")
        self._model.restore(content["model"])
        self.step, self._best = content["step"], content["best"]
        self._record = self._record.model_copy(
            update={
                "step": self.step,
                "seconds": content["seconds"],
                "losses": content["losses"],
                "validation": tuple(content["validation"]),
            }
        )
        lost = seconds - content["seconds"]
        notice = notice or f"going on from step {self.step}" + (f", {lost:.0f} s of work lost" if lost >= 1 else "")
        self._tell(notice=notice)

    def run(self, log: RunLog, stop: Callable[[], bool], checkpoint_s: float) -> None:
        """The loop: to the last step, the end of patience, or a signal."""
        record, train, every = self._record, self._recipe.train, self._recipe.validation.every_steps
        share = self._ranks.share(train.batch)
        log_every = min(max(1, record.steps // LOGGED), LOGGED_AT_LEAST_EVERY)
        picture_every = max(1, record.steps // PICTURES)
        if log.missing:
            self._tell(notice="the package tensorboard is not installed: no curves and pictures")
        self._save()
        self._pace.start(self.step)
        while self.step < record.steps and not self._out_of_patience():
            entropy = (*self._entropy, self.step)
            batch = self._sampler.draw([(*entropy, sample) for sample in share])
            rate = learning_rate_factor(self.step, record.steps, train.decay_fraction)
            self._losses.add(self._model.step(batch, rate, entropy))
            self.step += 1
            if self.step % log_every == 0 or self.step == record.steps:
                self._log(log, rate)
            if self.step % picture_every == 0 or self.step == record.steps:
                self._show_patches(log)
            if every and (self.step % every == 0 or self.step == record.steps):
                self._validate(log)
            if self._pace.due("report", REPORT_S):
                self._pace.mark(self.step)
                self._tell()
            if self._pace.due("checkpoint", checkpoint_s):
                self._save()
            if self._asked_to_stop(stop):
                self._save()
                raise Interrupted(f"{self._folder}: at step {self.step} of {record.steps}; the same command goes on")
        self._save()

    def finish(self, runs: Path) -> RunRecord:
        """Write the generator's averaged weights and the last record."""
        if self._ranks.first:
            weights = self._best.get("weights") or self._model.averaged.state_dict()
            data = {name: tensor.detach().to("cpu").contiguous() for name, tensor in weights.items()}
            if bad := [name for name, tensor in data.items() if not bool(tensor.isfinite().all())]:
                raise RunError("diverged", f"{self._folder}: weights {bad[0]} are not finite numbers: it diverged")
            write_whole(self._folder / WEIGHTS, save_safetensors(data))
            update = {"state": "done", "weights_sha256": sha256_of(self._folder / WEIGHTS)}
            self._record = self._record.model_copy(update=update)
            write_record(runs, self._record)
            drop_previous(self._folder)
            self._tell()
        self._ranks.barrier()
        return self._record if self._ranks.first else read_record(self._folder)

    def _check_losses(self) -> None:
        means = self._losses.now()
        if not all(math.isfinite(value) for value in means.values()):
            text = f"{self._folder}: at step {self.step} the losses are {means}: it diverged"
            raise RunError("diverged", f"{text}; a lower learning rate may help")

    def _log(self, log: RunLog, rate: float) -> None:
        self._check_losses()
        means = self._losses.take()
        self._record = self._record.model_copy(update={"losses": means})
        log.scalars("loss", means, self.step)
        log.scalars(
            "train",
            {"learning_rate": rate * self._recipe.train.learning_rate, "steps_per_s": self._pace.rate(self.step)},
            self.step,
        )

    def _show_patches(self, log: RunLog) -> None:
        if not self._ranks.first:
            return
        batch = self._sampler.draw([(*self._entropy, PICTURE_STEP, sample) for sample in range(PICTURE_PATCHES)])
        suv_max = self._recipe.normalization.suv_max
        log.picture("patches: CT, PET, synthetic", middle_slices(self._model.averaged, batch), suv_max, self.step)

    def _validate(self, log: RunLog) -> None:
        """Rank 0 measures; the others wait for it at the next gradient."""
        if not self._ranks.first or not self._studies:
            return
        self._tell(stage="validate")
        with self._pace.validating():
            averaged = self._model.averaged
            found = validate(averaged, self._recipe, self._record.network, self._studies, self._device)
        if not found.studies:
            self._tell(notice=f"none of {len(self._studies)} validation studies shows {self._record.network}")
            return
        figures = found.figures(self.step)
        self._record = self._record.model_copy(update={"validation": (*self._record.validation, figures)})
        log.scalars(
            "validation", {name: value for name, value in figures.items() if name in ("mae", "psnr")}, self.step
        )
        if found.picture is not None:
            suv_max = self._recipe.normalization.suv_max
            log.picture("validation: CT, PET, synthetic", found.picture[np.newaxis], suv_max, self.step)
        if self._recipe.validation.patience:
            self._keep_best(found)

    def _keep_best(self, found: Validation) -> None:
        if found.mae < self._best.get("mae", math.inf):
            weights = copy.deepcopy(self._model.averaged.state_dict())
            self._best = {"mae": found.mae, "step": self.step, "weights": weights}

    def _out_of_patience(self) -> bool:
        """Whether so many checks went by without a gain. All ranks ask when a check is due, rank 0 knows."""
        every, patience = self._recipe.validation.every_steps, self._recipe.validation.patience
        if not (every and patience) or self.step % every:
            return False
        over = bool(self._best) and self.step - self._best["step"] >= patience * every
        return self._ranks.any(over and self._ranks.first)

    def _asked_to_stop(self, stop: Callable[[], bool]) -> bool:
        if self._ranks.world == 1:
            return stop()
        return self.step % VOTE_EVERY == 0 and self._ranks.any(stop())

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint must agree with."""
        record = self._record
        return {
            "training": record.training_digest,
            "data": record.prepared_digest,
            "entropy": list(self._entropy),
            "steps": record.steps,
        }

    def _save(self) -> None:
        """Checkpoint and record; at step 0 the record only, so that the run is known."""
        if not self._ranks.first:
            return
        self._check_losses()  # no checkpoint of a run that is lost
        seconds = self._record.seconds + self._pace.lap()
        self._record = self._record.model_copy(update={"step": self.step, "seconds": seconds})
        if self.step:
            content = {
                "identity": self._identity(),
                "step": self.step,
                "seconds": seconds,
                "losses": dict(self._record.losses),
                "validation": list(self._record.validation),
                "best": self._best,
                "model": self._model.state(),
            }
            save_checkpoint(self._folder, content)
        write_record(self._folder.parents[2], self._record)

    def _tell(self, *, stage: str = "train", notice: str = "") -> None:
        record = self._record
        self._report(
            TrainProgress(
                model=record.model,
                network=record.network,
                seed=record.seed,
                step=self.step,
                steps=record.steps,
                losses=self._losses.now() or record.losses,
                steps_per_s=self._pace.rate(self.step),
                seconds_left=self._pace.left(self.step),
                stage=stage,
                notice=notice,
            )
        )
