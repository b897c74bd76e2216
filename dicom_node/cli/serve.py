"""`dicom-node serve`."""

from __future__ import annotations

from dicom_node.cli.common import DEFAULT_CONFIG, ConfigPath
from dicom_node.config import load_config


def serve(config: ConfigPath = DEFAULT_CONFIG) -> None:
    """Run the node until it is told to stop.

    The first Ctrl-C (or SIGTERM) drains: nothing new is accepted and the running job ends or goes back to the queue.
    The second stops at once. Nothing acknowledged is lost either way.
    """
    from dicom_node.node import Node  # imports the DICOM stack: not needed for `--help`

    Node(load_config(config)).run_forever()
