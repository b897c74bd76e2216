"""The nnU-Net layout: `images*/<case>_0000.nii.gz` and `_0001`, `labels*/<case>.nii.gz`, dataset.json.

Which channel is the CT differs between converters: dataset.json says so, or else the voxels do.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from training.cases.ids import patient_hash, study_id
from training.cases.metadata import Metadata, day_of, subject_key
from training.cases.nifti import check_headers, read_nifti, stem
from training.cases.types import Study
from training.errors import StudyError
from training.prepared import RefusedStudy

CT_BELOW_HU = -200.0  # every CT holds air; no SUV is negative
_CHANNEL = re.compile(r"(.+)_(\d{4})")
_SUBJECT = re.compile(r"((?:[a-z]+[-_])?(?=[0-9a-f]*\d)[0-9a-f]{4,})(?:[-_](.+))?", re.I)

Channels = tuple[int, int]  # of the CT, of the SUV


def channel_of(path: Path) -> tuple[str, int] | None:
    """Case and channel of an image file's name, or None."""
    found = _CHANNEL.fullmatch(stem(path))
    return (found[1], int(found[2])) if found else None


def find_nnunet(
    files: Sequence[Path], metadata: Metadata, on_file: Callable[[], None]
) -> tuple[list[Study], list[RefusedStudy]]:
    """The studies among the NIfTI files, from names, headers and dataset.json."""
    images: dict[tuple[Path, str], dict[int, Path]] = {}
    labels: dict[tuple[Path, str], Path] = {}
    for path in files:
        if named := channel_of(path):
            images.setdefault((path.parent, named[0]), {})[named[1]] = path
        else:
            labels[path.parent, stem(path)] = path
    studies, refused = [], []
    channels: dict[Path, Channels] = {}
    for (folder, case), members in sorted(images.items()):
        name = study_id(_subject(case, metadata)[0], case)
        try:
            if folder not in channels:
                channels[folder] = _channels(folder, members)
            studies.append(_study(name, folder, case, members, channels[folder], labels, metadata))
        except StudyError as error:
            refused.append(RefusedStudy(study=name, code=error.code, text=error.text))
        for _ in members:
            on_file()
    for _ in labels:
        on_file()
    return studies, refused


def _study(
    name: str,
    folder: Path,
    case: str,
    members: Mapping[int, Path],
    channels: Channels,
    labels: Mapping[tuple[Path, str], Path],
    metadata: Metadata,
) -> Study:
    ct, suv = channels
    if suv not in members:
        raise StudyError("no_pet", f"there is no channel {suv:04d} (SUV) of the case")
    if ct not in members:
        raise StudyError("no_ct", f"there is no channel {ct:04d} (CT) of the case")
    parts = {"ct": (members[ct],), "pet": (members[suv],)}
    side = folder.name.removeprefix("images")
    for part, kind in (("lesions", "labels"), ("districts", "districts"), ("organs", "organs")):
        if path := labels.get((folder.with_name(kind + side), case)):
            parts[part] = (path,)
    check_headers(parts)
    subject, study = _subject(case, metadata)
    by_case = subject_key(case) in metadata.subjects()
    known = metadata.of(case if by_case else subject, study=study)
    notes = [] if "lesions" in parts else ["no label map of lesions"]
    if len(members) > 2:
        notes.append(f"{len(members) - 2} further channels are not used")
    return Study(
        id=name,
        patient=patient_hash(subject),
        layout="nnunet",
        parts=parts,
        diagnosis=known.diagnosis,
        age=known.age,
        sex=known.sex,
        notes=(*notes, *known.notes),
    )


def _subject(case: str, metadata: Metadata) -> tuple[str, str]:
    """Whose study `case` is, and the study's name: by the longest subject of the table, else by its looks.

    A table may have a row for each case: `fdg_<hash>_<date>-...` is a study all the same, and <hash> its patient.
    """
    key = subject_key(case)
    known = [s for s in metadata.subjects() if key == s or key.startswith((f"{s}_", f"{s}-"))]
    found = _SUBJECT.fullmatch(case)
    if known and not (key in known and found and day_of(found[2] or "")):
        cut = len(case) - len(key) + len(max(known, key=len))
        return case[:cut], case[cut + 1 :]
    return (found[1], found[2] or "") if found else (case, "")


def _channels(folder: Path, members: Mapping[int, Path]) -> Channels:
    """Which channel is the CT and which the SUV: what dataset.json says, else the one with air in it is the CT."""
    named = _named_channels(folder.parent / "dataset.json")
    if named is not None:
        return named
    if not {0, 1} <= members.keys():
        missing = 1 if 0 in members else 0
        text = f"there is no channel {missing:04d} of the case, and dataset.json does not say what the other one is"
        raise StudyError("no_pet", text)
    has_air = [bool((read_nifti(members[c], f"channel {c:04d}", "1.2.3")[0] < CT_BELOW_HU).any()) for c in (0, 1)]
    if has_air[0] == has_air[1]:
        text = f"dataset.json names no CT, and {'both' if has_air[0] else 'neither'} of the channels hold values under"
        raise StudyError("channels_unknown", f"{text} {CT_BELOW_HU:.0f}")
    return (0, 1) if has_air[0] else (1, 0)


def _named_channels(path: Path) -> Channels | None:
    """Channels by dataset.json (`channel_names`, formerly `modality`); None where it does not tell them apart."""
    try:
        content = json.loads(path.read_text("utf-8"))
        names = content.get("channel_names") or content.get("modality") or {}
        kinds = {int(channel): str(name).strip().lower() for channel, name in names.items()}
    except (OSError, ValueError, AttributeError):
        return None
    ct = [channel for channel, name in kinds.items() if re.match(r"ct\b|ct_|hu\b|computed", name)]
    pet = [channel for channel, name in kinds.items() if re.search(r"pet\b|suv|^pt\b", name)]
    if len(ct) == 1 and len(pet) == 1 and ct != pet:
        return ct[0], pet[0]
    if len(kinds) == 2 and len(ct) == 1:
        return ct[0], next(channel for channel in kinds if channel != ct[0])
    return None
