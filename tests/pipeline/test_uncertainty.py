"""The uncertainty map: the numbers, and the series that carries them."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from outputs_samples import CREATED, PROVENANCE, Sample, read_back, sample_suv, source_of, write_sample_ct, write_series
from pydicom import dcmread
from pydicom.uid import SecondaryCaptureImageStorage
from test_outputs_validators import NOT_IN_IOD, complaints, tool
from tiny_bundle import write_tiny_bundle
from tiny_study import write_tiny_study

from pipeline import run as run_module
from pipeline.bundle import load_bundle
from pipeline.errors import OutputError
from pipeline.outputs.statistics import district_stats
from pipeline.outputs.uncertainty_series import ENCODING, encode_uncertainty_series
from pipeline.provenance import ResultUids
from pipeline.run import synthesize_series
from pipeline.types import (
    District,
    DistrictMap,
    EncodedSeries,
    FloatVolume,
    GateOptions,
    GeometryError,
    Grid,
    OnProgress,
    OutputOptions,
    PipelineOptions,
    Progress,
    ResultSet,
    SourceSeries,
    Stage,
    SuvVolume,
    ignore_progress,
)
from pipeline.uncertainty import FLIPS, UNSEEN, UNSEEN_NOTE, flip_deviation, flips_for

SHAPE = (3, 4, 5)
GRID = Grid(shape=SHAPE, spacing_mm=(8.0, 8.0, 8.0), origin_mm=(0.0, 0.0, 0.0), frame_of_reference_uid="2.25.5")


def district_map(labels: np.ndarray) -> DistrictMap:
    return DistrictMap(labels=labels, grid=GRID, segmenter="test", version="1", confidence={District.TRUNK: 1.0})


TRUNK = district_map(np.full(SHAPE, int(District.TRUNK), dtype=np.uint8))
CT = np.random.default_rng(5).uniform(0, 1, SHAPE).astype(np.float32)


def deviation_of(network, ct: FloatVolume = CT, districts: DistrictMap = TRUNK) -> FloatVolume:
    """Of a network that gives the SUV [z, y, x] for a CT and its labels, of which 0 stays 0."""

    def synthesize(seen: FloatVolume, found: DistrictMap, _: OnProgress) -> FloatVolume:
        return np.where(found.labels > 0, network(seen), 0).astype(np.float32)

    return flip_deviation(
        synthesize(ct, districts, ignore_progress), ct, districts, synthesize, tuple(FLIPS), ignore_progress
    )


def test_a_network_that_answers_a_flip_alike_is_certain() -> None:
    assert not deviation_of(lambda ct: 7.3 * ct).any()


def test_a_network_that_answers_by_place_gives_the_known_deviation() -> None:
    """The SUV is the column: at column x the members are x, 4 - x (left-right) and x (front-back)."""
    columns = np.broadcast_to(np.arange(5, dtype=np.float32), SHAPE)
    members = np.stack([columns, columns[..., ::-1], columns])
    found = deviation_of(lambda _: columns)
    assert found.dtype == np.float32
    assert found == pytest.approx(members.std(axis=0), abs=1e-6)
    assert found[0, 0] == pytest.approx(np.array([4, 2, 0, 2, 4]) * np.sqrt(2) / 3, abs=1e-6)


def test_front_to_back_counts_and_feet_to_head_does_not() -> None:
    rows = np.broadcast_to(np.arange(4, dtype=np.float32)[:, None], SHAPE)
    assert (deviation_of(lambda _: rows) > 0).all()
    planes = np.broadcast_to(np.arange(3, dtype=np.float32)[:, None, None], SHAPE)
    assert not deviation_of(lambda _: planes).any()


@pytest.mark.parametrize(
    ("training", "flips"),
    [
        ({"recipe": {"augment": {"flips": True}}}, tuple(FLIPS)),
        ({"recipe": {"augment": {"flips": False}}}, UNSEEN),
        ({"recipe": {"augment": "none"}}, UNSEEN),
        ({"recipe": "paper"}, UNSEEN),
        ({}, UNSEEN),
    ],
)
def test_only_networks_that_were_trained_with_flips_are_shown_all_of_them(
    training: dict[str, Any], flips: tuple[str, ...]
) -> None:
    assert flips_for(training) == flips


def test_the_districts_are_flipped_with_the_ct() -> None:
    labels = np.zeros(SHAPE, dtype=np.uint8)
    labels[:, 1:, 2:] = int(District.TRUNK)
    columns = np.broadcast_to(np.arange(1, 6, dtype=np.float32), SHAPE)
    found = deviation_of(lambda _: columns, districts=district_map(labels))
    assert (found[labels == 0] == 0).all()
    assert (found[labels > 0][:1] >= 0).all()
    assert found[0, 2, 4] == pytest.approx(np.std([5, 1, 5]), abs=1e-6)


def test_the_result_itself_is_not_changed() -> None:
    suv = CT.copy()
    flip_deviation(suv, CT, TRUNK, lambda ct, *_: ct * 2, tuple(FLIPS), ignore_progress)
    assert (suv == CT).all()


def test_the_progress_runs_once_through_all_flips() -> None:
    seen: list[Progress] = []

    def synthesize(ct: FloatVolume, _: DistrictMap, listen: OnProgress) -> FloatVolume:
        for done in range(5):
            listen(Progress(stage=Stage.SYNTHESIS, done=done, total=4))
        return ct

    flip_deviation(CT, CT, TRUNK, synthesize, tuple(FLIPS), seen.append)
    assert {p.stage for p in seen} == {Stage.UNCERTAINTY}
    assert [p.done for p in seen] == sorted(p.done for p in seen)
    assert (seen[0].done, seen[-1].done) == (0, seen[-1].total)
    assert list(dict.fromkeys(p.text for p in seen)) == list(FLIPS)


def test_the_mean_deviation_of_a_district_is_that_of_the_written_values() -> None:
    labels = TRUNK.labels.copy()
    labels[0] = int(District.HEAD)
    deviation = SuvVolume(suv=CT, grid=GRID, not_evaluated=(District.HEAD,))
    head, trunk = district_stats(replace(deviation, suv=CT * 3), district_map(labels), deviation)
    assert head.uncertainty is None
    assert trunk.uncertainty == pytest.approx(CT[1:].mean(), abs=0.0005)
    assert district_stats(deviation, district_map(labels))[1].uncertainty is None
    with pytest.raises(GeometryError, match="uncertainty"):
        district_stats(deviation, district_map(labels), sample_suv())


@pytest.fixture(scope="module")
def ct(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_sample_ct(tmp_path_factory.mktemp("ct"))


@pytest.fixture(scope="module")
def source(ct: list[Path]) -> SourceSeries:
    return source_of(ct)


def encoded(source: SourceSeries, deviation: SuvVolume, **changes: object) -> EncodedSeries:
    options = OutputOptions(**changes)
    uids = ResultUids(source=source, provenance=PROVENANCE, options=options, encoding=ENCODING)
    return encode_uncertainty_series(
        deviation, source=source, provenance=PROVENANCE, options=options, uids=uids, created=CREATED
    )


def deviation_volume() -> SuvVolume:
    suv = sample_suv()
    return replace(suv, suv=suv.suv / 20)


def test_no_object_of_the_map_can_be_taken_for_uptake(source: SourceSeries) -> None:
    series = encoded(source, deviation_volume())
    assert (series.kind, series.encoding) == ("uncertainty", "sc")
    for ds in read_back(series):
        assert (ds.SOPClassUID, ds.Modality, ds.SeriesNumber) == (SecondaryCaptureImageStorage, "OT", 9010)
        assert ds.SeriesDescription.startswith("SYNTHETIC")
        assert len(ds.SeriesDescription) <= 64
        assert "UNCERTAINTY" in ds.ImageType
        for text in (ds.SeriesDescription, ds.DerivationDescription, ds.ImageComments):
            assert "STANDARD DEVIATION" in text
            assert "UNCERTAINTY" in text
            assert "NOT UPTAKE" in text
        for keyword in ("Units", "SUVType", "RadiopharmaceuticalInformationSequence", "CorrectedImage", "DecayFactor"):
            assert keyword not in ds
        assert "QuantityDefinitionSequence" not in ds.RealWorldValueMappingSequence[0]
        assert ds.SyntheticData == "YES"


def test_a_district_that_was_not_evaluated_is_named(source: SourceSeries) -> None:
    (ds, *_) = read_back(encoded(source, replace(deviation_volume(), not_evaluated=(District.LEGS,))))
    assert "NOT EVALUATED" in ds.ImageComments
    assert "legs" in ds.DerivationDescription


def test_the_map_reads_back_on_the_grid_of_the_pet(source: SourceSeries, tmp_path: Path) -> None:
    deviation = deviation_volume()
    images = []
    pet = Sample(source=source, suv=sample_suv()).pet("sc")
    for name, series in (("pet", pet), ("map", encoded(source, deviation))):
        write_series(series, tmp_path / name)
        reader = sitk.ImageSeriesReader()
        reader.SetFileNames(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(tmp_path / name)))
        images.append(reader.Execute())
    for geometry in ("GetOrigin", "GetSpacing", "GetDirection", "GetSize"):
        assert getattr(images[0], geometry)() == getattr(images[1], geometry)()
    step = float(read_back(encoded(source, deviation))[0].RescaleSlope)
    assert np.abs(sitk.GetArrayFromImage(images[1]) - deviation.suv).max() <= step / 2 + 1e-7
    planes = read_back(pet)
    for ours, plane in zip(read_back(encoded(source, deviation)), planes, strict=True):
        for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "FrameOfReferenceUID"):
            assert ours[keyword] == plane[keyword]
        assert ours.SourceImageSequence == plane.SourceImageSequence


def test_the_validators_find_nothing_but_what_secondary_capture_must_get(
    ct: list[Path], source: SourceSeries, tmp_path: Path
) -> None:
    paths = write_series(encoded(source, deviation_volume()), tmp_path / "map")
    for path in (paths[0], paths[-1]):
        found = complaints(path)
        assert [line for line in found if not (line.startswith("Warning") and line.endswith(NOT_IN_IOD))] == []
    pet = write_series(Sample(source=source, suv=sample_suv()).pet("sc"), tmp_path / "pet")
    done = subprocess.run(
        [tool("dcentvfy"), *map(str, (*ct, *pet, *paths))], capture_output=True, text=True, timeout=60
    )
    assert (done.stdout + done.stderr).strip() == ""


def test_the_uids_are_stable_and_of_their_own(source: SourceSeries) -> None:
    deviation = deviation_volume()
    one = encoded(source, deviation)
    assert one == encoded(source, deviation)
    assert one == encoded(source, deviation, uncertainty=True, mip=False, seg=True)
    other = encoded(source, deviation, uncertainty_series_number=9040)
    pet = Sample(source=source, suv=sample_suv()).pet("sc")
    uids = [u for s in (one, other, pet) for u in (s.series_uid, *(i.sop_instance_uid for i in s.instances))]
    assert len(set(uids)) == len(uids)


def test_a_grid_without_a_frame_of_reference_is_refused(source: SourceSeries) -> None:
    deviation = deviation_volume()
    with pytest.raises(OutputError) as refused:
        encoded(source, replace(deviation, grid=replace(deviation.grid, frame_of_reference_uid="")))
    assert refused.value.code == "no_frame_of_reference"


def job(folder: Path, found: list[DistrictMap], on_progress: OnProgress = ignore_progress, **output: bool) -> ResultSet:
    if not (folder / "ct").exists():
        write_tiny_study(folder / "ct")
        write_tiny_bundle(folder / "bundle")
    real = run_module.find_districts

    def once(*arguments: object, **others: object) -> DistrictMap:
        if not found:
            found.append(real(*arguments, **others))
        return found[0]

    options = PipelineOptions(
        bundle=folder / "bundle",
        device="cpu",
        threads=1,
        gate=GateOptions(required_districts=()),
        output=OutputOptions(**output),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "find_districts", once)
        return synthesize_series(
            sorted((folder / "ct").iterdir()),
            load_bundle(folder / "bundle"),
            options,
            created=datetime(2024, 5, 6, tzinfo=UTC),
            on_progress=on_progress,
        )


def test_a_job_that_is_asked_adds_the_map_and_changes_nothing_else(tmp_path: Path) -> None:
    found: list[DistrictMap] = []
    seen: list[Progress] = []
    plain = job(tmp_path, found)
    asked = job(tmp_path, found, seen.append, uncertainty=True)
    assert asked.series[:-1] == plain.series  # the very bytes
    assert [replace(s, uncertainty=None) for s in asked.stats] == list(plain.stats)
    assert Stage.UNCERTAINTY not in plain.stage_seconds
    assert set(asked.notes) - set(plain.notes) == {UNSEEN_NOTE}
    assert list(asked.stage_seconds) == [stage.value for stage in Stage]
    done = [p.done / p.total for p in seen if p.stage is Stage.UNCERTAINTY and p.text]
    assert done == sorted(done)
    assert done[-1] == 1

    series = asked.series[-1]
    assert (series.kind, len(series.instances)) == ("uncertainty", len(plain.series[0].instances))
    planes = [dcmread(BytesIO(instance.data)) for instance in series.instances]
    values = np.stack([ds.pixel_array * float(ds.RescaleSlope) for ds in planes])
    labels = found[0].labels
    assert not values[labels == 0].any()
    assert values.max() > 0.01  # random weights know no symmetry
    for stats in asked.stats:
        assert stats.uncertainty == pytest.approx(values[labels == stats.district].mean(), abs=1e-6)


def test_a_lack_of_memory_is_told_once_and_not_for_every_flip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = run_module.synthesize

    def short_of_memory(*arguments: Any, batch: int, **others: Any) -> FloatVolume:
        if batch > 4:
            raise MemoryError
        return real(*arguments, batch=batch, **others)

    monkeypatch.setattr(run_module, "synthesize", short_of_memory)
    made = job(tmp_path, [], uncertainty=True, mip=False)
    assert len(made.provenance.fallbacks) == len(set(made.provenance.fallbacks)) > 0
    assert made.series[-1].kind == "uncertainty"
