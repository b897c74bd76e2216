"""pynetdicom's requestor, held for certain while it waits for a response."""

from __future__ import annotations

import threading
import time

from pynetdicom.association import Association


class _Checkpoint(threading.Event):
    """What the association's thread passes in each of its rounds; `clear` returns when it rests there.

    pynetdicom takes it for resting when it was only let go of a moment ago: on a busy machine it then takes the next
    response away from whoever waits for it (`dicom_node.net.sending.reactor_held`).
    """

    def __init__(self, assoc: Association) -> None:
        super().__init__()
        self.set()
        self._assoc = assoc

    def clear(self) -> None:
        super().clear()
        while not self._cond._waiters and self._assoc.is_alive():  # type: ignore[attr-defined]
            time.sleep(0.0002)


def steady(assoc: Association) -> Association:
    """The association, whose thread never takes the answer to one of several requests."""
    assoc._reactor_checkpoint = _Checkpoint(assoc)
    return assoc
