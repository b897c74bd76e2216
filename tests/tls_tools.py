"""Real certificates, made for the test: a CA, what it signs, another CA, and one that has ended."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import trustme

LONG_AGO = datetime.now(UTC) - timedelta(days=2)


class Authority:
    """A CA and the files that it signed, in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._ca = trustme.CA()
        self.file = folder / "ca.pem"
        self._ca.cert_pem.write_to_path(str(self.file))

    def certificate(self, name: str, *, host: str = "127.0.0.1", ends: datetime | None = None) -> Path:
        """A file with key and certificate."""
        path = self._folder / f"{name}.pem"
        self._ca.issue_cert(host, not_after=ends).private_key_and_cert_chain_pem.write_to_path(str(path))
        return path

    def split(self, name: str) -> tuple[Path, Path]:
        """(certificate, key) in files of their own, as DCMTK wants them."""
        issued = self._ca.issue_cert("127.0.0.1")
        certificate, key = self._folder / f"{name}-cert.pem", self._folder / f"{name}-key.pem"
        issued.cert_chain_pems[0].write_to_path(str(certificate))
        issued.private_key_pem.write_to_path(str(key))
        return certificate, key
