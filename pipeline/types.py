"""What travels through the pipeline: frozen values that check themselves once.

Axes are always [z, y, x] and every volume is axis-aligned in LPS: x grows to the patient's left, y to the
back, z to the head (PS3.3 C.7.6.2.1.1). `ct_reader` turns or resamples whatever the scanner wrote into that
frame, so nothing after it has to ask for an orientation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset

from pipeline.errors import PipelineError

FloatVolume = NDArray[np.float32]
LabelVolume = NDArray[np.uint8]


class GeometryError(PipelineError):
    """Two things that must lie on one grid do not."""

    def __init__(self, text: str, code: str = "geometry_mismatch") -> None:
        super().__init__(code, text)

    def __reduce__(self) -> tuple[type[GeometryError], tuple[str, str]]:
        return type(self), (self.text, self.code)


class District(IntEnum):
    """The body regions with a generator of their own, numbered as in the paper (section III-A)."""

    HEAD = 1
    TRUNK = 2
    ARMS = 3
    LEGS = 4

    @property
    def key(self) -> str:
        """The lower-case name used in bundles, recipes, tables and configuration."""
        return self.name.lower()


OUTSIDE = 0
AIR_HU = -1024.0  # what was not scanned
WHOLE_BODY = "whole_body"  # the competitor's network, beside the keys of the four districts


class Stage(StrEnum):
    """The stages of one job, in order; the ledger and the progress bar use these names."""

    READ = "read"
    RESAMPLE = "resample"
    DISTRICTS = "districts"
    SYNTHESIS = "synthesis"
    STITCH = "stitch"
    GATE = "gate"
    UNCERTAINTY = "uncertainty"  # only where the output asks for it
    WRITE = "write"


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """A regular axis-aligned LPS grid.

    `shape` and `spacing_mm` are (z, y, x); `origin_mm` is the LPS position (x, y, z) of the centre of voxel
    [0, 0, 0], the patient's most foot-ward, front, right voxel.
    """

    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    origin_mm: tuple[float, float, float]
    frame_of_reference_uid: str

    def __post_init__(self) -> None:
        if len(self.shape) != 3 or min(self.shape) < 1:
            raise GeometryError(f"grid shape {self.shape} needs three sizes of at least 1")
        if len(self.spacing_mm) != 3 or not all(np.isfinite(s) and s > 0 for s in self.spacing_mm):
            raise GeometryError(f"grid spacing {self.spacing_mm} mm needs three positive numbers")

    @property
    def affine(self) -> NDArray[np.float64]:
        """4x4, maps an index (z, y, x, 1) to an LPS position (x, y, z, 1) in mm."""
        dz, dy, dx = self.spacing_mm
        ox, oy, oz = self.origin_mm
        return np.array([[0, 0, dx, ox], [0, dy, 0, oy], [dz, 0, 0, oz], [0, 0, 0, 1]], dtype=np.float64)

    @property
    def extent_mm(self) -> tuple[float, float, float]:
        """Edge to edge size (z, y, x)."""
        z, y, x = (n * s for n, s in zip(self.shape, self.spacing_mm, strict=True))
        return z, y, x

    @property
    def voxel_ml(self) -> float:
        dz, dy, dx = self.spacing_mm
        return dz * dy * dx / 1000.0


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceInstance:
    """One CT plane that a volume was made of. `position_mm` is its (centre) LPS position x, y, z.

    `frame_number` counts the frames of a multi-frame instance from 1 (PS3.3 C.7.6.16.1.1); 0: it has one plane.
    """

    sop_class_uid: str
    sop_instance_uid: str
    position_mm: tuple[float, float, float]
    frame_number: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceSeries:
    """The CT series as the outputs need it: `header` is the lowest slice's data set without pixel data.

    `instances` are its planes, sorted from foot to head. `header` is for white-list copying only (dicom-output
    section 3) and is never logged.
    """

    study_uid: str
    series_uid: str
    header: Dataset
    instances: tuple[SourceInstance, ...]
    earliest_acquisition: tuple[str, str]  # DA, TM of the earliest slice (else series, else study, else "")
    lossy: bool = False
    notes: tuple[str, ...] = ()  # what the reader had to mend, for the ledger: "gantry tilt -12.0 deg resampled"


@dataclass(frozen=True, kw_only=True, slots=True)
class CtVolume:
    """Hounsfield units, float32, [z, y, x] on `grid`; padding and whatever was not scanned are -1024."""

    hu: FloatVolume
    grid: Grid
    source: SourceSeries

    def __post_init__(self) -> None:
        if self.hu.shape != self.grid.shape:
            raise GeometryError(f"CT {self.hu.shape} does not fit grid {self.grid.shape}")
        if self.hu.dtype != np.float32:
            raise GeometryError(f"CT is {self.hu.dtype}, float32 is expected")


@dataclass(frozen=True, kw_only=True, slots=True)
class DistrictMap:
    """uint8 labels [z, y, x] on `grid`: 0 outside the body, else a `District`; every body voxel has one (eq. 2).

    `confidence` gives 0..1 for each district that is present; an absent district has no entry.
    """

    labels: LabelVolume
    grid: Grid
    segmenter: str
    version: str
    confidence: Mapping[District, float]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.labels.shape != self.grid.shape:
            raise GeometryError(f"districts {self.labels.shape} do not fit grid {self.grid.shape}")
        if self.labels.dtype != np.uint8:
            raise GeometryError(f"districts are {self.labels.dtype}, uint8 is expected")

    @property
    def present(self) -> tuple[District, ...]:
        counts = np.bincount(self.labels.ravel(), minlength=len(District) + 1)
        return tuple(d for d in District if counts[d] > 0)

    def mask(self, district: District) -> NDArray[np.bool_]:
        mask: NDArray[np.bool_] = self.labels == district
        return mask


@dataclass(frozen=True, kw_only=True, slots=True)
class SuvVolume:
    """Body-weight SUV in g/ml, float32, [z, y, x] on `grid`; 0 outside the body.

    `not_evaluated` names the districts in the field of view that no network was trusted with: they hold 0 and
    are reported as "not evaluated", never as "no uptake".
    """

    suv: FloatVolume
    grid: Grid
    not_evaluated: tuple[District, ...] = ()

    def __post_init__(self) -> None:
        if self.suv.shape != self.grid.shape:
            raise GeometryError(f"SUV {self.suv.shape} does not fit grid {self.grid.shape}")
        if self.suv.dtype != np.float32:
            raise GeometryError(f"SUV is {self.suv.dtype}, float32 is expected")


@dataclass(frozen=True, kw_only=True, slots=True)
class JobVolumes:
    """What one job leaves in memory for a shadow: its CT, the same in HU on the result's grid, districts, result."""

    ct: CtVolume
    hu: FloatVolume
    districts: DistrictMap
    suv: SuvVolume


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelRef:
    """One network that took part: for ContributingEquipment and the ledger."""

    district: str  # a District key or WHOLE_BODY
    weights_sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Provenance:
    """Who made a result: software, bundle, networks, segmenter, options. Result UIDs are a function of it."""

    software_version: str
    bundle_name: str
    bundle_version: str
    bundle_sha256: str  # of the manifest, which holds every weights hash
    models: tuple[ModelRef, ...]
    segmenter: str
    segmenter_version: str
    networks: tuple[str, ...] = ()  # which served which district: "arms=whole_body", "legs=none"; part of the UIDs
    settings: tuple[str, ...] = ()  # what an option changed against the bundle: "blending=mean"; part of the UIDs
    recipe_sha256: str = ""  # of the recipe that the weights were trained by, as the bundle's manifest says it
    data_sha256: str = ""  # of the prepared data that they were trained on; the manifest's hash covers both
    device: str  # "cpu", "cuda:0 NVIDIA H100": recorded, not part of the UIDs
    fallbacks: tuple[str, ...] = ()  # "out of memory on cuda:0: batch 64"; recorded, not part of the UIDs


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedInstance:
    """One DICOM Part 10 object, ready to be written and sent unchanged."""

    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax_uid: str
    file_name: str  # "0001.dcm"; from a counter, never from a header
    data: bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedSeries:
    """All instances of one result series, in sending order.

    `kind`: "pet", "mip", "seg", "uncertainty", "sr" (measurement report), "gsps" or "pcps" (presentation states).
    `encoding`: "sc" or "pet"; of a SEG, report or presentation state that of the PET series which it refers to.
    """

    kind: str
    encoding: str
    series_uid: str
    instances: tuple[EncodedInstance, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class DistrictStats:
    """SUV inside one district, from the de-quantized values that a reader of the file sees."""

    district: District
    volume_ml: float
    suv_mean: float
    suv_max: float
    confidence: float
    evaluated: bool
    uncertainty: float | None = None  # mean standard deviation of the SUV over flips, where that was asked for


@dataclass(frozen=True, kw_only=True, slots=True)
class ResultSet:
    """Everything that one job leaves: encoded series, statistics, the picture (PNG), where the time went."""

    series: tuple[EncodedSeries, ...]
    stats: tuple[DistrictStats, ...]
    provenance: Provenance
    overview_png: bytes
    stage_seconds: Mapping[str, float]
    notes: tuple[str, ...] = ()
    held: GateFinding | None = None  # set: complete, but not to be sent before a person releases it


@dataclass(frozen=True, kw_only=True, slots=True)
class GateFinding:
    """Why a gate stopped: a stable code and a sentence."""

    code: str
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """Reported while a stage goes on: `done` of `total` units (slices, windows, instances)."""

    stage: Stage
    done: int
    total: int
    text: str = ""


OnProgress = Callable[[Progress], None]


def ignore_progress(_: Progress) -> None:
    """The default listener."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputOptions:
    """What is written for one destination or folder; part of the result UIDs (see `provenance`)."""

    encodings: tuple[str, ...] = ("sc",)  # each of "sc", "pet"
    mip: bool = True
    seg: bool = False
    uncertainty: bool = False
    sr: bool = False
    presentation_states: bool = False
    series_number: int = 9001
    uncertainty_series_number: int = 9010
    seg_series_number: int = 9020
    mip_series_number: int = 9030
    sr_series_number: int = 9040
    gsps_series_number: int = 9050
    pcps_series_number: int = 9060
    series_description: str = "SYNTHETIC FDG PET SUVbw - AI, RESEARCH ONLY"
    institution_name: str = ""
    emit_patient_position: bool = False
    emit_sc_markers: bool = False
    omit_patient_size: bool = False
    test: bool = False  # of a generated test study: descriptions and comments say TEST


@dataclass(frozen=True, kw_only=True, slots=True)
class DistrictOptions:
    """What the segmenters of districts need beside the CT. `segmentations` are SEG objects of the CT's study."""

    chain: tuple[str, ...] = ("builtin",)  # tried in order
    segmentations: tuple[Path, ...] = ()
    result_series: tuple[str, ...] = ()  # UIDs of series made of this CT before: a SEG drawn on one is one of the CT
    nnunet_folder: Path | None = None  # an unzipped nnU-Net v2 model folder
    totalsegmentator_weights: Path | None = None  # None: where TotalSegmentator itself looks
    timeout_s: float = 900.0  # for a segmenter with a process of its own; then it is ended
    device: str = "auto"  # for such a segmenter: "auto", "cpu", "cuda", "cuda:1"
    threads: int = 0  # its CPU threads; 0: all cores


@dataclass(frozen=True, kw_only=True, slots=True)
class GateOptions:
    """The thresholds of the gates, see docs/gates.md.

    `severity` replaces what follows from a check: its code to "reject", "hold" or "note".
    """

    min_coverage_mm: float = 120.0
    max_slices: int = 3000
    max_slice_spacing_mm: float = 10.0
    body_mm: tuple[float, float] = (120.0, 600.0)
    required_districts: tuple[str, ...] = (District.TRUNK.key,)
    min_age_years: int = 18
    max_cut_share: float = 0.05
    max_metal_share: float = 0.005
    max_hu_distance: float = 0.35
    max_lung_suv: float = 1.5
    max_bone_suv: float = 3.0
    suv_factor: float = 2.0
    max_seam: float = 2.0
    max_asymmetry: float = 0.5
    max_not_evaluated: float = 0.5
    severity: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineOptions:
    """How one job is run. Paths and numbers only: the engine gets it pickled.

    `bundle` and `shadow` are folders, or names of bundles that ship with the product or lie in one of `bundles`.
    """

    bundle: Path
    bundles: tuple[Path, ...] = ()  # folders with installed bundles
    shadow: Path | None = None  # a second bundle that is only compared, see `shadow`
    device: str = "auto"  # "auto", "cpu", "cuda", "cuda:1"
    precision: str = "auto"  # "auto", "fp32", "bf16"
    batch: int = 0  # windows at once; 0: chosen from the device
    blending: str = "bundle"  # "bundle", "mean", "gaussian"
    stitching: str = "bundle"  # "bundle", "hard", "feathered"
    districts: DistrictOptions = field(default_factory=DistrictOptions)
    min_confidence: float = 0.5
    low_confidence: str = "whole_body"  # or "not_evaluated"
    threads: int = 0  # CPU threads for torch and SimpleITK; 0: all cores
    gate: GateOptions = field(default_factory=GateOptions)
    output: OutputOptions = field(default_factory=OutputOptions)
