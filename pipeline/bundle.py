"""Model bundles: a folder with `manifest.json` and one safetensors file per network.

Everything that a network needs at inference is in the manifest; `load_bundle` refuses a folder whose files are
not, byte for byte, the ones that the manifest names. Nothing is downloaded and nothing is unpickled.

BundleError codes: bundle_missing, manifest_invalid, manifest_altered, weights_missing, weights_altered,
weights_unfit, file_missing, file_altered.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import nn

from pipeline.bundle_paths import MANIFEST as MANIFEST
from pipeline.bundle_paths import bundle_path as bundle_path
from pipeline.bundle_paths import bundles_in as bundles_in
from pipeline.bundle_paths import shipped_bundles as shipped_bundles
from pipeline.errors import BundleError, listed
from pipeline.networks import NetworkSpec, build_network
from pipeline.types import WHOLE_BODY, District

CARD = "MODEL_CARD.md"
NETWORK_KEYS = (*(d.key for d in District), WHOLE_BODY)

# What a network sees of the scaled CT (see `Manifest.input_mask`), and in how many channels.
InputMask = Literal["body", "district", "channel", "districts"]
INPUT_CHANNELS: Mapping[str, int] = {"body": 1, "district": 1, "channel": 2, "districts": 1 + len(District)}

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
PlainName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}$")]
Volume = TypeVar("Volume", np.ndarray, torch.Tensor)
Spacing = Annotated[float, Field(gt=0, le=50)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Normalization(_Frozen):
    """How HU and SUV are scaled to [0, 1].

    `ct_range` "fixed" takes the same limits for every volume (profile `robust`); "volume" takes the volume's own
    minimum and maximum (profile `paper`), and then the two limits are not read.
    """

    ct_range: Literal["fixed", "volume"] = "fixed"
    ct_low_hu: float = -1000.0
    ct_high_hu: float = 1000.0
    suv_max: float = Field(default=20.0, gt=0)

    @model_validator(mode="after")
    def _range_is_positive(self) -> Normalization:
        if not self.ct_high_hu > self.ct_low_hu:
            raise ValueError(f"ct_high_hu {self.ct_high_hu} must be above ct_low_hu {self.ct_low_hu}")
        return self

    def ct_to_unit(self, hu: Volume) -> Volume:
        """HU to [0, 1], float32: 0 is air. With `ct_range` "volume", of the volume that is passed in."""
        if self.ct_range == "volume":
            low = float(hu.min())
            return _to_unit(hu, low, max(float(hu.max()), low + 1.0))
        return _to_unit(hu, self.ct_low_hu, self.ct_high_hu)

    def suv_to_unit(self, suv: Volume) -> Volume:
        """SUV to [0, 1], float32, clipped at `suv_max`."""
        return _to_unit(suv, 0.0, self.suv_max)

    def unit_to_suv(self, unit: Volume) -> Volume:
        """[0, 1] to SUV in g/ml, float32."""
        if isinstance(unit, torch.Tensor):
            return unit.to(torch.float32) * self.suv_max
        return np.multiply(unit, np.float32(self.suv_max), dtype=np.float32)


def _to_unit(values: Volume, low: float, high: float) -> Volume:
    if isinstance(values, torch.Tensor):
        return ((values.to(torch.float32) - low) / (high - low)).clamp(0.0, 1.0)
    scaled = (np.asarray(values, dtype=np.float32) - np.float32(low)) * np.float32(1.0 / (high - low))
    return np.clip(scaled, 0.0, 1.0, out=scaled)


class NetworkEntry(_Frozen):
    """One network of the bundle. `file` is a plain name in the bundle's folder."""

    file: str = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}\.safetensors$")
    sha256: Sha256
    spec: NetworkSpec


class Manifest(_Frozen):
    """What a bundle says about itself; the inference settings are those that the networks were trained for.

    `input_mask` tells what a network sees. "body": the scaled CT, 0 (air) outside the body, so it sees the context
    at its district's border. "district" is the paper's eq. 7, 0 outside the district, and needs hard stitching:
    beyond its border such a network has seen air, and feathering would mix that in. "channel": the scaled CT as it
    is, and its district (or the body) as a second channel of 0 and 1. "districts": as "body", and four more
    channels of 0 and 1, one per district in the paper's order: one network conditioned on the district.

    `files` names the other files that belong to the bundle (the model card), each with its SHA-256.
    `content_sha256` is the manifest's own, see `sealed`: a suv_max that changed by one digit would scale every result.
    """

    name: str = Field(min_length=1, max_length=64)
    version: str = Field(min_length=1, max_length=64)
    created: datetime
    profile: Literal["robust", "paper"]
    licence: str
    statement: str
    spacing_mm: tuple[Spacing, Spacing, Spacing]  # (z, y, x)
    window: int = Field(ge=4, le=512)
    overlap: int = Field(ge=0)
    blending: Literal["mean", "gaussian"]
    stitching: Literal["hard", "feathered"]
    feather_mm: float = Field(ge=0, le=100)
    input_mask: InputMask = "body"
    normalization: Normalization
    networks: dict[str, NetworkEntry]
    files: dict[PlainName, Sha256] = {}
    training: dict[str, Any] = {}
    metrics: dict[str, Any] = {}
    statistics: dict[str, Any] = {}
    content_sha256: Sha256 | None = None

    @property
    def content_digest(self) -> str:
        """SHA-256 of everything in the manifest but `content_sha256`, however it is laid out in the file."""
        content = json.loads(self.model_dump_json(exclude={"content_sha256"}))
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def sealed(self) -> Manifest:
        """With its `content_sha256`; from then on `load_bundle` refuses a manifest that says anything else."""
        return self.model_copy(update={"content_sha256": self.content_digest})

    @model_validator(mode="after")
    def _parts_fit(self) -> Manifest:
        if not self.networks:
            raise ValueError("networks is empty")
        unknown = sorted(set(self.networks) - set(NETWORK_KEYS))
        if unknown:
            raise ValueError(f"networks {unknown} are not among {list(NETWORK_KEYS)}")
        if self.overlap >= self.window:
            raise ValueError(f"overlap {self.overlap} must be below window {self.window}")
        if self.input_mask == "district" and self.stitching == "feathered":
            text = "input_mask district cannot go with stitching feathered: borders would darken, hard is expected"
            raise ValueError(text)
        for key, entry in self.networks.items():
            if entry.spec.in_channels != INPUT_CHANNELS[self.input_mask]:
                text = f"network {key} has {entry.spec.in_channels} input channels, input_mask {self.input_mask!r}"
                raise ValueError(f"{text} needs {INPUT_CHANNELS[self.input_mask]}")
            if entry.spec.window != self.window:
                raise ValueError(f"network {key} has window {entry.spec.window}, the bundle {self.window}")
        return self


@dataclass(frozen=True, kw_only=True)
class ModelBundle:
    """A checked bundle. Networks are read when first asked for and kept per device and precision."""

    folder: Path
    manifest: Manifest
    manifest_sha256: str
    _cache: dict[tuple[str, str, torch.dtype], nn.Module] = field(default_factory=dict, repr=False, compare=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    @property
    def keys(self) -> tuple[str, ...]:
        """The networks of this bundle, districts in the paper's order, whole_body last."""
        return tuple(key for key in NETWORK_KEYS if key in self.manifest.networks)

    def network(self, key: str, device: torch.device, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The network in eval mode on `device`.

        Raises:
            BundleError: no such network, or its file is missing, altered or does not fit its spec.
        """
        if key not in self.manifest.networks:
            raise BundleError("weights_missing", f"bundle {self.manifest.name} has no network {key!r}: {self.keys}")
        slot = (key, str(device), dtype)
        with self._lock:
            if slot not in self._cache:
                self._cache[slot] = _read_network(self.folder, key, self.manifest.networks[key]).to(device, dtype)
            return self._cache[slot]


def _checked_bytes(folder: Path, key: str, entry: NetworkEntry) -> bytes:
    try:
        data = (folder / entry.file).read_bytes()
    except OSError as error:
        text = f"weights of {key} in {folder}: {entry.file} cannot be read: {error.strerror}"
        raise BundleError("weights_missing", text) from error
    found = hashlib.sha256(data).hexdigest()
    if found != entry.sha256:
        text = f"weights of {key}, {entry.file}: SHA-256 is {found[:16]}..., the manifest says {entry.sha256[:16]}..."
        raise BundleError("weights_altered", text)
    return data


def _check_file(folder: Path, name: str, expected: str) -> None:
    try:
        found = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    except OSError as error:
        text = f"model bundle {folder}: {name}, named in {MANIFEST}, cannot be read: {error.strerror}"
        raise BundleError("file_missing", text) from error
    if found != expected:
        text = f"model bundle {folder}: {name}: SHA-256 is {found[:16]}..., the manifest says {expected[:16]}..."
        raise BundleError("file_altered", text)


def _read_network(folder: Path, key: str, entry: NetworkEntry) -> nn.Module:
    network = build_network(entry.spec)
    try:
        network.load_state_dict(load_safetensors(_checked_bytes(folder, key, entry)))
    except (RuntimeError, SafetensorError) as error:
        text = f"weights of {key}, {entry.file}, do not fit {entry.spec.architecture} width {entry.spec.width}"
        raise BundleError("weights_unfit", text) from error
    return network.requires_grad_(False).eval()


def load_bundle(folder: Path) -> ModelBundle:
    """Read the manifest and check every file that it names against its SHA-256; other files may lie beside them.

    Raises:
        BundleError: the folder, the manifest or a file that it names is missing, malformed or altered.
    """
    path = folder / MANIFEST
    try:
        raw = path.read_bytes()
    except OSError as error:
        text = f"model bundle {folder}: {MANIFEST} cannot be read: {error.strerror}"
        raise BundleError("bundle_missing", text) from error
    try:
        manifest = Manifest.model_validate_json(raw)
    except ValidationError as error:
        text = f"model bundle {folder}: {MANIFEST}: {listed(error, 5)}"
        raise BundleError("manifest_invalid", text) from error
    if manifest.content_sha256 not in (None, manifest.content_digest):
        raise BundleError("manifest_altered", f"model bundle {folder}: {MANIFEST} is not as it was written")
    for key, entry in manifest.networks.items():
        _checked_bytes(folder, key, entry)
    for name, digest in manifest.files.items():
        _check_file(folder, name, digest)
    return ModelBundle(folder=folder, manifest=manifest, manifest_sha256=hashlib.sha256(raw).hexdigest())
