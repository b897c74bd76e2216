"""`dicom-node pull`: what may be asked for, what is said of each study, and the exit code."""

from __future__ import annotations

import csv
import json
import os
import pwd
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ct_factory import write_ct
from fake_pacs import free_port
from fake_retrieve import FIND, MOVE, FakeRetrieve, Script
from intake_tools import Intake, config, running_intake
from orthanc import running_orthanc
from pydicom.uid import generate_uid
from typer.testing import CliRunner, Result

from dicom_node.cli import app
from dicom_node.cli.check import check_retrieve
from dicom_node.cli.common import warnings_on_stderr
from dicom_node.cli.findings import Verdict
from dicom_node.cli.pull import ListError, read_list
from dicom_node.net.associations import AssociationRegistry
from dicom_node.net.receive import Receiver
from dicom_node.node import lock_root
from dicom_node.pull import Wanted

STUDY = generate_uid()
CONFIG = """
[node]
host = "127.0.0.1"
port = {port}
acse_timeout_s = 5.0

[[peers]]
name = "archive"
ae_title = "{ae_title}"
host = "127.0.0.1"
port = {archive}
we_may = {we_may}

[intake]
min_free_bytes = 0

[storage]
root = "{root}"
database_url = "sqlite:///{ledger}"
"""


@dataclass
class Console:
    """The command with a configuration, beside a node that receives (or does not)."""

    folder: Path
    intake: Intake

    def configure(
        self, archive_port: int, *, node_port: int = 0, we_may: Sequence[str] = (), ae_title: str = "ARCHIVE"
    ) -> None:
        text = CONFIG.format(
            port=node_port or self.intake.port,
            ae_title=ae_title,
            archive=archive_port,
            we_may=json.dumps(list(we_may or ("find", "move", "get"))),
            root=self.intake.spool.root,
            ledger=self.folder / "ledger.sqlite",
        )
        (self.folder / "config.toml").write_text(text)

    def run(self, *arguments: str) -> Result:
        with warnings_on_stderr():  # the receiver of this process logs, too
            return CliRunner().invoke(app, ["pull", "--config", str(self.folder / "config.toml"), *arguments])

    def rows(self, *arguments: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(self.run(*arguments, "--json").stdout)
        return found


@pytest.fixture
def console(tmp_path: Path) -> Iterator[Console]:
    with running_intake(tmp_path, config(peers=[{"name": "archive", "ae_title": "ARCHIVE"}])) as intake:
        unlock = lock_root(intake.spool.root)  # as a node does while it runs
        yield Console(tmp_path, intake)
        unlock()


@pytest.fixture
def archive(tmp_path: Path, console: Console) -> Iterator[FakeRetrieve]:
    paths = write_ct(tmp_path / "ct", np.zeros((4, 8, 8)), study_uid=STUDY)
    with FakeRetrieve(paths, node_port=console.intake.port) as made:
        console.configure(made.peer().port)
        yield made


def test_the_command_fetches_while_the_node_runs_and_says_so(console: Console, archive: FakeRetrieve) -> None:
    report = console.folder / "report.csv"
    done = console.run("--accession", "ACC1", "--report", str(report))
    assert done.exit_code == 0, done.output
    assert "1 fetched" in done.stdout
    assert len(console.intake.spool.incoming()) == 4
    [row] = csv.DictReader(report.read_text().splitlines())
    assert (row["accession"], row["study_uid"], row["outcome"], row["instances"]) == ("ACC1", STUDY, "fetched", "4")
    assert archive.asked[0] == ("FIND STUDY", "ACC1")


def test_a_list_is_fetched_row_by_row_and_one_failure_is_the_exit_code(console: Console, archive: FakeRetrieve) -> None:
    listed = console.folder / "list.csv"
    listed.write_text(f"\ufeffAccession;Study_UID\nACC1;\n;{STUDY}\nNONE;\nACC1;\n", encoding="utf-8")
    done = console.run("--from-csv", str(listed), "--get")
    assert done.exit_code == 1
    rows = console.rows("--from-csv", str(listed), "--get", "--dry-run")
    assert [row["outcome"] for row in rows] == ["planned", "planned", "not_found"]  # no assembler runs here: no job yet
    assert len(console.intake.spool.incoming()) == 8  # asked for by number and by UID
    assert len(archive.moves) == 2


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 2, "nothing is asked for"),
        (["--accession", "A*"], 2, "no accession number"),
        (["--accession", "12345678901234567"], 2, "no accession number"),
        (["--study", "../etc"], 2, "no Study Instance UID"),
        (["--accession", "ACC1", "--peer", "other"], 2, "no peer is named 'other'"),
        (["--from-csv", "missing.csv"], 2, "cannot be read"),
        (["--accession", "ACC1", "--report", "/no/such/folder/report.csv"], 2, "cannot be written"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_asked(
    console: Console, archive: FakeRetrieve, arguments: list[str], code: int, said: str
) -> None:
    done = console.run(*arguments)
    assert (done.exit_code, archive.asked) == (code, [])
    assert said in done.output


def test_only_a_peer_that_may_be_asked_is_asked(console: Console, archive: FakeRetrieve) -> None:
    console.configure(archive.peer().port, we_may=["find"])
    refused = console.run("--accession", "ACC1")
    named = console.run("--accession", "ACC1", "--peer", "archive", "--get")
    assert (refused.exit_code, named.exit_code, archive.asked) == (2, 2, [])
    assert 'we_may = ["find", "move"]' in refused.output
    assert "lacks get" in named.output
    assert console.run("--accession", "ACC1", "--dry-run").exit_code == 0


def test_a_move_needs_the_node_and_a_get_does_not(console: Console, archive: FakeRetrieve) -> None:
    console.configure(archive.peer().port, node_port=free_port())
    moved = console.run("--accession", "ACC1")
    assert (moved.exit_code, archive.asked) == (1, [])
    assert "does not run" in moved.output
    assert console.run("--accession", "ACC1", "--get").exit_code == 0


def test_an_archive_that_does_not_know_us_is_said_so(console: Console, archive: FakeRetrieve) -> None:
    archive.script = Script.UNKNOWN_DESTINATION
    done = console.run("--accession", "ACC1", "--json")
    [row] = json.loads(done.stdout)
    assert (done.exit_code, row["outcome"]) == (1, "destination_unknown")
    assert "add it there" in row["text"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "first line"),
        ("name\nx\n", "first line"),
        ("accession\nA?\n", "line 2"),
        ("accession,study_uid\nACC1,\n,1.2.x\n", "line 3"),
        ("accession,other\n,x\n", "line 2: has neither"),
    ],
)
def test_a_list_that_cannot_be_used_names_the_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "list.csv"
    path.write_text(text)
    with pytest.raises(ListError, match=said):
        read_list(path)


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("accession,study_uid\nACC1,\n,1.2.3\n", "utf-8"),
        ("accession;study_uid;Name\r\nACC1;;Jürgen\r\n;1.2.3;\r\n", "utf-8-sig"),  # Excel in Europe: CSV UTF-8
        ("accession\tstudy_uid\r\nACC1\t\r\n\t1.2.3\r\n", "utf-16"),  # Excel: Unicode text
        ('\ufeff"accession";"study_uid"\n"ACC1";""\n"";"1.2.3"\n', "utf-16-be"),
    ],
)
def test_a_list_is_read_as_spreadsheets_write_it(tmp_path: Path, text: str, encoding: str) -> None:
    path = tmp_path / "list.csv"
    path.write_bytes(text.encode(encoding))
    assert read_list(path) == [Wanted(accession="ACC1"), Wanted(study_uid="1.2.3")]


@pytest.mark.parametrize(
    "content",
    ["accession;Name\nACC1;Jürgen\n".encode("cp1252"), "accession\nACC1\n".encode("utf-16")[:-1]],
)
def test_a_list_that_is_no_text_says_how_to_save_it(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "list.csv"
    path.write_bytes(content)
    with pytest.raises(ListError, match=r'list\.csv: .*save it as "CSV UTF-8"'):
        read_list(path)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_of_a_list_with_another_header_no_data_is_shown(tmp_path: Path, end: str) -> None:
    path = tmp_path / "list.csv"
    path.write_bytes(f"Accession Number,x{end}PULL1,2{end}".encode())
    with pytest.raises(ListError, match=r"it has 'Accession Number,x'$"):
        read_list(path)


def test_check_says_what_the_archive_lacks_for_a_pull(archive: FakeRetrieve) -> None:
    with FakeRetrieve([], classes=[FIND, MOVE]) as partly:
        found = [
            check_retrieve(config(), one)
            for one in (
                archive.peer(),
                archive.peer(may=("echo",)),
                partly.peer(),
                archive.peer(port=free_port()),
            )
        ]
    assert [finding.verdict for finding in found] == [Verdict.OK, Verdict.WARN, Verdict.WARN, Verdict.WARN]
    assert "must know SYNPET on port 11112" in found[0].text
    assert 'lacks "store"' in found[1].text
    assert "offers no C-GET" in found[2].text
    assert "cannot be reached" in found[3].text


@pytest.mark.orthanc
def test_orthanc_is_asked_moves_and_is_got_from(tmp_path: Path) -> None:
    port = free_port()
    with running_orthanc(tmp_path / "orthanc", modalities={"synpet": ("SYNPET", port)}) as orthanc:
        cfg = config(node={"port": port}, peers=[{"name": "archive", "ae_title": orthanc.ae_title}])
        with running_intake(tmp_path, cfg, listen=False) as intake:
            for number, accession in enumerate(("ACC1", "ACC2")):
                for path in write_ct(tmp_path / f"ct{number}", np.zeros((4, 8, 8)), accession=accession):
                    orthanc.post("/instances", path.read_bytes())
            console = Console(tmp_path, intake)
            console.configure(orthanc.dicom_port, node_port=port, ae_title=orthanc.ae_title)
            registry = AssociationRegistry(limit=8, clock=intake.clock)
            receiver = Receiver(cfg, intake.spool, intake.ledger, registry)
            receiver.start(port=port)
            unlock = lock_root(intake.spool.root)
            try:
                moved = console.rows("--accession", "ACC1")
            finally:
                unlock()
                receiver.stop()
            got = console.rows("--accession", "ACC2", "--get")
            assert [(row["outcome"], row["series"], row["instances"]) for row in moved + got] == [("fetched", 1, 4)] * 2
            assert len(intake.spool.incoming()) == 8
            intake.pass_time(40)
            intake.pass_time(400)
            assert len(intake.jobs()) == 2
            assert console.rows("--accession", "ACC2", "--get")[0]["outcome"] == "present"


@pytest.mark.parametrize(
    "command",
    [["pull", "--accession", "ACC1", "--get"], ["ledger", "backup"], ["ledger", "restore", "config.toml"]],
)
def test_who_is_not_the_nodes_user_is_told_which_user_to_be_and_writes_nothing(
    console: Console, archive: FakeRetrieve, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.chdir(console.folder)
    owner, root = os.geteuid(), console.intake.spool.root
    before = sorted(root.rglob("*"))
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    done = CliRunner().invoke(app, [*command, "--config", "config.toml"])
    assert done.exit_code == 1
    assert f"belongs to user {pwd.getpwuid(owner).pw_name}" in done.stderr
    assert (sorted(root.rglob("*")), archive.asked) == (before, [])
