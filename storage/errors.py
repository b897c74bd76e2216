"""The storage package's errors.

StorageError
├── LedgerError     the ledger cannot be opened, read or written: the text names the file and what to do
│   ├── LedgerOutage     whatever is asked of it; what was asked is not to blame
│   │   └── LedgerDamaged    its file is broken: nothing may be written into it, a backup must be restored
│   └── BackupDamaged    what was to be restored is broken, or no ledger: another backup must be restored
├── NotFound        no such job, delivery or series
├── IllegalMove     the table of moves does not allow it: a fault in the caller, or an operator's wrong command
├── OtherSeries     a result has other series UIDs than what its job has sent already: it needs a job of its own
├── StaleState      somebody else moved the row first, or the lease was lost: forget the row and go on
├── NoSpace         the spool has no room: refuse with 0xA700 (PS3.4 table B.2-1), try later
└── BadUid          not a UID of PS3.5 section 9.1, so never a file name
"""

from __future__ import annotations


class StorageError(Exception):
    """The root of the tree."""


class LedgerError(StorageError):
    """The ledger cannot be used; the text names the database and the remedy."""


class LedgerOutage(LedgerError):
    """Nothing can be read or written now, whatever is asked: it says nothing against what was asked."""


class LedgerDamaged(LedgerOutage):
    """The ledger's file is not whole; the text names what was found."""


class BackupDamaged(LedgerError):
    """A backup is not whole; the text names what was found."""


class NotFound(StorageError):
    """The row or the folder asked for does not exist."""


class IllegalMove(StorageError):
    """The state machine does not know this move."""


class OtherSeries(StorageError):
    """The ledger would forget a series that is with a destination."""


class StaleState(StorageError):
    """The row is not in the expected state, or not leased to the caller any more."""


class NoSpace(StorageError):
    """Writing would go below the free-space watermark, or the disk is full. Nothing was kept."""


class BadUid(StorageError):
    """Text that claims to be a UID and is none."""
