"""What the node accepts and proposes under a configuration, asked of the functions that do it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydicom._uid_dict import UID_dictionary
from pydicom.uid import UID
from pynetdicom import build_context
from pynetdicom._globals import ALL_TRANSFER_SYNTAXES
from pynetdicom.presentation import PresentationContext

from dicom_node.config import Config, DestinationConfig, PeerConfig
from dicom_node.net.commitment import commitment_context
from dicom_node.net.move import get_contexts, move_context
from dicom_node.net.part10 import Part10
from dicom_node.net.query import find_context
from dicom_node.net.scp import STORAGE_COMMITMENT, VERIFICATION, contexts_for, is_storage_class
from dicom_node.net.scu import echo_context, storage_contexts
from dicom_node.net.store import accepted_classes, kept_classes
from dicom_node.worker import new_deliveries
from pipeline.outputs.rejection_note import KIND as REJECTION
from pipeline.result import SeriesSummary
from pipeline.types import EncodedSeries, OutputOptions

STORED, DROPPED = "kept", "answered with Success and dropped"
REFUSED = "rejected: abstract syntax not supported"


@dataclass(frozen=True, kw_only=True, slots=True)
class Accepted:
    """A SOP class that the node takes as acceptor, in its order of preference of transfer syntaxes."""

    sop_class_uid: str
    role: str  # ours
    transfer_syntaxes: tuple[str, ...]
    use: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Proposed:
    """A SOP class that the node proposes as requestor, one presentation context for each transfer syntax or list."""

    sop_class_uid: str
    transfer_syntaxes: tuple[str, ...]
    objects: tuple[str, ...] = ()  # "pet-sc": kinds of object that go out under it
    role: str = "SCU"  # ours


def known_sop_classes() -> tuple[str, ...]:
    """Every SOP class of PS3.6 annex A that pydicom knows, retired ones too."""
    return tuple(uid for uid, entry in UID_dictionary.items() if entry[1] in ("SOP Class", "Meta SOP Class"))


def accepted(config: Config) -> tuple[Accepted, ...]:
    """What a peer that may do everything is granted when it proposes everything there is."""
    asked = [build_context(uid, list(ALL_TRANSFER_SYNTAXES)) for uid in known_sop_classes()]
    granted = contexts_for(
        asked,
        may_store=True,
        may_echo=True,
        may_report=config.asks_commitment,
        may_commit=config.gives_commitment,
        storage=accepted_classes(config),
    )
    kept = kept_classes(config)
    return tuple(_accepted(context, kept, config) for context in granted)


def not_kept(config: Config) -> tuple[str, ...]:
    """The storage classes of PS3.6 that the node has no use for: dropped, or refused."""
    kept = kept_classes(config)
    return tuple(uid for uid in known_sop_classes() if is_storage_class(uid) and uid not in kept)


def _accepted(context: PresentationContext, kept: frozenset[UID], config: Config) -> Accepted:
    sop_class_uid = str(context.abstract_syntax)
    is_storage = is_storage_class(sop_class_uid)
    if sop_class_uid == STORAGE_COMMITMENT:
        return _commitment(context, config)
    return Accepted(
        sop_class_uid=sop_class_uid,
        role="SCP",
        transfer_syntaxes=tuple(str(uid) for uid in context.transfer_syntax),
        use=(STORED if sop_class_uid in kept else DROPPED) if is_storage else _USES[sop_class_uid],
    )


_USES = {str(VERIFICATION): "C-ECHO is answered"}


def _commitment(context: PresentationContext, config: Config) -> Accepted:
    """Either role, or both: what the acceptor grants follows from who reports to us and who may ask us."""
    roles = {"SCU": config.asks_commitment, "SCP": config.gives_commitment}
    uses = {"N-EVENT-REPORT is taken": config.asks_commitment, "N-ACTION is taken": config.gives_commitment}
    return Accepted(
        sop_class_uid=str(context.abstract_syntax),
        role=" and ".join(role for role, has in roles.items() if has),
        transfer_syntaxes=tuple(str(uid) for uid in context.transfer_syntax),
        use=", ".join(use for use, has in uses.items() if has),
    )


def proposed(series: Sequence[EncodedSeries], options: OutputOptions, destination: DestinationConfig) -> list[Proposed]:
    """What goes out to one DIMSE destination; `series` are samples of all that can be written."""
    sent = [one for one in series if _is_written(one, options)]
    wanted = {(new.kind, new.encoding) for new in new_deliveries([_summary(one) for one in sent], [destination])}
    going = [one for one in series if (one.kind, one.encoding) in wanted or one.kind == REJECTION]
    parts = [_part10(one) for one in going]
    by_class: dict[str, list[str]] = {}
    for context in storage_contexts(parts, destination.transfer_syntax):
        by_class.setdefault(str(context.abstract_syntax), []).append(str(context.transfer_syntax[0]))
    storage = [
        Proposed(
            sop_class_uid=sop_class_uid,
            transfer_syntaxes=tuple(syntaxes),
            objects=tuple(
                f"{one.kind}-{one.encoding}" for one in going if one.instances[0].sop_class_uid == sop_class_uid
            ),
        )
        for sop_class_uid, syntaxes in by_class.items()
    ]
    return [*storage, *_services(destination)]


def verification() -> Proposed:
    """What `dicom-node check` proposes to every peer."""
    return _service(echo_context())


def asked(peer: PeerConfig) -> list[Proposed]:
    """What is proposed to a peer that we may ask for studies, or that asks us for commitment."""
    contexts = {"find": [find_context()], "move": [move_context()], "get": get_contexts()}
    found: dict[str, list[str]] = {}
    for context in (context for what in peer.we_may for context in contexts[what]):
        found.setdefault(str(context.abstract_syntax), []).extend(str(uid) for uid in context.transfer_syntax)
    services = [
        Proposed(
            sop_class_uid=sop_class_uid,
            transfer_syntaxes=tuple(dict.fromkeys(syntaxes)),
            role="SCP" if is_storage_class(sop_class_uid) else "SCU",
        )
        for sop_class_uid, syntaxes in found.items()
    ]
    reports = [replace(_service(commitment_context()), role="SCP")] if "commit" in peer.may else []
    return [*services, *reports]


def _services(destination: DestinationConfig) -> Iterator[Proposed]:
    if destination.commitment:
        yield _service(commitment_context())
    if destination.verify:
        yield _service(find_context())


def _service(context: PresentationContext) -> Proposed:
    return Proposed(
        sop_class_uid=str(context.abstract_syntax),
        transfer_syntaxes=tuple(str(uid) for uid in context.transfer_syntax),
    )


def _is_written(series: EncodedSeries, options: OutputOptions) -> bool:
    """Whether a job writes this kind of object under the options."""
    companions = {
        "mip": options.mip,
        "seg": options.seg,
        "uncertainty": options.uncertainty,
        "sr": options.sr,
        "gsps": options.presentation_states,
        "pcps": options.presentation_states,
    }
    return companions.get(series.kind, series.kind == "pet" and series.encoding in options.encodings)


def _summary(series: EncodedSeries) -> SeriesSummary:
    return SeriesSummary(
        kind=series.kind,
        encoding=series.encoding,
        series_uid=series.series_uid,
        sop_class_uid=series.instances[0].sop_class_uid,
        instances=len(series.instances),
        folder="",
    )


def _part10(series: EncodedSeries) -> Part10:
    first = series.instances[0]
    return Part10(
        path=Path(first.file_name),
        sop_class_uid=first.sop_class_uid,
        sop_instance_uid=first.sop_instance_uid,
        transfer_syntax_uid=first.transfer_syntax_uid,
    )
