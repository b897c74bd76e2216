from __future__ import annotations

from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread

from pipeline.ct_reader import read_ct
from training.phantom import Phantom, PhantomSpec, make_phantom
from training.phantom.dicom import write_ct_series, write_pet_series
from training.phantom.segments import write_seg


@pytest.fixture(scope="module")
def phantom() -> Phantom:
    return make_phantom(PhantomSpec(seed=2, spacing_mm=(12.0, 8.0, 8.0), coverage=(0.45, 0.9), pose="raised"))


def test_the_ct_series_is_read_back_as_the_volume_it_was(phantom: Phantom, tmp_path: Path) -> None:
    ct = read_ct(write_ct_series(phantom, tmp_path, matrix=None))
    assert ct.grid.shape == phantom.grid.shape
    assert ct.grid.spacing_mm == pytest.approx(phantom.grid.spacing_mm)
    assert ct.grid.origin_mm == pytest.approx(phantom.grid.origin_mm, abs=1e-3)
    assert ct.grid.frame_of_reference_uid == phantom.grid.frame_of_reference_uid
    assert np.abs(ct.hu - phantom.hu).max() <= 0.51


def test_a_larger_matrix_covers_the_same_field(phantom: Phantom, tmp_path: Path) -> None:
    ct = read_ct(write_ct_series(phantom, tmp_path, matrix=128))
    assert ct.grid.shape == (phantom.grid.shape[0], round(128 * phantom.grid.shape[1] / phantom.grid.shape[2]), 128)
    assert ct.grid.extent_mm == pytest.approx(phantom.grid.extent_mm, rel=0.02)
    assert ct.hu.mean() == pytest.approx(phantom.hu.mean(), abs=10)


def test_suv_follows_from_activity_weight_dose_and_decay_to_the_series_time(phantom: Phantom, tmp_path: Path) -> None:
    """QIBA: SUV = activity x weight / (dose decayed from injection to the series time), for DecayCorrection START."""
    slices = [dcmread(path) for path in write_pet_series(phantom, tmp_path)]
    first = slices[0]
    assert (first.Units, first.DecayCorrection) == ("BQML", "START")
    item = first.RadiopharmaceuticalInformationSequence[0]
    start = datetime.strptime(first.SeriesDate + first.SeriesTime, "%Y%m%d%H%M%S")
    injected = datetime.strptime(item.RadiopharmaceuticalStartDateTime, "%Y%m%d%H%M%S")
    elapsed = (start - injected).total_seconds()
    assert elapsed == 3600
    dose = float(item.RadionuclideTotalDose) * 2 ** (-elapsed / float(item.RadionuclideHalfLife))
    suv = np.stack([s.pixel_array * float(s.RescaleSlope) for s in slices]) * float(first.PatientWeight) * 1000 / dose
    assert np.abs(suv - phantom.suv).max() < 2e-3 * phantom.suv.max()
    assert len({s.RescaleSlope for s in slices}) > 1  # a slope per slice, as scanners write it


def test_a_phantom_gives_the_same_uids_and_bytes_twice(phantom: Phantom, tmp_path: Path) -> None:
    one, two = (write_ct_series(phantom, tmp_path / n, matrix=None) for n in ("a", "b"))
    assert [p.read_bytes() for p in one] == [p.read_bytes() for p in two]


def test_the_seg_has_one_segment_per_district_and_refers_to_the_ct(phantom: Phantom, tmp_path: Path) -> None:
    ct = write_ct_series(phantom, tmp_path / "ct", matrix=None)
    seg = dcmread(write_seg(phantom, tmp_path / "seg", ct))
    assert seg.Modality == "SEG"
    assert seg.FrameOfReferenceUID == phantom.grid.frame_of_reference_uid
    labels = [s.SegmentLabel for s in seg.SegmentSequence]
    assert labels == ["head", "trunk", "arms"]
    frames = seg.pixel_array.reshape(-1, *phantom.grid.shape[1:])
    numbers = [f.SegmentIdentificationSequence[0].ReferencedSegmentNumber for f in seg.PerFrameFunctionalGroupsSequence]
    for number, district in enumerate((1, 2, 3), start=1):
        own = frames[[i for i, n in enumerate(numbers) if n == number]]
        assert own.sum() == (phantom.districts == district).sum()
