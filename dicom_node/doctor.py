"""The whole path with a test study: sent to the running node, followed through the ledger, looked for in the archive.

The study is announced (`dicom_node.trial`) before it is sent, so that its result goes to one destination and no other.
Each step is a value (`dicom_node.steps`). The first failure ends the trip; only what may have arrived is still retired.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from dicom_node.config import Config, DestinationConfig, PeerConfig
from dicom_node.net.link import timeouts_of
from dicom_node.net.scu import send_series
from dicom_node.net.trial_lock import sending_a_test
from dicom_node.proof import count_instances
from dicom_node.retire import retire
from dicom_node.steps import Step, StepFailed, taken, waited, was_tried
from dicom_node.trial import announce
from storage.ledger import Ledger
from storage.records import PROOF_STATES, REJECTION, Delivery, DeliveryState, Job, JobState

ENDED_BADLY = frozenset({JobState.REJECTED, JobState.FAILED, JobState.CANCELLED})


@dataclass(frozen=True, kw_only=True, slots=True)
class TestStudy:
    """The generated CT series that is sent."""

    __test__ = False  # no class of tests

    files: Sequence[Path]
    study_uid: str
    accession: str


class Trip:
    """One test study on its way. `destination` None: its result stays in the outbox.

    `timeout_s` is for each step; `on_step` hears which one begins.
    """

    def __init__(
        self,
        config: Config,
        ledger: Ledger,
        study: TestStudy,
        *,
        node: PeerConfig,
        destination: DestinationConfig | None,
        timeout_s: float,
        on_step: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._config, self._ledger, self._study = config, ledger, study
        self._node, self._destination = node, destination
        self._timeout_s, self._on_step = timeout_s, on_step
        self._job_id = ""

    def steps(self, *, retire: bool) -> Iterator[Step]:
        """Go all the way, one step after the other; the first that fails is the last.

        With `retire` the result is taken back from the archive at the end, also when a step before has failed: some
        of it may have arrived.
        """
        actions = [("send", self._send), ("assembly", self._assemble), ("synthesis", self._synthesize)]
        if self._destination is not None:
            actions += [("delivery", self._deliver), ("proof", self._prove)]
        else:
            actions.append(("delivery", self._stay))
        for name, action in actions:
            self._on_step(name)
            step = taken(name, action)
            yield step
            if not step.ok:
                break
        if retire:
            self._on_step("retire")
            yield taken("retire", self._retire)

    # ---- the steps: each returns what it found, or raises StepFailed

    def _send(self) -> str:
        study = self._study
        announce(self._ledger, study.study_uid, self._destination.name if self._destination else "")
        with sending_a_test(self._config.storage.root):
            outcome = send_series(study.files, self._node, calling_ae=self._config.node.ae_title)
        if not outcome.ok:
            raise StepFailed(
                f"{outcome.code}: {outcome.text}", f"the log of the node; dicom-node why {study.accession}"
            )
        return f"{outcome.stored} instances were answered with Success; accession {study.accession}"

    def _assemble(self) -> str:
        def decided() -> bool:
            jobs = self._ledger.jobs_of_study(self._study.study_uid)
            return bool(jobs) and jobs[0].state is not JobState.RECEIVING

        intake = self._config.intake
        self._until(decided, "the series did not become a job", "the log of the node: does its assembler run?")
        job = self._ledger.jobs_of_study(self._study.study_uid)[0]
        self._job_id = job.id
        if job.state in ENDED_BADLY and not _has_result(job):
            self._not_used(job)
        if job.state is JobState.HELD and not _has_result(job):
            self._ledger.release(job.id)
            return f"job {job.id[:8]}: {job.instances} slices; held by {job.reason_code}, and released: it is a test"
        quiet = max(intake.quiet_period_s, intake.study_quiet_period_s)
        return f"job {job.id[:8]}: {job.instances} slices, whole after {quiet:g} s without another instance"

    def _synthesize(self) -> str:
        self._until(
            lambda: _has_result(self._job) or self._job.state in ENDED_BADLY,
            "the job has no result yet",
            f"dicom-node jobs show {self._job_id[:8]}: a longer --timeout, if it computes or waits for other jobs",
        )
        job = self._job
        if not _has_result(job):
            self._not_used(job)
        made_by = job.details["provenance"]
        text = f"{made_by['bundle_name']} {made_by['bundle_version']}: {len(job.details['result_series'])} series"
        if job.state is JobState.HELD:
            self._ledger.release(job.id)
            text += f"; held by {job.reason_code}, and released: a phantom is no patient"
        return text

    def _stay(self) -> str:
        if self._ledger.deliveries(self._job_id):
            raise StepFailed("a result that should stay here is on its way", "report this: it must not happen")
        names = ", ".join(one.name for one in self._config.destinations) or "none is configured"
        return f"sent nowhere, as asked; --destination NAME proves the way on: {names}"

    def _deliver(self) -> str:
        destination = self._wanted
        self._until(self._delivery_ended, f"{destination.name} has not everything yet", self._show)
        deliveries = self._series()
        if not deliveries or any(one.destination != destination.name for one in deliveries):
            raise StepFailed("the result does not go where it should", "report this: it must not happen")
        for one in deliveries:
            if one.state not in PROOF_STATES and one.reason_code != "optional_refused":
                again = "; the node goes on trying" if one.state is DeliveryState.PENDING else ""
                raise StepFailed(f"{one.kind} ({one.encoding}): {one.reason_code}: {one.reason}{again}", self._show)
        left = sum(one.reason_code == "optional_refused" for one in deliveries)
        sent = sum(one.sent for one in deliveries)
        text = f"{sent} instances in {len(deliveries) - left} series are stored at {destination.name}"
        return text + (f"; {left} series of a class that it does not take" if left else "")

    def _prove(self) -> str:
        destination = self._wanted
        self._until(lambda: self._job.state not in (JobState.DELIVERING, JobState.HELD), "no proof yet", self._show)
        job = self._job
        if job.state is not JobState.DONE:
            raise StepFailed(f"{job.state.value}: {job.reason_code}: {job.reason}", self._show)
        (pet,) = [one for one in self._series() if one.kind == "pet"]
        committed = "committed (Storage Commitment), " if pet.committed_at else ""
        node = self._config.node
        timeouts = timeouts_of(node)
        study_uid = job.info.study_uid
        counted = count_instances(self._config, destination, study_uid, pet.series_uid, timeouts, lambda: False)
        if counted.code == "not_offered":
            return f"{committed}and not looked for: {destination.name} answers no query"
        if not counted.ok:
            raise StepFailed(f"{counted.code}: {counted.text}", f"may {node.ae_title} query {destination.name}?")
        if counted.count != pet.instances:
            text = f"{destination.name} shows {counted.count} of {pet.instances} instances of the PET series"
            raise StepFailed(text, f"look there for accession {self._study.accession}")
        return f"{committed}{destination.name} shows the PET series with its {pet.instances} instances"

    def _retire(self) -> str:
        if not self._job_id:
            jobs = self._ledger.jobs_of_study(self._study.study_uid)
            if not jobs:
                again = f"if it becomes one: dicom-node doctor --retire-study {self._study.accession}"
                return f"nothing to retire: the test study is no job; {again}"
            self._job_id = jobs[0].id
        return retire(self._config, self._ledger, self._job_id, timeout_s=self._timeout_s)

    # ---- what they ask

    @property
    def _job(self) -> Job:
        return self._ledger.get(self._job_id)

    @property
    def _wanted(self) -> DestinationConfig:
        assert self._destination is not None
        return self._destination

    @property
    def _show(self) -> str:
        return f"dicom-node jobs show {self._job_id[:8]}"

    def _series(self) -> list[Delivery]:
        return [one for one in self._ledger.deliveries(self._job_id) if one.kind != REJECTION]

    def _delivery_ended(self) -> bool:
        return all(was_tried(one) for one in self._series())

    def _not_used(self, job: Job) -> NoReturn:
        raise StepFailed(
            f"{job.state.value}: {job.reason_code}: {job.reason}", f"dicom-node why {self._study.accession}"
        )

    def _until(self, holds: Callable[[], bool], late: str, remedy: str) -> None:
        if not waited(holds, self._timeout_s):
            raise StepFailed(f"{late} after {self._timeout_s:g} s", remedy)


def _has_result(job: Job) -> bool:
    return "result_series" in job.details
