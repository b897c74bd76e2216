"""C-ECHO that also tells whose software answered (PS3.7 annex D.3.3.2: the Implementation Class UID)."""

from __future__ import annotations

from dataclasses import dataclass

from dicom_node.config import PeerConfig
from dicom_node.net.link import Link, RequestOutcome, Timeouts, Trouble, dimse_status
from dicom_node.net.scp import IMPLEMENTATION_CLASS_UID
from dicom_node.net.scu import echo_context


@dataclass(frozen=True, kw_only=True, slots=True)
class EchoAnswer(RequestOutcome):
    """What came of a C-ECHO; no `implementation_class_uid` where no association came to be."""

    implementation_class_uid: str = ""

    @property
    def is_this_software(self) -> bool:
        """Whether this product answered, of whatever version and on whatever machine."""
        return self.implementation_class_uid == IMPLEMENTATION_CLASS_UID


def who_answers(peer: PeerConfig, *, calling_ae: str, timeouts: Timeouts | None = None) -> EchoAnswer:
    """Ask `peer` by C-ECHO, and look whose software it is."""
    with Link(peer, [echo_context()], calling_ae, timeouts or Timeouts(), 16382) as link:
        if link.trouble:
            return EchoAnswer.of(link.trouble)
        software = str(link.assoc.acceptor.implementation_class_uid or "")
        status = dimse_status(link.assoc.send_c_echo())
        trouble = None
        if status is None:
            trouble = Trouble("no_response", "no response to C-ECHO", False)
        elif status != 0:
            trouble = Trouble("echo_refused", f"C-ECHO was answered with 0x{status:04X}", True)
    return EchoAnswer.of(trouble, implementation_class_uid=software)
