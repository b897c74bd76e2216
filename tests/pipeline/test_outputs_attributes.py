"""What is taken over from a CT header, whatever the header holds."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from outputs_samples import CREATED, Sample, header_only, read_back, sample_suv, source_of, write_sample_ct
from pydicom import Dataset, dcmread
from pydicom.datadict import tag_for_keyword
from pydicom.dataelem import RawDataElement
from pydicom.sequence import Sequence
from pydicom.tag import Tag

from pipeline.errors import OutputError
from pipeline.outputs.explicit import element
from pipeline.outputs.header import CLEANERS, clean, ds_text, text_of
from pipeline.types import OutputOptions, SourceSeries

# character set terms, bytes in the file, what the result must say
NAMES = [
    ("", b"Smith^Jane", "Smith^Jane"),
    ("ISO_IR 6", b"Smith^Jane", "Smith^Jane"),
    ("ISO_IR 100", b"M\xfcller^Zo\xeb", "Müller^Zoë"),
    ("ISO_IR 144", "Иванов^Иван".encode("iso8859_5"), "Иванов^Иван"),
    ("ISO_IR 192", "Ōta^花子".encode(), "Ōta^花子"),
    ("ISO_IR 13", b"\xd4\xcf\xc0\xde^\xc0\xdb\xb3", "ﾔﾏﾀﾞ^ﾀﾛｳ"),
    (
        "\\ISO 2022 IR 87",
        b"Yamada^Tarou=\x1b$B;3ED\x1b(B^\x1b$BB@O:\x1b(B=\x1b$B$d$^$@\x1b(B^\x1b$B$?$m$&\x1b(B",
        "Yamada^Tarou=山田^太郎=やまだ^たろう",
    ),
    (
        "ISO 2022 IR 13\\ISO 2022 IR 87",
        b"\xd4\xcf\xc0\xde^\xc0\xdb\xb3=\x1b$B;3ED\x1b(J^\x1b$BB@O:\x1b(J=\x1b$B$d$^$@\x1b(J^\x1b$B$?$m$&\x1b(J",
        "ﾔﾏﾀﾞ^ﾀﾛｳ=山田^太郎=やまだ^たろう",
    ),
    (
        "\\ISO 2022 IR 149",
        b"Hong^Gildong=\x1b$)C\xfb\xf3^\x1b$)C\xd1\xce\xd4\xd7=\x1b$)C\xc8\xab^\x1b$)C\xb1\xe6\xb5\xbf",
        "Hong^Gildong=洪^吉洞=홍^길동",
    ),
    ("ISO_IR 192", b"<script>alert(1)</script>", "<script>alert(1)</script>"),
    ("NO SUCH SET", b"Smith^Jane", "Smith^Jane"),
]


def header_from_bytes(*elements: bytes) -> Dataset:
    """A header as a reader gets it: nothing converted yet."""
    return dcmread(BytesIO(b"".join(elements)), force=True)


def source_with(header: Dataset) -> SourceSeries:
    return replace(header_only(), header=header)


def one_instance(source: SourceSeries, **options: object) -> Dataset:
    sample = Sample(source=source, suv=sample_suv((1, 4, 5)), options=OutputOptions(**options))
    return read_back(sample.pet("pet"))[0]


@pytest.mark.filterwarnings("ignore:Unknown encoding")  # pydicom's, when it opens such a file
@pytest.mark.parametrize(("terms", "raw", "name"), NAMES, ids=[f"{t or 'none'}-{n[:6]}" for t, _, n in NAMES])
def test_a_name_is_decoded_by_the_cts_character_set_and_written_so_that_everybody_can_read_it(
    terms: str, raw: bytes, name: str
):
    header = header_from_bytes(element(0x00080005, "CS", terms.encode()), element(0x00100010, "PN", raw))
    ds = one_instance(source_with(header))
    assert str(ds.PatientName) == name
    if name.isascii():
        known = terms if terms not in ("NO SUCH SET", "ISO_IR 6") else ""  # the latter is what absence means
        assert ds.get("SpecificCharacterSet", "") in (known, None)
    else:
        assert ds.SpecificCharacterSet == "ISO_IR 192"


def test_a_character_set_of_several_terms_is_kept_when_the_text_is_ascii():
    header = header_from_bytes(
        element(0x00080005, "CS", b"\\ISO 2022 IR 87"), element(0x00100010, "PN", b"Yamada^Tarou")
    )
    assert list(one_instance(source_with(header)).SpecificCharacterSet) == ["", "ISO 2022 IR 87"]


def test_a_description_of_ours_that_is_not_ascii_makes_the_series_utf_8():
    ds = one_instance(header_only(PatientName="A^B"), series_description="SYNTHETIC ПЭТ")
    assert (ds.SpecificCharacterSet, ds.SeriesDescription) == ("ISO_IR 192", "SYNTHETIC ПЭТ")


def test_bytes_that_do_not_fit_the_character_set_are_replaced_without_a_warning():
    header = header_from_bytes(element(0x00080005, "CS", b"ISO_IR 192"), element(0x00100010, "PN", b"A\xff\xfeB"))
    assert str(one_instance(source_with(header)).PatientName) == "A\ufffd\ufffdB"


CLEANED = [
    ("PN", "A^B^C^D^E^F^G", "A^B^C^D^E"),
    ("PN", "a=b=c=d", "a=b=c"),
    ("PN", "x" * 100, "x" * 64),
    ("PN", "one\\two", "one"),
    ("PN", "line\nbreak\x1b[2J", "linebreak[2J"),
    ("LO", "y" * 100, "y" * 64),
    ("LO", "first\\second", "first"),
    ("SH", "0123456789ABCDEFG", "0123456789ABCDEF"),
    ("DA", "20240230", ""),
    ("DA", "2024.01.02", "20240102"),
    ("DA", "yesterday", ""),
    ("DA", "٢٠٢٤٠١٠٢", ""),
    ("TM", "10:15:00", "101500"),
    ("TM", "101500.1234567", "101500.123456"),
    ("TM", "1015", "1015"),
    ("TM", "2561", ""),
    ("DS", "70.123456789012345678", "70.123456789"),
    ("DS", "1e400", ""),
    ("DS", "NaN", ""),
    ("DS", "12,5", ""),
    ("DS", " 7.5e1 ", "7.5e1"),
    ("IS", "99999999999", ""),
    ("IS", "12", "12"),
    ("CS", "head", "HEAD"),
    ("CS", "A" * 17, ""),
    ("CS", "<script>", ""),
    ("AS", "45Y", "045Y"),
    ("AS", "old", ""),
    ("UI", "1.2.3 ", "1.2.3"),
    ("UI", "1.2/../etc", ""),
    ("UI", "1" * 65, ""),
]


@pytest.mark.parametrize(("vr", "text", "cleaned"), CLEANED)
def test_a_value_is_cut_mended_or_dropped(vr: str, text: str, cleaned: str):
    assert clean(vr, text) == cleaned


@given(st.sampled_from(sorted(CLEANERS)), st.text())
def test_a_clean_value_stays_as_it_is(vr: str, text: str):
    once = clean(vr, text)
    assert clean(vr, once) == once
    assert "\\" not in once
    once.encode("utf-8")


@given(st.floats(allow_nan=False, allow_infinity=False, min_value=-1e14, max_value=1e14))
def test_a_number_as_text_has_at_most_16_characters_and_is_the_number(value: float):
    text = ds_text(value)
    assert len(text) <= 16
    assert text != "-0"
    assert float(text) == pytest.approx(value, abs=1e-9 if abs(value) < 1e5 else abs(value) * 1e-9)


def test_a_number_that_is_none_has_no_text():
    for value in (float("nan"), float("inf"), 1e20):
        with pytest.raises(ValueError, match=r"decimal string|characters"):
            ds_text(value)


VRS = ("PN", "LO", "CS", "DS", "IS", "UN", "SQ", "US", "OB", None)
COPIED_KEYWORDS = (
    "PatientName",
    "PatientID",
    "PatientBirthDate",
    "PatientSex",
    "PatientWeight",
    "PatientSize",
    "PatientAge",
    "StudyDate",
    "StudyTime",
    "AccessionNumber",
    "StudyID",
    "SpecificCharacterSet",
    "BodyPartExamined",
    "PatientPosition",
    "SeriesNumber",
    "PixelSpacing",
    "Rows",
    "PatientIdentityRemoved",
    "DeidentificationMethod",
    "DeidentificationMethodCodeSequence",
    "LossyImageCompression",
    "LossyImageCompressionRatio",
    "TimezoneOffsetFromUTC",
)


@given(
    st.dictionaries(
        st.sampled_from(COPIED_KEYWORDS),
        st.tuples(
            st.sampled_from(["PN", "LO", "CS", "DS", "IS", "UN", "SQ", "US", "OB", None]), st.binary(max_size=90)
        ),
    )
)
def test_no_header_however_broken_stops_the_series(garbage: dict[str, tuple[str | None, bytes]]):
    header = Dataset()
    for keyword, (vr, value) in garbage.items():
        tag = Tag(tag_for_keyword(keyword))
        header._dict[tag] = RawDataElement(tag, vr, len(value), value, 0, vr is None, True)
    ds = one_instance(source_with(header))
    for elem in ds.iterall():
        str(elem.value)
    assert ds.Modality == "PT"


def test_a_sequence_where_text_is_expected_is_left_out():
    header = Dataset()
    header.add_new(0x00100010, "SQ", Sequence([Dataset()]))
    assert text_of(header, "PatientName") == ""
    assert str(one_instance(source_with(header)).PatientName) == ""


def test_an_identifier_that_is_too_long_is_left_out_because_a_cut_one_would_be_another():
    header = header_from_bytes(
        element(0x00080050, "SH", b"12345678901234567"),
        element(0x00100010, "PN", b"A" * 70),
        element(0x00100020, "LO", b"7" * 65),
    )
    ds = one_instance(source_with(header))
    assert (ds.AccessionNumber, ds.PatientID, str(ds.PatientName)) == ("", "", "A" * 64)


@pytest.mark.parametrize("weight", ["", "0", "-70", "heavy", "1e9"])
def test_a_weight_that_is_none_is_not_written(weight: str):
    header = header_from_bytes(element(0x00101030, "DS", weight.encode()))
    assert "PatientWeight" not in one_instance(source_with(header))
    assert "PatientWeight" not in one_instance(header_only())


def test_the_size_can_be_left_out_and_the_weight_stays():
    source = header_only(PatientSize="1.7", PatientWeight="70")
    assert one_instance(source).PatientSize == 1.7
    ds = one_instance(source, omit_patient_size=True)
    assert "PatientSize" not in ds
    assert ds.PatientWeight == 70


def test_nothing_that_is_not_on_the_white_list_crosses(tmp_path: Path):
    secret = "SECRET"

    def add(ds: Dataset, _: int) -> None:
        for keyword in ("StationName", "ProtocolName", "OperatorsName", "ContrastBolusAgent", "PatientAddress"):
            setattr(ds, keyword, secret)
        for keyword in ("Manufacturer", "ManufacturerModelName", "SoftwareVersions", "DeviceSerialNumber"):
            setattr(ds, keyword, secret)
        ds.ConvolutionKernel = ds.SeriesDescription = secret
        ds.ImageComments = secret
        ds.private_block(0x0029, secret, create=True).add_new(1, "LO", secret)
        ds.SmallestImagePixelValue = 3
        ds.PixelPaddingValue = 4
        ds.AcquisitionDateTime = "20240102"

    sample = Sample(source=source_of(write_sample_ct(tmp_path, add)), suv=sample_suv())
    for encoded in (sample.pet("sc"), sample.pet("pet"), sample.mip()):
        assert secret.encode() not in encoded.instances[0].data
        ds = read_back(encoded)[0]
        for keyword in ("KVP", "PixelPaddingValue", "SmallestImagePixelValue", "AcquisitionDateTime"):
            assert keyword not in ds
        assert not any(elem.tag.is_private for elem in ds.iterall())


@pytest.mark.parametrize(("taken", "number"), [("2", 9001), ("9001", 9101), ("9001x", 9001), ("", 9001)])
def test_a_series_number_that_the_ct_has_is_not_used_again(taken: str, number: int):
    header = header_from_bytes(element(0x00200011, "IS", taken.encode()))
    assert one_instance(source_with(header)).SeriesNumber == number


POSITIONS = {
    "HFS": ("40199007", "102540008"),
    "HFP": ("1240000", "102540008"),
    "HFDR": ("102535000", "102540008"),
    "HFDL": ("102536004", "102540008"),
    "FFS": ("40199007", "102541007"),
    "FFP": ("1240000", "102541007"),
    "FFDR": ("102535000", "102541007"),
    "FFDL": ("102536004", "102541007"),
}


@pytest.mark.parametrize(("position", "expected"), POSITIONS.items())
def test_the_patients_position_becomes_codes(position: str, expected: tuple[str, str]):
    ds = one_instance(header_only(PatientPosition=position))
    orientation = ds.PatientOrientationCodeSequence[0]
    assert orientation.CodeValue == "102538003"
    assert orientation.PatientOrientationModifierCodeSequence[0].CodeValue == expected[0]
    assert ds.PatientGantryRelationshipCodeSequence[0].CodeValue == expected[1]
    assert "PatientPosition" not in ds


@pytest.mark.parametrize("position", ["", "LFP", "UPSIDE"])
def test_an_unknown_position_leaves_the_codes_empty(position: str):
    ds = one_instance(header_only(PatientPosition=position))
    assert len(ds.PatientOrientationCodeSequence) == len(ds.PatientGantryRelationshipCodeSequence) == 0


def test_a_site_can_ask_for_the_patients_position():
    assert one_instance(header_only(PatientPosition="FFS"), emit_patient_position=True).PatientPosition == "FFS"


TIMES = [
    (("20240102", "102100.5"), {}, ("20240102", "102100.5")),
    (("20240102", "10"), {}, ("20240102", "100000")),
    (("20240102", ""), {"SeriesDate": "20240103", "SeriesTime": "111111"}, ("20240102", "000000")),
    (("", ""), {"SeriesDate": "20240103", "SeriesTime": "111111"}, ("20240103", "111111")),
    (("nonsense", "111"), {"StudyDate": "20240104", "StudyTime": "121212"}, ("20240104", "121212")),
    (("", ""), {}, ("20240506", "000000")),
]


@pytest.mark.parametrize(("earliest", "header", "expected"), TIMES)
def test_the_series_begins_when_the_ct_was_acquired(
    earliest: tuple[str, str], header: dict[str, str], expected: tuple[str, str]
):
    ds = one_instance(replace(header_only(**header), earliest_acquisition=earliest))
    assert (ds.SeriesDate, ds.SeriesTime) == expected
    assert (ds.AcquisitionDate, ds.AcquisitionTime) == expected
    item = ds.RadiopharmaceuticalInformationSequence[0]
    assert item.RadiopharmaceuticalStartTime == expected[1]
    assert item.RadiopharmaceuticalStartDateTime == "".join(expected)


def test_times_of_the_job_are_in_the_cts_time_zone_where_it_names_one():
    ds = one_instance(header_only(TimezoneOffsetFromUTC="-0800"))
    assert (ds.ContentDate, ds.ContentTime, ds.TimezoneOffsetFromUTC) == ("20240505", "230809.123456", "-0800")
    ds = one_instance(header_only(TimezoneOffsetFromUTC="late"))
    assert (ds.ContentDate, ds.ContentTime) == ("20240506", "070809.123456")
    assert "TimezoneOffsetFromUTC" not in ds


def test_a_naive_time_is_refused():
    sample = Sample(source=header_only(), suv=sample_suv(), created=datetime(2024, 1, 1))
    with pytest.raises(OutputError, match="naive_time"):
        sample.pet("sc")
    assert CREATED.tzinfo is UTC


def test_lossy_history_is_inherited():
    header = {
        "LossyImageCompression": "01",
        "LossyImageCompressionRatio": ["10.5", "2"],
        "LossyImageCompressionMethod": ["ISO_10918_1", "ISO_15444_1"],
    }
    ds = one_instance(header_only(**header))
    assert ds.LossyImageCompression == "01"
    assert list(ds.LossyImageCompressionRatio) == [10.5, 2]
    assert list(ds.LossyImageCompressionMethod) == ["ISO_10918_1", "ISO_15444_1"]
    assert one_instance(header_only()).LossyImageCompression == "00"
    assert one_instance(replace(header_only(), lossy=True)).LossyImageCompression == "01"


def test_a_de_identified_patient_stays_marked_as_such():
    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = "113100", "DCM", "Basic Profile"
    ds = one_instance(
        header_only(
            PatientIdentityRemoved="YES",
            DeidentificationMethod=["first", "second"],
            DeidentificationMethodCodeSequence=[code, Dataset()],
        )
    )
    assert ds.PatientIdentityRemoved == "YES"
    assert list(ds.DeidentificationMethod) == ["first", "second"]
    assert [item.CodeValue for item in ds.DeidentificationMethodCodeSequence] == ["113100"]
    assert one_instance(header_only(PatientIdentityRemoved="YES")).DeidentificationMethod
    assert "PatientIdentityRemoved" not in one_instance(header_only(PatientIdentityRemoved="MAYBE"))


def test_a_study_without_a_usable_uid_is_refused():
    with pytest.raises(OutputError, match="bad_study_uid"):
        one_instance(replace(header_only(), study_uid="../../etc"))


def test_the_institution_is_the_configured_one_else_the_cts():
    source = header_only(InstitutionName="Site")
    assert one_instance(source).InstitutionName == "Site"
    assert one_instance(source, institution_name="Ours").InstitutionName == "Ours"
    assert "InstitutionName" not in one_instance(header_only())


BODY_PARTS = [("CHEST", "CHEST"), ("thorax", "CHEST"), ("LEG", "WHOLEBODY"), ("TH/ABD", "WHOLEBODY"), ("", "WHOLEBODY")]


@pytest.mark.parametrize(("ct", "result"), BODY_PARTS)
def test_the_body_part_is_the_cts_where_no_side_belongs_to_it(ct: str, result: str):
    header = header_from_bytes(element(0x00180015, "CS", ct.encode()))
    assert one_instance(source_with(header)).BodyPartExamined == result
