"""A model bundle with random weights that runs in a second: for tests of everything around the networks."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from pathlib import Path

import torch
from safetensors.torch import save

from pipeline.bundle import MANIFEST, NETWORK_KEYS, Manifest, NetworkEntry, Normalization
from pipeline.networks import NetworkSpec, build_network

SPEC = NetworkSpec(width=4, depth=3, window=16)


def write_tiny_bundle(folder: Path, *, spacing_mm: float = 8.0, seed: int = 0) -> Path:
    """Write a whole bundle (four districts and the whole-body network) and return its folder."""
    folder.mkdir(parents=True)
    entries = {key: _write_network(folder, key, seed + i) for i, key in enumerate(NETWORK_KEYS)}
    manifest = Manifest(
        name="tiny",
        version="1",
        created=datetime(2026, 1, 1, tzinfo=UTC),
        profile="robust",
        licence="Apache-2.0",
        statement="random weights, for tests only",
        spacing_mm=(spacing_mm, spacing_mm, spacing_mm),
        window=SPEC.window,
        overlap=0,
        blending="mean",
        stitching="hard",
        feather_mm=0.0,
        normalization=Normalization(),
        networks=entries,
    )
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
    return folder


def _write_network(folder: Path, key: str, seed: int) -> NetworkEntry:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        data = save(build_network(SPEC).state_dict())
    (folder / f"{key}.safetensors").write_bytes(data)
    return NetworkEntry(file=f"{key}.safetensors", sha256=hashlib.sha256(data).hexdigest(), spec=SPEC)
