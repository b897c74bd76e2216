from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.bundle import MANIFEST, Manifest, Normalization, bundle_path, load_bundle, shipped_bundles
from pipeline.errors import BundleError
from pipeline.networks import NetworkSpec, build_network
from training.export import export_bundle
from training.recipe import Recipe, load_recipe


def small_recipe() -> Recipe:
    recipe = load_recipe("phantom")
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"generator": NetworkSpec(width=1)})})


@pytest.fixture
def networks() -> dict[str, torch.nn.Module]:
    torch.manual_seed(1)
    return {key: build_network(NetworkSpec(width=1)).eval() for key in ("whole_body", "head")}


@pytest.fixture
def folder(tmp_path: Path, networks: dict[str, torch.nn.Module]) -> Path:
    created = datetime(2026, 1, 2, tzinfo=UTC)
    export_bundle(tmp_path / "b", networks, small_recipe(), created=created, training={}, metrics={}, statistics={})
    return tmp_path / "b"


def change_manifest(folder: Path, **changes: Any) -> None:
    content = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(content | changes))


def refused(folder: Path) -> str:
    with pytest.raises(BundleError) as caught:
        load_bundle(folder)
    return caught.value.code


def test_what_was_exported_gives_the_same_outputs(folder: Path, networks: dict[str, torch.nn.Module]) -> None:
    bundle = load_bundle(folder)
    assert bundle.keys == ("head", "whole_body")  # the paper's order, whatever the order of export
    x = torch.rand(1, 1, 32, 32, 32)
    for key, network in networks.items():
        loaded = bundle.network(key, torch.device("cpu"))
        assert not loaded.training
        assert loaded is bundle.network(key, torch.device("cpu"))
        with torch.inference_mode():
            assert torch.equal(loaded(x), network(x))


def test_one_changed_byte_of_weights_is_refused(folder: Path) -> None:
    path = folder / "head.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert refused(folder) == "weights_altered"


def test_weights_changed_after_the_check_are_refused_too(folder: Path) -> None:
    bundle = load_bundle(folder)
    (folder / "head.safetensors").write_bytes(b"other")
    with pytest.raises(BundleError, match="SHA-256") as caught:
        bundle.network("head", torch.device("cpu"))
    assert caught.value.code == "weights_altered"


def test_missing_weights_are_refused(folder: Path) -> None:
    (folder / "head.safetensors").unlink()
    assert refused(folder) == "weights_missing"


def test_a_folder_without_manifest_is_refused(tmp_path: Path) -> None:
    assert refused(tmp_path) == "bundle_missing"


@pytest.mark.parametrize(
    "changes",
    [
        {"overlap": 32},
        {"blending": "median"},
        {"networks": {}},
        {"networks": {"tail": {"file": "a.safetensors", "sha256": "0" * 64, "spec": {}}}},
        {"networks": {"head": {"file": "../a.safetensors", "sha256": "0" * 64, "spec": {}}}},
        {"window": 64},
        {"unknown_key": 1},
        {"normalization": {"ct_low_hu": 5, "ct_high_hu": 5, "suv_max": 20}},
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(folder: Path, changes: dict[str, Any]) -> None:
    change_manifest(folder, **changes)
    assert refused(folder) == "manifest_invalid"


def test_feathering_what_saw_nothing_beyond_its_border_is_refused(folder: Path) -> None:
    change_manifest(folder, input_mask="district", stitching="feathered", feather_mm=8.0)
    with pytest.raises(BundleError, match="input_mask district cannot go with stitching feathered"):
        load_bundle(folder)
    change_manifest(folder, input_mask="district", stitching="hard", feather_mm=0.0)
    assert load_bundle(folder).manifest.input_mask == "district"


def test_weights_of_another_size_are_refused(folder: Path) -> None:
    content = json.loads((folder / MANIFEST).read_text())
    content["networks"]["head"]["spec"]["width"] = 2
    change_manifest(folder, networks=content["networks"])
    with pytest.raises(BundleError) as caught:
        load_bundle(folder).network("head", torch.device("cpu"))
    assert caught.value.code == "weights_unfit"


def test_a_network_that_the_bundle_lacks_is_an_error(folder: Path) -> None:
    with pytest.raises(BundleError, match="'legs'"):
        load_bundle(folder).network("legs", torch.device("cpu"))


def test_the_manifest_hash_follows_the_manifest(folder: Path) -> None:
    before = load_bundle(folder).manifest_sha256
    change_manifest(folder, version="2")
    assert load_bundle(folder).manifest_sha256 != before


def test_a_bundle_is_found_by_name_or_folder(folder: Path) -> None:
    assert bundle_path(str(folder)) == folder
    for path in shipped_bundles():
        assert bundle_path(path.name) == path
    with pytest.raises(BundleError, match="neither"):
        bundle_path("no-such-bundle")
    with pytest.raises(BundleError):
        bundle_path("")


def test_every_shipped_bundle_loads_and_says_what_it_is_not() -> None:
    for path in shipped_bundles():
        manifest: Manifest = load_bundle(path).manifest
        assert "not for clinical use" in manifest.statement
        assert sum(file.stat().st_size for file in path.iterdir()) < 40e6


def test_normalization_is_the_same_for_arrays_and_tensors_and_turns_back() -> None:
    n = Normalization()
    hu = np.array([-3024, -1000, 0, 1000, 3000], dtype=np.float32)
    assert n.ct_to_unit(hu).tolist() == [0, 0, 0.5, 1, 1]
    torch.testing.assert_close(n.ct_to_unit(torch.from_numpy(hu)), torch.from_numpy(n.ct_to_unit(hu)))
    suv = np.array([0, 2.5, 20, 35], dtype=np.float32)
    assert n.unit_to_suv(n.suv_to_unit(suv)).tolist() == [0, 2.5, 20, 20]
    torch.testing.assert_close(n.unit_to_suv(n.suv_to_unit(torch.from_numpy(suv))), torch.tensor([0, 2.5, 20, 20]))
    assert n.ct_to_unit(hu.astype(np.int16)).dtype == np.float32
