"""What the statement says of CT images and of association negotiation, as acceptor."""

from __future__ import annotations

from collections.abc import Sequence

from dicom_node.conformance.markdown import table, text
from dicom_node.net.negotiation import MIN_PEER_PDU

# user item (PS3.7 annex D.3.3) -> what we do with it in an A-ASSOCIATE-RQ; dicom_node/net/negotiation.py, receive.py
NEGOTIATION: Sequence[tuple[str, str]] = (
    ("Maximum length", f"kept; 0 or none: no limit; 1 to {MIN_PEER_PDU - 1} bytes: aborted"),
    ("Asynchronous operations window", "answered with 1, 1: one operation at a time"),
    (
        "SCP/SCU role selection",
        "answered for Storage Commitment alone; Storage has the default roles, whatever is asked",
    ),
    ("SOP class extended negotiation", "taken, not answered"),
    ("SOP class common extended negotiation", "taken, not believed: the class decides the service"),
    (
        "User identity, types 1 and 2 (name, passcode)",
        "taken and not checked; the positive response is given where it is asked for",
    ),
    ("User identity, types 3 to 5 (Kerberos, SAML, JWT)", "taken and not looked at, without a response"),
    ("Any other item", "ignored (PS3.8 section 9.3.1)"),
)


def negotiation() -> list[str]:
    """The part of PS3.2 N.7 on what an association request may hold beside its presentation contexts."""
    return [
        *table(("in an association request", "what we do"), NEGOTIATION),
        *text(
            """A class may be proposed in any number of presentation contexts, up to all 128: each is answered by
            its own transfer syntaxes. One that names no abstract or no transfer syntax is answered as not
            supported, the others are not affected. An even context ID, and an item that is longer than the request,
            abort the association."""
        ),
    ]


def ct_images() -> list[str]:
    """The part of PS3.2 N.5 on what a CT image may be."""
    return text(
        """A CT series is single frames (CT Image Storage) or multi-frame images (Enhanced CT, Legacy Converted
        Enhanced CT), each in any of the transfer syntaxes of 7.3. Pixels are MONOCHROME2 in 16 allocated and 10 to
        16 stored bits, signed or not, with a rescale to Hounsfield units and pixel padding where there is some;
        Basic and Extended Offset Tables are used where they are filled. Of a multi-frame image, plane position and
        orientation, pixel measures and pixel value transformation are read from the shared and the per-frame
        functional groups; its frames count as slices, a concatenation is complete when all of its parts have come,
        frames whose type is LOCALIZER are left out. Several stacks or temporal positions that are not one volume,
        and projections, are rejected by name. The result's Source Image Sequence names the frames by number
        (0008,1160). What an 8-bit transfer syntax (JPEG Baseline) brings is taken and rejected as no CT."""
    )
