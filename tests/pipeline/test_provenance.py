"""Result UIDs: the same for the same content, others for other content."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom import Dataset
from pydicom.uid import UID

from pipeline.provenance import NOT_IN_KEY, ResultUids, software_version
from pipeline.types import ModelRef, OutputOptions, Provenance, SourceInstance, SourceSeries

CT_CLASS = "1.2.840.10008.5.1.4.1.1.2"


def instances(*uids: str) -> tuple[SourceInstance, ...]:
    return tuple(
        SourceInstance(sop_class_uid=CT_CLASS, sop_instance_uid=uid, position_mm=(0.0, 0.0, float(i)))
        for i, uid in enumerate(uids)
    )


SOURCE = SourceSeries(
    study_uid="1.2.1",
    series_uid="1.2.2",
    header=Dataset(),
    instances=instances("1.2.3.1", "1.2.3.2", "1.2.3.3"),
    earliest_acquisition=("20240101", "120000"),
)
PROVENANCE = Provenance(
    software_version="1.0",
    bundle_name="phantom",
    bundle_version="1",
    bundle_sha256="a" * 64,
    models=(ModelRef(district="head", weights_sha256="b" * 64), ModelRef(district="trunk", weights_sha256="c" * 64)),
    networks=("head=head", "trunk=trunk", "legs=none"),
    segmenter="builtin",
    segmenter_version="1",
    device="cpu",
)
UIDS = ResultUids(source=SOURCE, provenance=PROVENANCE, options=OutputOptions(), encoding="sc")


def changed_source(**change: Any) -> ResultUids:
    return replace(UIDS, source=replace(SOURCE, **change))


def changed_provenance(**change: Any) -> ResultUids:
    return replace(UIDS, provenance=replace(PROVENANCE, **change))


@given(kind=st.text(max_size=20), index=st.integers(0, 10**6))
def test_every_uid_is_valid_and_short(kind: str, index: int) -> None:
    uid = UIDS.uid(kind, index)
    assert len(uid) <= 44
    assert UID(uid).is_valid
    assert re.fullmatch(r"2\.25\.(0|[1-9][0-9]*)", uid)


def test_kinds_and_indices_have_uids_of_their_own() -> None:
    uids = {UIDS.uid(kind, i) for kind in ("series", "inst", "mip") for i in range(500)}
    assert len(uids) == 1500


def test_the_uids_are_the_same_in_every_release() -> None:
    assert UIDS.uid("series") == "2.25.135119621261961428436065931741007144363"


@pytest.mark.parametrize(
    "other",
    [
        changed_source(series_uid="1.2.9"),
        changed_source(instances=instances("1.2.3.1", "1.2.3.2")),
        changed_source(instances=instances("1.2.3.1", "1.2.3.2", "1.2.3.4")),
        changed_provenance(bundle_sha256="d" * 64),
        changed_provenance(models=PROVENANCE.models[:1]),
        changed_provenance(models=(ModelRef(district="whole_body", weights_sha256="e" * 64), PROVENANCE.models[1])),
        changed_provenance(networks=("head=trunk", "trunk=head", "legs=none")),
        changed_provenance(networks=("head=head", "trunk=trunk")),
        changed_provenance(software_version="1.1"),
        changed_provenance(segmenter="dicom_seg"),
        changed_provenance(segmenter_version="2"),
        changed_provenance(settings=("blending=mean",)),
        replace(UIDS, encoding="pet"),
    ],
)
def test_changed_content_has_new_uids(other: ResultUids) -> None:
    assert other.uid("series") != UIDS.uid("series")
    assert other.uid("inst", 5) != UIDS.uid("inst", 5)


@pytest.mark.parametrize("name", [f.name for f in fields(OutputOptions) if f.name not in NOT_IN_KEY])
def test_every_output_option_is_part_of_the_uids(name: str) -> None:
    value = getattr(OutputOptions(), name)
    other: Any = not value if isinstance(value, bool) else value + 1 if isinstance(value, int) else value + "x"
    assert replace(UIDS, options=replace(UIDS.options, **{name: other})).key != UIDS.key


@pytest.mark.parametrize(
    "same",
    [
        changed_source(instances=instances("1.2.3.3", "1.2.3.1", "1.2.3.2")),
        changed_source(notes=("gantry tilt resampled",)),
        changed_provenance(device="cuda:0 NVIDIA H100"),
        changed_provenance(fallbacks=("out of memory on cuda:0",)),
        changed_provenance(models=PROVENANCE.models[::-1]),
        changed_provenance(networks=PROVENANCE.networks[::-1]),
        replace(UIDS, options=OutputOptions(encodings=("sc", "pet"), mip=False)),
    ],
)
def test_order_device_and_companions_leave_the_uids_alone(same: ResultUids) -> None:
    assert same.key == UIDS.key


@given(st.lists(st.text("0123456789.", min_size=1, max_size=64), min_size=1, max_size=5, unique=True))
def test_two_sets_of_instances_never_share_a_key(uids: list[str]) -> None:
    # joined text would let ("1", "2.3") and ("1.2", "3") meet; JSON keeps them apart
    whole = changed_source(instances=instances(*uids))
    joined = changed_source(instances=instances("".join(uids)))
    assert (whole.key == joined.key) == (len(uids) == 1)


def test_the_software_version_is_a_version() -> None:
    assert re.match(r"\d+\.\d+", software_version())
    assert len(software_version()) <= 64
