"""Small studies in the published layouts, written by hand, for tests of their loaders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom import Dataset

from training.phantom import Phantom
from training.phantom.dicom import write_ct_series, write_pet_series
from training.phantom.segments import write_lesion_seg, write_seg

SHAPE = (6, 5, 4)  # z, y, x
SPACING = (5.0, 4.0, 3.0)
ORIGIN = (-30.0, -20.0, 100.0)  # LPS x, y, z
Edit = Callable[[Dataset], None]


def volume(seed: int = 0, low: float = 0.0, high: float = 10.0) -> NDArray[np.float32]:
    """Different numbers everywhere [z, y, x], so that a wrong flip shows."""
    return np.random.default_rng(seed).uniform(low, high, SHAPE).astype(np.float32)


def hounsfield(seed: int = 1) -> NDArray[np.float32]:
    return np.rint(volume(seed, -1000, 1000)).astype(np.float32)


def write_nifti(
    path: Path,
    array: NDArray[Any],
    *,
    axes: str = "RAS",
    spacing: tuple[float, float, float] = SPACING,
    origin: tuple[float, float, float] = ORIGIN,
    turn: NDArray[np.float64] | None = None,
) -> Path:
    """`array` [z, y, x] in LPS as a NIfTI file whose array axes grow towards `axes` ("LPS", "RAS", "SAL" ...)."""
    place = {"L": (0, 1), "R": (0, -1), "P": (1, 1), "A": (1, -1), "S": (2, 1), "I": (2, -1)}
    order = [place[letter] for letter in axes]
    data = array.transpose(2, 1, 0).transpose([axis for axis, _ in order])
    step = dict(zip(range(3), spacing[::-1], strict=True))
    steps, first = np.zeros((3, 3)), np.array(origin, float)
    for k, (axis, sign) in enumerate(order):
        steps[axis, k] = sign * step[axis]
        if sign < 0:
            data = np.flip(data, k)
            first[axis] += step[axis] * (data.shape[k] - 1)
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = (np.eye(3) if turn is None else turn) @ steps, first
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(np.ascontiguousarray(data), np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine)
    nibabel.save(image, path)
    return path


def write_nifti_study(folder: Path, *, without: tuple[str, ...] = (), **volumes: NDArray[Any]) -> Path:
    """CT, CTres, PET, SUV and SEG as the published conversion names them, less `without`."""
    seg = np.zeros(SHAPE, np.uint8)
    seg[2, 3, 1] = 1
    made: dict[str, NDArray[Any]] = {
        "CT": hounsfield(),
        "CTres": hounsfield(2),
        "PET": volume(3) * 5000,
        "SUV": volume(),
        "SEG": seg,
        **volumes,
    }
    for name, array in made.items():
        if name not in without:
            write_nifti(folder / f"{name}.nii.gz", array)
    return folder


def write_dicom_study(phantom: Phantom, folder: Path) -> Path:
    """CT, PET and the SEGs of districts and lesions, in folders that say nothing."""
    ct = write_ct_series(phantom, folder / "a", matrix=None)
    pet = write_pet_series(phantom, folder / "b")
    write_seg(phantom, folder / "c", ct)
    if phantom.lesions.any():
        write_lesion_seg(phantom, folder / "d", pet)
    return folder


def edit(folder: Path, change: Edit) -> None:
    """Apply `change` to every DICOM file of `folder`."""
    for path in sorted(folder.glob("*.dcm")):
        ds = pydicom.dcmread(path)
        change(ds)
        ds.save_as(path)


def copy_series(folder: Path, target: Path, series_uid: str, change: Edit = lambda ds: None) -> None:
    """A second series: the files of `folder` under another UID, changed."""
    target.mkdir()
    for path in sorted(folder.glob("*.dcm")):
        ds = pydicom.dcmread(path)
        ds.SeriesInstanceUID = series_uid
        ds.SOPInstanceUID = f"{series_uid}.{ds.InstanceNumber}"
        ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
        change(ds)
        ds.save_as(target / path.name)
