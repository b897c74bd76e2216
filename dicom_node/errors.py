"""The node's own errors.

NodeError        the node cannot start; the text says what stands in the way
"""

from __future__ import annotations


class NodeError(Exception):
    """The node cannot start: another one uses the storage root, or the port is taken."""
