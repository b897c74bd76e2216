"""Districts by an nnU-Net v2 model folder, such as MOOSE's `clin_ct_body`, run by nnunetv2's own predictor.

The folder holds dataset.json, plans.json and fold_*/checkpoint_final.pth. Labels are matched to districts by their
names in dataset.json. The checkpoint is read as data only (`weights_only`): it cannot bring code along.

Which way the network saw its training files is a matter of their reader and file format:

    NibabelIOWithReorient       turns every file to RAS: x to the right, y to the front, z to the head
    SimpleITKIO, NibabelIO      take a file as it lies: NIfTI made from axial DICOM (dcm2niix, dicom2nifti) lies in
                                LAS, and MOOSE turns its input to the left too; .mha, .nrrd and .gipl keep DICOM's LPS

Ours is LPS [z, y, x], which is these readers' axis order, so only x and y may have to be turned round.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.districts.outside import checked, finished, require_package, run_apart
from pipeline.errors import SegmenterUnavailable
from pipeline.geometry import resample
from pipeline.types import OUTSIDE, CtVolume, District, DistrictMap, DistrictOptions, Grid, LabelVolume

NAME = "nnunet_folder"
WORK = "pipeline.districts.nnunet_predict:predict"
CHECKPOINTS = ("checkpoint_final.pth", "checkpoint_best.pth")
MAX_LABEL = 255
SIDES = ("left", "right", "l", "r")
WORDS: Mapping[str, District | None] = {
    "background": None,
    "ignore": None,
    "head": District.HEAD,
    "trunk": District.TRUNK,
    "body": District.TRUNK,  # MOOSE's word
    "torso": District.TRUNK,
    "arm": District.ARMS,
    "arms": District.ARMS,
    "leg": District.LEGS,
    "legs": District.LEGS,
}
ORIENTATIONS = {"NibabelIOWithReorient": "RAS", "SimpleITKIO": "LAS", "NibabelIO": "LAS"}
DICOM_ORIENTED = (".mha", ".nrrd", ".gipl")


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """What a model folder says of itself."""

    folder: Path
    name: str  # dataset, plans, configuration
    districts: Mapping[int, District]  # of each label but the background
    orientation: str  # "LPS", "LAS", "RAS": where x, y and z grow to in the network's input
    checkpoints: tuple[Path, ...]  # one per fold


def segment(ct: CtVolume, grid: Grid, options: DistrictOptions) -> DistrictMap:
    """Districts of `ct` on `grid` by the model in `options.nnunet_folder`.

    Confidence is `outside.finished`'s; the model's certainty of a district is its mean softmax there.
    Raises SegmenterUnavailable (see `outside`), DistrictError (no_body).
    """
    if options.nnunet_folder is None:
        raise SegmenterUnavailable("segmenter_not_configured", "no model folder is set (pipeline.nnunet_folder)")
    model = read_model(options.nnunet_folder)
    require_package("nnunetv2", "nnunet")
    settings = {
        "folder": str(model.folder),
        "checkpoints": [str(path) for path in model.checkpoints],
        "orientation": model.orientation,
        "device": options.device,
    }
    answer = run_apart(WORK, ct, settings, options=options, environment=_paths(model.folder))
    labels = checked(answer.maps["labels"], ct.grid, model.districts)
    return finished(
        resample(relabeled(labels, model.districts), ct.grid, grid, fill=OUTSIDE, nearest=True),
        ct,
        grid,
        segmenter=NAME,
        version=f"{model.name} {answer.facts['sha256'][:12]}",
        certainty=by_district(answer.facts["certainty"], model.districts),
    )


def read_model(folder: Path) -> Model:
    """Check a model folder, or the folder around one; raises SegmenterUnavailable (segmenter_bad_model)."""
    folder = _with_dataset(folder)
    dataset, plans = (read_json(folder / name) for name in ("dataset.json", "plans.json"))
    channels = dataset.get("channel_names", dataset.get("modality", {}))
    if len(channels) != 1:
        raise bad_model(folder, f"it wants {len(channels)} input channels, a CT is one")
    named = (plans.get("dataset_name"), plans.get("plans_name"), folder.name.split("__")[-1])
    return Model(
        folder=folder,
        name=" ".join(str(part)[:24] for part in named if part),
        districts=districts_by_name(dataset.get("labels", {}), folder),
        orientation=_orientation(dataset, plans, folder),
        checkpoints=_checkpoints(folder),
    )


def districts_by_name(labels: Mapping[str, Any], folder: Path) -> dict[int, District]:
    """The district of each label of dataset.json; sides are one district. Raises SegmenterUnavailable."""
    found: dict[int, District] = {}
    if not isinstance(labels, Mapping):
        raise bad_model(folder, "its labels are no table of names and numbers")
    for name, value in labels.items():
        words = [w for w in name.lower().replace("-", "_").replace(" ", "_").split("_") if w not in SIDES]
        if len(words) != 1 or words[0] not in WORDS:
            raise bad_model(
                folder, f"its label {name!r} is no district: head, trunk (body, torso), arms and legs are known"
            )
        district = WORDS[words[0]]
        if not isinstance(value, int):
            raise bad_model(folder, f"its label {name!r} is a region {value!r}, plain labels are expected")
        if not 0 <= value <= MAX_LABEL:
            raise bad_model(folder, f"its label {name!r} is {value}, 0 to {MAX_LABEL} are expected")
        if district is not None:
            found[value] = district
    if not found:
        raise bad_model(folder, "its dataset.json has no labels")
    return found


def relabeled(labels: LabelVolume, districts: Mapping[int, District]) -> LabelVolume:
    """The model's labels as districts."""
    table = np.zeros(MAX_LABEL + 1, dtype=np.uint8)
    for value, district in districts.items():
        table[value] = district
    return table[labels]


def by_district(certainty: Mapping[str, float], districts: Mapping[int, District]) -> dict[District, float]:
    """The least sure label's certainty, per district; `certainty` is by the label's number, as JSON has it."""
    found: dict[District, float] = {}
    for value, district in districts.items():
        if str(value) in certainty:
            found[district] = min(found.get(district, 1.0), certainty[str(value)])
    return found


def turned(volume: NDArray[Any], orientation: str) -> NDArray[Any]:
    """LPS [z, y, x] as `orientation`, or back: x is reversed for R, y for A."""
    axes = tuple(axis for axis, turn in ((2, orientation[0] == "R"), (1, orientation[1] == "A")) if turn)
    return np.ascontiguousarray(np.flip(volume, axes))


def _with_dataset(folder: Path) -> Path:
    """`folder`, or the one trainer__plans__configuration folder in it, as a dataset's folder is unzipped."""
    if (folder / "dataset.json").is_file():
        return folder
    inner = [p for p in sorted(folder.glob("*__*__*")) if (p / "dataset.json").is_file()] if folder.is_dir() else []
    if len(inner) != 1:
        raise bad_model(folder, "it holds no dataset.json, and not one folder that does")
    return inner[0]


def _checkpoints(folder: Path) -> tuple[Path, ...]:
    """Of all numbered folds, else of fold_all; the final ones, else the best."""
    for name in CHECKPOINTS:
        folds = sorted(path for path in folder.glob(f"fold_*/{name}"))
        numbered = tuple(path for path in folds if path.parent.name != "fold_all")
        if folds:
            return numbered or tuple(folds)
    raise bad_model(folder, f"it has no fold_*/{CHECKPOINTS[0]}")


def _orientation(dataset: Mapping[str, Any], plans: Mapping[str, Any], folder: Path) -> str:
    reader = plans.get("image_reader_writer") or dataset.get("overwrite_image_reader_writer") or "SimpleITKIO"
    if reader not in ORIENTATIONS:
        raise bad_model(folder, f"its image reader {reader!r} is not known: {sorted(ORIENTATIONS)} are")
    if reader == "SimpleITKIO" and str(dataset.get("file_ending", "")).lower() in DICOM_ORIENTED:
        return "LPS"
    return ORIENTATIONS[reader]


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise bad_model(path.parent, f"{path.name} cannot be read") from error
    if not isinstance(content, dict):
        raise bad_model(path.parent, f"{path.name} is no JSON object")
    return content


def _paths(folder: Path) -> dict[str, str]:
    """nnU-Net wants its three folders named; none of them is used to predict."""
    return dict.fromkeys(("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"), str(folder))


def bad_model(folder: Path, what: str) -> SegmenterUnavailable:
    return SegmenterUnavailable("segmenter_bad_model", f"the model folder {folder.name}: {what}")
