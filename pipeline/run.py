"""One job: a CT series in, a synthetic PET series with its companions out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline import gate
from pipeline.bundle import Manifest, ModelBundle
from pipeline.ct_reader import read_ct
from pipeline.device import Compute, choose_compute, is_out_of_memory, set_threads, with_fallbacks
from pipeline.districts import find_districts
from pipeline.geometry import grid_at_spacing, resample, resample_on
from pipeline.outputs.pet_series import encode_pet_series
from pipeline.outputs.picture import encode_mip, overview_png
from pipeline.outputs.statistics import district_stats
from pipeline.provenance import ResultUids, software_version
from pipeline.result import ResultSummary, SeriesSummary, read_summary, write_result
from pipeline.stitching import reach, stitch
from pipeline.synthesis import masked_input, place_windows, synthesize
from pipeline.types import (
    WHOLE_BODY,
    CtVolume,
    District,
    DistrictMap,
    EncodedSeries,
    FloatVolume,
    Grid,
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

__all__ = ["ResultSummary", "SeriesSummary", "read_summary", "synthesize_series", "write_result"]

AIR_HU = -1024.0  # what was not scanned
MIP_ENCODING = "sc"  # the picture is a secondary capture whatever the PET series is


def synthesize_series(
    paths: Sequence[Path],
    bundle: ModelBundle,
    options: PipelineOptions,
    *,
    created: datetime,
    on_progress: OnProgress = ignore_progress,
) -> ResultSet:
    """Read a CT series, synthesize the PET of every district that it shows, and encode the result.

    Args:
        paths: the files of one CT series, in any order.
        bundle: the networks and the settings they were trained for.
        options: how; `options.bundle` is not read here.
        created: aware UTC time of the job, written into the objects.
        on_progress: told about each stage as it begins, goes on and ends.

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
        ct = read_ct(paths, max_slices=options.max_slices, on_progress=on_progress)
        gate.check_input(ct, min_coverage_mm=options.min_coverage_mm)
    with stages.stage(Stage.RESAMPLE):
        grid = grid_at_spacing(ct.grid, bundle.manifest.spacing_mm)
        ct_unit = bundle.manifest.normalization.ct_to_unit(_resampled(ct, grid, compute.device))
    with stages.stage(Stage.DISTRICTS):
        districts = find_districts(ct, grid, chain=options.districts, on_progress=on_progress)
        networks, notes = choose_networks(districts, bundle.keys, options)
    with stages.stage(Stage.SYNTHESIS):
        volumes = _synthesize_districts(
            ct_unit, districts, networks, bundle, settings, compute, fallbacks.append, on_progress
        )
    with stages.stage(Stage.STITCH):
        suv = _stitch_to_suv(volumes, districts, bundle.manifest, settings, grid)
    with stages.stage(Stage.GATE):
        held = gate.check_output(suv, districts)
    with stages.stage(Stage.WRITE):
        provenance = _provenance(bundle, networks, districts, settings, compute, tuple(fallbacks))
        series = _encode(suv, ct, provenance, options, created, on_progress)
        stats = district_stats(suv, districts)
        picture = overview_png(ct, districts, suv)
    return ResultSet(
        series=series,
        stats=stats,
        provenance=provenance,
        overview_png=picture,
        stage_seconds=stages.seconds,
        notes=(*ct.source.notes, *districts.notes, *notes, *fallbacks),
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
    whole-body network, or none ("not evaluated") where the options say so or the bundle has none.
    """
    chosen: dict[District, str] = {}
    notes: list[str] = []
    for district in districts.present:
        confidence = districts.confidence.get(district, 0.0)
        sure = confidence >= options.min_confidence
        if sure and district.key in keys:
            chosen[district] = district.key
            continue
        why = f"{district.key}: confidence {confidence:.2f}" if not sure else f"{district.key}: no network of its own"
        if WHOLE_BODY in keys and (sure or options.low_confidence == WHOLE_BODY):
            chosen[district] = WHOLE_BODY
            notes.append(f"{why}, the whole-body network is used")
        else:
            notes.append(f"{why}, not evaluated")
    return chosen, tuple(notes)


def _synthesize_districts(
    ct_unit: FloatVolume,
    districts: DistrictMap,
    networks: Mapping[District, str],
    bundle: ModelBundle,
    settings: _Settings,
    compute: Compute,
    report: Callable[[str], None],
    on_progress: OnProgress,
) -> dict[District, FloatVolume]:
    """[0, 1] volumes per district; `report` hears what had to be given up when memory ran out."""
    manifest = bundle.manifest
    masks = {d: reach(districts, d, mode=settings.stitching, feather_mm=manifest.feather_mm) for d in networks}
    counter = _WindowCounter(masks, manifest, on_progress)
    volumes: dict[District, FloatVolume] = {}
    for district, key in networks.items():
        masked = masked_input(ct_unit, districts, district, key, manifest.input_mask)

        def work(rung: Compute, key: str = key, district: District = district, ct: FloatVolume = masked) -> FloatVolume:
            return synthesize(
                ct,
                masks[district],
                bundle.network(key, rung.device),
                window=manifest.window,
                overlap=manifest.overlap,
                blending=settings.blending,
                batch=rung.batch,
                device=rung.device,
                precision=rung.precision,
                on_progress=counter.listener(district),
            )

        # a rung that had no memory for one district is not tried again for the next
        volumes[district], compute = with_fallbacks(work, compute, report)
    return volumes


class _WindowCounter:
    """Windows of all districts together, so that the progress bar runs through once."""

    def __init__(
        self, masks: Mapping[District, NDArray[np.bool_]], manifest: Manifest, on_progress: OnProgress
    ) -> None:
        self._done = dict.fromkeys(masks, 0)
        self._on_progress = on_progress
        self._total = 0
        for mask in masks.values():
            lattice = place_windows(mask, window=manifest.window, overlap=manifest.overlap)
            self._total += 0 if lattice is None else len(lattice.starts)

    def listener(self, district: District) -> Callable[[int, int], None]:
        """What `synthesize` reports to for one district; it may begin again after a fallback."""

        def listen(done: int, _: int) -> None:
            self._done[district] = done
            self._on_progress(
                Progress(stage=Stage.SYNTHESIS, done=sum(self._done.values()), total=self._total, text=district.key)
            )

        return listen


def _stitch_to_suv(
    volumes: Mapping[District, FloatVolume],
    districts: DistrictMap,
    manifest: Manifest,
    settings: _Settings,
    grid: Grid,
) -> SuvVolume:
    unit = stitch(volumes, districts, mode=settings.stitching, feather_mm=manifest.feather_mm)
    return SuvVolume(
        suv=manifest.normalization.unit_to_suv(unit),
        grid=grid,
        not_evaluated=tuple(d for d in districts.present if d not in volumes),
    )


def _provenance(
    bundle: ModelBundle,
    networks: Mapping[District, str],
    districts: DistrictMap,
    settings: _Settings,
    compute: Compute,
    fallbacks: tuple[str, ...],
) -> Provenance:
    used = set(networks.values())
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
        device=compute.name,
        fallbacks=fallbacks,
    )


def _encode(
    suv: SuvVolume,
    ct: CtVolume,
    provenance: Provenance,
    options: PipelineOptions,
    created: datetime,
    on_progress: OnProgress,
) -> tuple[EncodedSeries, ...]:
    """The PET series in every encoding that is asked for, then the picture."""
    output = options.output
    created = created.astimezone()  # DICOM dates and times are local where no offset is given (PS3.3 C.12.1.1)

    def uids(encoding: str) -> ResultUids:
        return ResultUids(source=ct.source, provenance=provenance, options=output, encoding=encoding)

    series = [
        encode_pet_series(
            suv,
            source=ct.source,
            provenance=provenance,
            options=output,
            encoding=encoding,
            uids=uids(encoding),
            created=created,
            on_progress=on_progress,
        )
        for encoding in output.encodings
    ]
    if output.mip:
        picture = encode_mip(
            suv,
            source=ct.source,
            provenance=provenance,
            options=output,
            encoding=MIP_ENCODING,
            uids=uids(MIP_ENCODING),
            created=created,
        )
        series.append(picture)
    return tuple(series)
