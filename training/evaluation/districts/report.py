"""Try a segmenter on many phantoms and on real series: a table, the rows, and pictures of the worst."""

from __future__ import annotations

import csv
import io
import math
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from pydicom import Dataset

from pipeline.ct_reader import choose_ct, read_ct
from pipeline.districts import find_districts
from pipeline.errors import DistrictError
from pipeline.types import CtVolume, District, DistrictMap, DistrictOptions, Grid, LabelVolume, SourceSeries
from training.evaluation.districts.cases import DistrictCase, make_case
from training.evaluation.districts.pictures import district_figure
from training.evaluation.districts.scores import DistrictScore, score_districts
from training.evaluation.figures import save
from training.evaluation.tables import markdown_rows
from training.files import write_whole

WORST = 10
GOALS = {District.HEAD: 0.95, District.TRUNK: 0.95, District.ARMS: 0.85, District.LEGS: 0.95}
INVENTED = 0.005  # of the body: more of a district that is not in the field is a finding
HERE = 0.005  # of the body: a district with less in the field is not scored
SOURCE = SourceSeries(
    study_uid="2.25.1", series_uid="2.25.2", header=Dataset(), instances=(), earliest_acquisition=("", "")
)


@dataclass(frozen=True, kw_only=True, slots=True)
class CaseResult:
    """One phantom: its score, or why the segmenter gave none; `shares` of the true body by district."""

    case: DistrictCase
    score: DistrictScore | None
    shares: dict[District, float]
    seconds: float
    refused: str = ""

    @property
    def worst(self) -> float:
        """The lowest Dice of the districts that count; 0 where the segmenter refused."""
        if self.score is None:
            return 0.0
        return min((v for d, v in self.score.dice.items() if self.shares[d] >= HERE), default=1.0)


def measure_case(case: DistrictCase, options: DistrictOptions) -> CaseResult:
    """Run the segmenter on one phantom, on the phantom's own grid."""
    volume = make_case(case)
    counts = np.bincount(volume.labels.ravel(), minlength=len(District) + 1)
    shares = {d: float(counts[d] / counts[1:].sum()) for d in District}
    began = time.perf_counter()
    try:
        found = find_districts(CtVolume(hu=volume.hu, grid=volume.grid, source=SOURCE), volume.grid, options=options)
    except DistrictError as error:
        seconds = time.perf_counter() - began
        return CaseResult(case=case, score=None, shares=shares, seconds=seconds, refused=f"{error.code}: {error.text}")
    seconds = time.perf_counter() - began
    score = score_districts(found.labels, volume.labels, volume.grid.spacing_mm)
    return CaseResult(case=case, score=score, shares=shares, seconds=seconds)


def measure_cases(
    cases: Sequence[DistrictCase],
    options: DistrictOptions,
    *,
    workers: int = 1,
    on_done: Callable[[CaseResult], None] = lambda _: None,
) -> list[CaseResult]:
    """All of them, in the order given, side by side in processes."""
    work = partial(measure_case, options=options)
    results = []
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for result in pool.map(work, cases):
            on_done(result)
            results.append(result)
    return results


def write_report(
    results: Sequence[CaseResult], real: Sequence[Path], out: Path, options: DistrictOptions, *, command: str
) -> None:
    """`out`/report.md, rows.csv, phantom-worst-NN.png and real-N-NAME.png."""
    out.mkdir(parents=True, exist_ok=True)
    ranked = sorted(results, key=lambda r: r.worst)[:WORST]
    pictures = [(f"phantom-worst-{n:02d}.png", r) for n, r in enumerate(ranked, start=1)]
    for name, result in pictures:
        volume = make_case(result.case)
        ct = CtVolume(hu=volume.hu, grid=volume.grid, source=SOURCE)
        found = _found_or_empty(ct, options)
        save(district_figure(volume.hu, found, volume.grid, title=_title(result), true=volume.labels), out / name)
    write_whole(out / "rows.csv", as_csv(results).encode())
    reals = [_real(folder, number, out, options) for number, folder in enumerate(real, start=1)]
    write_whole(out / "report.md", markdown(results, pictures, reals, options, command).encode())


def _found_or_empty(ct: CtVolume, options: DistrictOptions) -> LabelVolume:
    try:
        return find_districts(ct, ct.grid, options=options).labels
    except DistrictError:
        return np.zeros(ct.hu.shape, np.uint8)


@dataclass(frozen=True, kw_only=True, slots=True)
class RealResult:
    """What was found in one real series, where nobody knows the truth: shares of the body, seconds, the picture."""

    name: str
    found: DistrictMap
    grid: Grid
    seconds: float
    picture: str


def _real(folder: Path, number: int, out: Path, options: DistrictOptions) -> RealResult:
    ct = read_ct(choose_ct(folder))
    began = time.perf_counter()
    found = find_districts(ct, ct.grid, options=options)
    seconds = time.perf_counter() - began
    name = f"real-{number}-{folder.name}.png"
    save(
        district_figure(ct.hu, found.labels, ct.grid, title=f"{folder.name}: {found.segmenter} {found.version}"),
        out / name,
    )
    return RealResult(name=folder.name, found=found, grid=ct.grid, seconds=seconds, picture=name)


def _title(result: CaseResult) -> str:
    found = "refused" if result.score is None else " ".join(f"{d.key} {v:.2f}" for d, v in result.score.dice.items())
    return f"phantom {result.case.name} (seed {result.case.spec.seed}): {found}"


def markdown(
    results: Sequence[CaseResult],
    pictures: Iterable[tuple[str, CaseResult]],
    reals: Sequence[RealResult],
    options: DistrictOptions,
    command: str,
) -> str:
    """The report; every figure is of phantoms unless it says otherwise."""
    refused = [r for r in results if r.refused]
    invented = [r for r in results if r.score is not None and r.score.invented >= INVENTED]
    seconds = sorted(r.seconds for r in results)
    lines = [
        "# Districts: how well they are found",
        "",
        f"`{command}`, segmenters {', '.join(options.chain)}. {len(results)} computed phantoms of different people: "
        "this says how the segmenter holds on stylised bodies, not on patients.",
        "",
        f"- no result on {len(refused)} of {len(results)}" + "".join(f"; {r.case.name}: {r.refused}" for r in refused),
        f"- a district that is not in the field, {INVENTED:.1%} of the body or more: {len(invented)} of {len(results)}"
        + "".join(f"; {r.case.name} ({_share(r)})" for r in invented),
        f"- seconds per phantom: median {seconds[len(seconds) // 2]:.1f}, longest {seconds[-1]:.1f}",
        "",
        "## Dice by district",
        "",
        "Mean over the phantoms that have it in the field (at least 0.5 % of the body); in brackets the lowest.",
        "",
        *markdown_rows(
            ["", "phantoms", *(d.key for d in District), "border (mm)", "border, 95 % (mm)", "body"],
            [_row("all", results), *(_row(group, some) for group, some in _groups(results))],
        ),
        "",
        "Goals: " + ", ".join(f"{d.key} {goal:.2f}" for d, goal in GOALS.items()) + ". " + _verdict(results),
        "",
    ]
    if reals:
        head = ["series", "segmenter", *(d.key for d in District), "confidence", "seconds"]
        lines += [
            "## Real series",
            "",
            "Share of the body. Nobody drew these districts by hand: look at the pictures.",
            "",
        ]
        lines += [*markdown_rows(head, [_real_row(real) for real in reals]), ""]
        lines += [line for real in reals for line in (f"![{real.name}]({real.picture})", "")]
    lines += [f"## The {WORST} phantoms with the lowest Dice", "", "Found: filled. True: white contour.", ""]
    lines += [line for name, result in pictures for line in (f"![{result.case.name}]({name})", "")]
    return "\n".join(lines)


def _share(result: CaseResult) -> str:
    return "" if result.score is None else f"{result.score.invented:.1%}"


def _groups(results: Sequence[CaseResult]) -> list[tuple[str, list[CaseResult]]]:
    groups: dict[str, list[CaseResult]] = {}
    for result in results:
        groups.setdefault(result.case.group, []).append(result)
    return list(groups.items())


def scores_of(results: Sequence[CaseResult], district: District) -> list[float]:
    """Dice of one district in the phantoms that have it in the field; 0 where the segmenter refused."""
    counted = [r for r in results if r.shares[district] >= HERE]
    return [0.0 if r.score is None else r.score.dice[district] for r in counted]


def _row(name: str, results: Sequence[CaseResult]) -> list[str]:
    cells = []
    for district in District:
        values = scores_of(results, district)
        cells.append(f"{np.mean(values):.3f} ({min(values):.2f})" if values else "")
    scored = [r.score for r in results if r.score is not None]
    return [
        name,
        str(len(results)),
        *cells,
        _mean([s.border_mm for s in scored], 1),
        _mean([s.border_p95_mm for s in scored], 1),
        _mean([s.body_dice for s in scored], 3),
    ]


def _mean(values: Sequence[float], digits: int) -> str:
    known = [v for v in values if not math.isnan(v)]
    return f"{np.mean(known):.{digits}f}" if known else ""


def _verdict(results: Sequence[CaseResult]) -> str:
    means = {d: float(np.mean(values)) for d in District if (values := scores_of(results, d))}
    missed = [f"{d.key} ({mean:.3f})" for d, mean in means.items() if mean < GOALS[d]]
    return "Missed by " + ", ".join(missed) + "." if missed else "All are met."


def _real_row(real: RealResult) -> list[str]:
    counts = np.bincount(real.found.labels.ravel(), minlength=len(District) + 1)
    body = max(int(counts[1:].sum()), 1)
    sure = ", ".join(f"{d.key} {real.found.confidence.get(d, 0.0):.2f}" for d in real.found.present)
    shares = [f"{counts[d] / body:.1%}" if counts[d] else "" for d in District]
    return [real.name, f"{real.found.segmenter} {real.found.version}", *shares, sure, f"{real.seconds:.1f}"]


def as_csv(results: Sequence[CaseResult]) -> str:
    """One line per phantom."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    dices = [f"dice_{d.key}" for d in District]
    writer.writerow(
        ["case", "group", "seed", *dices, "dice_body", "border_mm", "border_p95_mm", "invented", "seconds", "refused"]
    )
    for result in results:
        score = result.score
        cells = ["" if score is None or d not in score.dice else round(score.dice[d], 4) for d in District]
        rest = (
            ["", "", "", ""]
            if score is None
            else [round(v, 4) for v in (score.body_dice, score.border_mm, score.border_p95_mm, score.invented)]
        )
        row = [
            result.case.name,
            result.case.group,
            result.case.spec.seed,
            *cells,
            *rest,
            round(result.seconds, 2),
            result.refused,
        ]
        writer.writerow(row)
    return text.getvalue()
