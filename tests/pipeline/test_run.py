"""A whole job on a small phantom with random weights, and its result on disk."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from hashlib import sha256
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ct_factory import write_ct
from pydicom import dcmread
from safetensors.torch import save_file

from pipeline import result as result_module
from pipeline import run as run_module
from pipeline.bundle import INPUT_CHANNELS, Manifest, ModelBundle, NetworkEntry, Normalization, load_bundle
from pipeline.device import Compute
from pipeline.errors import GateRefusal, OutputError
from pipeline.networks import NetworkSpec, build_network
from pipeline.run import choose_networks, read_summary, synthesize_series, synthesize_volume, write_result
from pipeline.types import (
    District,
    DistrictMap,
    EncodedInstance,
    GateFinding,
    GateOptions,
    Grid,
    PipelineOptions,
    Progress,
    ResultSet,
    Stage,
)
from training.phantom import PhantomSpec, make_phantom

CREATED = datetime(2024, 5, 6, 7, 8, 9, tzinfo=UTC)
SPEC = NetworkSpec(width=4, depth=2, window=16)
LINEAGE = {"recipe_sha256": "ab" * 32, "data_sha256": "cd" * 32}


def write_bundle(folder: Path, keys: tuple[str, ...], **changes: Any) -> ModelBundle:
    """A bundle of random networks of width 4 on a grid of 8 mm."""
    folder.mkdir(parents=True)
    spec = SPEC.model_copy(update={"in_channels": INPUT_CHANNELS[changes.get("input_mask", "body")]})
    entries = {}
    for seed, key in enumerate(keys):
        torch.manual_seed(seed)
        save_file(build_network(spec).state_dict(), folder / f"{key}.safetensors")
        digest = sha256((folder / f"{key}.safetensors").read_bytes()).hexdigest()
        entries[key] = NetworkEntry(file=f"{key}.safetensors", sha256=digest, spec=spec)
    settings: dict[str, Any] = {
        "name": "random",
        "version": "1",
        "created": CREATED,
        "profile": "robust",
        "licence": "none",
        "statement": "random weights, for tests",
        "spacing_mm": (8.0, 8.0, 8.0),
        "window": 16,
        "overlap": 8,
        "blending": "gaussian",
        "stitching": "feathered",
        "feather_mm": 16.0,
        "normalization": Normalization(),
        "networks": entries,
    }
    manifest = Manifest(**(settings | changes))
    (folder / "manifest.json").write_text(manifest.model_dump_json())
    return load_bundle(folder)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    keys = ("head", "trunk", "arms", "legs", "whole_body")
    return write_bundle(tmp_path_factory.mktemp("bundle") / "random", keys, training=LINEAGE)


@pytest.fixture(scope="module")
def ct_files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    spec = PhantomSpec(seed=1, spacing_mm=(6.0, 6.0, 6.0), pose="sides", coverage=(0.4, 1.0), noise=False)
    phantom = make_phantom(spec)
    return write_ct(tmp_path_factory.mktemp("ct"), phantom.hu, spacing_mm=phantom.grid.spacing_mm)


@pytest.fixture(scope="module")
def options(bundle: ModelBundle) -> PipelineOptions:
    return PipelineOptions(bundle=bundle.folder, device="cpu", threads=1)


@pytest.fixture(scope="module")
def reports() -> list[Progress]:
    return []


@pytest.fixture(scope="module")
def found() -> list[DistrictMap]:
    return []


@pytest.fixture(scope="module")
def result(
    ct_files: list[Path],
    bundle: ModelBundle,
    options: PipelineOptions,
    reports: list[Progress],
    found: list[DistrictMap],
) -> ResultSet:
    both = replace(options, output=replace(options.output, encodings=("sc", "pet")))
    real = run_module.find_districts

    def remembered(*arguments: Any, **others: Any) -> DistrictMap:
        found.append(real(*arguments, **others))
        return found[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "find_districts", remembered)
        return synthesize_series(ct_files, bundle, both, created=CREATED, on_progress=reports.append)


@pytest.fixture
def _known_districts(monkeypatch: pytest.MonkeyPatch, result: ResultSet, found: list[DistrictMap]) -> None:
    """The districts that the segmenter found for `result`: finding them is most of a small job's time."""
    monkeypatch.setattr(run_module, "find_districts", lambda *_, **__: found[0])


def test_a_ct_series_becomes_a_pet_series_in_every_encoding_and_one_picture(result: ResultSet) -> None:
    assert [(s.kind, s.encoding) for s in result.series] == [("pet", "sc"), ("pet", "pet"), ("mip", "sc")]
    sc, pet, mip = result.series
    assert len(sc.instances) == len(pet.instances) > 50
    assert len(mip.instances) == 1
    assert result.overview_png.startswith(b"\x89PNG")
    uids = [i.sop_instance_uid for s in result.series for i in s.instances] + [s.series_uid for s in result.series]
    assert len(set(uids)) == len(uids)


def test_the_written_objects_say_who_they_come_from(result: ResultSet, ct_files: list[Path]) -> None:
    ct = dcmread(ct_files[0], stop_before_pixels=True)
    for series in result.series:
        for instance in (series.instances[0], series.instances[-1]):
            ds = dcmread(BytesIO(instance.data), stop_before_pixels=True)
            assert instance.sop_instance_uid == ds.SOPInstanceUID
            assert series.series_uid == ds.SeriesInstanceUID
            assert ct.StudyInstanceUID == ds.StudyInstanceUID


def test_every_district_of_the_phantom_is_evaluated(result: ResultSet) -> None:
    stats = {s.district: s for s in result.stats}
    assert set(stats) == set(District)
    assert all(s.evaluated and s.suv_max >= s.suv_mean > 0 for s in stats.values())


def test_the_provenance_names_bundle_networks_and_segmenter(result: ResultSet, bundle: ModelBundle) -> None:
    made_by = result.provenance
    assert (made_by.bundle_name, made_by.bundle_sha256) == ("random", bundle.manifest_sha256)
    assert made_by.segmenter == "builtin"
    assert made_by.device == "cpu"
    assert made_by.settings == made_by.fallbacks == ()
    known = {key: entry.sha256 for key, entry in bundle.manifest.networks.items()}
    assert made_by.models
    assert all(known[m.district] == m.weights_sha256 for m in made_by.models)
    assert made_by.networks == ("head=head", "trunk=trunk", "arms=arms", "legs=legs")


def test_every_written_object_names_software_bundle_weights_recipe_and_data(
    result: ResultSet, bundle: ModelBundle
) -> None:
    assert (result.provenance.recipe_sha256, result.provenance.data_sha256) == ("ab" * 32, "cd" * 32)
    weights = {f"random {key}": entry.sha256[:12] for key, entry in bundle.manifest.networks.items()}
    for series in result.series:
        ds = dcmread(BytesIO(series.instances[0].data), stop_before_pixels=True)
        assert ds.SoftwareVersions == version("dicom-node")
        assert bundle.manifest_sha256[:12] == ds.DeviceSerialNumber
        assert "by random 1;" in ds.DerivationDescription
        *networks, segmenter = ds.ContributingEquipmentSequence
        assert {item.ManufacturerModelName for item in networks} == set(weights) - {"random whole_body"}
        for item in networks:
            assert (item.SoftwareVersions, item.DeviceSerialNumber) == ("1", weights[item.ManufacturerModelName])
            said = item.ContributionDescription
            for digest in (weights[item.ManufacturerModelName], bundle.manifest_sha256[:12]):
                assert digest in said
            assert f"recipe {'ab' * 6}, data {'cd' * 6}, software {version('dicom-node')}" in said
        assert segmenter.ManufacturerModelName == "builtin"


def test_a_manifest_that_says_nothing_sound_of_its_data_adds_no_words(
    ct_files: list[Path], options: PipelineOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    found: list[DistrictMap], result: ResultSet,
) -> None:  # fmt: skip
    monkeypatch.setattr(run_module, "find_districts", lambda *_, **__: found[0])
    odd = write_bundle(tmp_path / "odd", ("whole_body",), training={"data_sha256": "x\ny", "recipe_sha256": 7})
    made = synthesize_series(ct_files, odd, options, created=CREATED)
    assert (made.provenance.recipe_sha256, made.provenance.data_sha256) == ("", "")
    ds = dcmread(BytesIO(made.series[-1].instances[0].data), stop_before_pixels=True)
    assert "data" not in ds.ContributingEquipmentSequence[0].ContributionDescription
    assert made.series[0].series_uid != result.series[0].series_uid


def test_each_stage_is_timed_and_reported_in_order(result: ResultSet, reports: list[Progress]) -> None:
    stages = [stage for stage in Stage if stage is not Stage.UNCERTAINTY]  # not asked for
    assert list(result.stage_seconds) == [stage.value for stage in stages]
    assert all(seconds >= 0 for seconds in result.stage_seconds.values())
    order = list(dict.fromkeys(report.stage for report in reports))
    assert order == stages
    assert all(0 <= report.done <= report.total for report in reports)
    windows = [r.done for r in reports if r.stage is Stage.SYNTHESIS and r.text]
    assert windows == sorted(windows)
    assert windows[-1] == next(r.total for r in reports if r.stage is Stage.SYNTHESIS and r.text)


def test_the_same_job_twice_gives_the_same_bytes(
    ct_files: list[Path], bundle: ModelBundle, options: PipelineOptions, result: ResultSet
) -> None:
    again = synthesize_series(ct_files[::-1], bundle, options, created=CREATED)
    assert again.series[0] == result.series[0]
    assert again.series[1] == result.series[2]
    assert again.stats == result.stats


@pytest.mark.usefixtures("_known_districts")
def test_other_blending_is_another_result(
    ct_files: list[Path], bundle: ModelBundle, options: PipelineOptions, result: ResultSet
) -> None:
    changed = replace(options, blending="mean", stitching="hard", min_confidence=1.1, low_confidence="whole_body")
    other = synthesize_series(ct_files, bundle, changed, created=CREATED)
    assert other.provenance.settings == ("blending=mean", "stitching=hard")
    assert [m.district for m in other.provenance.models] == ["whole_body"]
    assert other.series[0].series_uid != result.series[0].series_uid
    assert sum("whole-body network" in note for note in other.notes) == len(other.stats)


@pytest.mark.usefixtures("_known_districts")
def test_a_district_without_a_network_stays_empty_and_is_reported(
    ct_files: list[Path], tmp_path: Path, options: PipelineOptions
) -> None:
    only_trunk = write_bundle(tmp_path / "trunk", ("trunk",), input_mask="district", stitching="hard")
    result = synthesize_series(ct_files, only_trunk, options, created=CREATED)
    evaluated = {s.district: s.evaluated for s in result.stats}
    assert evaluated == {District.HEAD: False, District.TRUNK: True, District.ARMS: False, District.LEGS: False}
    assert any(note.startswith("head: ") and note.endswith("not evaluated") for note in result.notes)
    assert all(s.suv_max == 0 for s in result.stats if not s.evaluated)


@pytest.mark.usefixtures("_known_districts")
def test_the_same_networks_in_other_districts_are_another_result(
    monkeypatch: pytest.MonkeyPatch,
    ct_files: list[Path],
    bundle: ModelBundle,
    options: PipelineOptions,
    found: list[DistrictMap],
) -> None:
    uids = set()
    for unsure in (District.ARMS, District.LEGS):
        confidence = {**found[0].confidence, unsure: 0.1, District.HEAD: 0.1}
        districts = replace(found[0], confidence=confidence)
        monkeypatch.setattr(run_module, "find_districts", lambda *_, d=districts, **__: d)
        monkeypatch.setattr(run_module, "synthesize", lambda channels, *_, **__: channels[0])
        for low_confidence in ("whole_body", "not_evaluated"):
            chosen = replace(options, low_confidence=low_confidence)
            result = synthesize_series(ct_files, bundle, chosen, created=CREATED)
            word = {"whole_body": "whole_body", "not_evaluated": "none"}[low_confidence]
            assert f"{unsure.key}={word}" in result.provenance.networks
            uids.add(result.series[0].series_uid)
    assert len(uids) == 4


@pytest.mark.parametrize(
    ("precision", "expected"), [("auto", ()), ("fp32", ("precision=fp32",)), ("bf16", ("precision=bf16",))]
)
def test_a_precision_that_is_asked_for_is_a_setting_and_one_that_is_found_is_not(
    bundle: ModelBundle, options: PipelineOptions, precision: str, expected: tuple[str, ...]
) -> None:
    settings = run_module._Settings.of(bundle.manifest, replace(options, precision=precision))
    assert settings.changed == expected


@pytest.mark.usefixtures("_known_districts")
def test_the_whole_body_network_sees_the_whole_body_where_the_others_see_their_district(
    monkeypatch: pytest.MonkeyPatch, ct_files: list[Path], tmp_path: Path, options: PipelineOptions
) -> None:
    keys = ("trunk", "whole_body")
    paper = write_bundle(tmp_path / "paper", keys, input_mask="district", stitching="hard")
    sees_more: list[bool] = []

    def blank(channels: Any, mask: Any, *_: Any, **__: Any) -> Any:
        sees_more.append(bool((channels[0][~mask] > 0).any()))
        return np.full(mask.shape, 0.1, dtype=np.float32)

    monkeypatch.setattr(run_module, "synthesize", blank)
    synthesize_series(ct_files, paper, options, created=CREATED)
    assert sees_more == [True, False]  # head, arms and legs in one pass; trunk


@pytest.mark.usefixtures("_known_districts")
def test_a_lack_of_memory_is_recorded_and_changes_neither_uids_nor_values(
    monkeypatch: pytest.MonkeyPatch,
    ct_files: list[Path],
    bundle: ModelBundle,
    options: PipelineOptions,
    result: ResultSet,
) -> None:
    real = run_module.synthesize

    def short_of_memory(*arguments: Any, batch: int, **others: Any) -> Any:
        if batch > 4:
            raise MemoryError
        return real(*arguments, batch=batch, **others)

    monkeypatch.setattr(run_module, "synthesize", short_of_memory)
    poor = synthesize_series(ct_files, bundle, options, created=CREATED)
    assert len(poor.provenance.fallbacks) == 2  # 16 to 8 to 4, once for all districts
    assert set(poor.provenance.fallbacks) <= set(poor.notes)
    assert poor.series[0].series_uid == result.series[0].series_uid
    assert [s.suv_mean for s in poor.stats] == pytest.approx([s.suv_mean for s in result.stats], abs=1e-3)


@pytest.mark.usefixtures("_known_districts")
def test_a_gpu_that_is_full_before_the_job_begins_is_recorded(
    monkeypatch: pytest.MonkeyPatch, ct_files: list[Path], bundle: ModelBundle, options: PipelineOptions
) -> None:
    def full(*_: object) -> None:
        raise torch.AcceleratorError("CUDA error: out of memory")

    monkeypatch.setattr(run_module, "synthesize", lambda channels, *_, **__: channels[0])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", full)
    result = synthesize_series(ct_files, bundle, replace(options, device="auto"), created=CREATED)
    assert result.provenance.device == "cpu"
    assert result.provenance.fallbacks == ("out of memory on cuda:0 before the first window: on the cpu",)
    assert set(result.provenance.fallbacks) <= set(result.notes)


@pytest.mark.usefixtures("_known_districts")
def test_a_gate_that_finds_the_output_implausible_holds_a_complete_result(
    monkeypatch: pytest.MonkeyPatch, ct_files: list[Path], bundle: ModelBundle, options: PipelineOptions
) -> None:
    finding = GateFinding(code="out_of_range", text="SUV 99 in the trunk, at most 20 is expected")
    monkeypatch.setattr(run_module, "check_output", lambda *_: (finding,))
    held = synthesize_series(ct_files, bundle, options, created=CREATED)
    assert held.held == finding
    assert held.series
    assert held.overview_png.startswith(b"\x89PNG")


def test_a_series_that_covers_too_little_is_refused(
    ct_files: list[Path], bundle: ModelBundle, options: PipelineOptions
) -> None:
    with pytest.raises(GateRefusal):
        synthesize_series(ct_files, bundle, replace(options, gate=GateOptions(min_coverage_mm=5000.0)), created=CREATED)


def test_what_crosses_to_the_engine_can_be_pickled(result: ResultSet, options: PipelineOptions) -> None:
    assert pickle.loads(pickle.dumps(options)) == options
    assert pickle.loads(pickle.dumps(result.provenance)) == result.provenance


# --- which network -----------------------------------------------------------------------------------------------

ALL = ("head", "trunk", "arms", "legs", "whole_body")


def districts_with(confidence: Mapping[District, float]) -> DistrictMap:
    labels = np.array([0, *confidence], dtype=np.uint8).reshape(-1, 1, 1)
    grid = Grid(shape=labels.shape, spacing_mm=(1, 1, 1), origin_mm=(0, 0, 0), frame_of_reference_uid="1.2")
    return DistrictMap(labels=labels, grid=grid, segmenter="t", version="1", confidence=confidence)


@pytest.mark.parametrize(
    ("confidence", "keys", "low_confidence", "expected"),
    [
        (0.9, ALL, "whole_body", "arms"),
        (0.5, ALL, "whole_body", "arms"),
        (0.4, ALL, "whole_body", "whole_body"),
        (0.4, ALL, "not_evaluated", None),
        (0.4, ("arms",), "whole_body", None),
        (0.9, ("trunk", "whole_body"), "not_evaluated", "whole_body"),
        (0.9, ("trunk",), "whole_body", None),
        (0.4, ("whole_body",), "whole_body", "whole_body"),
        (0.4, ("whole_body",), "not_evaluated", None),
    ],
)
def test_the_network_of_a_district_follows_confidence_bundle_and_options(
    confidence: float, keys: tuple[str, ...], low_confidence: str, expected: str | None
) -> None:
    options = PipelineOptions(bundle=Path("b"), min_confidence=0.5, low_confidence=low_confidence)
    chosen, notes = choose_networks(districts_with({District.ARMS: confidence}), keys, options)
    assert chosen.get(District.ARMS) == expected
    assert bool(notes) == (expected != "arms")


# --- one volume --------------------------------------------------------------------------------------------------

ON_CPU = Compute(device=torch.device("cpu"), precision="fp32", batch=8)


def stacked_districts() -> DistrictMap:
    """Head over trunk over legs in a box of body, air around it."""
    labels = np.zeros((36, 20, 20), dtype=np.uint8)
    for district, rows in ((District.LEGS, (2, 12)), (District.TRUNK, (12, 24)), (District.HEAD, (24, 34))):
        labels[rows[0] : rows[1], 3:17, 3:17] = district
    grid = Grid(shape=labels.shape, spacing_mm=(8, 8, 8), origin_mm=(0, 0, 0), frame_of_reference_uid="1.2")
    return DistrictMap(labels=labels, grid=grid, segmenter="t", version="1", confidence=dict.fromkeys(District, 1.0))


def scaled_ct(districts: DistrictMap) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(3).random(districts.grid.shape, dtype=np.float32)


@pytest.mark.parametrize("stitching", ["hard", "feathered"])
def test_a_network_that_serves_all_districts_runs_once_and_gives_what_the_whole_body_gives(
    monkeypatch: pytest.MonkeyPatch, bundle: ModelBundle, stitching: str
) -> None:
    masks: list[Any] = []
    real = run_module.synthesize

    def counted(channels: Any, mask: Any, *arguments: Any, **others: Any) -> Any:
        masks.append(mask)
        return real(channels, mask, *arguments, **others)

    monkeypatch.setattr(run_module, "synthesize", counted)
    districts = stacked_districts()
    body = districts.labels > 0
    whole = dict.fromkeys(districts.present, "whole_body")
    ct = scaled_ct(districts)
    volume = synthesize_volume(ct, districts, whole, bundle, compute=ON_CPU, stitching=stitching)
    assert len(masks) == 1
    np.testing.assert_array_equal(masks[0], body)
    one_label = replace(districts, labels=np.where(body, np.uint8(District.TRUNK), np.uint8(0)))
    plain = synthesize_volume(ct, one_label, {District.TRUNK: "whole_body"}, bundle, compute=ON_CPU, stitching="hard")
    np.testing.assert_array_equal(volume, plain)
    assert volume[body].min() > 0
    assert not volume[~body].any()


def test_a_volume_of_a_subset_of_districts_is_empty_elsewhere(bundle: ModelBundle) -> None:
    districts = stacked_districts()
    volume = synthesize_volume(scaled_ct(districts), districts, {District.HEAD: "head"}, bundle, compute=ON_CPU)
    head = districts.mask(District.HEAD)
    assert (volume[head] > 0).all()
    assert not volume[~head].any()


def test_a_network_conditioned_on_the_district_answers_to_the_labels(tmp_path: Path) -> None:
    conditioned = write_bundle(tmp_path / "one", ("whole_body",), input_mask="districts")
    districts = stacked_districts()
    ct = scaled_ct(districts)
    networks, notes = choose_networks(districts, conditioned.keys, PipelineOptions(bundle=conditioned.folder))
    assert networks == dict.fromkeys(districts.present, "whole_body")
    assert notes == ()
    volume = synthesize_volume(ct, districts, networks, conditioned, compute=ON_CPU)
    relabeled = replace(districts, labels=np.where(districts.labels > 0, np.uint8(District.ARMS), np.uint8(0)))
    other = synthesize_volume(ct, relabeled, {District.ARMS: "whole_body"}, conditioned, compute=ON_CPU)
    assert volume.shape == ct.shape
    assert not np.allclose(volume, other, atol=1e-4)


def test_with_the_district_as_a_channel_each_district_has_its_own_pass_and_the_whole_body_one(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "channel", ("head", "trunk", "whole_body"), input_mask="channel")
    districts = stacked_districts()
    networks = {
        District.HEAD: "head",
        District.TRUNK: "trunk",
        District.ARMS: "whole_body",
        District.LEGS: "whole_body",
    }
    groups = [(one.key, one.districts) for one in run_module._passes(districts, networks, bundle.manifest, "hard")]
    assert groups == [
        ("head", (District.HEAD,)),
        ("trunk", (District.TRUNK,)),
        ("whole_body", (District.ARMS, District.LEGS)),
    ]


@pytest.mark.usefixtures("_known_districts")
def test_a_bundle_of_the_paper_s_profile_works_on_a_whole_series(
    ct_files: list[Path], tmp_path: Path, options: PipelineOptions, result: ResultSet
) -> None:
    paper = {
        "profile": "paper",
        "blending": "mean",
        "stitching": "hard",
        "feather_mm": 0.0,
        "input_mask": "district",
        "normalization": Normalization(ct_range="volume"),
    }
    bundle = write_bundle(tmp_path / "paper", ALL, **paper)
    made = synthesize_series(ct_files, bundle, options, created=CREATED)
    assert {s.district for s in made.stats if s.evaluated and s.suv_max > 0} == set(District)
    assert made.series[0].series_uid != result.series[0].series_uid


# --- on disk -----------------------------------------------------------------------------------------------------


def test_a_written_result_reads_back_as_it_was(result: ResultSet, tmp_path: Path) -> None:
    folder = tmp_path / "job"
    write_result(result, folder)
    summary = read_summary(folder)
    assert summary.stats == result.stats
    assert summary.provenance == result.provenance
    assert summary.stage_seconds == result.stage_seconds
    assert summary.notes == result.notes
    assert summary.held is None
    for entry, series in zip(summary.series, result.series, strict=True):
        assert (entry.series_uid, entry.instances) == (series.series_uid, len(series.instances))
        files = sorted((folder / entry.folder).iterdir())
        assert [f.read_bytes() for f in files] == [i.data for i in series.instances]
        assert dcmread(files[0], stop_before_pixels=True).SOPClassUID == entry.sop_class_uid
    assert (folder / "overview.png").read_bytes() == result.overview_png
    assert [p.name for p in tmp_path.iterdir()] == ["job"]


def small(result: ResultSet, **changes: Any) -> ResultSet:
    """Only the picture: quick to write."""
    return replace(result, series=result.series[-1:], **changes)


def test_a_held_result_says_so_on_disk(result: ResultSet, tmp_path: Path) -> None:
    finding = GateFinding(code="output_range", text="too high")
    write_result(small(result, held=finding), tmp_path / "job")
    assert read_summary(tmp_path / "job").held == finding


class Killed(BaseException):
    """Stands for a kill: nothing in the product catches it."""


@pytest.mark.parametrize("step", range(9))
def test_a_kill_at_any_sync_leaves_no_folder_or_a_whole_one_and_the_rerun_succeeds(
    monkeypatch: pytest.MonkeyPatch, result: ResultSet, tmp_path: Path, step: int
) -> None:
    calls = 0
    real = os.fsync

    def fsync(descriptor: int) -> None:
        nonlocal calls
        if calls == step:
            raise Killed
        calls += 1
        real(descriptor)

    folder = tmp_path / "job"
    with monkeypatch.context() as patch:
        patch.setattr(result_module.os, "fsync", fsync)
        try:
            write_result(small(result), folder)
        except Killed:
            if folder.exists():
                assert read_summary(folder).series
    write_result(small(result), folder)
    assert read_summary(folder).series[0].instances == 1
    assert [p.name for p in tmp_path.iterdir()] == ["job"]


def test_files_on_their_way_to_a_peer_are_not_written_again(result: ResultSet, tmp_path: Path) -> None:
    folder = tmp_path / "job"
    write_result(small(result), folder)
    before = {p: p.stat().st_ino for p in folder.rglob("*")}
    write_result(small(result, stage_seconds={"read": 99.0}), folder)
    assert {p: p.stat().st_ino for p in folder.rglob("*")} == before


def test_a_result_with_other_series_replaces_the_first(result: ResultSet, tmp_path: Path) -> None:
    folder = tmp_path / "job"
    write_result(small(result), folder)
    (series,) = small(result).series
    write_result(replace(small(result), series=(replace(series, series_uid="1.2.3"),)), folder)
    assert read_summary(folder).series[0].series_uid == "1.2.3"
    assert [p.name for p in tmp_path.iterdir()] == ["job"]


def instance(**changes: str) -> EncodedInstance:
    plain = {"sop_class_uid": "1.2", "sop_instance_uid": "1.2.3", "transfer_syntax_uid": "1.2", "file_name": "0001.dcm"}
    return EncodedInstance(**(plain | changes), data=b"x")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "instances",
    [
        (instance(file_name="../0001.dcm"),),
        (instance(file_name="/etc/x"),),
        (instance(file_name=".."),),
        (instance(), instance(file_name="0002.dcm", sop_class_uid="1.3")),
        (),
    ],
)
def test_a_malformed_result_is_refused_and_leaves_nothing(
    result: ResultSet, tmp_path: Path, instances: tuple[EncodedInstance, ...]
) -> None:
    (series,) = small(result).series
    with pytest.raises(OutputError):
        write_result(replace(small(result), series=(replace(series, instances=instances),)), tmp_path / "job")
    assert not (tmp_path / "job").exists()


def test_a_full_disk_leaves_nothing_behind_and_can_be_tried_again(
    monkeypatch: pytest.MonkeyPatch, result: ResultSet, tmp_path: Path
) -> None:
    def no_room(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(result_module.os, "fsync", no_room)
        with pytest.raises(OutputError, match=r"not_written: .*No space left"):
            write_result(small(result), tmp_path / "job")
    assert not list(tmp_path.iterdir())


def test_two_instances_of_one_name_are_a_fault_not_a_shorter_series(result: ResultSet, tmp_path: Path) -> None:
    (series,) = small(result).series
    with pytest.raises(OutputError, match="File exists"):
        write_result(
            replace(small(result), series=(replace(series, instances=(instance(), instance())),)), tmp_path / "j"
        )


def test_no_result_and_a_damaged_summary_are_named(result: ResultSet, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no_result"):
        read_summary(tmp_path / "nothing")
    write_result(small(result), tmp_path / "job")
    (tmp_path / "job" / "result.json").write_text("{")
    with pytest.raises(OutputError, match="malformed"):
        read_summary(tmp_path / "job")
    shutil.rmtree(tmp_path / "job")
