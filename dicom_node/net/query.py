"""What an archive shows: C-FIND as SCU (PS3.4 annex C), to count what is visible of a series, and to find CT studies.

CountOutcome and FindOutcome codes: "" (it was answered), not_offered, find_refused, find_unanswered (although it let
us in: it is not down), too_many_answers, interrupted, and those of `link`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import date
from time import monotonic

from pydicom import Dataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import build_context
from pynetdicom.presentation import PresentationContext

from dicom_node.config import PeerConfig
from dicom_node.net.link import Link, RequestOutcome, Timeouts, Trouble, aborted_when, dimse_status, of_service, where
from dicom_node.net.status import Outcome, classify, status_text
from storage.errors import BadUid
from storage.spool import check_uid

STUDY_ROOT_FIND = "1.2.840.10008.5.1.4.1.2.2.1"
PENDING = (0xFF00, 0xFF01)  # PS3.4 table C.4-1
MOST_ANSWERS = 100_000  # to one C-FIND: far above the instances of any series
_MOST_S = 600.0  # for all answers to one C-FIND
NOT_OFFERED_STATUSES = frozenset({0x0122, 0x0124, 0x0211})


@dataclass(frozen=True, kw_only=True, slots=True)
class CountOutcome(RequestOutcome):
    """How many instances of the series an archive shows (0: it does not show the series), or why it is not known."""

    count: int | None = None


def count_series_instances(
    peer: PeerConfig,
    study_uid: str,
    series_uid: str,
    *,
    calling_ae: str,
    timeouts: Timeouts | None = None,
    max_pdu: int = 262144,
    should_stop: Callable[[], bool] = lambda: False,
) -> CountOutcome:
    """C-FIND at SERIES level for Number of Series Related Instances (0020,1209).

    That key is optional for an archive (PS3.4 table C.6-3): where it stays empty the instances are counted at IMAGE
    level, each SOP Instance UID once. `should_stop` is asked at each answer; a stop aborts the association
    ("interrupted"), as do MOST_ANSWERS answers and those that do not end.
    """
    began = monotonic()
    count: int | None = None
    with Link(peer, [find_context()], calling_ae, timeouts or Timeouts(), max_pdu) as link:
        trouble = link.trouble
        if trouble is None:
            query = _query("SERIES", study_uid, series_uid, "NumberOfSeriesRelatedInstances")
            found, trouble = _find(link, query, peer, should_stop)
            shown = [one for one in found if one.get("SeriesInstanceUID") == series_uid]
            count = _told(shown)
            if trouble is None and count is None:
                query = _query("IMAGE", study_uid, series_uid, "SOPInstanceUID")
                found, trouble = _find(link, query, peer, should_stop)
                ours = [one for one in found if str(one.get("SeriesInstanceUID") or series_uid) == series_uid]
                count = len({str(one.SOPInstanceUID) for one in ours if one.get("SOPInstanceUID")})
    seconds = monotonic() - began
    return CountOutcome.of(of_service(trouble), count=count if trouble is None else None, seconds=seconds)


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyFound:
    """A study that an archive shows. Names and dates of the patient are neither asked for nor kept."""

    study_uid: str
    accession: str = ""
    study_date: str = ""
    description: str = ""
    modalities: tuple[str, ...] = ()  # empty where the archive does not say


@dataclass(frozen=True, kw_only=True, slots=True)
class SeriesFound:
    """A series that an archive shows; `instances` is None where it does not say."""

    series_uid: str
    modality: str = ""
    description: str = ""
    station_name: str = ""
    instances: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class FindOutcome(RequestOutcome):
    """What was found, or why it is not known; one of the two lists, as it was asked for."""

    studies: tuple[StudyFound, ...] = ()
    series: tuple[SeriesFound, ...] = ()


class Finder:
    """Questions to one archive, each on an association of its own."""

    def __init__(
        self,
        peer: PeerConfig,
        *,
        calling_ae: str,
        timeouts: Timeouts | None = None,
        max_pdu: int = 262144,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self._peer, self._calling_ae, self._max_pdu = peer, calling_ae, max_pdu
        self._timeouts, self._should_stop = timeouts or Timeouts(), should_stop

    def studies_of_accession(self, accession: str) -> FindOutcome:
        """The studies with exactly this accession number; one that the archive adds of its own is left out."""
        found = self._studies(AccessionNumber=accession)
        mine = tuple(study for study in found.studies if study.accession == accession.strip())
        return replace(found, studies=mine)

    def study(self, study_uid: str) -> FindOutcome:
        """That study, if it is there."""
        found = self._studies(StudyInstanceUID=study_uid)
        return replace(found, studies=tuple(study for study in found.studies if study.study_uid == study_uid))

    def ct_studies(self, first: date, last: date) -> FindOutcome:
        """The studies of these days (both included) that have a CT, or of which the archive does not say."""
        days = f"{first:%Y%m%d}-{last:%Y%m%d}" if first < last else f"{first:%Y%m%d}"
        found = self._studies(StudyDate=days, ModalitiesInStudy="CT")
        kept = [study for study in found.studies if not study.modalities or "CT" in study.modalities]
        inside = (study for study in kept if f"{first:%Y%m%d}" <= study.study_date <= f"{last:%Y%m%d}")
        return replace(found, studies=tuple(inside))

    def ct_series(self, study_uid: str) -> FindOutcome:
        """The CT series of a study: an archive need not match Modality, so what it answers is looked at."""
        query = Dataset()
        query.QueryRetrieveLevel, query.StudyInstanceUID, query.Modality = "SERIES", study_uid, "CT"
        for keyword in ("SeriesInstanceUID", "SeriesDescription", "StationName", "NumberOfSeriesRelatedInstances"):
            setattr(query, keyword, None)
        answers, outcome = self._ask(query)
        found = {
            uid: SeriesFound(
                series_uid=uid,
                modality=_text(answer, "Modality"),
                description=_text(answer, "SeriesDescription"),
                station_name=_text(answer, "StationName"),
                instances=_number(answer),
            )
            for answer in answers
            if (uid := _uid(answer, "SeriesInstanceUID")) and _uid(answer, "StudyInstanceUID") in ("", study_uid)
        }
        return replace(outcome, series=tuple(one for one in found.values() if one.modality == "CT"))

    def _studies(self, **keys: str) -> FindOutcome:
        query = Dataset()
        query.QueryRetrieveLevel = "STUDY"
        for keyword in ("StudyInstanceUID", "AccessionNumber", "StudyDate", "StudyDescription", "ModalitiesInStudy"):
            setattr(query, keyword, keys.get(keyword))
        answers, outcome = self._ask(query)
        found = {
            uid: StudyFound(
                study_uid=uid,
                accession=_text(answer, "AccessionNumber"),
                study_date=_text(answer, "StudyDate"),
                description=_text(answer, "StudyDescription"),
                modalities=tuple(filter(None, _text(answer, "ModalitiesInStudy").split("\\"))),
            )
            for answer in answers
            if (uid := _uid(answer, "StudyInstanceUID"))
        }
        return replace(outcome, studies=tuple(found.values()))

    def _ask(self, query: Dataset) -> tuple[list[Dataset], FindOutcome]:
        began = monotonic()
        answers: list[Dataset] = []
        with Link(self._peer, [find_context()], self._calling_ae, self._timeouts, self._max_pdu) as link:
            trouble = link.trouble
            if trouble is None:
                with aborted_when(link, self._should_stop):
                    answers, trouble = _find(link, query, self._peer, self._should_stop)
                if trouble is not None and trouble.code == "find_unanswered" and self._should_stop():
                    trouble = Trouble("interrupted", "stopped while asking", False)
        seconds = monotonic() - began
        return answers if trouble is None else [], FindOutcome.of(of_service(trouble), seconds=seconds)


def _text(answer: Dataset, keyword: str) -> str:
    """A value as text, whatever the archive wrote; several values with a backslash between them."""
    try:  # pydicom reads a value when it is asked for
        value = answer.get(keyword)
    except (ValueError, TypeError, LookupError, OverflowError):
        return ""
    if isinstance(value, str | bytes) or value is None:
        return str(value or "").strip()
    return "\\".join(str(one) for one in value).strip() if isinstance(value, Iterable) else str(value).strip()


def _uid(answer: Dataset, keyword: str) -> str:
    """A UID that is one; empty for anything else: it goes back over the network, and into the ledger."""
    try:
        return check_uid(_text(answer, keyword))
    except BadUid:
        return ""


def find_context() -> PresentationContext:
    """What we propose for C-FIND."""
    return build_context(STUDY_ROOT_FIND, [ExplicitVRLittleEndian, ImplicitVRLittleEndian])


def _query(level: str, study_uid: str, series_uid: str, wanted: str) -> Dataset:
    ds = Dataset()
    ds.QueryRetrieveLevel = level
    ds.StudyInstanceUID, ds.SeriesInstanceUID = study_uid, series_uid
    setattr(ds, wanted, None)
    return ds


def _told(shown: list[Dataset]) -> int | None:
    """The number that a SERIES answer gives; 0 without an answer, None where none of them gives it."""
    if not shown:
        return 0
    return max(filter(None, map(_number, shown)), default=None)


def _number(answer: Dataset) -> int | None:
    """What an archive says that it has of a series; None where it says nothing, or what is no such number."""
    try:  # pydicom reads a value when it is asked for
        return max(0, int(answer.get("NumberOfSeriesRelatedInstances") or 0)) or None
    except (ValueError, TypeError, OverflowError):  # "many", "3\\3"
        return None


def _find(
    link: Link, query: Dataset, peer: PeerConfig, should_stop: Callable[[], bool]
) -> tuple[list[Dataset], Trouble | None]:
    found: list[Dataset] = []
    answers, until = 0, monotonic() + _MOST_S
    try:
        for answer, identifier in link.assoc.send_c_find(query, STUDY_ROOT_FIND):
            status = dimse_status(answer)
            if status is None:
                return found, Trouble("find_unanswered", f"{where(peer)} did not answer the C-FIND", False)
            if status in PENDING:
                found += [identifier] if identifier is not None else []
                answers += 1
                trouble = _endless(answers, until, peer, should_stop)
                if trouble is not None:
                    link.assoc.abort()
                    return found, trouble
            elif classify(status) is not Outcome.OK:
                return found, _refused(status, peer)
    except (ValueError, RuntimeError):  # the association ended in between
        return found, Trouble("find_unanswered", f"{where(peer)} ended the association in the C-FIND", False)
    return found, None


def _endless(answers: int, until: float, peer: PeerConfig, should_stop: Callable[[], bool]) -> Trouble | None:
    """Why no further answer to a C-FIND is waited for, if so."""
    if should_stop():
        return Trouble("interrupted", "stopped while counting", False)
    if answers > MOST_ANSWERS:
        return Trouble("too_many_answers", f"{where(peer)} answered the C-FIND more than {MOST_ANSWERS} times", False)
    if monotonic() > until:
        return Trouble(
            "find_unanswered", f"{where(peer)} did not end its answers to the C-FIND in {_MOST_S:g} s", False
        )
    return None


def _refused(status: int, peer: PeerConfig) -> Trouble:
    text = f"{where(peer)} refused the C-FIND: {status_text(status)}"
    if status in NOT_OFFERED_STATUSES:
        return Trouble("not_offered", text, True)
    return Trouble("find_refused", text, False)
