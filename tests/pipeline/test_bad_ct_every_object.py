"""What hospitals send, read from files and carried through every object that one job writes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from outputs_samples import CREATED, PROVENANCE, read_back, sample_suv, write_sample_ct, write_series
from pydicom import Dataset, dcmread
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataelem import RawDataElement
from pydicom.errors import BytesLengthException
from pydicom.tag import Tag
from test_output_seg import district_map
from test_outputs_attributes import COPIED_KEYWORDS, NAMES, VRS, source_with
from test_outputs_validators import NOT_IN_IOD, complaints

from pipeline.ct_reader import read_ct
from pipeline.outputs.encoding import encode_result
from pipeline.outputs.explicit import element, element_header
from pipeline.outputs.statistics import district_stats
from pipeline.types import District, DistrictMap, EncodedSeries, OutputOptions, SuvVolume

OPTIONS = OutputOptions(
    encodings=("sc", "pet"), mip=True, seg=True, uncertainty=True, sr=True, presentation_states=True
)
KINDS = {"pet", "mip", "seg", "uncertainty", "sr", "gsps", "pcps"}
NUMBERS = {"pet": 9001, "uncertainty": 9010, "seg": 9020, "mip": 9030, "sr": 9040, "gsps": 9050, "pcps": 9060}
# What the CT lacks or has is not mended: nothing is invented
NOT_OURS = ("needed to build DICOMDIR", "Retired Person Name form")
PIXELS = element_header(0x7FE00010, "OW", 2 * 16 * 20)
UNREADABLE = b"".join(
    (
        element(0x7FDF0010, "LO", b"SECRET"),
        element(0x7FDF1010, "FD", b"abc "),  # no length of its VR
        element(0x7FDF1011, "SQ", b"\xfe\xff\x00\xe0\xff\xff"),  # an item cut off
        element(0x7FDF1012, "DS", b"SECRET"),
    )
)


def encode_all(paths: list[Path], options: OutputOptions = OPTIONS) -> tuple[EncodedSeries, ...]:
    """Every object of one CT as the pipeline writes them; fails if a companion was left out."""
    ct = read_ct(paths)
    rng = np.random.default_rng(5)
    suv = SuvVolume(suv=rng.uniform(0, 9, ct.grid.shape).astype(np.float32), grid=ct.grid)
    labels = np.full(ct.grid.shape, District.TRUNK, np.uint8)
    labels[-2:] = District.HEAD
    districts = DistrictMap(
        labels=labels, grid=ct.grid, segmenter="builtin", version="2", confidence={District.HEAD: 0.9}
    )
    series, notes = encode_result(
        suv,
        districts,
        district_stats(suv, districts),
        suv,
        source=ct.source,
        provenance=PROVENANCE,
        options=options,
        created=CREATED,
    )
    assert notes == ()
    assert {s.kind for s in series} == KINDS
    return series


def check_with_the_validator(series: tuple[EncodedSeries, ...], folder: Path) -> None:
    """No error in any object, and no warning but those of every secondary capture or of what the CT lacks."""
    for one in series:
        first = replace(one, instances=one.instances[:1])
        (path,) = write_series(first, folder / f"{one.kind}-{one.encoding}")
        found = [line for line in complaints(path) if not line.endswith(NOT_OURS)]
        if one.kind in ("pet", "uncertainty") and one.encoding == "sc":
            found = [line for line in found if not (line.startswith("Warning") and line.endswith(NOT_IN_IOD))]
        assert found == [], one.kind


def put(ds: Dataset, tag: int | str, value: bytes, vr: str = "") -> None:
    """Bytes that pydicom itself would not write."""
    at = Tag(tag_for_keyword(tag) if isinstance(tag, str) else tag)
    vr = vr or dictionary_VR(at)
    ds._dict[at] = RawDataElement(at, vr, len(value), value, 0, False, True)


def no_frame_of_reference(ds: Dataset, _: int) -> None:
    del ds.FrameOfReferenceUID


def no_weight(ds: Dataset, _: int) -> None:
    del ds.PatientWeight


def empty_study_date(ds: Dataset, _: int) -> None:
    ds.StudyDate = ds.StudyTime = ""


def overflowing_decimals(ds: Dataset, _: int) -> None:
    put(ds, "PatientWeight", b"70.12345678901234567890 ")
    put(ds, "PatientSize", b"1.7000000000000000000001")
    put(ds, "PixelSpacing", b"2.00000000000000000\\2.50000000000000001 ")
    x, y, z = (float(v) for v in ds.ImagePositionPatient)
    put(ds, "ImagePositionPatient", f"{x:.20f}\\{y:.20f}\\{z:.20f}".encode().ljust(80)[:80])
    put(ds, "SliceThickness", b"3.000000000000000000000 ")


def sequences_nested_five_deep(ds: Dataset, _: int) -> None:
    inner = Dataset()
    inner.CodeValue = "SECRET"
    for keyword in (
        "PurposeOfReferenceCodeSequence",
        "SourceImageSequence",
        "DerivationImageSequence",
        "ContributingEquipmentSequence",
        "RequestAttributesSequence",
    ):
        outer = Dataset()
        setattr(outer, keyword, [inner])
        inner = outer
    ds.RequestAttributesSequence = inner.RequestAttributesSequence
    ds.DeidentificationMethodCodeSequence = inner.RequestAttributesSequence
    ds.PatientIdentityRemoved = "YES"


DEFECTS: tuple[Callable[[Dataset, int], None], ...] = (
    no_frame_of_reference,
    no_weight,
    empty_study_date,
    overflowing_decimals,
    sequences_nested_five_deep,
)


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda d: d.__name__)
def test_every_object_of_a_defective_ct_is_written_and_valid(
    defect: Callable[[Dataset, int], None], tmp_path: Path
) -> None:
    series = encode_all(write_sample_ct(tmp_path / "ct", defect))
    check_with_the_validator(series, tmp_path)
    for one in series:
        assert all(b"SECRET" not in instance.data for instance in one.instances)


def test_private_elements_that_break_an_iteration_reach_no_object(tmp_path: Path) -> None:
    paths = write_sample_ct(tmp_path / "ct")
    for path in paths:
        whole = path.read_bytes()
        assert whole.count(PIXELS) == 1
        path.write_bytes(whole.replace(PIXELS, UNREADABLE + PIXELS))
    with pytest.raises((OSError, ValueError, BytesLengthException)):
        for _ in dcmread(paths[0]):
            pass
    series = encode_all(paths)
    check_with_the_validator(series, tmp_path)
    for one in series:
        assert not any(elem.tag.is_private for elem in read_back(one)[0].iterall())


def test_a_ct_without_a_frame_of_reference_gets_one_that_all_objects_share(tmp_path: Path) -> None:
    series = encode_all(write_sample_ct(tmp_path, no_frame_of_reference))
    frames = {read_back(s)[0].FrameOfReferenceUID for s in series if s.kind in ("pet", "seg", "uncertainty")}
    assert len(frames) == 1


def test_no_object_invents_a_weight_or_a_study_date(tmp_path: Path) -> None:
    for one in encode_all(write_sample_ct(tmp_path / "1", no_weight)):
        assert "PatientWeight" not in read_back(one)[0]
    for one in encode_all(write_sample_ct(tmp_path / "2", empty_study_date)):
        ds = read_back(one)[0]
        assert (ds.StudyDate, ds.SeriesDate) == ("", "20240102")


def test_decimals_that_overflow_are_shortened_in_every_object(tmp_path: Path) -> None:
    for one in encode_all(write_sample_ct(tmp_path, overflowing_decimals)):
        for ds in read_back(one):
            assert (ds.PatientWeight, ds.PatientSize) == (pytest.approx(70.123456789), 1.7)
            for elem in ds.iterall():
                if elem.VR == "DS" and not elem.is_empty:
                    values = elem.value if elem.VM > 1 else [elem.value]
                    assert all(len(getattr(v, "original_string", str(v))) <= 16 for v in values), elem.keyword


@pytest.mark.parametrize("taken", sorted(NUMBERS.values()))
def test_no_object_takes_the_cts_series_number(taken: int, tmp_path: Path) -> None:
    numbers = {
        s.kind: int(read_back(replace(s, instances=s.instances[:1]))[0].SeriesNumber)
        for s in encode_all(write_sample_ct(tmp_path, series_number=taken))
    }
    assert numbers == {kind: n + 100 * (n == taken) for kind, n in NUMBERS.items()}


@pytest.mark.filterwarnings("ignore:Unknown encoding")  # pydicom's, when it opens such a file
@pytest.mark.parametrize(("terms", "raw", "name"), NAMES, ids=[f"{t or 'none'}-{n[:6]}" for t, _, n in NAMES])
def test_a_name_in_any_character_set_is_in_every_object_as_it_came(
    terms: str, raw: bytes, name: str, tmp_path: Path
) -> None:
    def named(ds: Dataset, _: int) -> None:
        put(ds, "SpecificCharacterSet", terms.encode())
        put(ds, "PatientName", raw)

    series = encode_all(write_sample_ct(tmp_path / "ct", named))
    for one in series:
        for ds in read_back(one):
            assert str(ds.PatientName) == name
            assert ds.get("SpecificCharacterSet") == "ISO_IR 192" or name.isascii()
    check_with_the_validator(series, tmp_path)


@settings(max_examples=15)
@given(st.dictionaries(st.sampled_from(COPIED_KEYWORDS), st.tuples(st.sampled_from(VRS), st.binary(max_size=90))))
def test_no_header_however_broken_costs_an_object(garbage: dict[str, tuple[str | None, bytes]]) -> None:
    header = Dataset()
    for keyword, (vr, value) in garbage.items():
        tag = Tag(tag_for_keyword(keyword))
        header._dict[tag] = RawDataElement(tag, vr, len(value), value, 0, vr is None, True)
    suv = sample_suv()
    series, notes = encode_result(
        suv,
        district_map(),
        district_stats(suv, district_map()),
        suv,
        source=source_with(header),
        provenance=PROVENANCE,
        options=replace(OPTIONS, encodings=("sc",), mip=False),  # the MIP is of the PET's modules, and slow to draw
        created=CREATED,
    )
    assert notes == ()
    assert {s.kind for s in series} == KINDS - {"mip"}
    for one in series:
        for elem in read_back(one)[0].iterall():
            str(elem.value)
