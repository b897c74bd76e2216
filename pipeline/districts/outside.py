"""What every segmenter from outside has in common: a process of its own with a deadline, and checks of its answer.

The process (`apart`) gets the voxels and nothing else of the patient. It is ended with its whole process group at the
deadline; whatever goes wrong in it is a `SegmenterUnavailable` here, so the next segmenter of the chain is tried:
segmenter_not_configured, segmenter_not_installed, segmenter_bad_model, segmenter_no_space, segmenter_timeout,
segmenter_crashed, segmenter_out_of_memory, segmenter_bad_labels, segmenter_no_districts.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from pipeline.districts.body import Mask, body_mask
from pipeline.districts.builtin import shrink, without_slivers, working_grid
from pipeline.errors import DistrictError, SegmenterUnavailable
from pipeline.geometry import bounding_box, resample
from pipeline.types import OUTSIDE, CtVolume, District, DistrictMap, DistrictOptions, Grid, LabelVolume

APART = "pipeline.districts.apart"
PREFIX = "districts-"  # of temporary folders; the id of the process that made one follows
PARTS = {District.HEAD: 1, District.TRUNK: 1, District.ARMS: 2, District.LEGS: 2}  # connected parts that are expected
HU_FILE, REQUEST_FILE, ANSWER_FILE, LOG_FILE = "hu.npy", "request.json", "answer.json", "log.txt"


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What a segmenter's process gave: label maps [z, y, x] on the CT's grid, and facts about them (JSON)."""

    maps: Mapping[str, NDArray[Any]]
    facts: Mapping[str, Any]


def require_package(package: str, extra: str) -> None:
    """Raises SegmenterUnavailable (segmenter_not_installed) where `package` is not there; does not import it."""
    if importlib.util.find_spec(package) is None:
        raise SegmenterUnavailable(
            "segmenter_not_installed", f"the package {package} is not installed (pip install '.[{extra}]')"
        )


def run_apart(
    work: str,
    ct: CtVolume,
    settings: Mapping[str, Any],
    *,
    options: DistrictOptions,
    environment: Mapping[str, str] | None = None,
) -> Answer:
    """`work` on the voxels of `ct`, in a Python process of its own that is ended at `options.timeout_s`.

    Args:
        work: "module:function"; called with HU [z, y, x], a `Grid` and `settings`, gives (maps, facts).
        ct: only voxels and grid are handed over, without the Frame of Reference.
        settings: JSON for the function.
        options: the deadline, the number of threads.
        environment: variables that the process has from its start, beside its parent's.

    Raises:
        SegmenterUnavailable: what the function raised, or its crash, lack of memory or deadline.
    """
    _sweep()
    prefix = f"{PREFIX}{os.getpid()}-"
    with TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True) as name:  # a grandchild may still be ending
        folder = Path(name)
        _write_request(folder, work, ct, settings, options)
        code = _exit_code(folder, options, environment or {})
        if not (folder / ANSWER_FILE).is_file():
            raise _crashed(code, (folder / LOG_FILE).read_text(encoding="utf-8", errors="replace"))
        answer = json.loads((folder / ANSWER_FILE).read_text(encoding="utf-8"))
        if "code" in answer:
            raise SegmenterUnavailable(answer["code"], answer["text"])
        return Answer(maps={m: np.load(folder / f"{m}.npy") for m in answer["maps"]}, facts=answer["facts"])


def _sweep() -> None:
    """Remove what processes left that were killed between writing a CT's voxels and starting their segmenter."""
    for folder in Path(gettempdir()).glob(f"{PREFIX}*-*"):
        pid = folder.name.removeprefix(PREFIX).partition("-")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists() and Path("/proc/self").exists():
            shutil.rmtree(folder, ignore_errors=True)


def _write_request(
    folder: Path, work: str, ct: CtVolume, settings: Mapping[str, Any], options: DistrictOptions
) -> None:
    """Voxels and request into `folder`; raises SegmenterUnavailable (segmenter_no_space)."""
    grid = {
        "shape": ct.grid.shape,
        "spacing_mm": ct.grid.spacing_mm,
        "origin_mm": ct.grid.origin_mm,
        "frame_of_reference_uid": "",
    }
    request = {"work": work, "grid": grid, "settings": dict(settings), "threads": options.threads}
    try:
        np.save(folder / HU_FILE, ct.hu)
        (folder / REQUEST_FILE).write_text(json.dumps(request), encoding="utf-8")
    except OSError as error:
        raise SegmenterUnavailable(
            "segmenter_no_space",
            f"the CT's {ct.hu.nbytes / 1e6:.0f} MB could not be written to the temporary folder (TMPDIR): "
            f"{error.strerror or 'too little was written'}",
        ) from error


def _exit_code(folder: Path, options: DistrictOptions, environment: Mapping[str, str]) -> int:
    """Run the process in `folder`; its exit code. Whatever it started ends with it."""
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(p or str(Path.cwd()) for p in sys.path),
        "TMPDIR": str(folder),  # a library's temporary files go with ours
        **({"OMP_NUM_THREADS": str(options.threads)} if options.threads else {}),
        **environment,
    }
    command = [sys.executable, "-m", APART, str(folder), str(os.getpid())]
    with (folder / LOG_FILE).open("wb") as log:
        process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
            command,
            cwd=folder,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(options.timeout_s)
        except subprocess.TimeoutExpired as error:
            raise SegmenterUnavailable(
                "segmenter_timeout",
                f"it did not end within {options.timeout_s:g} s (pipeline.segmenter_timeout_s) and was ended",
            ) from error
        finally:
            with suppress(ProcessLookupError, PermissionError):  # all of its group have ended
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _crashed(code: int, log: str) -> SegmenterUnavailable:
    if code == -signal.SIGKILL:
        return SegmenterUnavailable(
            "segmenter_out_of_memory", "its process was killed by the system, as one is that takes too much memory"
        )
    lines = log.strip().splitlines()
    said = f": {lines[-1][:200]}" if lines else ""
    return SegmenterUnavailable("segmenter_crashed", f"its process ended with code {code} and no answer{said}")


def checked(labels: NDArray[Any], grid: Grid, declared: Collection[int]) -> LabelVolume:
    """`labels` as uint8 [z, y, x], when they lie on `grid` and hold none but `declared` values.

    Raises SegmenterUnavailable (segmenter_bad_labels).
    """
    if labels.shape != grid.shape or labels.dtype.kind not in "ui":
        raise SegmenterUnavailable(
            "segmenter_bad_labels", f"it gave {labels.dtype} {labels.shape} for a CT of {grid.shape} voxels"
        )
    strange = sorted({int(v) for v in np.unique(labels)} - {OUTSIDE, *declared})
    if strange:
        raise SegmenterUnavailable(
            "segmenter_bad_labels", f"it gave the label {strange[0]}, declared are {sorted(declared)}"
        )
    return labels.astype(np.uint8)


def finished(
    labels: LabelVolume,
    ct: CtVolume,
    grid: Grid,
    *,
    segmenter: str,
    version: str,
    certainty: Mapping[District, float],
    notes: tuple[str, ...] = (),
) -> DistrictMap:
    """Eq. 2 for an outside segmenter's districts: every body voxel has exactly one, outside is 0.

    Args:
        labels: uint8 [z, y, x] on `grid`, 0 or a District.
        ct: the body is what the built-in segmenter takes for it: without table, blanket and headrest.
        grid: of the result.
        segmenter: the name for the records.
        version: of it.
        certainty: 0..1 per district, how sure the segmenter itself was.
        notes: kept in the map.

    Labels outside the body are dropped, body voxels without one get the nearest, and a district under 0.5 % of the
    body goes to its neighbor (`builtin.without_slivers`). Confidence is a product of three shares: the segmenter's
    own certainty, the share of the district that lies in its largest connected parts (one for head and trunk, two
    for arms and legs), and the share of it that the segmenter labeled itself.

    Raises DistrictError (no_body), SegmenterUnavailable (segmenter_no_districts: none of the labels lies in the body).
    """
    body = find_body(ct, grid)
    box = bounding_box(body)
    if box is None:
        raise DistrictError("no_body", f"segmenting districts: no patient in a volume of {ct.hu.shape} voxels")
    given = np.where(body[box], labels[box], OUTSIDE).astype(np.uint8)
    if not given.any():
        raise SegmenterUnavailable("segmenter_no_districts", "none of its labels lies within the body")
    whole = np.zeros(grid.shape, dtype=np.uint8)
    whole[box] = without_slivers(nearest_filled(given, body[box], grid.spacing_mm))
    filled = 1 - float((given > 0).sum() / body[box].sum())
    return DistrictMap(
        labels=whole,
        grid=grid,
        segmenter=segmenter,
        version=version,
        confidence=confidences(whole[box], given, certainty),
        notes=(*notes, f"{segmenter}: {filled:.1%} of the body got the nearest label") if filled > 0.01 else notes,
    )


def find_body(ct: CtVolume, grid: Grid) -> Mask:
    """The built-in segmenter's body mask of `ct`, on `grid`."""
    coarse = working_grid(ct.grid)
    body = body_mask(shrink(ct.hu, ct.grid, coarse))
    return np.asarray(resample(body, coarse, grid, fill=0, nearest=True))


def nearest_filled(labels: LabelVolume, body: Mask, spacing_mm: tuple[float, float, float]) -> LabelVolume:
    """`labels` [z, y, x] with the nearest (in mm) in every voxel of `body` that has none; nothing outside it."""
    inside = np.where(body, labels, OUTSIDE)
    near = ndimage.distance_transform_edt(inside == 0, spacing_mm, return_distances=False, return_indices=True)
    return np.where(body, inside[tuple(near)], OUTSIDE).astype(np.uint8)


def confidences(labels: LabelVolume, given: LabelVolume, certainty: Mapping[District, float]) -> dict[District, float]:
    """0..1 for every district of `labels`: certainty x share in its largest parts x share of `given` in it."""
    found: dict[District, float] = {}
    for district in District:
        mask = labels == district
        size = int(mask.sum())
        if size:
            own = float((given[mask] == district).sum() / size)
            found[district] = certainty.get(district, 1.0) * connected_share(mask, PARTS[district]) * own
    return found


def connected_share(mask: Mask, parts: int) -> float:
    """The share of a mask that lies in its largest `parts` connected (26) parts; 0 for an empty mask."""
    labeled, _ = ndimage.label(mask, structure=np.ones((3, 3, 3)))
    sizes = np.sort(np.bincount(labeled.ravel())[1:])
    return float(sizes[-parts:].sum() / sizes.sum()) if sizes.size else 0.0
