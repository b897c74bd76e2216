"""Sections of the statement on what peers may ask of us beside storing, and on what we ask of archives."""

from __future__ import annotations

from dicom_node.config import Config, PeerConfig
from dicom_node.conformance.markdown import table, text
from dicom_node.net.commitment_scp import MOST_REFERENCES, SAME_ASSOCIATION_AFTER_S, SORTED_WITHIN_S, describe

_SAID = {
    "": "every instance came",
    "incomplete": "some did not, or none at all: by the archive's counts, whatever its status",
    "destination_unknown": "A801: the archive does not know our AE title as a destination",
    "retrieve_refused": "any other failure or cancel status",
    "not_offered": "no presentation context, or 0122, 0124, 0211",
    "no_response": "nothing for `[pull].answer_timeout_s`, or the association ended",
    "too_long": "not done after `[pull].series_timeout_s`: C-CANCEL, then A-ABORT",
}


def commitment_for_peers(config: Config) -> list[str]:
    """Storage Commitment as SCP."""
    rules = config.commitment
    askers = [peer.name for peer in config.peers if "commit" in peer.may]
    return [
        "### 5.5 Storage Commitment for peers",
        "",
        *text(
            f"""Peers that may ask (`may` has `commit`): {", ".join(askers) or "none"}. The Success of an N-ACTION means
            that the request is durable; it may name {MOST_REFERENCES} instances. The report (N-EVENT-REPORT) comes on
            the association of the request when that is open and quiet {SAME_ASSOCIATION_AFTER_S:g} s later, else on one
            that we open to the peer, in the role of SCP. It is sent again after {rules.first_retry_s:g} to
            {rules.max_retry_s:g} s, at most {rules.max_attempts} times, also after a restart. Committed means that the
            instance is durable here at the moment of the report, and sorted into its series, for which the report waits
            up to {SORTED_WITHIN_S:g} s. It is removed after `keep_inputs_days`, here
            {config.storage.keep_inputs_days:g}: this node is no archive, and nobody should delete on its word."""
        ),
        *table(("Failure Reason", "when"), describe()),
    ]


def studies_from_archives(config: Config) -> list[str]:
    """C-FIND, C-MOVE and C-GET as SCU."""
    peers = [_asked_row(peer) for peer in config.peers if peer.we_may]
    pulls = [(one.name, one.peer, one.at, str(one.days_back), f"C-{one.method.upper()}") for one in config.pulls]
    lines = [
        "### 5.6 Studies from an archive",
        "",
        *text(
            """`dicom-node pull` and `[[pulls]]` ask a peer for CT studies, Study Root, one study at a time. C-FIND at
            STUDY level by Accession Number, Study Instance UID, or Study Date with Modalities in Study; at SERIES level
            by Modality, with Series Description, Station Name and Number of Series Related Instances as return keys.
            What is answered is compared with what was asked, so that a key that is not matched does no harm. Retrieval
            at SERIES level: C-MOVE to our own AE title, or C-GET with CT in every transfer syntax of 7.3. No relational
            queries, no extended negotiation."""
        ),
        *table(("outcome of a retrieval", "when"), [(code or "success", when) for code, when in _SAID.items()]),
    ]
    lines += table(("peer", "may be asked for"), peers) if peers else ["No peer may be asked (`we_may`).", ""]
    return lines + (table(("pull", "peer", "at", "days back", "by"), pulls) if pulls else [])


def _asked_row(peer: PeerConfig) -> tuple[str, str]:
    return peer.name, ", ".join(f"C-{one.upper()}" for one in peer.we_may)
