"""The node's own errors.

NodeError        the node cannot start; the text says what stands in the way
├── PacsError    the demo's PACS did not start or refused a request (dicom_node.cli.demo_pacs)
└── RerunRefused a result cannot, or need not, be computed again; the text says why (dicom_node.rerun)
"""

from __future__ import annotations


class NodeError(Exception):
    """The node cannot start: another one uses the storage root, or the port is taken."""


class RerunRefused(NodeError):
    """Nothing has changed that the result is made of, a successor is there, or the CT is gone."""
