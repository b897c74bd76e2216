"""One job: a CT series in, a synthetic PET series with its companions out."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.bundle import Manifest, ModelBundle
from pipeline.ct_reader import read_ct
from pipeline.device import Compute, choose_compute, is_out_of_memory, set_threads, with_fallbacks
from pipeline.districts import find_districts
from pipeline.gate import settled
from pipeline.gate.input import check_input, check_scan
from pipeline.gate.output import check_output
from pipeline.geometry import resample, resample_on, result_grid
from pipeline.outputs.encoding import encode_result
from pipeline.outputs.picture import overview_png
from pipeline.outputs.statistics import district_stats
from pipeline.provenance import software_version
from pipeline.result import ResultSummary, SeriesSummary, read_summary, write_result
from pipeline.stitching import reach, stitch
from pipeline.synthesis import depends_on_district, network_input, place_windows, synthesize
from pipeline.types import (
    AIR_HU,
    WHOLE_BODY,
    CtVolume,
    District,
    DistrictMap,
    FloatVolume,
    Grid,
    JobVolumes,
    ModelRef,
    OnProgress,
    PipelineOptions,
    Progress,
    Provenance,
    ResultSet,
    Stage,
    SuvVolume,
    ignore_progress,
)
from pipeline.uncertainty import UNSEEN, UNSEEN_NOTE, flip_deviation, flips_for

__all__ = [
    "ResultSummary",
    "SeriesSummary",
    "choose_networks",
    "read_summary",
    "synthesize_series",
    "synthesize_volume",
    "write_result",
]


def synthesize_series(
    paths: Sequence[Path],
    bundle: ModelBundle,
    options: PipelineOptions,
    *,
    created: datetime,
    on_progress: OnProgress = ignore_progress,
    keep: Callable[[JobVolumes], None] | None = None,
) -> ResultSet:
    """Read a CT series, synthesize the PET of every district that it shows, and encode the result.

    Args:
        paths: the files of one CT series, in any order.
        bundle: the networks and the settings they were trained for.
        options: how; `options.bundle` is not read here.
        created: aware UTC time of the job, written into the objects.
        on_progress: told about each stage as it begins, goes on and ends.
        keep: gets the volumes at the end, for a comparison with another bundle.

    Raises:
        UnsupportedSeries, DistrictError, GateRefusal: this CT will never give a result.
        BundleError, OutputError, DeviceError: an operator's matter.
    """
    stages = _Stages(on_progress)
    settings = _Settings.of(bundle.manifest, options)
    set_threads(options.threads)
    fallbacks: list[str] = []
    compute = choose_compute(options.device, options.precision, options.batch, report=fallbacks.append)

    with stages.stage(Stage.READ):
        ct = read_ct(paths, max_slices=options.gate.max_slices, on_progress=on_progress)
        findings = list(check_input(ct, options.gate))
    with stages.stage(Stage.RESAMPLE):
        grid = result_grid(ct.grid, bundle.manifest.spacing_mm)
        hu = _resampled(ct, grid, compute.device)
        ct_unit = bundle.manifest.normalization.ct_to_unit(hu)
    with stages.stage(Stage.DISTRICTS):
        districts = find_districts(ct, grid, options=options.districts, on_progress=on_progress)
        findings += check_scan(hu, districts, bundle.manifest.statistics, options.gate)
        networks, notes = choose_networks(districts, bundle.keys, options)
    unit = synthesize_volume(
        ct_unit,
        districts,
        networks,
        bundle,
        compute=compute,
        blending=settings.blending,
        stitching=settings.stitching,
        report=fallbacks.append,
        on_progress=on_progress,
        on_stage=stages.stage,
    )
    suv = SuvVolume(
        suv=bundle.manifest.normalization.unit_to_suv(unit),
        grid=grid,
        not_evaluated=tuple(d for d in districts.present if d not in networks),
    )
    with stages.stage(Stage.GATE):
        findings += check_output(suv, districts, hu, bundle.manifest.statistics, options.gate)
        held, remarks = settled(findings, options.gate)
    deviation = None
    if options.output.uncertainty:
        flips = flips_for(bundle.manifest.training)
        with stages.stage(Stage.UNCERTAINTY):
            deviation = _deviation(
                suv, ct_unit, districts, networks, bundle, settings, compute, fallbacks, flips, on_progress=on_progress
            )
        if deviation is not None and flips == UNSEEN:
            notes = (*notes, UNSEEN_NOTE)
    with stages.stage(Stage.WRITE):
        provenance = _provenance(bundle, networks, districts, settings, compute, tuple(fallbacks))
        stats = district_stats(suv, districts, deviation)
        series, left_out = encode_result(
            suv,
            districts,
            stats,
            deviation,
            source=ct.source,
            provenance=provenance,
            options=options.output,
            created=created,
            on_progress=on_progress,
        )
        picture = overview_png(ct, districts, suv)
    if keep is not None:
        keep(JobVolumes(ct=ct, hu=hu, districts=districts, suv=suv))
    return ResultSet(
        series=series,
        stats=stats,
        provenance=provenance,
        overview_png=picture,
        stage_seconds=stages.seconds,
        notes=(*ct.source.notes, *districts.notes, *notes, *remarks, *fallbacks, *left_out),
        held=held,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Settings:
    """The bundle's blending and stitching, or what the options put in their place.

    `changed` is for the provenance; a precision counts only where the options name one, as "auto" follows the machine.
    """

    blending: str
    stitching: str
    changed: tuple[str, ...]

    @classmethod
    def of(cls, manifest: Manifest, options: PipelineOptions) -> _Settings:
        wanted = {"blending": options.blending, "stitching": options.stitching}
        own = {"blending": manifest.blending, "stitching": manifest.stitching}
        chosen = {name: str(own[name]) if value == "bundle" else value for name, value in wanted.items()}
        changed = tuple(f"{name}={value}" for name, value in chosen.items() if value != own[name])
        precision = () if options.precision == "auto" else (f"precision={options.precision}",)
        return cls(blending=chosen["blending"], stitching=chosen["stitching"], changed=(*changed, *precision))


class _Stages:
    """Seconds per stage, and a word to the listener when a stage begins and ends."""

    def __init__(self, on_progress: OnProgress) -> None:
        self.seconds: dict[str, float] = {}
        self._on_progress = on_progress

    @contextmanager
    def stage(self, stage: Stage) -> Iterator[None]:
        self._on_progress(Progress(stage=stage, done=0, total=1))
        began = time.perf_counter()
        yield
        self.seconds[stage.value] = time.perf_counter() - began
        self._on_progress(Progress(stage=stage, done=1, total=1))


def _resampled(ct: CtVolume, grid: Grid, device: torch.device) -> FloatVolume:
    """The CT in HU on `grid`: on the GPU where there is one with room for it, else by SimpleITK."""
    if device.type == "cuda":
        try:
            return resample_on(device, ct.hu, ct.grid, grid, fill=AIR_HU)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
    resampled: FloatVolume = resample(ct.hu, ct.grid, grid, fill=AIR_HU)
    return resampled


def choose_networks(
    districts: DistrictMap, keys: Sequence[str], options: PipelineOptions
) -> tuple[dict[District, str], tuple[str, ...]]:
    """The network's key for each district that is present, and a note for each that does not get its own.

    A district found with less than `options.min_confidence`, or without a network in the bundle, gets the
    whole-body network, or none ("not evaluated") where the options say so or the bundle has none. A bundle of the
    whole-body network alone was made so: there is nothing to note about districts that it has no networks for.
    """
    own = {d: WHOLE_BODY if tuple(keys) == (WHOLE_BODY,) else d.key for d in District}
    chosen: dict[District, str] = {}
    notes: list[str] = []
    for district in districts.present:
        confidence = districts.confidence.get(district, 0.0)
        sure = confidence >= options.min_confidence
        if sure and own[district] in keys:
            chosen[district] = own[district]
            continue
        why = f"{district.key}: confidence {confidence:.2f}" if not sure else f"{district.key}: no network of its own"
        if WHOLE_BODY in keys and (sure or options.low_confidence == WHOLE_BODY):
            chosen[district] = WHOLE_BODY
            notes.append(f"{why}, the whole-body network is used")
        else:
            notes.append(f"{why}, not evaluated")
    return chosen, tuple(notes)


@contextmanager
def _untimed(_: Stage) -> Iterator[None]:
    yield


def synthesize_volume(
    ct_unit: FloatVolume,
    districts: DistrictMap,
    networks: Mapping[District, str],
    bundle: ModelBundle,
    *,
    compute: Compute,
    blending: str | None = None,
    stitching: str | None = None,
    report: Callable[[str], None] = lambda _: None,
    on_progress: OnProgress | None = None,
    on_stage: Callable[[Stage], AbstractContextManager[None]] = _untimed,
) -> FloatVolume:
    """The scaled PET of one scaled CT: every network over its districts, then stitched.

    Args:
        ct_unit: float32 [z, y, x], HU scaled by the bundle's normalization, on the districts' grid, not masked.
        districts: on the bundle's grid spacing.
        networks: the key of the network for each district that is wanted; a district left out stays 0.
        bundle: the networks and the settings they were trained for.
        compute: where to begin; less of it is used when memory runs out.
        blending: "mean" or "gaussian"; None: the bundle's.
        stitching: "hard" or "feathered"; None: the bundle's.
        report: hears what had to be given up when memory ran out.
        on_progress: told of the windows of all districts together.
        on_stage: entered around each of the two stages, SYNTHESIS and STITCH.

    Returns:
        float32 [z, y, x] in [0, 1], 0 outside the body.

    Raises:
        GeometryError: shapes do not fit.
        BundleError: the bundle has no such network, or its file was altered.
    """
    mode = stitching or bundle.manifest.stitching
    with on_stage(Stage.SYNTHESIS):
        volumes = _synthesize_districts(
            ct_unit,
            districts,
            networks,
            bundle,
            blending=blending or bundle.manifest.blending,
            stitching=mode,
            compute=compute,
            report=report,
            on_progress=on_progress or ignore_progress,
        )
    with on_stage(Stage.STITCH):
        return stitch(volumes, districts, mode=mode, feather_mm=bundle.manifest.feather_mm)


def _deviation(
    suv: SuvVolume,
    ct_unit: FloatVolume,
    districts: DistrictMap,
    networks: Mapping[District, str],
    bundle: ModelBundle,
    settings: _Settings,
    compute: Compute,
    fallbacks: list[str],
    flips: Sequence[str],
    *,
    on_progress: OnProgress,
) -> SuvVolume | None:
    """The standard deviation of the SUV over flips, in the place of the SUV; the result is not changed.

    None, and a word in `fallbacks`, where there is no memory for it: a companion must not cost the result.
    """

    def report(text: str) -> None:
        if text not in fallbacks:  # each flip meets the same lack of memory again
            fallbacks.append(text)

    def flipped(ct: FloatVolume, labels: DistrictMap, listen: OnProgress) -> FloatVolume:
        unit = synthesize_volume(
            ct,
            labels,
            networks,
            bundle,
            compute=compute,
            blending=settings.blending,
            stitching=settings.stitching,
            report=report,
            on_progress=listen,
        )
        return bundle.manifest.normalization.unit_to_suv(unit)

    try:
        return replace(suv, suv=flip_deviation(suv.suv, ct_unit, districts, flipped, flips, on_progress))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    fallbacks.append("out of memory for the uncertainty: it is left out")
    return None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pass:
    """One network over the windows of one or more districts that show it the same input."""

    key: str
    districts: tuple[District, ...]
    mask: NDArray[np.bool_]  # [z, y, x], where its output is wanted

    @property
    def name(self) -> str:
        return "+".join(d.key for d in self.districts)


def _passes(
    districts: DistrictMap, networks: Mapping[District, str], manifest: Manifest, stitching: str
) -> list[_Pass]:
    """Districts that one network serves with one input go together, so that no window is computed twice."""
    shared: dict[tuple[str, District | None], list[District]] = {}
    for district, key in networks.items():
        own = district if depends_on_district(key, manifest.input_mask) else None
        shared.setdefault((key, own), []).append(district)
    feather_mm = manifest.feather_mm
    return [
        _Pass(
            key=key,
            districts=tuple(group),
            mask=np.logical_or.reduce(
                [reach(districts, d, mode=stitching, feather_mm=feather_mm) for d in group], dtype=np.bool_
            ),
        )
        for (key, _), group in shared.items()
    ]


def _synthesize_districts(
    ct_unit: FloatVolume,
    districts: DistrictMap,
    networks: Mapping[District, str],
    bundle: ModelBundle,
    *,
    blending: str,
    stitching: str,
    compute: Compute,
    report: Callable[[str], None],
    on_progress: OnProgress,
) -> dict[District, FloatVolume]:
    """[0, 1] volumes per district; districts of one pass share one array."""
    manifest = bundle.manifest
    passes = _passes(districts, networks, manifest, stitching)
    counter = _WindowCounter([one.mask for one in passes], manifest, on_progress)
    volumes: dict[District, FloatVolume] = {}
    for index, one in enumerate(passes):
        channels = network_input(ct_unit, districts, one.districts[0], one.key, manifest.input_mask)

        def work(rung: Compute, index: int = index, one: _Pass = one, seen: FloatVolume = channels) -> FloatVolume:
            return synthesize(
                seen,
                one.mask,
                bundle.network(one.key, rung.device),
                window=manifest.window,
                overlap=manifest.overlap,
                blending=blending,
                batch=rung.batch,
                device=rung.device,
                precision=rung.precision,
                on_progress=counter.listener(index, one.name),
            )

        # a rung that had no memory for one pass is not tried again for the next
        volume, compute = with_fallbacks(work, compute, report)
        volumes |= dict.fromkeys(one.districts, volume)
    return volumes


class _WindowCounter:
    """Windows of all passes together, so that the progress bar runs through once."""

    def __init__(self, masks: Sequence[NDArray[np.bool_]], manifest: Manifest, on_progress: OnProgress) -> None:
        self._done = [0] * len(masks)
        self._on_progress = on_progress
        self._total = 0
        for mask in masks:
            lattice = place_windows(mask, window=manifest.window, overlap=manifest.overlap)
            self._total += 0 if lattice is None else len(lattice.starts)

    def listener(self, index: int, name: str) -> Callable[[int, int], None]:
        """What `synthesize` reports to for one pass; it may begin again after a fallback."""

        def listen(done: int, _: int) -> None:
            self._done[index] = done
            self._on_progress(Progress(stage=Stage.SYNTHESIS, done=sum(self._done), total=self._total, text=name))

        return listen


def _provenance(
    bundle: ModelBundle,
    networks: Mapping[District, str],
    districts: DistrictMap,
    settings: _Settings,
    compute: Compute,
    fallbacks: tuple[str, ...],
) -> Provenance:
    used = set(networks.values())
    training = bundle.manifest.training
    return Provenance(
        software_version=software_version(),
        bundle_name=bundle.manifest.name,
        bundle_version=bundle.manifest.version,
        bundle_sha256=bundle.manifest_sha256,
        models=tuple(
            ModelRef(district=key, weights_sha256=bundle.manifest.networks[key].sha256)
            for key in bundle.keys
            if key in used
        ),
        networks=tuple(f"{d.key}={networks.get(d, 'none')}" for d in districts.present),
        segmenter=districts.segmenter,
        segmenter_version=districts.version,
        settings=settings.changed,
        recipe_sha256=_digest(training.get("recipe_sha256")),
        data_sha256=_digest(training.get("data_sha256")),
        device=compute.name,
        fallbacks=fallbacks,
    )


def _digest(value: object) -> str:
    """A manifest's training part is free text; only a SHA-256 goes into DICOM objects."""
    return value if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) else ""
