"""Computing a delivered result again because what it is made of has changed: a new job that supersedes the old one.

What was delivered stays as it is, byte for byte: the new result has other UIDs, since they are a function of what it
is made of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from uuid import uuid4

from dicom_node.config import Config
from dicom_node.errors import RerunRefused
from dicom_node.incoming import STANDING, stands
from dicom_node.lineage import RERUN, asked_for, result_uids
from dicom_node.worker import pipeline_options
from pipeline.bundle import bundle_path, load_bundle
from pipeline.provenance import software_version
from storage.deliveries import taken_back_at
from storage.errors import StorageError
from storage.ledger import Ledger
from storage.records import Job, JobState
from storage.spool import Spool

_KEPT = ("coverage_mm", "spacing_mm", "slices")  # the series is the same: so are these
_NO_CT = "its CT is not in the spool any more (storage.keep_inputs_days): route the study again first"


def changes(job: Job, config: Config, spool: Spool) -> tuple[str, ...]:
    """What a job's result would be made of now and was not then, in words; () when it would be the same result.

    Raises:
        BundleError: the configured bundle cannot be read.
    """
    made_by = job.details.get("provenance") or {}
    bundle = load_bundle(bundle_path(config.pipeline.bundle, config.pipeline.bundles))
    found = []
    if bundle.manifest_sha256 != made_by.get("bundle_sha256"):
        then = f"{made_by.get('bundle_name', '')} {made_by.get('bundle_version', '')}"
        found.append(f"bundle: {then} -> {bundle.manifest.name} {bundle.manifest.version}")
    if software_version() != made_by.get("software_version"):
        found.append(f"software: {made_by.get('software_version', '')} -> {software_version()}")
    if config.pipeline.uses_segmentations:
        now = segmentation_names(spool, job)
        then_uids = job.details.get("segmentations")
        if now != (then_uids if then_uids is not None else []):
            found.append(f"SEG objects of the study: {len(then_uids or [])} -> {len(now)}, not the same ones")
    return (*found, *_changed_options(job.details.get("asked_for"), asked_for(pipeline_options(config))))


def _changed_options(then: Mapping[str, Any] | None, now: Mapping[str, Any]) -> list[str]:
    """Named options that differ; an option that the older version did not know had its default then."""
    if then is None:
        return []
    return [f"{key}: {then[key]} -> {now[key]}" for key in now if key in then and then[key] != now[key]]


def segmentation_names(spool: Spool, job: Job) -> list[str]:
    """The SOP Instance UIDs of the SEG objects of the job's study that are in the spool now."""
    return [path.name.removesuffix(".dcm") for path in spool.segmentations(job.info.study_uid)]


def rerun(ledger: Ledger, spool: Spool, job: Job, why: Sequence[str]) -> Job:
    """Open and queue a job that computes the series of `job` again and supersedes it.

    Its input is linked first, and the ledger hears of it once, whole: a kill leaves a folder for retention, no job.

    Raises:
        RerunRefused: nothing has changed, another job takes its place, slices of it are arriving, or its CT is gone;
            the text says which.
        StaleState: another job of the series was opened at the same time.
    """
    if not why:
        again = "`dicom-node jobs redeliver` sends it again"
        if taken_back_at(job.details):
            again = "it would be the series that was taken back"
        raise RerunRefused(f"nothing that the result is made of has changed: {again}")
    jobs = ledger.jobs_of_series(job.info.series_uid)
    for one in jobs[: [other.id for other in jobs].index(job.id)]:  # newer than `job`
        if one.state is JobState.RECEIVING:
            raise RerunRefused(f"slices of its series are arriving as job {one.id}: wait for its end")
        if _takes_place_of(one, job):
            how = "supersedes it already" if one.supersedes == job.id else "of the same series is newer"
            raise RerunRefused(f"job {one.id} {how} and is {one.state}: retry that one")
    source = next((one for one in (job, *jobs) if _has_ct(spool, one, job)), None)
    if source is None:
        raise RerunRefused(_NO_CT)
    new_id = uuid4().hex
    details = {RERUN: list(why), **{key: job.details[key] for key in _KEPT if key in job.details}}
    try:
        count = spool.link_previous(new_id, source.id)
        known = [one.id for one in jobs]
        return ledger.open_successor(
            new_id, job.id, known=known, instances=count, details=details, code="rerun", text="; ".join(why)
        )
    except FileNotFoundError as error:  # retention removes it at this moment
        spool.discard_work(new_id)
        raise RerunRefused(_NO_CT) from error
    except StorageError:
        spool.discard_work(new_id)
        raise


def _takes_place_of(one: Job, job: Job) -> bool:
    """A successor, or what was routed again, that is on its way or has brought a result of its own.

    One that was recalled as well still stands here where it supersedes `job`: the two would be computed alike.
    """
    if one.state not in STANDING or not (one.supersedes == job.id or stands(one)):
        return False
    return one.state is not JobState.DONE or not (result_uids(one) & result_uids(job))


def _has_ct(spool: Spool, one: Job, job: Job) -> bool:
    same = one.id == job.id or (bool(job.source_digest) and one.source_digest == job.source_digest)
    return same and bool(spool.ct_files(one.id))
