"""A series on its way in: what the assembler remembers of it, and when it counts as complete."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field

from dicom_node.headers import InstanceHeader, SeriesGeometry, geometry_of
from dicom_node.lineage import RECALLED
from pipeline.ct_groups import missing_parts
from storage.records import Job, JobState, SeriesInfo

# a job of the series in one of these states stands; in any other it was given up and the series has a new chance
STANDING = frozenset({JobState.QUEUED, JobState.RUNNING, JobState.DELIVERING, JobState.DONE, JobState.HELD})
# of these, the ones that were chosen for synthesis: a successor with late slices need not be chosen again
CHOSEN = STANDING - {JobState.HELD}

_SHOWN_GAPS = 5


def stands(job: Job) -> bool:
    """Whether the series has what it came for: not when its result was recalled."""
    return job.state in STANDING and RECALLED not in job.details


@dataclass(kw_only=True, slots=True)
class IncomingSeries:
    """One series in the inbox. Everything here can be rebuilt from the spool and the ledger.

    `headers` are the instances of this job, by SOP Instance UID; `inherited` those of `earlier`, a job of the same
    series from before, which are linked to this one. `last_seen` is of the assembler's monotonic clock.
    """

    study_uid: str
    series_uid: str
    last_seen: float
    job: Job | None = None
    earlier: Job | None = None
    headers: dict[str, InstanceHeader] = field(default_factory=dict)
    inherited: dict[str, InstanceHeader] = field(default_factory=dict)
    tokens: set[str] = field(default_factory=set)
    last_token: str = ""  # of the association that brought the latest instance; empty: an earlier life of the node
    after_cancel: bool = False  # the rest of a series that a person cancelled while it arrived
    calling_ae: str = ""
    address: str = ""
    kept_sender: tuple[str, str] = ("", "")  # as it lies beside the files
    duplicates: int = 0
    latest: InstanceHeader | None = None  # also of a duplicate: describes a series that has nothing new
    _geometry: tuple[int, SeriesGeometry] | None = None

    @property
    def instances(self) -> list[InstanceHeader]:
        """All instances that the job will run on."""
        return list({**self.inherited, **self.headers}.values())

    @property
    def count(self) -> int:
        """How many instances that are, without building the list."""
        return len(self.headers) + sum(uid not in self.headers for uid in self.inherited)

    @property
    def labeled_test(self) -> bool:
        """An instance of it says that it is of a test study."""
        return any(header.labeled_test for header in self.instances)

    @property
    def only_duplicates(self) -> bool:
        """Everything that came is part of an earlier job that stands."""
        return not self.headers and self.duplicates > 0

    @property
    def succeeds(self) -> Job | None:
        """The standing job whose series got late slices."""
        return self.earlier if self.earlier is not None and stands(self.earlier) else None

    @property
    def geometry(self) -> SeriesGeometry:
        count = len(self.headers)
        if self._geometry is None or self._geometry[0] != count:
            self._geometry = (count, geometry_of(self.instances))
        return self._geometry[1]

    @property
    def slices(self) -> int:
        """How many planes these instances are: each frame of a multi-frame one counts."""
        return sum(max(1, len(header.positions)) for header in self.instances)

    @property
    def missing_parts(self) -> tuple[int, int]:
        """How many parts of a multi-frame image that was split have not come, and how many there are."""
        return missing_parts(h.concatenation for h in self.instances if h.concatenation is not None)

    def info(self) -> SeriesInfo:
        """What opens the job."""
        header = next(iter(self.headers.values()), self.latest)
        if header is None:
            raise ValueError(f"series {self.series_uid}: has no instance to describe it")
        return series_info(header, calling_ae=self.calling_ae, address=self.address)


def series_info(header: InstanceHeader, *, calling_ae: str, address: str) -> SeriesInfo:
    """What a job is of: the series of one of its instances, and who sent it."""
    return SeriesInfo(
        study_uid=header.study_uid,
        series_uid=header.series_uid,
        accession=header.accession,
        patient_id=header.patient_id,
        modality=header.modality,
        sop_class_uid=header.sop_class_uid,
        series_number=header.series_number,
        series_description=header.series_description,
        study_date=header.study_date,
        calling_ae=calling_ae,
        peer_address=address,
    )


def source_digest(sop_instance_uids: Iterable[str]) -> str:
    """sha256 in hex of the sorted SOP Instance UIDs, one a line: what a job runs on."""
    return hashlib.sha256("\n".join(sorted(sop_instance_uids)).encode("ascii")).hexdigest()


def gaps_text(geometry: SeriesGeometry, missing: tuple[int, int]) -> str:
    """Name the places where slices are missing: `2 between z = -437.0 and -431.0 mm`; or `missing` parts of a whole."""
    if missing[0]:
        return f"{missing[0]} of the {missing[1]} parts of a concatenation missing"
    places = []
    for below, above in geometry.gaps_mm[:_SHOWN_GAPS]:
        slices = max(1, round((above - below) / geometry.spacing_mm) - 1)
        places.append(f"{slices} between z = {below:.1f} and {above:.1f} mm")
    more = len(geometry.gaps_mm) - len(places)
    return f"slices missing: {', '.join(places)}" + (f", and {more} more places" if more > 0 else "")
