"""What `train evaluate` leaves for programs: report.json. `train export` refuses without it."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.errors import listed
from training.errors import RunError

REPORT = "report.json"


class EvaluationReport(BaseModel):
    """Figures of one evaluation.

    `weights` names every network that was measured: "<model>/<network>/seed-<n>" to the SHA-256 of its weights.
    `summary[method][region][metric]` is {n, mean, sd, se, low, high}; methods are "<model>/districts",
    "<model>/whole_body", "hu_lookup" and "district_mean", regions "body" and the districts, metrics "mae", "psnr",
    "ssim" (data range 1.0 = suv_max) and "bias_suv_mean" (g/ml). A mean of None was not measured.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    created: datetime
    recipe: str
    split: Literal["validation", "test"]
    studies: int
    patients: int
    phantom: bool
    prepared_digest: str
    split_digest: str
    weights: dict[str, str]
    summary: dict[str, dict[str, dict[str, dict[str, float | int | None]]]]
    details: dict[str, Any] = {}  # rows per study, lesions, tests, organs ... as report.md shows them


def read_report(folder: Path) -> EvaluationReport:
    """Read a report.

    Raises:
        RunError: report_missing, report_invalid.
    """
    path = folder / REPORT
    try:
        return EvaluationReport.model_validate_json(path.read_bytes())
    except OSError as error:
        raise RunError("report_missing", f"{path} cannot be read ({error.strerror}); run `train evaluate`") from error
    except ValidationError as error:
        raise RunError("report_invalid", f"{path}: {listed(error, 3)}") from error
