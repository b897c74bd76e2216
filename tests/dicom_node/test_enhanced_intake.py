"""An Enhanced CT from the wire to a job: its frames count as slices, its parts are waited for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ct_factory import write_ct
from enhanced_ct import frame_item, item, write_enhanced
from intake_tools import QUEUED, RECEIVING, REJECTED, Intake, config, running_intake
from pydicom import Dataset, dcmread
from pydicom.uid import EnhancedCTImageStorage, JPEGLSLossless

from dicom_node.headers import read_header
from pipeline.ct_reader import read_ct

SLICES = 8


@pytest.fixture
def intake(tmp_path: Path) -> Iterator[Intake]:
    with running_intake(tmp_path, config(selection={"min_slices": 4, "min_coverage_mm": 20})) as running:
        yield running


def some_ct(folder: Path, **kwargs: Any) -> list[Path]:
    hu = np.random.default_rng(3).integers(-1000, 1500, (SLICES, 12, 14)).astype(np.int16)
    return write_ct(folder / "classic", hu, spacing_mm=(5.0, 2.0, 2.0), **kwargs)


def send(intake: Intake, paths: Sequence[Path], **kwargs: Any) -> None:
    """By C-STORE, in the transfer syntax that the files have."""
    syntax = str(dcmread(paths[0], stop_before_pixels=True).file_meta.TransferSyntaxUID)
    with intake.association([(EnhancedCTImageStorage, (syntax,))]) as assoc:
        for path in paths:
            assert assoc.send_c_store(path).Status == 0x0000


def test_the_frames_of_one_instance_make_a_job_as_slices_do(intake: Intake, tmp_path: Path) -> None:
    classic = some_ct(tmp_path)
    send(intake, write_enhanced(tmp_path, classic, transfer_syntax=JPEGLSLossless))
    intake.pass_time(31)
    job = intake.job()
    assert job.state is QUEUED
    assert (job.instances, job.details["slices"], job.details["coverage_mm"]) == (1, SLICES, 40.0)
    assert np.array_equal(read_ct(intake.spool.ct_files(job.id)).hu, read_ct(classic).hu)


def test_fewer_frames_than_the_least_slices_are_too_few(intake: Intake, tmp_path: Path) -> None:
    send(intake, write_enhanced(tmp_path, some_ct(tmp_path)[:3]))
    intake.pass_time(31)
    assert (intake.job().state, intake.job().reason_code) == (REJECTED, "too_few_slices")


@pytest.mark.parametrize("late", [0, 1, 2], ids=["first", "middle", "last"])
def test_a_part_of_a_concatenation_is_waited_for_also_where_nothing_gapes(
    intake: Intake, tmp_path: Path, late: int
) -> None:
    parts = write_enhanced(tmp_path, some_ct(tmp_path), parts=3)
    send(intake, [part for k, part in enumerate(parts) if k != late])
    intake.pass_time(31)
    assert intake.job().state is RECEIVING
    send(intake, [parts[late]])
    intake.pass_time(31)
    assert (intake.job().state, intake.job().details["slices"]) == (QUEUED, SLICES)


def test_a_part_that_never_comes_is_named(tmp_path: Path) -> None:
    with running_intake(tmp_path, config()) as intake:
        send(intake, write_enhanced(tmp_path, some_ct(tmp_path), parts=3)[:2])
        intake.pass_time(301)
        job = intake.job()
        assert (job.state, job.reason_code) == (REJECTED, "missing_slices")
        assert "1 of the 3 parts of a concatenation" in intake.ledger.events(job.id)[-1].text


def test_a_gap_between_frames_is_a_gap(intake: Intake, tmp_path: Path) -> None:
    classic = some_ct(tmp_path)
    send(intake, write_enhanced(tmp_path, [*classic[:3], *classic[4:]]))
    intake.pass_time(31)
    assert intake.job().state is RECEIVING


# -- headers


def header_of(tmp_path: Path, change: Any = None) -> Any:
    (path,) = write_enhanced(tmp_path, some_ct(tmp_path, kernel="Br40"), modify=change)
    return read_header(path)


@pytest.mark.parametrize("shared", [True, False], ids=["shared groups", "per-frame groups"])
def test_kernel_and_thickness_come_from_the_functional_groups(tmp_path: Path, shared: bool) -> None:
    (path,) = write_enhanced(tmp_path, some_ct(tmp_path, kernel="Br40"), shared=shared)
    header = read_header(path)
    assert (header.kernel, header.thickness_mm, len(header.positions)) == ("Br40", 5.0, SLICES)
    assert header.orientation == (1, 0, 0, 0, 1, 0)


def test_localizer_frames_are_no_slices(tmp_path: Path) -> None:
    def change(ds: Dataset) -> None:
        frame = ds.PerFrameFunctionalGroupsSequence[0]
        frame.CTImageFrameTypeSequence = [item(FrameType=["ORIGINAL", "PRIMARY", "LOCALIZER", "NONE"])]
        del frame.PlanePositionSequence

    assert len(header_of(tmp_path, change).positions) == SLICES - 1


def test_projections_are_named_after_the_image_type(tmp_path: Path) -> None:
    def change(ds: Dataset) -> None:
        kind = ds.SharedFunctionalGroupsSequence[0].CTImageFrameTypeSequence[0]
        kind.VolumeBasedCalculationTechnique = "MAX_IP"

    assert header_of(tmp_path, change).image_type == ("ORIGINAL", "PRIMARY", "VOLUME", "NONE", "MAX_IP")


@pytest.mark.parametrize("value", [[], ["1", "2"], ["x", "2", "3"], ["nan", "0", "0"], ["1e9", "0", "0"]])
def test_a_frame_without_a_usable_position_leaves_the_instance_without_places(tmp_path: Path, value: list[str]) -> None:
    def change(ds: Dataset) -> None:
        plane = frame_item(ds, 3, "PlanePositionSequence")
        plane.add_new("ImagePositionPatient", "UT", "\\".join(value))  # not validated

    assert header_of(tmp_path, change).positions == ()
