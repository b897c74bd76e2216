"""OHIF in a headless Chromium against Orthanc: what a radiologist sees of each encoding, and beside a real PET.

One archive, one browser: every page is opened once, and the tests ask the report that it left. The screenshots of
docs/viewers.md are these (`make viewer-pictures`).
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ohif_server import serving_ohif
from orthanc import Orthanc, running_orthanc
from reader_study import (
    ENCODINGS,
    SPEC,
    SUV_TOLERANCE,
    ReaderStudy,
    Written,
    acquired_phantom,
    make_study,
    write_acquired_pet,
    write_files,
)
from reader_tools import HERE, NODE_TIMEOUT_S, node_modules, ohif_dist, program

from pipeline.types import EncodedSeries
from training.phantom import PhantomSpec, make_phantom
from training.phantom.dicom import activity_per_suv

pytestmark = [pytest.mark.orthanc, pytest.mark.slow, pytest.mark.timeout(NODE_TIMEOUT_S + 300)]

PLANES = ("AXIAL", "SAGITTAL", "CORONAL")
MAXIMUM_INTENSITY = 1  # cornerstone's blend mode of a MIP
SHORT = (0.60, 0.85)  # of the body, for the studies that only ask who is shown
WEIGHTLESS, OURS_FIRST, REAL_FIRST, LOW_NUMBER, OWN_FRAME, ALONE = (
    replace(SPEC, visit=visit, coverage=SHORT) for visit in (2, 3, 4, 5, 6, 7)
)
NOT_REGISTERED = "do not share the same FrameOfReferenceUID"
ROI_RADIUS_MM = 20.0
FLOAT32 = 1e-5


@dataclass(frozen=True, kw_only=True)
class Seen:
    """The report of one page, with the study that it shows."""

    study: ReaderStudy
    ours: str  # our series' UID, empty where the study has none
    spec: PhantomSpec
    report: Mapping[str, Any]
    roi_center_mm: tuple[float, float, float] = (0, 0, 0)

    def display_set(self, series: str) -> Mapping[str, Any]:
        (found,) = [one for one in self.report["displaySets"] if one["series"] == series]
        return dict(found)

    def volume(self, series: str) -> Mapping[str, Any]:
        (found,) = [one for one in self.report["volumes"] if one["series"] == series]
        return dict(found)

    def shown_in(self, viewport: str, *, chosen: bool = False) -> list[str]:
        """The series in a viewport, at first or after ours was chosen."""
        viewports = self.report["chosen"]["viewports"] if chosen else self.report["viewports"]
        (found,) = [one["series"] for one in viewports if one["id"].lower() == viewport.lower()]
        return list(found)

    @property
    def ct(self) -> str:
        return self.study.source.series_uid


@dataclass(frozen=True, kw_only=True)
class Page:
    """What the browser is asked to open."""

    name: str
    study: ReaderStudy
    ours: str
    spec: PhantomSpec
    mode: str = "tmtv"
    with_region: bool = False
    choose_ours: bool = False  # a double click on our thumbnail, at the end

    @property
    def lesion_mm(self) -> tuple[float, float, float]:
        """The lesion nearest to the middle, so that every plane shows the trunk: LPS, in its nearest slice."""
        grid = self.study.suv.grid
        lesion = min(make_phantom(self.spec).lesion_list, key=lambda one: abs(one.centre_mm[0]))
        x, y, z = lesion.centre_mm
        slice_ = round((z - grid.origin_mm[2]) / grid.spacing_mm[0])
        return x, y, grid.origin_mm[2] + slice_ * grid.spacing_mm[0]

    def job(self) -> dict[str, Any]:
        asked: dict[str, Any] = {"name": self.name, "mode": self.mode, "study": self.study.source.study_uid}
        if self.mode == "tmtv":
            asked |= {"volumes": 2, "center": self.lesion_mm}
        else:
            asked["show"] = ["OT", "PT", "SEG", "SR"]
        if self.with_region:
            asked["roi"] = {"center": self.lesion_mm, "radius_mm": ROI_RADIUS_MM}
        if self.choose_ours:
            asked["chosen"] = {"viewport": "ptAXIAL", "series": self.ours}
        return asked


@pytest.fixture(scope="module")
def seen(written: Written, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Seen]:
    """Fill an archive, open every page, read the report."""
    folder = tmp_path_factory.mktemp("ohif")
    dist, modules, chromium = ohif_dist(), node_modules(), program("chromium", "chromium")
    with running_orthanc(folder / "orthanc", modalities={}, dicomweb=True) as orthanc:
        pages = list(fill(orthanc, written, folder))
        with serving_ohif(dist, orthanc.http_port) as url:
            report = browse(folder, pages, url=url, modules=str(modules), chromium=chromium)
    return {
        page.name: Seen(
            study=page.study,
            ours=page.ours,
            spec=page.spec,
            report=report[page.name],
            roi_center_mm=page.lesion_mm,
        )
        for page in pages
    }


def fill(orthanc: Orthanc, written: Written, folder: Path) -> Iterator[Page]:
    """Each study into the archive, in the order in which a hospital might get them."""
    pet_spec = replace(SPEC, visit=1, fov_mm=544.0)  # 136 x 136: planes of whole bytes in a SEG
    for encoding, study, spec in (
        ("sc", written.study, SPEC),
        ("pet", make_study(folder / "pet" / "ct", spec=pet_spec), pet_spec),
    ):
        ours = send(orthanc, study, folder / encoding / "ours", *study.result(encoding).values())
        yield Page(name=f"tmtv-{encoding}", study=study, ours=ours, spec=spec, with_region=True)
        yield Page(name=f"viewer-{encoding}", study=study, ours=ours, spec=spec, mode="viewer")
    study = make_study(folder / "weightless" / "ct", spec=WEIGHTLESS, weight=False)
    ours = send(orthanc, study, folder / "weightless" / "ours", study.pet("sc"))
    yield Page(name="tmtv-weightless", study=study, ours=ours, spec=WEIGHTLESS, with_region=True)
    for name, spec, encoding in (
        ("ours-first", OURS_FIRST, "sc"),
        ("real-first", REAL_FIRST, "pet"),
        ("low-number", LOW_NUMBER, "sc"),
        ("own-frame", OWN_FRAME, "sc"),
    ):
        study = make_study(folder / name / "ct", spec=spec)
        if name == "low-number":
            study = replace(study, options=replace(study.options, series_number=1))
        own_frame = name == "own-frame"
        acquired = write_acquired_pet(folder / name / "acquired", spec=spec, own_frame=own_frame)
        if name != "ours-first":
            put(orthanc, acquired)
        ours = send(orthanc, study, folder / name / "ours", study.pet(encoding))
        if name == "ours-first":
            put(orthanc, acquired)
        yield Page(name=f"beside-a-real-pet-{name}", study=study, ours=ours, spec=spec, choose_ours=own_frame)
    study = make_study(folder / "alone" / "ct", spec=ALONE)
    put(orthanc, [*study.ct, *write_acquired_pet(folder / "alone" / "acquired", spec=ALONE, own_frame=True)])
    yield Page(name="own-frame-without-ours", study=study, ours="", spec=ALONE)


def send(orthanc: Orthanc, study: ReaderStudy, folder: Path, *result: EncodedSeries) -> str:
    """The CT and our series into the archive; returns the UID of our PET series."""
    put(orthanc, list(study.ct))
    for series in result:
        put(orthanc, write_files(series, folder / series.kind))
    return next(series.series_uid for series in result if series.kind == "pet")


def put(orthanc: Orthanc, paths: list[Path]) -> None:
    for path in paths:
        orthanc.post("/instances", path.read_bytes())


def browse(folder: Path, pages: list[Page], **job: str) -> dict[str, Any]:
    """Run the browser over the pages; screenshots and report stay in `folder`."""
    whole = {**job, "profile": str(folder / "profile"), "out": str(folder), "pages": [page.job() for page in pages]}
    path = folder / "job.json"
    path.write_text(json.dumps(whole))
    command = [program("node", "nodejs"), str(HERE / "ohif.mjs"), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=NODE_TIMEOUT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return report


@pytest.fixture(params=ENCODINGS)
def tmtv(request: pytest.FixtureRequest, seen: dict[str, Seen]) -> Seen:
    """The TMTV page of the study that has this encoding and no other PET."""
    return seen[f"tmtv-{request.param}"]


def test_tmtv_mode_shows_ct_pet_fusion_and_mip(tmtv: Seen) -> None:
    for plane in PLANES:
        assert tmtv.shown_in(f"ct{plane}") == [tmtv.ct]
        assert tmtv.shown_in(f"pt{plane}") == [tmtv.ours]
        assert tmtv.shown_in(f"fusion{plane}") == [tmtv.ct, tmtv.ours]
    (mip,) = [one for one in tmtv.report["viewports"] if one["id"].startswith("mip")]
    assert (mip["series"], mip["blendMode"]) == ([tmtv.ours], MAXIMUM_INTENSITY)


def test_the_viewer_raises_no_error(seen: dict[str, Seen]) -> None:
    assert {name: one.report["errors"] for name, one in seen.items()} == {name: [] for name in seen}


def test_the_pet_is_a_volume_with_an_suv_factor_of_1(tmtv: Seen) -> None:
    assert tmtv.display_set(tmtv.ours)["reconstructable"]
    volume = tmtv.volume(tmtv.ours)
    assert volume["scaling"]["suvbw"] == 1
    assert volume["array"] == "Float32Array"


def test_the_volume_lies_where_the_result_lies(tmtv: Seen) -> None:
    volume, grid = tmtv.volume(tmtv.ours), tmtv.study.suv.grid
    assert volume["dimensions"] == list(grid.shape[::-1])
    assert volume["spacing"] == pytest.approx(grid.spacing_mm[::-1], abs=1e-4)
    assert volume["origin"] == pytest.approx(grid.origin_mm, abs=1e-3)
    assert volume["direction"] == pytest.approx([1, 0, 0, 0, 1, 0, 0, 0, 1])


def test_every_slice_has_the_maximum_that_was_written(tmtv: Seen) -> None:
    expected = tmtv.study.shown.max(axis=(1, 2))
    found = np.array(tmtv.volume(tmtv.ours)["sliceMaxima"])
    assert np.abs(found - expected).max() <= SUV_TOLERANCE + FLOAT32


def test_a_region_and_a_probe_are_measured_in_suv(tmtv: Seen) -> None:
    ellipse, probe = sorted(tmtv.report["regions"], key=lambda one: str(one["tool"]))
    assert (ellipse["tool"], probe["tool"]) == ("EllipticalROI", "Probe")
    assert (ellipse["unit"], probe["unit"]) == ("SUV", "SUV")
    voxel, disk = around(tmtv, ROI_RADIUS_MM)
    assert ellipse["max"] == pytest.approx(disk.max(), abs=SUV_TOLERANCE + FLOAT32)
    assert probe["value"] == pytest.approx(voxel, abs=SUV_TOLERANCE + FLOAT32)


def around(seen: Seen, radius_mm: float) -> tuple[float, np.ndarray]:
    """The SUV of the voxel at the region's center, and of all within the radius in its slice."""
    grid, (x, y, z) = seen.study.suv.grid, seen.roi_center_mm
    plane = seen.study.shown[round((z - grid.origin_mm[2]) / grid.spacing_mm[0])]
    rows = grid.origin_mm[1] + np.arange(grid.shape[1]) * grid.spacing_mm[1] - y
    columns = grid.origin_mm[0] + np.arange(grid.shape[2]) * grid.spacing_mm[2] - x
    distance_squared = rows[:, None] ** 2 + columns[None, :] ** 2
    return float(plane.ravel()[distance_squared.argmin()]), plane[distance_squared <= radius_mm**2]


def test_the_pet_viewport_says_synthetic(tmtv: Seen) -> None:
    for plane in PLANES:
        (text,) = [one["text"] for one in tmtv.report["viewports"] if one["id"] == f"pt{plane}"]
        assert "SYNTHETIC" in text


def test_without_a_weight_the_values_are_right_and_the_unit_is_raw(seen: dict[str, Seen]) -> None:
    page = seen["tmtv-weightless"]
    volume = page.volume(page.ours)
    assert not volume["scaling"] or "suvbw" not in volume["scaling"]
    found = np.array(volume["sliceMaxima"])
    assert np.abs(found - page.study.shown.max(axis=(1, 2))).max() <= SUV_TOLERANCE + FLOAT32
    assert {one["unit"] for one in page.report["regions"]} == {"raw"}


@pytest.fixture(params=ENCODINGS)
def viewer(request: pytest.FixtureRequest, seen: dict[str, Seen]) -> Seen:
    """The page of the basic viewer on the study that has this encoding, with every companion."""
    return seen[f"viewer-{request.param}"]


def test_the_basic_viewer_lists_every_series_and_reads_all_but_presentation_states(viewer: Seen) -> None:
    assert {one["modality"]: one["supported"] for one in viewer.report["displaySets"]} == {
        "CT": True,
        "PT": True,
        "OT": True,
        "SEG": True,
        "SR": True,
        "PR": False,
    }


def test_the_basic_viewer_shows_the_mip_picture(viewer: Seen) -> None:
    assert "SYNTHETIC FDG PET MIP" in viewer.report["shown"]["OT"]["text"]


def test_the_basic_viewer_shows_the_pet_from_suv_0_to_5(viewer: Seen) -> None:
    shown = viewer.report["shown"]["PT"]
    assert shown["voi"] == pytest.approx({"lower": 0, "upper": 5})
    assert "SYNTHETIC FDG PET SUVbw - AI, RESEARCH ONLY" in shown["text"]


def test_the_basic_viewer_draws_every_voxel_of_the_districts_in_place(seen: dict[str, Seen]) -> None:
    page = seen["viewer-pet"]
    assert page.study.suv.suv[0].size % 8 == 0
    assert page.report["shown"]["segments"] == voxels_of_districts(page)


@pytest.mark.xfail(reason="OHIF reads each frame of a SEG from a whole byte on: 125 x 125 bits end within one")
def test_the_basic_viewer_draws_districts_whose_planes_do_not_end_with_a_byte(seen: dict[str, Seen]) -> None:
    page = seen["viewer-sc"]
    assert page.report["shown"]["segments"] == voxels_of_districts(page)


def voxels_of_districts(page: Seen) -> dict[str, list[int]]:
    """Of each district: its voxels, the sum of their rows and that of their columns."""
    districts = page.study.districts
    where = {one.key: np.nonzero(districts.labels == one) for one in districts.present}
    return {key: [len(z), int(y.sum()), int(x.sum())] for key, (z, y, x) in where.items()}


@pytest.mark.xfail(reason="OHIF opens only reports whose measurements have coordinates: ours refer to segments")
def test_the_basic_viewer_opens_the_measurement_report(viewer: Seen) -> None:
    assert [line for line in viewer.report["logged"] if "Error Boundary" in line] == []


@pytest.mark.parametrize("order", ["ours-first", "real-first"])
def test_beside_a_real_pet_the_hanging_protocol_stays_on_the_real_one(order: str, seen: dict[str, Seen]) -> None:
    page = seen[f"beside-a-real-pet-{order}"]
    real = acquired_series(page)
    for plane in PLANES:
        assert page.shown_in(f"pt{plane}") == [real]
        assert page.shown_in(f"fusion{plane}") == [page.ct, real]
    assert page.shown_in("mipSagittal") == [real]
    assert page.display_set(page.ours)["reconstructable"]  # ours is there to be opened


@pytest.mark.parametrize("order", ["ours-first", "real-first"])
def test_beside_ours_a_real_pet_keeps_its_suv(order: str, seen: dict[str, Seen]) -> None:
    page = seen[f"beside-a-real-pet-{order}"]
    phantom = acquired_phantom(page.spec)
    volume = page.volume(acquired_series(page))
    assert volume["scaling"]["suvbw"] == pytest.approx(1 / activity_per_suv(phantom), rel=1e-3)
    assert volume["sliceMaxima"] == pytest.approx(list(phantom.suv.max(axis=(1, 2))), rel=1e-3)


def test_a_series_number_below_the_real_one_would_take_its_place(seen: dict[str, Seen]) -> None:
    """Why `series_number` is 9001: OHIF takes the lowest among equals."""
    page = seen["beside-a-real-pet-low-number"]
    assert {tuple(page.shown_in(f"pt{plane}")) for plane in PLANES} == {(page.ours,)}


@pytest.mark.parametrize("name", ["beside-a-real-pet-own-frame", "own-frame-without-ours"])
def test_a_real_pet_with_a_frame_of_its_own_keeps_its_place_and_ohif_fuses_it_unregistered(
    name: str, seen: dict[str, Seen]
) -> None:
    """OHIF's hanging protocol does not ask for the Frame of Reference, with ours in the study or without.

    Its only word of it is in the browser's console; the picture is drawn all the same.
    """
    page = seen[name]
    real = acquired_series(page)
    for plane in PLANES:
        assert page.shown_in(f"pt{plane}") == [real]
        assert page.shown_in(f"fusion{plane}") == [page.ct, real]
    assert page.shown_in("mipSagittal") == [real]
    grid = acquired_phantom(page.spec, own_frame=True).grid
    assert page.volume(real)["origin"] == pytest.approx(grid.origin_mm, abs=1e-3)
    assert [line for line in page.report["logged"] if NOT_REGISTERED in line]


def test_beside_a_real_pet_with_a_frame_of_its_own_ours_is_chosen_and_fuses_with_the_ct(seen: dict[str, Seen]) -> None:
    page = seen["beside-a-real-pet-own-frame"]
    for plane in PLANES:
        assert page.shown_in(f"pt{plane}", chosen=True) == [page.ours]
        assert page.shown_in(f"fusion{plane}", chosen=True) == [page.ct, page.ours]
    assert page.shown_in("mipSagittal", chosen=True) == [page.ours]
    assert [line for line in page.report["chosen"]["logged"] if NOT_REGISTERED in line] == []


def acquired_series(page: Seen) -> str:
    (found,) = [
        one["series"] for one in page.report["displaySets"] if one["modality"] == "PT" and one["series"] != page.ours
    ]
    return str(found)
