"""The statement as Markdown, in the order of PS3.2 annex N."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

from dicom_node import __version__
from dicom_node.config import Config, DestinationConfig
from dicom_node.conformance.acceptor import ct_images, negotiation
from dicom_node.conformance.annexes import annexes
from dicom_node.conformance.markdown import name_of, named, table, text, yes
from dicom_node.conformance.negotiation import (
    DROPPED,
    REFUSED,
    Accepted,
    Proposed,
    accepted,
    asked,
    not_kept,
    proposed,
    verification,
)
from dicom_node.conformance.sample import make_samples
from dicom_node.conformance.services import commitment_for_peers, studies_from_archives
from dicom_node.net.peers import addresses_of
from dicom_node.net.scp import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME
from dicom_node.net.status import (
    ANSWERS,
    CALLED_AE_NOT_RECOGNIZED,
    CALLING_AE_NOT_RECOGNIZED,
    LOCAL_LIMIT_EXCEEDED,
    MEANINGS,
    NO_REASON_TRANSIENT,
    Outcome,
)
from dicom_node.worker import pipeline_options
from pipeline.outputs.explicit import IMPLEMENTATION_CLASS_UID as WRITER_CLASS_UID
from pipeline.outputs.explicit import IMPLEMENTATION_VERSION_NAME as WRITER_VERSION_NAME

REACTIONS = {
    Outcome.OK: "counts as stored; the status is kept",
    Outcome.TRANSIENT: "tried again later",
    Outcome.PERMANENT: "the delivery fails: an operator looks at it",
}
REJECTIONS = (
    (CALLED_AE_NOT_RECOGNIZED, "the called AE title is not ours (`require_called_ae`)"),
    (
        CALLING_AE_NOT_RECOGNIZED,
        "no peer has the calling AE title (`unknown_peers`), or not at that address; or it is ours, without a test",
    ),
    (LOCAL_LIMIT_EXCEEDED, "`max_associations` are open"),
    (NO_REASON_TRANSIENT, "an error inside the node, which its log explains"),
)
LIMITS = ("max_pdu", "max_associations", "acse_timeout_s", "dimse_timeout_s", "network_timeout_s")

Sends = Mapping[str, Sequence[Proposed]]  # by the destination's name


def statement(config: Config) -> str:
    """The whole document for one configuration. It holds no path, no secret and no patient."""
    options = pipeline_options(config).output
    samples = make_samples(options)
    takes = [one for one in accepted(config) if one.use != DROPPED]
    sends = {one.name: proposed(samples.full.series, options, one) for one in config.destinations if one.peer}
    parts = (
        _cover(config),
        _overview(takes, sends, config),
        _introduction(),
        _model(config),
        _services(takes, config),
        _configuration(config),
        _network(takes, sends, config),
        _security(config),
        annexes(samples),
    )
    return "\n".join(chain.from_iterable(parts))


def _cover(config: Config) -> list[str]:
    return [
        "# DICOM conformance statement",
        "",
        *text(
            f"""Product: dicom-node {__version__}, a node that makes a SYNTHETIC FDG-PET series from a CT series.
            Research only, not for diagnosis."""
        ),
        *text(
            f"""Written by `dicom-node conformance` from a configuration and the code's own tables, in the order of
            PS3.2 annex N. This one is for the AE title `{config.node.ae_title}`; with your `config.toml` the command
            writes yours."""
        ),
    ]


def _overview(takes: Sequence[Accepted], sends: Sends, config: Config) -> list[str]:
    asks = [one for peer in config.peers for one in asked(peer)]
    out = [verification(), *chain.from_iterable(sends.values()), *(one for one in asks if one.role == "SCU")]
    as_scu = [one.sop_class_uid for one in out]
    as_scp = [one.sop_class_uid for one in takes if "SCP" in one.role]
    every = dict.fromkeys([*as_scp, *as_scu])
    rows = [(name_of(uid), f"`{uid}`", yes(uid in as_scu), yes(uid in as_scp)) for uid in every]
    rest = f"every other Storage class: {len(not_kept(config))} of PS3.6, retired ones too, and private ones"
    web = [one.name for one in config.destinations if one.url]
    return [
        "## 1 Overview",
        "",
        *table(("SOP class", "UID", "SCU", "SCP"), [*rows, (rest, "", "no", _others(config))]),
        *text(
            f"""DICOMweb: {"STOW-RS and QIDO-RS user agent for " + ", ".join(web) if web else "not configured"}. No
            media, no workflow service, and no query, retrieve or print service for others."""
        ),
    ]


def _others(config: Config) -> str:
    """What becomes of a storage class that is not kept."""
    return REFUSED if config.intake.other_classes == "refuse" else DROPPED


def _introduction() -> list[str]:
    return [
        "## 3 Introduction",
        "",
        *text(
            """For PACS administrators and integrators who know the DICOM standard. A conformance statement alone does
            not prove that two products work together: `dicom-node check` tries your peers."""
        ),
    ]


def _model(config: Config) -> list[str]:
    """PS3.2 N.4: one application entity and what it does in which order."""
    intake = config.intake
    return [
        "## 4 Implementation model",
        "",
        *text(f"One application entity, `{config.node.ae_title}`, takes what peers route to it and sends its results."),
        "1. A peer stores a CT series. Each Success means that the instance is durable on disk.",
        f"2. The series is complete when {intake.quiet_period_s:g} s brought no instance, no association that carried",
        "   it is open and no slice is missing. Which series of the study is used is decided when",
        f"   {intake.study_quiet_period_s:g} s brought no instance of the study.",
        "3. The synthetic PET series and its companions are written. Their UIDs are a function of the source",
        "   instances, the model bundle, the software and the options: the same input gives the same instances again.",
        "4. They are stored at each destination, one association for each series, the PET series first.",
        "5. Where the destination is configured so, Storage Commitment is requested and the series is counted there.",
        "",
    ]


def _services(takes: Sequence[Accepted], config: Config) -> list[str]:
    """PS3.2 N.5: what each service does with what it gets."""
    return [
        "## 5 Service and interoperability description",
        "",
        "### 5.1 What is accepted",
        "",
        *table(
            ("SOP class", "our role", "what becomes of it"), [(name_of(t.sop_class_uid), t.role, t.use) for t in takes]
        ),
        *text(f"""{_what_is_not_kept(config)} A data set is kept as it came, byte for byte: nothing is coerced."""),
        *ct_images(),
        "### 5.2 Statuses that we answer with",
        "",
        *table(("status", "when"), [(f"{status:04X}", when) for status, when in ANSWERS.items()]),
        "### 5.3 Statuses that we get",
        "",
        *table(
            ("status", "meaning", "what we do"),
            [(_range(row.first, row.last), row.text, REACTIONS[row.outcome]) for row in MEANINGS],
        ),
        *text("Any other status fails the delivery. An optional companion that is refused never costs the PET series."),
        "### 5.4 Proof of delivery",
        "",
        *table(
            ("destination", "Storage Commitment", "counted", "attempts", "first pause, s", "longest pause, s"),
            map(_proof_row, config.destinations),
        ),
        *text(
            """Where Storage Commitment is asked for, a report (N-EVENT-REPORT) is taken on the association of the
            request, on a later one of ours, or on one that the archive opens to us: in the role of SCP, or without
            role selection under the AE title or address of an archive that is asked. Every request has a fresh
            Transaction UID; items that failed are stored again. Counting is C-FIND (Study Root) at SERIES level for
            Number of Series Related Instances (0020,1209), at IMAGE level where that stays empty, and QIDO-RS at a
            DICOMweb destination. A service that a destination does not offer is noted; it fails nothing."""
        ),
        *commitment_for_peers(config),
        *studies_from_archives(config),
    ]


def _what_is_not_kept(config: Config) -> str:
    if config.intake.other_classes == "refuse":
        return f"""Presentation contexts of any other Storage class are {REFUSED} (PS3.8 table 9-18, result 3); those of
            the same association that are accepted are served."""
    return f"""Instances of any other Storage class are {DROPPED}, so that auto-routing does not stall; the ledger
            counts them."""


def _range(first: int, last: int) -> str:
    return f"{first:04X}" if first == last else f"{first:04X}-{last:04X}"


def _proof_row(one: DestinationConfig) -> tuple[object, ...]:
    asked = f"yes, {one.commitment_timeout_s:g} s for a report" if one.commitment else "no"
    counted = ("QIDO-RS" if one.url else "C-FIND") if one.verify else "no"
    return one.name, asked, counted, one.max_attempts, f"{one.first_retry_s:g}", f"{one.max_retry_s:g}"


def _configuration(config: Config) -> list[str]:
    """PS3.2 N.6: AE titles, addresses and limits. Every key is in config.toml with its meaning."""
    node = config.node
    peers = [(p.name, p.ae_title, ", ".join(p.may), ", ".join(addresses_of(p)) or "any") for p in config.peers]
    return [
        "## 6 Configuration",
        "",
        f"AE title `{node.ae_title}`, TCP port {node.port}. `config.toml` explains every key.",
        "",
        *table(("[node]", "value"), [(key, f"{getattr(node, key):g}") for key in LIMITS]),
        *table(("peer", "AE title", "may", "from addresses"), peers),
        *table(
            ("destination", "reached by", "encoding", "transfer syntax", "superseded results"),
            map(_destination_row, config.destinations),
        ),
    ]


def _destination_row(one: DestinationConfig) -> tuple[str, ...]:
    way = f"DIMSE, peer {one.peer}" if one.peer else "DICOMweb"
    return one.name, way, one.encoding, one.transfer_syntax, "rejected by a note" if one.reject_superseded else "stay"


def _network(takes: Sequence[Accepted], sends: Sends, config: Config) -> list[str]:
    """PS3.2 N.7: identification, associations, presentation contexts."""
    return [
        "## 7 Network and media communication details",
        "",
        "### 7.1 Identification",
        "",
        *table(
            ("where", "Implementation Class UID", "Implementation Version Name"),
            [
                ("associations, received files", f"`{IMPLEMENTATION_CLASS_UID}`", IMPLEMENTATION_VERSION_NAME),
                ("files of results", f"`{WRITER_CLASS_UID}`", WRITER_VERSION_NAME),
            ],
        ),
        *_associations(config),
        *_accepted_contexts(takes, config),
        *_proposed_contexts(sends, config),
        "### 7.5 Media",
        "",
        "None. Results of `dicom-node run` are Part 10 files without a DICOMDIR.",
        "",
    ]


def _associations(config: Config) -> list[str]:
    node = config.node
    return [
        "### 7.2 Associations",
        "",
        *text(
            f"""Maximum PDU received: {f"{node.max_pdu} bytes" if node.max_pdu else "no limit"}. At most
            {node.max_associations} associations are accepted at a time; one is opened to each destination at a time.
            As requestor: no asynchronous operations window, no user identity, no extended negotiation; SCP/SCU role
            selection for Storage Commitment, and for CT in C-GET, alone."""
        ),
        *negotiation(),
        *table(("Result", "Source", "Reason", "we reject when"), [(*reason, when) for reason, when in REJECTIONS]),
        *text(
            """An association is aborted when it is silent for `network_timeout_s`. A rejection that we get is tried
            again when it is transient (Result 2) or from the presentation service (Source 3); else the delivery
            fails."""
        ),
    ]


def _accepted_contexts(takes: Sequence[Accepted], config: Config) -> list[str]:
    alike: dict[tuple[str, ...], list[str]] = {}
    for one in takes:
        alike.setdefault(one.transfer_syntaxes, []).append(one.sop_class_uid)
    lines = ["### 7.3 Presentation contexts that are accepted", ""]
    lines += text("The order is ours where one context offers several transfer syntaxes.")
    for syntaxes, classes in alike.items():
        lines += [f"{named(classes)}:", ""]
        lines += table(("transfer syntax", "UID"), [(name_of(uid), f"`{uid}`") for uid in syntaxes])
    native = "Explicit VR Little Endian, Implicit VR Little Endian, else whatever was proposed"
    return lines + text(f"Every other Storage class: {native if _others(config) == DROPPED else REFUSED}.")


def _proposed_contexts(sends: Sends, config: Config) -> list[str]:
    echo = verification()
    lines = [
        "### 7.4 Presentation contexts that are proposed",
        "",
        *text(
            f"""A Storage class has a context for each transfer syntax, so that the answer tells all that a peer takes.
            An instance goes out as it was written (Explicit VR Little Endian); compressed without loss where that is
            configured and accepted; in Implicit VR Little Endian where only that is accepted. `dicom-node check`
            proposes {name_of(echo.sop_class_uid)} to every peer ({named(echo.transfer_syntaxes)})."""
        ),
    ]
    for name, contexts in sends.items():
        rows: list[tuple[object, ...]] = [
            (name_of(one.sop_class_uid), ", ".join(one.objects) or "proof of delivery", named(one.transfer_syntaxes))
            for one in contexts
        ]
        lines += [f"Destination {name}:", "", *table(("SOP class", "for", "transfer syntaxes"), rows)]
    for peer in config.peers:
        rows = [(name_of(one.sop_class_uid), one.role, named(one.transfer_syntaxes)) for one in asked(peer)]
        if rows:
            lines += [f"Peer {peer.name}:", "", *table(("SOP class", "our role", "transfer syntaxes"), rows)]
    return lines


def _security(config: Config) -> list[str]:
    """PS3.2 N.8."""
    node = config.node
    rows = [(d.name, "TLS" if d.url.startswith("https") else "none", _login(d)) for d in config.destinations if d.url]
    return [
        "## 8 Security",
        "",
        *text(
            f"""DICOM TLS, by the BCP 195 RFC 8996, 9325 profile (PS3.15 annex B.12; TLS 1.2 and 1.3, client
            certificates none, optional or required): {_tls(config)}. The called AE title must be ours:
            {yes(node.require_called_ae)}. The calling AE title must be a peer's: {yes(node.unknown_peers == "reject")};
            from its addresses. Logs name no patient. Nothing is de-identified: results carry the
            patient's name and ID as the CT does."""
        ),
        *(table(("DICOMweb destination", "encryption", "login"), rows) if rows else []),
    ]


def _tls(config: Config) -> str:
    """Where DIMSE is encrypted in this configuration."""
    listener = "no port listens for it"
    if config.tls.cert_file is not None:
        beside = "and nothing else" if config.tls_alone else f"beside {config.node.port} without it"
        listener = f"on port {config.tls.port}, {beside}, client certificates {config.tls.client_certificates}"
    towards = ", ".join(peer.name for peer in config.peers if peer.tls)
    return f"{listener}; towards {towards or 'no peer'}"


def _login(one: DestinationConfig) -> str:
    return "basic" if one.username else "bearer token" if one.token_file else "none"
