"""How well trained networks do on held-out studies, through the inference code that the node runs.

The districts are the prepared ones with confidence 1, so that the networks are measured and not the segmenter. For
each model and seed: the district networks stitched, and the whole-body network. The two trivial predictors are
measured on the same studies. One study and one bundle are held at a time.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pipeline.bundle import ModelBundle
from pipeline.device import Compute, choose_compute
from pipeline.run import synthesize_volume
from pipeline.types import WHOLE_BODY, District, FloatVolume
from training.errors import DataError, RunError
from training.evaluation.aggregate import method_rank
from training.evaluation.baselines import BASELINES, Baselines, fit_baselines
from training.evaluation.measure import Measure, Truth, district_map, measure, read_truth
from training.evaluation.measure_store import MeasureStore
from training.export import assemble_bundle
from training.prepared import PreparedManifest, PreparedSet, Split, StudyRecord
from training.recipe import MODELS, ModelName, Recipe
from training.runs import RunRecord, check_runs_fit, find_runs

__all__ = ["Evaluation", "Picture", "district_map", "evaluate"]

DISTRICTS = "districts"
PRECISION = "fp32"  # the same figures on every device

OnProgress = Callable[[int, int, str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """One held-out study for the figures: the scaled CT, and SUV volumes [z, y, x] by method."""

    model: ModelName
    seed: int
    truth: Truth
    suv: Mapping[str, FloatVolume]  # "real", "districts", "whole_body"


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Everything that the report is made of. `missing` names what was not there to be measured."""

    prepared: PreparedManifest
    recipe: Recipe
    split: Split
    studies: tuple[StudyRecord, ...]
    records: tuple[RunRecord, ...]
    measures: tuple[Measure, ...]
    missing: tuple[str, ...]
    pictures: tuple[Picture, ...]
    device: str

    @property
    def methods(self) -> list[str]:
        """Every method that was measured, in the order in which it is shown."""
        return sorted({m.method for m in self.measures}, key=method_rank)

    @property
    def models(self) -> list[ModelName]:
        """The models with any network."""
        return [model for model in MODELS if any(r.model == model for r in self.records)]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Candidate:
    """The networks of one model and seed."""

    model: ModelName
    seed: int
    records: Mapping[str, RunRecord]

    @property
    def variants(self) -> dict[str, Mapping[District, str]]:
        """Which network serves which district, by variant: the districts' own, and the whole-body network."""
        own = {d: d.key for d in District if d.key in self.records}
        whole = dict.fromkeys(District, WHOLE_BODY) if WHOLE_BODY in self.records else {}
        return {name: networks for name, networks in ((DISTRICTS, own), (WHOLE_BODY, whole)) if networks}


def evaluate(
    runs: Path,
    prepared: PreparedSet,
    *,
    split: Split = "test",
    device: str = "auto",
    limit: int | None = None,
    seeds: Sequence[int] | None = None,
    work: Path | None = None,
    on_progress: OnProgress = lambda _done, _total, _text: None,
) -> Evaluation:
    """Measure every model and seed that has finished networks, and the trivial predictors, on one side of the split.

    Args:
        runs: the run directories.
        prepared: the data that they were trained on.
        device: "auto", "cpu", "cuda", "cuda:1".
        limit: only so many studies, the first by id.
        seeds: only these; None: all.
        work: where rows are kept so that an interrupted evaluation goes on, keyed by data, weights and settings.
        on_progress: predictions done, all of them, what is being done.

    Raises:
        RunError: no finished run, runs that do not fit together, altered weights, or runs of other data.
        DataError: no study on that side of the split, or none to fit the trivial predictors on.
    """
    found = [r for r in find_runs(runs) if seeds is None or r.seed in seeds]
    done = [r for r in found if r.state == "done"]
    if not done:
        text = f"{runs}: {len(found)} runs, none of them finished; `dicom-node train run` goes on with one"
        raise RunError("run_unfinished", text)
    check_runs_fit(runs, done)
    _check_data(done, prepared)
    studies = prepared.studies(split)[:limit]
    if not studies or not prepared.studies("train"):
        side = split if not studies else "train"
        raise DataError("split_empty", f"{prepared.folder}: no study on the side {side!r} of the split")

    candidates = _candidates(done)
    suv_max = done[0].recipe.normalization.suv_max
    store = MeasureStore(work, prepared.manifest)
    steps = _Steps(on_progress, len(studies) * (sum(len(c.variants) for c in candidates) + len(BASELINES)))
    compute = choose_compute(device, PRECISION)
    measures = list(_measure_baselines(prepared, studies, suv_max, store, steps))
    shown = next(study for study in studies if study.id == _telling_study(measures))
    pictures: dict[ModelName, Picture] = {}
    for candidate in candidates:
        with _assembled(runs, candidate, prepared.manifest) as bundle:
            measures += _measure_networks(candidate, bundle, prepared, studies, compute, store, steps)
            if candidate.model not in pictures:  # of its first seed
                truth = read_truth(prepared.load(shown))
                pictures[candidate.model] = _picture(candidate, bundle, truth, compute)
    return Evaluation(
        prepared=prepared.manifest,
        recipe=done[0].recipe,
        split=split,
        studies=tuple(studies),
        records=tuple(done),
        measures=tuple(measures),
        missing=(*_missing(candidates, done[0].recipe), *_unfinished(found), *_limited(prepared, split, limit)),
        pictures=tuple(pictures.values()),
        device=compute.name,
    )


def _check_data(records: Sequence[RunRecord], prepared: PreparedSet) -> None:
    for record in records:
        if record.prepared_digest != prepared.manifest.digest:
            text = f"{record.folder_name} was trained on data {record.prepared_digest[:12]}"
            found = f"{prepared.folder} is {prepared.manifest.digest[:12]}"
            raise RunError("run_foreign", f"{text}, {found}: its test studies may have been trained on")


def _candidates(records: Sequence[RunRecord]) -> list[_Candidate]:
    return [
        _Candidate(model=model, seed=seed, records=networks)
        for model in MODELS
        for seed in sorted({r.seed for r in records if r.model == model})
        if (networks := {r.network: r for r in records if (r.model, r.seed) == (model, seed)})
    ]


def _missing(candidates: Sequence[_Candidate], recipe: Recipe) -> list[str]:
    texts = [
        f"{c.model} seed {c.seed}: no finished network for {', '.join(absent)}"
        for c in candidates
        if (absent := [key for key in recipe.networks if key not in c.records])
    ]
    return texts + [f"{model}: no finished run" for model in MODELS if all(c.model != model for c in candidates)]


def _unfinished(records: Sequence[RunRecord]) -> list[str]:
    return [f"{r.folder_name}: at step {r.step} of {r.steps}, not measured" for r in records if r.state != "done"]


def _limited(prepared: PreparedSet, split: Split, limit: int | None) -> list[str]:
    total = len(prepared.studies(split))
    return [] if limit is None or limit >= total else [f"only the first {limit} of {total} {split} studies"]


class _Steps:
    """Counts predictions for the listener."""

    def __init__(self, on_progress: OnProgress, total: int) -> None:
        self._on_progress, self._total, self._done = on_progress, total, 0

    def start(self, text: str) -> None:
        self._on_progress(self._done, self._total, text)

    def end(self, text: str) -> None:
        self._done += 1
        self._on_progress(self._done, self._total, text)


def _measure_baselines(
    prepared: PreparedSet, studies: Sequence[StudyRecord], suv_max: float, store: MeasureStore, steps: _Steps
) -> Iterator[Measure]:
    training = prepared.studies("train")
    fitted_on = [prepared.manifest.digest]
    fitted: Baselines | None = None
    for study in studies:
        truth: Truth | None = None
        for method in BASELINES:
            row = store.take(study, method, None, fitted_on)
            if row is None:
                if fitted is None:
                    steps.start(f"fitting the trivial predictors on {len(training)} studies")
                    fitted = fit_baselines(prepared.load(record) for record in training)
                truth = truth or read_truth(prepared.load(study))
                volume = fitted.predict(method, truth.ct, truth.districts.labels)
                organs = prepared.manifest.organ_names
                row = measure(truth, volume, method=method, seed=None, suv_max=suv_max, organ_names=organs)
                store.keep(row, study, fitted_on)
            steps.end(method)
            yield row


def _measure_networks(
    candidate: _Candidate,
    bundle: ModelBundle,
    prepared: PreparedSet,
    studies: Sequence[StudyRecord],
    compute: Compute,
    store: MeasureStore,
    steps: _Steps,
) -> Iterator[Measure]:
    settings = next(iter(candidate.records.values())).recipe.inference.model_dump_json()
    for study in studies:
        truth: Truth | None = None
        for variant, networks in candidate.variants.items():
            method = f"{candidate.model}/{variant}"
            used = sorted(set(networks.values()))
            made_by = [settings, *(f"{key} {candidate.records[key].weights_sha256}" for key in used)]
            row = store.take(study, method, candidate.seed, made_by)
            if row is None:
                truth = truth or read_truth(prepared.load(study))
                row = measure(
                    truth,
                    _predict(truth, networks, bundle, compute),
                    method=method,
                    seed=candidate.seed,
                    suv_max=bundle.manifest.normalization.suv_max,
                    organ_names=prepared.manifest.organ_names,
                    not_evaluated=[d for d in truth.districts.present if d not in networks],
                )
                store.keep(row, study, made_by)
            steps.end(f"{method} seed {candidate.seed}")
            yield row


def _predict(truth: Truth, networks: Mapping[District, str], bundle: ModelBundle, compute: Compute) -> FloatVolume:
    """[0, 1] [z, y, x]; a district without a network stays 0."""
    wanted = {d: networks[d] for d in truth.districts.present if d in networks}
    return synthesize_volume(truth.ct, truth.districts, wanted, bundle, compute=compute)


@contextmanager
def _assembled(runs: Path, candidate: _Candidate, prepared: PreparedManifest) -> Iterator[ModelBundle]:
    with tempfile.TemporaryDirectory(prefix="dicom-node-evaluate-") as folder:
        yield assemble_bundle(
            runs,
            candidate.records,
            Path(folder),
            spacing_mm=prepared.spacing_mm,
            created=datetime.now(UTC),
            name=candidate.model,
        )


def _picture(candidate: _Candidate, bundle: ModelBundle, truth: Truth, compute: Compute) -> Picture:
    scale = bundle.manifest.normalization.unit_to_suv
    suv = {"real": scale(truth.pet)}
    for variant, networks in candidate.variants.items():
        suv[variant] = scale(_predict(truth, networks, bundle, compute))
    return Picture(model=candidate.model, seed=candidate.seed, truth=truth, suv=suv)


def _telling_study(measures: Sequence[Measure]) -> str:
    """The study for the figures: of those that show the most districts the one with the most lesion volume."""

    def told(row: Measure) -> tuple[int, float, str]:
        volume = sum(lesion["volume_ml"] or 0.0 for lesion in row.lesions)
        return sum(d.key in row.regions for d in District), volume, row.study

    return max(measures, key=told).study
