"""The table that comes with a cohort: diagnosis, age and sex by subject and study.

Column names, separators, encodings and spellings differ between releases and are matched loosely. A table may have
several rows for one study (one for each series).
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from training.errors import DataError
from training.prepared import Diagnosis

# Names are compared in lower case without anything but letters and digits.
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "subject": ("subjectid", "patientid", "subject", "patient", "caseid", "case", "pid", "id"),
    "diagnosis": ("diagnosis", "diagnose", "dx", "disease", "condition", "pathology"),
    "age": ("age", "patientage", "patientsage", "ageyears", "ageatscan"),
    "sex": ("sex", "gender", "patientsex", "patientssex"),
    "study_uid": ("studyuid", "studyinstanceuid"),
    "date": ("studydate", "date", "scandate"),
    "location": ("filelocation", "study", "studyname", "studyid", "path", "folder", "file"),
}
TABLE = "metadata table"  # all notes on it name it so
REQUIRED = ("subject", "diagnosis")
LISTING = {"seriesuid", "filelocation"}  # the download manager's own list of series: no clinical table
DIAGNOSES: Mapping[str, Diagnosis] = {
    **dict.fromkeys(("negative", "neg", "negativecontrol", "control", "healthy", "none", "normal"), "negative"),
    **dict.fromkeys(("lymphoma", "hodgkinlymphoma", "nonhodgkinlymphoma", "dlbcl"), "lymphoma"),
    **dict.fromkeys(("lungcancer", "nsclc", "lung", "lungcarcinoma", "nonsmallcelllungcancer"), "lung_cancer"),
    **dict.fromkeys(("melanoma", "malignantmelanoma"), "melanoma"),
    **dict.fromkeys(("", "na", "nan", "unknown"), "unknown"),
}
AGE_UNITS = {"Y": 1.0, "M": 1 / 12, "W": 7 / 365.25, "D": 1 / 365.25}  # AS, PS3.5 section 6.2
SEXES = {"m": "M", "male": "M", "f": "F", "female": "F", "w": "F", "o": "O", "other": "O"}
_PREFIX = re.compile(r"^(petct|fdg|psma|subject|sub|patient|case)[-_ ]+")


@dataclass(frozen=True, kw_only=True, slots=True)
class Known:
    """What a table says of one study."""

    diagnosis: Diagnosis = "unknown"
    age: float | None = None
    sex: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Metadata:
    """The rows of all clinical tables of a cohort, each with the keys of COLUMNS. No rows: there was no table."""

    rows: Mapping[str, Sequence[Mapping[str, str]]] = field(default_factory=dict)  # by subject key

    def subjects(self) -> set[str]:
        """The subject keys that the tables know."""
        return set(self.rows)

    def of(self, subject: str, *, study_uid: str = "", study: str = "", date: str = "") -> Known:
        """Diagnosis, age and sex of a study; what is not known stays unknown, with a note.

        Args:
            subject: the patient's ID or the case's name.
            study_uid: tells several studies of one subject apart, best of all.
            study: the study folder's name; `date`: the study date in any common form.
        """
        if not self.rows:
            return Known(notes=(f"no {TABLE}: the diagnosis is unknown",))
        rows = self.rows.get(subject_key(subject), ())
        if not rows:
            return Known(notes=(f"not in the {TABLE}: the diagnosis is unknown",))
        rows = _of_study(rows, study_uid, study, date)
        found = {diagnosis_of(row["diagnosis"]) for row in rows} - {"unknown"}
        notes: tuple[str, ...] = ()
        if len(found) > 1:
            notes = (f"the {TABLE} gives {', '.join(sorted(found))} for one study: taken as unknown",)
        return Known(
            diagnosis=found.pop() if len(found) == 1 else "unknown",
            age=next((age for row in rows if (age := age_of(row["age"])) is not None), None),
            sex=next((sex for row in rows if (sex := sex_of(row["sex"]))), ""),
            notes=notes,
        )


def _of_study(rows: Sequence[Mapping[str, str]], uid: str, study: str, date: str) -> Sequence[Mapping[str, str]]:
    """Those rows that name the study, by the surest of three signs that any row has; else all."""
    day = day_of(date) or day_of(study)
    for matches in (
        [row for row in rows if uid and row["study_uid"].strip() == uid],
        [row for row in rows if study and study in re.split(r"[\\/]", row["location"])],
        [row for row in rows if day and day_of(row["date"]) == day],
    ):
        if matches:
            return matches
    return rows


def read_metadata(paths: Iterable[Path]) -> Metadata:
    """The clinical tables among the CSV files `paths`.

    Raises:
        DataError: metadata_columns when there are tables and one of them lacks the columns that are wanted,
            metadata_unreadable when one cannot be read as CSV.
    """
    rows: dict[str, list[Mapping[str, str]]] = {}
    for path in sorted(paths):
        try:
            table = _read_table(path)
        except (OSError, csv.Error) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise DataError("metadata_unreadable", f"{path.name}: cannot be read as a CSV table ({reason})") from error
        for row in table:
            rows.setdefault(subject_key(row["subject"]), []).append(row)
    rows.pop("", None)
    return Metadata(rows=rows)


def _read_table(path: Path) -> list[dict[str, str]]:
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    head = text.partition("\n")[0]
    separator = max(",;\t", key=head.count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator)
    names = {_plain(name): name for name in reader.fieldnames or () if name}
    columns = {key: next((names[s] for s in synonyms if s in names), "") for key, synonyms in COLUMNS.items()}
    if names.keys() >= LISTING and not columns["diagnosis"]:
        return []
    if missing := [key for key in REQUIRED if not columns[key]]:
        wanted = "; ".join(f"{key} (one of {', '.join(COLUMNS[key])})" for key in missing)
        found = ", ".join(names.values()) or "none"
        if any(map(_is_value, names.values())):  # a patient's row, which is nobody's to read here
            found = "a first line that looks like values and not like names"
        text = f"{path.name}: no column for {wanted}, in any case and with spaces or underscores; found: {found}"
        raise DataError("metadata_columns", text)
    return [{key: (row.get(name) or "").strip() if name else "" for key, name in columns.items()} for row in reader]


def _is_value(cell: str) -> bool:
    """Whether a cell of the first line is what a row holds: a diagnosis, a number, an age or a date."""
    diagnosis = DIAGNOSES.get(_plain(cell), "unknown") != "unknown"
    return diagnosis or age_of(cell) is not None or bool(day_of(cell)) or "^" in cell


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())


def subject_key(subject: str) -> str:
    """How subjects are compared: `PETCT_0a1b`, `fdg_0a1b` and `0A1B` are one."""
    return _PREFIX.sub("", subject.strip().lower())


def diagnosis_of(text: str) -> Diagnosis:
    """The diagnosis behind any of its spellings; a text that is not known is "other"."""
    return DIAGNOSES.get(_plain(text), "other")


def age_of(text: str) -> float | None:
    """Years: `063Y` and its months, weeks and days (AS), a plain number, `63 years`; None for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([YMWD])?(?:EARS?|R|RS|ONTHS?|EEKS?|AYS?)?", text.strip().upper())
    return None if found is None else float(found[1]) * AGE_UNITS[found[2] or "Y"]


def sex_of(text: str) -> str:
    """M, F, O, or nothing."""
    return SEXES.get(text.strip().lower(), "")


def day_of(text: str) -> str:
    """YYYYMMDD of a date that `text` begins with: 2003-03-23, 20030323, 03-23-2003, 3/23/2003; else nothing."""
    if found := re.match(r"(\d{4})[-/.]?(\d{2})[-/.]?(\d{2})(?!\d)", text.strip()):
        return found[1] + found[2] + found[3]
    if found := re.match(r"(\d{1,2})[-/](\d{1,2})[-/](\d{4})(?!\d)", text.strip()):
        return f"{found[3]}{int(found[1]):02d}{int(found[2]):02d}"
    return ""
