"""`dicom-node train districts` from the command line."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from dicom_node.cli import app


def test_a_segmenter_that_does_not_exist_is_refused_before_any_phantom(tmp_path: Path) -> None:
    ran = CliRunner().invoke(app, ["train", "districts", "--out", str(tmp_path / "out"), "--segmenter", "buitlin"])
    assert ran.exit_code == 2
    assert "buitlin" in ran.output
    assert not (tmp_path / "out").exists()
