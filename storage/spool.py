"""The spool: folders with whole files only. The files are the record of the instances; the ledger has no row for them.

    inbox/incoming/<association>/<sop_instance_uid>.dcm     whole, not looked at yet (and slots: storage.incoming_file)
    inbox/series/<series_uid>/<sop_instance_uid>.dcm        sorted by the assembler; `sender.json`: who sent it
    inbox/segmentations/<study_uid>/<sop_instance_uid>.dcm  SEG objects, for every job of their study
    work/<job_id>/ct/<sop_instance_uid>.dcm                 the input of a job
    outbox/<job_id>/...                                     the result of a job, complete or absent
    references/<job_id>.json                                what is kept of a result when retention removes it
    jobs/<job_id>.json                                      what a job is, for a ledger that does not know it any more
    jobs/<job_id>.cancelled.json                            the same, and that a person cancelled it
    quarantine/<reason_code>/...                            what could not be used, kept for a while

Nothing that a peer sends becomes a path unless `check_uid` let it pass; association tokens and job ids are our own
hexadecimal. All folders must lie on one file system: a file moves by rename.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Any

import structlog

from storage.durable import (
    fsync_file,
    fsync_folder,
    full_disk_is_no_space,
    is_temp,
    link_file,
    make_folder,
    move,
    remove_tree,
    write_file,
)
from storage.errors import BadUid, NoSpace, NotFound, StorageError
from storage.incoming_file import IncomingFile, IncomingFolder, give_name, own_name_of, places, same_instance

log = structlog.get_logger(__name__)

A_DAY = timedelta(days=1)
_TELL_EVERY_S = 60.0  # of a folder that is closed to us
_FEW = 64  # names: these are asked for one by one, more are looked for in a folder's list
SENDER_FILE = "sender.json"  # beside the instances of a series, from the inbox into a job's input
_CANCELLED = ".cancelled.json"
RESULT_FILE = "result.json"  # written with the result folder, which is renamed into place when it is whole
_UID = re.compile(r"[0-9]+(?:\.[0-9]+)*")  # PS3.5 section 9.1; a leading zero in a component is common and harmless
_UID_LENGTH = 64
TOKEN = re.compile(r"[0-9a-f]{1,64}")
_REASON = re.compile(r"[a-z0-9_]{1,64}")


class Adopted(StrEnum):
    """What became of an incoming file."""

    NEW = "NEW"
    SAME = "SAME"
    DIFFERENT = "DIFFERENT"


def check_uid(uid: str) -> str:
    """The UID, fit to be a file name. Raises `BadUid` for anything else (PS3.5 section 9.1)."""
    if not isinstance(uid, str) or len(uid) > _UID_LENGTH or not _UID.fullmatch(uid):
        raise BadUid(f"{uid[:80]!r} is not a UID: expected 1 to 64 characters, digits in groups joined by single dots")
    return uid


class Spool:
    """The node's folders under `root`; safe for several threads of one process."""

    def __init__(self, root: Path, *, min_free_bytes: int, sync: bool = True) -> None:
        """Make the folders. `min_free_bytes` is the watermark below which nothing more is accepted.

        `sync` False: what is received is not synced to the disk before Success is said.
        """
        self.root = root
        self.min_free_bytes = min_free_bytes
        self._sync = sync
        self._adopting = threading.Lock()
        self._receiving: dict[str, IncomingFolder] = {}  # by association
        self._told: dict[Path, float] = {}  # folders that are closed to us, and when that was said last
        try:
            self._incoming = make_folder(root / "inbox" / "incoming")
            self._series = make_folder(root / "inbox" / "series")
            self._segmentations = make_folder(root / "inbox" / "segmentations")
            self._work = make_folder(root / "work")
            self._outbox = make_folder(root / "outbox")
            self._references = make_folder(root / "references")
            self._jobs = make_folder(root / "jobs")
            self._quarantine = make_folder(root / "quarantine")
        except OSError as error:
            raise StorageError(
                f"spool {root}: {error.strerror} for {error.filename}; [storage].root must be a folder that the "
                "node's user can write"
            ) from error

    # ---- room

    def free_bytes(self) -> int:
        """What the disk has left for this user."""
        found = os.statvfs(self.root)
        return found.f_bavail * found.f_frsize

    def room_for(self, n_bytes: int) -> bool:
        """Whether `n_bytes` more leave the watermark free."""
        return self._room() >= n_bytes

    def need_room(self, n_bytes: int) -> int:
        """How many bytes more leave the watermark free. Raises `NoSpace` when that is less than `n_bytes`."""
        room = self._room()
        if room < n_bytes:
            raise NoSpace(
                f"the disk of {self.root} has no room for {n_bytes} bytes more: {self.min_free_bytes} must stay free"
            )
        return room

    def _room(self) -> int:
        return self.free_bytes() - self.min_free_bytes

    # ---- the inbox

    def open_incoming(self, association: str, sop_instance_uid: str) -> IncomingFile:
        """The file of an instance that is being received; when its `commit` returns, Success may be said.

        What is written follows the preamble. Raises `NoSpace` (below the watermark, or the disk is full) and `BadUid`,
        keeping nothing; the file raises `NoSpace` when it would grow past the watermark. `close_incoming` when the
        association is over.
        """
        check_uid(sop_instance_uid)
        folder = self._receiving.get(association)
        if folder is None:
            path = self._incoming / check_token(association)
            folder = IncomingFolder(path, need_room=self.need_room, sync=self._sync)
            self._receiving[association] = folder
        return folder.open(sop_instance_uid)

    def close_incoming(self, association: str) -> None:
        """An association is over: what was prepared for it and not used goes. Fine when there is nothing."""
        folder = self._receiving.pop(association, None)
        if folder is not None:
            folder.close()

    def store_incoming(self, association: str, sop_instance_uid: str, chunks: Iterable[bytes]) -> Path:
        """Store one instance durably. Raises as `open_incoming` and `IncomingFile.commit`."""
        file = self.open_incoming(association, sop_instance_uid)
        try:
            for chunk in chunks:
                file.write(chunk)
            return file.commit()
        finally:
            file.discard()

    def drop_halves(self, association: str) -> None:
        """Remove what a process left unfinished that received this association and was killed."""
        folder = self._incoming / check_token(association)
        for path in folder.glob("*") if folder.is_dir() else ():
            if is_temp(path):
                path.unlink(missing_ok=True)
        with suppress(OSError):  # not empty, or never made
            folder.rmdir()

    def incoming(self) -> list[Path]:
        """The whole files that wait for the assembler, oldest first; one that is adopted meanwhile is left out.

        So is a folder that another user made and closed to this one: the others go on, and the log says so.
        """
        aged = []
        for folder in self._incoming.iterdir():
            with self._fenced(folder), suppress(FileNotFoundError):  # its association ended, and it was empty
                for path in _whole(folder):
                    with suppress(FileNotFoundError):
                        aged.append((path.stat().st_mtime_ns, path.name, path))
        return [path for _, _, path in sorted(aged)]

    def association_of(self, path: Path) -> str:
        """The association's token of an incoming file."""
        return path.parent.name

    def adopt(self, path: Path, series_uid: str, *, known: Collection[str] = ()) -> Adopted:
        """Move an incoming file to its series.

        `known` are ids of earlier jobs of this series: their slices count as known too. SAME: an identical
        duplicate, removed. DIFFERENT: another content under a known UID, put into quarantine.
        """
        target = self._series / check_uid(series_uid) / _sorted_name(path)
        with self._adopting:  # `take_series` renames the folder: not between these lines
            return self._taken(path, target, (self._ct(job_id) / target.name for job_id in known))

    def keep_sender(self, series_uid: str, calling_ae: str, address: str) -> None:
        """Keep who sent a series beside its files, with which it moves: a ledger may not know its job any more."""
        text = json.dumps({"calling_ae": calling_ae, "address": address})
        write_file(self._series / check_uid(series_uid) / SENDER_FILE, (text.encode(),))

    def sender_of_series(self, series_uid: str) -> tuple[str, str]:
        """(calling AE title, address) as `keep_sender` kept them; empty texts where there is nothing."""
        return _sender(self._series / check_uid(series_uid))

    def sender_of_job(self, job_id: str) -> tuple[str, str]:
        """The same for the series that became this job's input."""
        return _sender(self._ct(job_id))

    def keep_segmentation(self, path: Path, study_uid: str) -> Adopted:
        """Move an incoming SEG to its study, where it waits for the study's jobs; otherwise as `adopt`."""
        return self._taken(path, self._segmentations / check_uid(study_uid) / _sorted_name(path))

    def segmentations(self, study_uid: str) -> list[Path]:
        """The SEG objects of a study, by name."""
        return sorted(_whole(self._segmentations / check_uid(study_uid)))

    def series_uids(self) -> list[str]:
        """The series in the inbox that have at least one file."""
        return sorted(
            folder.name
            for folder in self._series.iterdir()
            if not is_temp(folder) and folder.is_dir() and any(True for _ in _whole(folder))
        )

    def series_files(self, series_uid: str) -> list[Path]:
        """The files of a series in the inbox, by name."""
        return sorted(_whole(self._series / check_uid(series_uid)))

    def find_instances(self, sop_instance_uids: Iterable[str]) -> dict[str, Path]:
        """Where instances lie that were received and can be used, by UID; the rest is not here.

        The folders are looked through in the order in which a file moves: one that moves meanwhile is found. The newest
        jobs come first, and the search ends when all is found: it is mostly for what came a moment ago.
        """
        wanted = {check_uid(uid) for uid in sop_instance_uids}
        found = self.find_incoming(wanted)
        missing = {f"{uid}.dcm" for uid in wanted}  # what came twice is told where it was sorted to
        for top, inner in ((self._series, "."), (self._segmentations, "."), (self._work, "ct")):
            for folder in _newest_first(top) if missing else ():
                if not missing:
                    break
                with self._fenced(folder):
                    here = _names_in(folder / inner, missing)
                    found |= {name.removesuffix(".dcm"): folder / inner / name for name in here}
                    missing -= here
        return found

    def is_incoming(self, path: Path) -> bool:
        """Whether a path that `find_instances` gave waits for the assembler, which may yet put it into quarantine."""
        return path.is_relative_to(self._incoming)

    def find_incoming(self, sop_instance_uids: Collection[str]) -> dict[str, Path]:
        """Which of these instances the assembler has not looked at yet, and where they lie, by UID."""
        wanted, found = set(sop_instance_uids), {}
        for folder in self._incoming.iterdir():
            with self._fenced(folder), suppress(FileNotFoundError, NotADirectoryError):
                for path in folder.iterdir():
                    uid = path.name.removesuffix(".dcm").partition("~")[0]
                    if uid in wanted and path.suffix == ".dcm":
                        found[uid] = path
        return found

    def quarantine(self, path: Path, reason_code: str) -> Path:
        """Put a file of the spool aside under `quarantine/<reason_code>/`; where it is now."""
        if not _REASON.fullmatch(reason_code):
            raise ValueError(f"quarantine reason {reason_code!r}: expected 1 to 64 of a-z, 0-9 and _")
        self._check_inside(path)
        folder = make_folder(self._quarantine / reason_code)
        target = next(place for place in places(folder / path.name) if not place.exists())
        move(path, target)
        return target

    def drop(self, path: Path) -> None:
        """Remove a file of the spool that is not used; fine when it is gone."""
        self._check_inside(path)
        path.unlink(missing_ok=True)

    # ---- work

    def take_series(self, job_id: str, series_uid: str) -> Path:
        """Make the series in the inbox the job's input by one rename; the folder it is in.

        Done already: fine, and what came later stays in the inbox for a successor. Raises `NotFound`.
        """
        source = self._series / check_uid(series_uid)
        target = self._ct(job_id)
        with self._adopting:
            if target.is_dir():
                return target
            if not source.is_dir():
                raise NotFound(f"job {job_id}: series {series_uid} is neither in the inbox nor in work")
            make_folder(target.parent)
            fsync_folder(source)  # the names that `adopt` gave
            move(source, target)
        return target

    def link_previous(self, job_id: str, previous_job_id: str) -> int:
        """Give a successor the slices of an earlier job that it does not have; how many were added."""
        target = make_folder(self._ct(job_id))
        missing = [path for path in self.ct_files(previous_job_id) if not (target / path.name).exists()]
        for path in missing:
            link_file(path, target / path.name)
        fsync_folder(target)
        return len(missing)

    def work_folder(self, job_id: str) -> Path:
        """The job's own folder, made where needed."""
        return make_folder(self._work / check_token(job_id))

    def ct_files(self, job_id: str) -> list[Path]:
        """The job's input, by name; empty when it has none."""
        return sorted(_whole(self._ct(job_id)))

    # ---- results

    def result_folder(self, job_id: str) -> Path:
        """Where the job's result appears, whole; not made here."""
        return self._outbox / check_token(job_id)

    def has_result(self, job_id: str) -> bool:
        """Whether the result is there; it is complete when it is."""
        return (self.result_folder(job_id) / RESULT_FILE).is_file()

    def keep_references(self, job_id: str, texts: Mapping[str, str]) -> None:
        """Keep what names the series of a result (`texts` by series) when the result itself is removed."""
        write_file(self._reference(job_id), (json.dumps(dict(texts)).encode(),))

    def has_references(self, job_id: str) -> bool:
        """Whether `keep_references` was called for this very result: an earlier one's names are not its own."""
        kept, result = self._reference(job_id), self.result_folder(job_id) / RESULT_FILE
        return kept.is_file() and (not result.is_file() or kept.stat().st_mtime_ns >= result.stat().st_mtime_ns)

    def references(self, job_id: str) -> dict[str, str]:
        """What `keep_references` kept; {} where there is nothing."""
        try:
            kept: dict[str, str] = json.loads(self._reference(job_id).read_bytes())
        except FileNotFoundError:
            return {}
        return kept

    def keep_job(self, job_id: str, facts: Mapping[str, Any]) -> None:
        """Keep what a job is beside its files: a ledger that is restored from a backup may not know it any more."""
        write_file(self._jobs / f"{check_token(job_id)}.json", (json.dumps(dict(facts)).encode(),))

    def kept_job(self, job_id: str) -> dict[str, Any]:
        """What `keep_job` kept; {} where there is nothing that can be read."""
        return _object(self._jobs / f"{check_token(job_id)}.json")

    def keep_cancelled(self, job_id: str, facts: Mapping[str, Any]) -> None:
        """Keep that a person cancelled the job, and what it is: apart from `keep_job`, which whoever runs it writes."""
        write_file(self._cancelled(job_id), (json.dumps(dict(facts)).encode(),))

    def forget_cancelled(self, job_id: str) -> None:
        """Take `keep_cancelled` back; fine when nothing was kept."""
        self._cancelled(job_id).unlink(missing_ok=True)
        fsync_folder(self._jobs)

    def kept_cancelled(self, job_id: str) -> dict[str, Any]:
        """What `keep_cancelled` kept; {} where there is nothing that can be read."""
        return _object(self._cancelled(job_id))

    def cancelled_ids(self) -> list[str]:
        """The jobs that `keep_cancelled` was called for."""
        return sorted(path.name.removesuffix(_CANCELLED) for path in self._jobs.glob(f"*{_CANCELLED}"))

    def job_ids(self) -> list[str]:
        """The jobs that have input or a result here, the oldest folder first."""
        folders = [f for top in (self._work, self._outbox) for f in top.iterdir() if TOKEN.fullmatch(f.name)]
        aged = {folder.name: folder.stat().st_mtime_ns for folder in reversed(folders) if folder.is_dir()}
        return sorted(aged, key=lambda job_id: (aged[job_id], job_id))

    def discard_work(self, job_id: str) -> None:
        """Remove the job's input and scratch files; fine when gone."""
        remove_tree(self._work / check_token(job_id))

    def discard_result(self, job_id: str) -> None:
        """Remove the job's result; fine when gone."""
        remove_tree(self.result_folder(job_id))

    # ---- upkeep

    def clean_temp(self) -> int:
        """Remove what a kill or a power cut left half done; only at start-up, before anything writes. Returns how many.

        Instances that are whole and have not their own names yet get them.
        """
        removed = self._settle_slots()
        for top in (
            self._series,
            self._segmentations,
            self._quarantine,
            self._work,
            self._outbox,
            self._references,
            self._jobs,
        ):
            for path in [p for p in self._walk(top) if is_temp(p)]:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
                removed += 1
        for folder in (*self._incoming.iterdir(), *self._series.iterdir(), *self._segmentations.iterdir()):
            with self._fenced(folder):
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()
        return removed

    def apply_retention(
        self,
        keep_inputs: timedelta,
        keep_results: timedelta,
        now: datetime,
        *,
        is_final: Callable[[str], bool],
        is_over: Callable[[str], bool] = lambda _: False,
        before_result: Callable[[str], object] = lambda _: None,
        keep_references: timedelta = timedelta.max,
    ) -> list[str]:
        """Remove the inputs and results of jobs at their end, and quarantined files, that are older than asked.

        `before_result` is called with a job's id before its result goes; what it keeps of it stays `keep_references`.
        Where it finds the disk full or failing the result stays for the next time, and the others go: so do inputs and
        quarantined files, which come first and make room.
        `is_over` says of a study (by UID) that no job of it waits: then its SEG objects are inputs like others.
        Halves that a kill left beside jobs and results go after a day. Nothing else of the inbox is touched: what
        was acknowledged and is no job yet waits. Returns what was removed, as paths in the spool.
        """
        removed = []

        def is_over_age(folder: Path, keep: timedelta) -> bool:
            with suppress(FileNotFoundError):  # somebody else removed it
                return bool(TOKEN.fullmatch(folder.name)) and _age(folder, now) > keep and is_final(folder.name)
            return False

        def over(top: Path, keep: timedelta) -> Iterator[Path]:
            # one after the other: with many to remove, the last is asked about when its turn has come
            return (path for path in sorted(top.iterdir()) if is_over_age(path, keep))

        for folder in over(self._work, keep_inputs):
            remove_tree(folder)
            removed.append(str(folder.relative_to(self.root)))
        loose = {folder for folder in self._segmentations.iterdir() if is_over(folder.name)}
        for path in sorted(p for folder in (*self._quarantine.iterdir(), *loose) for p in _whole(folder)):
            least = A_DAY if path.parent in loose else timedelta()  # a SEG may come before its CT
            if _age(path, now) > max(keep_inputs, least):
                path.unlink(missing_ok=True)
                removed.append(str(path.relative_to(self.root)))
        for path in sorted((*_whole(self._references), *_whole(self._jobs))):
            if _age(path, now) > keep_references:
                path.unlink(missing_ok=True)
                removed.append(str(path.relative_to(self.root)))
        for path in self._leftovers(now, is_final):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
            removed.append(str(path.relative_to(self.root)))
        for folder in over(self._outbox, keep_results):
            try:
                before_result(folder.name)
            except (StorageError, OSError):  # it said so; what names a result must be kept before that goes
                continue
            # again: while its names were kept it may have been asked for again, or a rejection note written into it
            if not is_over_age(folder, keep_results):
                continue
            remove_tree(folder)
            removed.append(str(folder.relative_to(self.root)))
        return removed

    # ---- inside

    def _settle_slots(self) -> int:
        """Name what is whole and remove the rest; how many were removed. What cannot be read stays, and is told."""
        taken_up = removed = 0
        for folder in self._incoming.iterdir():
            with self._fenced(folder), suppress(FileNotFoundError, NotADirectoryError):
                for slot in [path for path in folder.iterdir() if is_temp(path)]:
                    try:
                        name = own_name_of(slot)
                        if name is None:
                            slot.unlink()
                            removed += 1
                        else:
                            if self._sync:
                                fsync_file(slot)  # a kill may have come before its own sync ended
                            give_name(slot, folder / name)
                            taken_up += 1
                    except FileNotFoundError:  # `dicom-node pull` ends it now, or a receiver of a killed node
                        continue
                    except (OSError, StorageError) as error:
                        log.error("spool.slot_not_settled", file=str(slot.relative_to(self.root)), reason=str(error))
        if taken_up:
            log.warning("spool.taken_up", instances=taken_up, reason="the node or its machine ended while they came")
        return removed

    def _leftovers(self, now: datetime, is_final: Callable[[str], bool]) -> list[Path]:
        """What a killed run or removal left beside jobs and results (`<job_id>.tmp`, `<job_id>.old`, `.<token>.tmp`).

        A node that never stops never calls `clean_temp`. Only what is a day old, and of no job that goes on.
        """
        found = []
        for path in sorted((*self._work.iterdir(), *self._outbox.iterdir())):
            job_id, _, rest = path.name.partition(".")
            with suppress(FileNotFoundError):
                if rest and _age(path, now) > A_DAY and (not job_id or (TOKEN.fullmatch(job_id) and is_final(job_id))):
                    found.append(path)
        return found

    def _walk(self, folder: Path) -> Iterator[Path]:
        """Everything below; what is temporary is not entered."""
        with self._fenced(folder):
            for path in folder.iterdir():
                yield path
                if path.is_dir() and not path.is_symlink() and not is_temp(path):
                    yield from self._walk(path)

    @contextmanager
    def _fenced(self, folder: Path) -> Iterator[None]:
        """One folder that another user made and closed to this one stops nothing else; it is told once a minute."""
        try:
            yield
        except PermissionError:
            now = time.monotonic()
            if now - self._told.get(folder, -math.inf) >= _TELL_EVERY_S:
                self._told[folder] = now
                do = "give it to the node's user (chown -R); it is taken up then"
                log.error("spool.folder_closed", folder=str(folder.relative_to(self.root)), reason=do)

    def _reference(self, job_id: str) -> Path:
        return self._references / f"{check_token(job_id)}.json"

    def _cancelled(self, job_id: str) -> Path:
        return self._jobs / f"{check_token(job_id)}{_CANCELLED}"

    def _taken(self, path: Path, target: Path, elsewhere: Iterable[Path] = ()) -> Adopted:
        """Move an incoming file to `target`, unless that or one of the same name `elsewhere` is there already."""
        for there in (target, *elsewhere):
            if there.exists():
                if same_instance(path, there):
                    self.drop(path)
                    return Adopted.SAME
                self.quarantine(path, "different_content")
                return Adopted.DIFFERENT
        make_folder(target.parent)
        with full_disk_is_no_space(target):
            path.rename(target)  # not synced: after a power cut it is here or there, or found by its seal
        return Adopted.NEW

    def _ct(self, job_id: str) -> Path:
        return self._work / check_token(job_id) / "ct"

    def _check_inside(self, path: Path) -> None:
        if not path.resolve().is_relative_to(self.root.resolve()):
            raise ValueError("a path outside the spool")


def check_token(token: str) -> str:
    """Our own tokens and ids; anything else is a fault in the caller, and never a path."""
    if not TOKEN.fullmatch(token):
        raise ValueError(f"{token[:80]!r}: expected 1 to 64 lower-case hexadecimal digits")
    return token


def _whole(folder: Path) -> Iterator[Path]:
    if folder.is_dir():
        names = (path for path in folder.iterdir() if not is_temp(path) and path.name != SENDER_FILE)
        yield from (path for path in names if path.is_file())


def _sender(folder: Path) -> tuple[str, str]:
    try:
        kept = json.loads((folder / SENDER_FILE).read_bytes())
        return str(kept["calling_ae"]), str(kept["address"])
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return "", ""


def _newest_first(top: Path) -> list[Path]:
    """The folders in `top` that are not on their way out."""
    aged = []
    for folder in top.iterdir():
        with suppress(FileNotFoundError):
            if not is_temp(folder) and folder.is_dir():
                aged.append((folder.stat().st_mtime_ns, folder))
    return [folder for _, folder in sorted(aged, reverse=True)]


def _names_in(folder: Path, wanted: Collection[str]) -> set[str]:
    """Which of these files a folder has. Raises `PermissionError` for a folder that is closed to us."""
    if len(wanted) > _FEW:
        with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.name in wanted}
        return set()
    return {name for name in wanted if (folder / name).exists()}


def _object(file: Path) -> dict[str, Any]:
    try:
        kept = json.loads(file.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}


def _sorted_name(path: Path) -> str:
    """The name of an incoming file where it is kept: its SOP instance's UID, without what told repeats apart."""
    return f"{check_uid(path.name.removesuffix('.dcm').partition('~')[0])}.dcm"


def _age(path: Path, now: datetime) -> timedelta:
    return now - datetime.fromtimestamp(path.stat().st_mtime, UTC)
