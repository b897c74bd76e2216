"""The whole road of an Enhanced CT: by C-STORE into a job, and out as the PET that its single frames would give."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path

import pytest
from enhanced_ct import write_enhanced
from intake_tools import QUEUED, config, running_intake
from pydicom import Dataset, dcmread
from pydicom.uid import EnhancedCTImageStorage, JPEG2000Lossless
from tiny_bundle import write_tiny_bundle
from tiny_study import write_tiny_study

from pipeline.bundle import load_bundle
from pipeline.run import synthesize_series
from pipeline.types import PipelineOptions

CREATED = datetime(2024, 5, 6, 7, 8, 9, tzinfo=UTC)
SELECTION = {"min_slices": 3, "min_coverage_mm": 10, "max_slice_spacing_mm": 10}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Dataset]]:
    """The PET planes of one CT, sent in two parts of compressed frames, and read as single frames."""
    folder = tmp_path_factory.mktemp("road")
    classic = write_tiny_study(folder / "classic")
    order = [*range(1, len(classic), 2), *range(0, len(classic), 2)]
    parts = write_enhanced(folder, classic, parts=2, order=order, transfer_syntax=JPEG2000Lossless)
    bundle = write_tiny_bundle(folder / "bundle")

    def pet(paths: Sequence[Path]) -> list[Dataset]:
        options = PipelineOptions(bundle=bundle, device="cpu", threads=1)
        result = synthesize_series(paths, load_bundle(bundle), options, created=CREATED)
        (series,) = [one for one in result.series if one.kind == "pet"]
        return [dcmread(BytesIO(one.data)) for one in series.instances]

    with running_intake(folder / "node", config(selection=SELECTION)) as intake:
        with intake.association([(EnhancedCTImageStorage, (JPEG2000Lossless,))]) as assoc:
            assert [assoc.send_c_store(path).Status for path in parts] == [0x0000, 0x0000]
        intake.pass_time(31)
        job = intake.job()
        assert job.state is QUEUED
        return {"frames": pet(intake.spool.ct_files(job.id)), "files": pet(classic)}


def test_the_pet_of_an_enhanced_ct_is_that_of_its_single_frames_voxel_for_voxel(
    results: dict[str, list[Dataset]],
) -> None:
    frames, files = results["frames"], results["files"]
    assert len(frames) == len(files) > 3
    assert any(any(plane.PixelData) for plane in files)
    keywords = ("PixelData", "RescaleSlope", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing")
    for one, other in zip(frames, files, strict=True):
        for keyword in (*keywords, "FrameOfReferenceUID", "StudyInstanceUID", "PatientID", "SeriesDate", "SeriesTime"):
            assert one[keyword].value == other[keyword].value, keyword
        assert (one.SOPInstanceUID, one.SeriesInstanceUID) != (other.SOPInstanceUID, other.SeriesInstanceUID)


def test_its_planes_name_the_frames_where_the_others_name_the_instances(results: dict[str, list[Dataset]]) -> None:
    """Frames lie in the order 2, 4, ..., 1, 3, ... over two parts: the place decides, not the number."""
    for one, other in zip(results["frames"], results["files"], strict=True):
        assert len(one.SourceImageSequence) == len(other.SourceImageSequence)
        assert all("ReferencedFrameNumber" in image for image in one.SourceImageSequence)
        assert not any("ReferencedFrameNumber" in image for image in other.SourceImageSequence)
        places = [image.SpatialLocationsPreserved for image in one.SourceImageSequence]
        assert places == [image.SpatialLocationsPreserved for image in other.SourceImageSequence]
