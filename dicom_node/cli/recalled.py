"""In words, for `why` and `jobs show`: when a result was recalled, where, and by which notes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime

from dicom_node.cli.common import local_time
from dicom_node.lineage import RECALLED, RECALLED_AT
from storage.records import REJECTION, Delivery, Job


def recalled_lines(job: Job, deliveries: Sequence[Delivery]) -> list[str]:
    """A recall everywhere, then those at one destination each, with a line for every note; [] for neither.

    `2026-11-22 08:15:00, 113001 Rejected for Quality Reasons: do not use its result`, `by note 2.25.9 to pacs (SENT)`
    """
    lines = []
    if everywhere := job.details.get(RECALLED):
        lines += [f"{_told(everywhere)}: do not use its result", *_notes(deliveries)]
    for name, told in sorted((job.details.get(RECALLED_AT) or {}).items()):
        there = [delivery for delivery in deliveries if delivery.destination == name]
        lines += [f"at {name}: {_told(told)}: do not use its result there", *_notes(there)]
    return lines


def _told(recalled: Mapping[str, str]) -> str:
    when = local_time(datetime.fromisoformat(recalled["time"]))
    return f"{when}, {recalled['code']} {recalled['meaning']}"


def _notes(deliveries: Sequence[Delivery]) -> list[str]:
    notes = [delivery for delivery in deliveries if delivery.kind == REJECTION]
    told = [f"by note {note.series_uid} to {note.destination} ({note.state})" for note in notes]
    return told or ["without a note: nothing of it had arrived"]
