"""The built-in segmenter on the real CT series, against what is known of them (README, "Real CT")."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from pipeline.ct_reader import choose_ct, read_ct
from pipeline.districts import find_districts
from pipeline.types import District, DistrictMap, DistrictOptions

pytestmark = pytest.mark.realdata

# classes of TotalSegmentator v2's task "total" in the label file
VERTEBRAE, HUMERI, RIBS = range(26, 51), (69, 70), range(92, 116)


def districts_of(folder: Path) -> DistrictMap:
    ct = read_ct(choose_ct(folder))
    return find_districts(ct, ct.grid, options=DistrictOptions(chain=("builtin",)))


def share(result: DistrictMap, district: District) -> float:
    return float(result.mask(district).sum() / (result.labels > 0).sum())


def test_a_chest_with_raised_arms_is_trunk_and_at_most_a_little_neck(real_data: Path) -> None:
    result = districts_of(real_data / "ct-chest")
    assert set(result.present) <= {District.TRUNK, District.HEAD}
    assert share(result, District.HEAD) < 0.03
    assert result.confidence[District.TRUNK] > 0.8


def test_an_abdomen_scanned_feet_first_is_trunk_above_the_top_of_the_legs(real_data: Path) -> None:
    result = districts_of(real_data / "ct-abdomen-feet-first")
    assert result.present == (District.TRUNK, District.LEGS)
    assert 0.005 < share(result, District.LEGS) < 0.15
    middle = [float(np.mean(np.nonzero(result.mask(d))[0])) for d in (District.TRUNK, District.LEGS)]
    assert middle[0] > middle[1]


def test_bones_of_arms_and_trunk_fall_into_their_districts(real_data: Path) -> None:
    result = districts_of(real_data / "ct-arms-jpeg2000")
    image = sitk.ReadImage(str(real_data / "ct-arms-jpeg2000-labels117.nii.gz"))
    bones = sitk.GetArrayFromImage(sitk.DICOMOrient(image, "LPS"))
    assert bones.shape == result.labels.shape
    assert np.mean(result.labels[np.isin(bones, HUMERI)] == District.ARMS) >= 0.95
    assert np.mean(result.labels[np.isin(bones, (*VERTEBRAE, *RIBS))] == District.TRUNK) >= 0.95
    assert result.present == (District.TRUNK, District.ARMS)
