from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

from pipeline import installing
from pipeline.bundle import (
    MANIFEST,
    Manifest,
    NetworkEntry,
    Normalization,
    bundle_path,
    bundles_in,
    load_bundle,
    shipped_bundles,
)
from pipeline.errors import BundleError
from pipeline.installing import install_bundle
from pipeline.networks import NetworkSpec, build_network

CREATED = datetime(2026, 1, 2, tzinfo=UTC)
SPEC = NetworkSpec(width=1)


@pytest.fixture
def networks() -> dict[str, torch.nn.Module]:
    torch.manual_seed(1)
    return {key: build_network(SPEC).eval() for key in ("whole_body", "head")}


@pytest.fixture
def folder(tmp_path: Path, networks: dict[str, torch.nn.Module]) -> Path:
    return write_networks(tmp_path / "b", networks)


def write_networks(folder: Path, networks: dict[str, torch.nn.Module], **changes: Any) -> Path:
    """A bundle of these networks, of SPEC."""
    folder.mkdir()
    entries = {}
    for key, network in networks.items():
        data = save(network.state_dict())
        (folder / f"{key}.safetensors").write_bytes(data)
        entries[key] = NetworkEntry(file=f"{key}.safetensors", sha256=sha256(data).hexdigest(), spec=SPEC)
    settings: dict[str, Any] = {
        "name": "b",
        "version": "1",
        "created": CREATED,
        "profile": "robust",
        "licence": "none",
        "statement": "random weights",
        "spacing_mm": (4, 4, 4),
        "window": 32,
        "overlap": 16,
        "blending": "gaussian",
        "stitching": "feathered",
        "feather_mm": 8.0,
        "normalization": Normalization(),
        "networks": entries,
    }
    (folder / MANIFEST).write_text(Manifest(**(settings | changes)).model_dump_json())
    return folder


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


@pytest.mark.parametrize(("old", "new"), [('"suv_max":20.0', '"suv_max":30.0'), ("random weights", "random_weights")])
def test_one_changed_byte_of_a_sealed_manifest_is_refused(folder: Path, old: str, new: str) -> None:
    manifest = load_bundle(folder).manifest.model_copy(
        update={"metrics": {"mae": 0.1, "seeds": (0, 1)}, "training": {"seconds": float("nan"), "by": {3: "x"}}}
    )
    text = manifest.sealed().model_dump_json()
    (folder / MANIFEST).write_text(text)
    load_bundle(folder)
    (folder / MANIFEST).write_text(json.dumps(json.loads(text), indent=4))  # the same, laid out otherwise
    load_bundle(folder)
    assert old in text
    (folder / MANIFEST).write_text(text.replace(old, new))
    assert refused(folder) == "manifest_altered"


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


def test_an_installed_bundle_is_found_by_name_before_a_shipped_one(folder: Path, tmp_path: Path) -> None:
    installed = tmp_path / "installed"
    install_bundle(load_bundle(folder), installed)
    assert bundle_path("b", installed) == installed / "b"
    assert bundle_path("b", tmp_path / "nothing", installed) == installed / "b"
    (installed / "b").rename(installed / "phantom")
    assert bundle_path("phantom", installed) == installed / "phantom"
    with pytest.raises(BundleError, match="phantom"):
        bundle_path("b", installed)


def test_only_what_the_manifest_names_is_installed(folder: Path, tmp_path: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    (tmp_path / "x").mkdir()
    target = install_bundle(load_bundle(folder), tmp_path / "x" / "bundles")
    assert sorted(path.name for path in target.iterdir()) == ["head.safetensors", MANIFEST, "whole_body.safetensors"]
    assert load_bundle(target).manifest_sha256 == load_bundle(folder).manifest_sha256
    assert [path.name for path in target.parent.iterdir()] == ["b"]


def test_a_bundle_whose_networks_share_a_file_is_installed(folder: Path, tmp_path: Path) -> None:
    networks = json.loads((folder / MANIFEST).read_text())["networks"]
    change_manifest(folder, networks=networks | {"legs": networks["head"]})
    target = install_bundle(load_bundle(folder), tmp_path / "bundles")
    assert load_bundle(target).keys == ("head", "legs", "whole_body")


def test_installing_the_same_bundle_again_changes_nothing(folder: Path, tmp_path: Path) -> None:
    target = install_bundle(load_bundle(folder), tmp_path / "bundles")
    before = {path: path.stat().st_ino for path in target.iterdir()}
    assert install_bundle(load_bundle(folder), tmp_path / "bundles") == target
    assert {path: path.stat().st_ino for path in target.iterdir()} == before


def test_another_bundle_of_the_same_name_goes_only_when_asked(folder: Path, tmp_path: Path) -> None:
    bundles = tmp_path / "bundles"
    install_bundle(load_bundle(folder), bundles)
    change_manifest(folder, version="2")
    with pytest.raises(BundleError, match="bundle_exists"):
        install_bundle(load_bundle(folder), bundles)
    assert load_bundle(bundles / "b").manifest.version == "1"
    install_bundle(load_bundle(folder), bundles, replace=True)
    assert load_bundle(bundles / "b").manifest.version == "2"
    assert [path.name for path in bundles.iterdir()] == ["b"]


def test_a_shipped_bundle_s_name_is_taken_only_when_asked(folder: Path, tmp_path: Path) -> None:
    change_manifest(folder, name="phantom")
    with pytest.raises(BundleError, match="ships with the product"):
        install_bundle(load_bundle(folder), tmp_path / "bundles")
    assert install_bundle(load_bundle(folder), tmp_path / "bundles", replace=True).name == "phantom"


@pytest.mark.parametrize("name", ["../x", "a/b", "..", ".b", "a b", "a\x00b"])
def test_a_name_that_is_no_folder_s_is_not_installed(folder: Path, tmp_path: Path, name: str) -> None:
    change_manifest(folder, name=name)
    with pytest.raises(BundleError, match="bundle_name"):
        install_bundle(load_bundle(folder), tmp_path / "bundles")
    assert not (tmp_path / "bundles").exists()


def test_a_full_disk_installs_nothing_and_keeps_what_was_there(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundles = tmp_path / "bundles"
    install_bundle(load_bundle(folder), bundles)
    change_manifest(folder, version="2")

    def full(_: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(installing.os, "fsync", full)
    with pytest.raises(BundleError, match="not_written"):
        install_bundle(load_bundle(folder), bundles, replace=True)
    assert load_bundle(bundles / "b").manifest.version == "1"
    assert bundles_in(bundles) == [bundles / "b"]
    assert [path.name for path in bundles.iterdir()] == ["b"]


def test_weights_that_change_while_they_are_copied_are_not_installed(folder: Path, tmp_path: Path) -> None:
    bundle = load_bundle(folder)
    (folder / "head.safetensors").write_bytes(b"other")
    with pytest.raises(BundleError, match="weights_altered"):
        install_bundle(bundle, tmp_path / "bundles")
    assert not any((tmp_path / "bundles").iterdir())


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


def test_a_volume_s_own_range_scales_it_to_all_of_the_unit_range() -> None:
    n = Normalization(ct_range="volume")
    hu = np.array([-1024, -400, 0, 976], dtype=np.float32)
    np.testing.assert_allclose(n.ct_to_unit(hu), [0, 0.312, 0.512, 1], atol=1e-6)
    torch.testing.assert_close(n.ct_to_unit(torch.from_numpy(hu)), torch.from_numpy(n.ct_to_unit(hu)))
    assert n.ct_to_unit(hu).dtype == np.float32
    metal = np.append(hu, np.float32(2976))  # one voxel moves all others: why the profile "robust" has fixed limits
    assert n.ct_to_unit(metal)[2] == pytest.approx(0.256)
    assert n.ct_to_unit(np.full(3, 40, dtype=np.float32)).tolist() == [0, 0, 0]


def test_limits_of_a_volume_s_own_range_are_not_read() -> None:
    hu = np.array([-500, 500], dtype=np.float32)
    narrow = Normalization(ct_range="volume", ct_low_hu=-1.0, ct_high_hu=1.0)
    assert narrow.ct_to_unit(hu).tolist() == [0, 1]
