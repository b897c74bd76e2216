"""A folder of studies, whichever of the three published layouts it has."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from training.cases.metadata import Metadata, read_metadata
from training.cases.nifti import STUDY_NAMES, find_nifti, stem
from training.cases.nnunet import channel_of, find_nnunet
from training.cases.tcia import find_dicom
from training.cases.types import Cohort, Layout, Study
from training.errors import DataError
from training.prepared import RefusedStudy

OnProgress = Callable[[int, int], None]
TABLE_DEPTH = 2  # folders below the root in which a clinical table may lie; deeper ones belong to single studies
ORGANS = "organs.json"
NO_ORGAN = "none"  # the name of label 0
DICM = b"DICM"  # at byte 128 (PS3.10 section 7.1)
LAYOUTS = (
    "(1) DICOM files of CT, PET and SEG in any folders, "
    "(2) <case>/<study>/CT.nii.gz, SUV.nii.gz, SEG.nii.gz, "
    "(3) imagesTr/<case>_0000.nii.gz and _0001.nii.gz with labelsTr/"
)


def find_studies(folder: Path, on_progress: OnProgress | None = None) -> Cohort:
    """Every study below `folder`, checked as far as names and headers go.

    No voxel is read, but of one nnU-Net case where only its voxels tell CT and SUV apart.

    Args:
        folder: a cohort in one of the layouts.
        on_progress: called with (files looked at, files in all).

    Raises:
        DataError: data_missing (no folder, or nothing in it), data_unknown (none of the layouts, or two at once),
            metadata_columns (a clinical table without the columns that are wanted), metadata_unreadable,
            organs_invalid.
    """
    if not folder.is_dir():
        raise DataError("data_missing", f"{folder} is not a folder")
    files = list_files(folder)
    if not files:
        raise DataError("data_missing", f"{folder} has no file in it, one of these is expected: {LAYOUTS}")
    layout = layout_of(folder, files)
    metadata = _metadata(folder, files)
    images = files if layout == "tcia" else [path for path in files if stem(path)]
    done = 0

    def on_file() -> None:
        nonlocal done
        done += 1
        if on_progress is not None:
            on_progress(done, len(images))

    phantom = False
    if layout == "tcia":
        found = find_dicom(images, metadata, on_file)
        studies, refused, phantom = list(found.studies), list(found.refused), found.phantom
    elif layout == "nnunet":
        studies, refused = find_nnunet(images, metadata, on_file)
    else:
        studies, refused = find_nifti(folder, images, metadata, on_file)
    if not studies and not refused:
        raise DataError("data_unknown", f"{folder} holds no study; one of these is expected: {LAYOUTS}")
    studies, alike = _told_apart(studies)
    return Cohort(
        layout=layout,
        studies=tuple(sorted(studies, key=lambda study: study.id)),
        refused=tuple(sorted([*refused, *alike], key=lambda study: study.study)),
        organ_names=_organ_names(folder),
        phantom=phantom or _says_phantom(folder),
    )


def _told_apart(studies: list[Study]) -> tuple[list[Study], list[RefusedStudy]]:
    """The studies with an id of their own, and a refusal for each id that several have: copies, or folders too deep."""
    counts = Counter(study.id for study in studies)
    text = "{} studies have the same names of case and study: copies, or folders that are not <case>/<study>/"
    alike = [
        RefusedStudy(study=name, code="same_name", text=text.format(count))
        for name, count in counts.items()
        if count > 1
    ]
    return [study for study in studies if counts[study.id] == 1], alike


def list_files(folder: Path) -> list[Path]:
    """All files below `folder` but hidden ones, sorted."""
    found: list[Path] = []
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(parent, name) for name in sorted(names) if not name.startswith(".")]
    return found


def layout_of(folder: Path, files: list[Path]) -> Layout:
    """Told by what the files are, not by what the folders are called. Raises DataError data_unknown."""
    volumes = [path for path in files if stem(path)]
    cases = {(path.parent, *named) for path in volumes if (named := channel_of(path))}
    layouts: list[Layout] = []
    if any(channel == 0 and (parent, case, 1) in cases for parent, case, channel in cases):
        layouts.append("nnunet")
    if any(stem(path).lower() in STUDY_NAMES for path in volumes):
        layouts.append("nifti")
    if any(path.suffix.lower() == ".dcm" for path in files) or (not layouts and any(map(_is_dicom, files))):
        layouts.append("tcia")
    if not layouts and cases:
        layouts.append("nnunet")
    if len(layouts) == 1:
        return layouts[0]
    found = f"files of {len(layouts)} layouts ({', '.join(layouts)})" if layouts else f"{len(files)} files of none"
    raise DataError("data_unknown", f"{folder} holds {found}; one of these is expected: {LAYOUTS}")


def _is_dicom(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == DICM
    except OSError:
        return False


def _metadata(folder: Path, files: list[Path]) -> Metadata:
    tables = [path for path in files if path.suffix.lower() == ".csv"]
    return read_metadata(path for path in tables if len(path.relative_to(folder).parts) <= TABLE_DEPTH + 1)


def _organ_names(folder: Path) -> tuple[str, ...]:
    """organs.json at the root: names in the order of their labels, or an object of labels and names (either way).

    Raises DataError organs_invalid.
    """
    path = folder / ORGANS
    if not path.exists():
        return ()
    try:
        content = json.loads(path.read_text("utf-8"))
        if not isinstance(content, dict):
            return tuple(str(name) for name in content)
        by_label = {int(k): str(v) for k, v in content.items() if k.isdigit()}
        by_label = by_label or {int(v): k for k, v in content.items()}
        return tuple(by_label.get(label, NO_ORGAN) for label in range(max(by_label, default=-1) + 1))
    except (OSError, ValueError, TypeError) as error:
        text = f"{path}: a list of organ names is expected, or an object of labels and names ({error})"
        raise DataError("organs_invalid", text) from error


def _says_phantom(folder: Path) -> bool:
    """Whether a NIfTI cohort says of itself, in its dataset.json or organs.json, that it was computed."""
    for name in ("dataset.json", ORGANS):
        try:
            content = json.loads((folder / name).read_text("utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(content, dict) and content.get("phantom") is True:
            return True
    return False
