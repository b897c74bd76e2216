"""The clinical table: its columns, separators, encodings and spellings are matched loosely."""

from __future__ import annotations

from pathlib import Path

import pytest

from training.cases.metadata import age_of, day_of, diagnosis_of, read_metadata, sex_of
from training.errors import DataError


def table(folder: Path, text: str, *, encoding: str = "utf-8", name: str = "clinical.csv") -> Path:
    path = folder / name
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize(
    ("head", "row", "encoding"),
    [
        ("Subject ID,diagnosis,age,sex", "PETCT_0a1b2c,LUNG_CANCER,063Y,M", "utf-8"),
        ("subject_id;Diagnosis;AGE;Sex", "petct_0A1B2C;nsclc;63;male", "utf-8-sig"),
        ("PatientID\tDIAGNOSE\tPatient Age\tGender", "fdg_0a1b2c\tLung cancer\t63 years\tm", "utf-8"),
        ("case,dx,age,sex,Bemerkung", "0a1b2c,NSCLC,63,M,für später", "latin-1"),
    ],
)
def test_columns_are_matched_loosely(tmp_path: Path, head: str, row: str, encoding: str) -> None:
    known = read_metadata([table(tmp_path, f"{head}\r\n{row}\r\n", encoding=encoding)]).of("PETCT_0a1b2c")
    assert (known.diagnosis, known.age, known.sex, known.notes) == ("lung_cancer", 63.0, "M", ())


def test_other_column_names_are_refused_naming_those_found_and_those_wanted(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_metadata([table(tmp_path, "Pseudonym,Befund\nPETCT_0a1b2c,NSCLC\n")])
    assert caught.value.code == "metadata_columns"
    for word in ("Pseudonym", "Befund", "subjectid", "diagnosis", "clinical.csv"):
        assert word in caught.value.text


def test_an_empty_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found: none"):
        read_metadata([table(tmp_path, "")])


def test_the_download_managers_list_of_series_is_no_clinical_table(tmp_path: Path) -> None:
    listing = table(tmp_path, "Series UID,Subject ID,Study UID,File Location\n1.2,PETCT_0a1b2c,1.3,./x\n")
    assert read_metadata([listing]).of("PETCT_0a1b2c").diagnosis == "unknown"


def test_without_a_table_the_diagnosis_is_unknown_with_a_note() -> None:
    known = read_metadata([]).of("PETCT_0a1b2c")
    assert known.diagnosis == "unknown"
    assert known.notes == ("no metadata table: the diagnosis is unknown",)


def test_a_subject_that_the_table_does_not_know_gets_a_note(tmp_path: Path) -> None:
    metadata = read_metadata([table(tmp_path, "Subject ID,diagnosis\nPETCT_0a1b2c,NEGATIVE\n")])
    assert metadata.of("PETCT_ffffff").notes == ("not in the metadata table: the diagnosis is unknown",)


def test_several_rows_of_one_study_are_one_and_studies_are_told_apart(tmp_path: Path) -> None:
    text = (
        "Subject ID,Study UID,Study Date,Modality,File Location,diagnosis,age,sex\n"
        "PETCT_0a1b2c,1.1,03-23-2003,CT,./PETCT_0a1b2c/03-23-2003-NA-PET-11111/1.0-CT,LYMPHOMA,040Y,F\n"
        "PETCT_0a1b2c,1.1,03-23-2003,PT,./PETCT_0a1b2c/03-23-2003-NA-PET-11111/2.0-PT,LYMPHOMA,040Y,F\n"
        "PETCT_0a1b2c,1.2,06-01-2004,CT,./PETCT_0a1b2c/06-01-2004-NA-PET-22222/1.0-CT,NEGATIVE,041Y,F\n"
    )
    metadata = read_metadata([table(tmp_path, text)])
    assert metadata.of("PETCT_0a1b2c", study_uid="1.1").diagnosis == "lymphoma"
    assert metadata.of("PETCT_0a1b2c", study_uid="1.2").age == 41.0
    assert metadata.of("PETCT_0a1b2c", study="06-01-2004-NA-PET-22222").diagnosis == "negative"
    assert metadata.of("PETCT_0a1b2c", study="06-01-2004-another-name").diagnosis == "negative"
    assert metadata.of("PETCT_0a1b2c", date="20030323").diagnosis == "lymphoma"
    both = metadata.of("PETCT_0a1b2c")
    assert both.diagnosis == "unknown"
    assert "lymphoma, negative" in both.notes[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("NEGATIVE", "negative"),
        ("Negative control", "negative"),
        ("LYMPHOMA", "lymphoma"),
        ("LUNG_CANCER", "lung_cancer"),
        ("NSCLC", "lung_cancer"),
        ("MELANOMA", "melanoma"),
        ("Sarcoma", "other"),
        ("", "unknown"),
        ("n/a", "unknown"),
    ],
)
def test_diagnoses_have_many_spellings(text: str, expected: str) -> None:
    assert diagnosis_of(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"), [("063Y", 63.0), ("63", 63.0), ("018M", 1.5), ("63.5", 63.5), ("", None), ("old", None)]
)
def test_ages_are_years(text: str, expected: float | None) -> None:
    assert age_of(text) == expected


def test_dates_are_read_in_the_forms_that_the_releases_use() -> None:
    forms = ("2003-03-23", "20030323", "03-23-2003", "3/23/2003", "03-23-2003-NA-PET-CT-12345")
    assert {day_of(form) for form in forms} == {"20030323"}
    assert day_of("study_1") == ""


def test_sex_is_a_letter_or_nothing() -> None:
    assert [sex_of(t) for t in ("M", "female", "O", "?")] == ["M", "F", "O", ""]


def test_a_table_without_a_header_shows_none_of_its_values(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_metadata([table(tmp_path, "0815,Mustermann Erika,LYMPHOMA,063Y\n0816,Doe Jane,NEGATIVE,050Y\n")])
    assert caught.value.code == "metadata_columns"
    assert "Mustermann" not in caught.value.text
    assert "0815" not in caught.value.text


def test_a_table_that_cannot_be_parsed_is_refused(tmp_path: Path) -> None:
    long = "x" * 200_000
    with pytest.raises(DataError, match=r"clinical\.csv") as caught:
        read_metadata([table(tmp_path, f"subject,diagnosis\na,{long}\n")])
    assert caught.value.code == "metadata_unreadable"
