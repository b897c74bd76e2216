"""The node's own errors.

NodeError        the node cannot start; the text says what stands in the way
└── PacsError    the demo's PACS did not start or refused a request (dicom_node.cli.demo_pacs)
"""

from __future__ import annotations


class NodeError(Exception):
    """The node cannot start: another one uses the storage root, or the port is taken."""
