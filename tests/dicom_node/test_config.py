"""A wrong configuration is refused with the key, the value and the rule."""

from __future__ import annotations

from pathlib import Path

import pytest

from dicom_node.config import Config, ConfigError, load_config

CASES = {
    "a misspelled key": ("[node]\nprot = 1", "[node].prot is not a key; did you mean 'port'?"),
    "a misspelled table": ("[nod]\nport = 1", "nod is not a key; did you mean 'node'?"),
    "a misspelled key of a peer": (
        '[[peers]]\nname = "pacs"\nae_title = "A"\nprot = 1',
        "[peers.pacs].prot is not a key; did you mean 'port'?",
    ),
    "a port out of range": ("[node]\nport = 99999", "[node].port = 99999: Input should be less than or equal to 65535"),
    "a port that is a word": ('[node]\nport = "dicom"', "[node].port = 'dicom'"),
    "a long AE title": ('[node]\nae_title = "ABCDEFGHIJKLMNOPQ"', "1 to 16 printable ASCII"),
    "an AE title with a line break": ('[node]\nae_title = "A\\nB"', "1 to 16 printable ASCII"),
    "the metrics on the node's port": (
        "[metrics]\nport = 11112",
        "[metrics].port = 11112: is [node].port too; one port is for one service",
    ),
    "the metrics on the port of TLS": (
        '[tls]\ncert_file = "a.pem"\nclient_certificates = "none"\n[metrics]\nport = 2762',
        "[metrics].port = 2762: is [tls].port too",
    ),
    "an odd PDU": ("[node]\nmax_pdu = 17", "[node].max_pdu = 17"),
    "a destination without its peer": (
        '[[destinations]]\nname = "x"\npeer = "nobody"',
        "destinations.x.peer: no peer is named 'nobody'",
    ),
    "two peers of one name": (
        '[[peers]]\nname = "a"\nae_title = "A"\n[[peers]]\nname = "a"\nae_title = "B"',
        "peers: the name 'a' is used twice",
    ),
    "an address that is none": (
        '[[peers]]\nname = "a"\nae_title = "A"\nallowed_addresses = ["10.0.0.300"]',
        "[peers.a].allowed_addresses",
    ),
    "a description that hides the word": ('[output]\nseries_description = "PET"', "must begin with the word SYNTHETIC"),
    "not TOML": ("[node", "not valid TOML"),
    "a table of many with one bracket": (
        '[pulls]\nname = "a"',
        "pulls: there may be several: write [[pulls]], with two brackets",
    ),
    "destinations with one bracket": ('[destinations]\nname = "a"', "write [[destinations]], with two brackets"),
    "one bracket, then two": (
        '# [peers]\n  [ peers ]  # ours\nname = "a"\n[[peers]]\nname = "b"',
        "line 2: write [[peers]], with two brackets",
    ),
    "two brackets, then one": (
        '[[peers]]\nname = "a"\n[peers]\nname = "b"',
        "line 3: write [[peers]], with two brackets",
    ),
    "a table of one with two brackets": ("[[node]]\nport = 1", "node: there is only one: write [node]"),
    "a table of one with one bracket, then two": (
        "[node]\nport = 1\n[[node]]\nport = 2",
        "line 3: write [node], with one bracket",
    ),
    "one word where a list belongs": (
        '[pipeline]\ndistricts = "builtin"',
        "[pipeline].districts = 'builtin': write a list, in brackets: [...]",
    ),
    "a table that is a number": ("peers = 3", "peers = 3: there may be several: write [[peers]]"),
    "a device that is none": ('[pipeline]\ndevice = "gpu"', "one of auto, cpu, cuda, cuda:N"),
    "an unknown encoding": (
        '[[peers]]\nname = "a"\nae_title = "A"\n[[destinations]]\nname = "d"\npeer = "a"\nencoding = "nm"',
        "[destinations.d].encoding = 'nm'",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_wrong_file_is_refused_with_the_key_the_value_and_the_rule(case: str, tmp_path: Path) -> None:
    text, expected = CASES[case]
    path = tmp_path / "config.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert expected in str(caught.value)
    assert str(path) in str(caught.value)


def test_what_is_no_toml_for_another_reason_is_not_put_down_to_brackets(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text('[[peers]]\nname = "a"\n[node]\nport = \n', encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert "write [" not in str(caught.value)
    assert "line 4" in str(caught.value)


def test_every_fault_is_named_at_once(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text("[node]\nport = 0\nmax_associations = 0", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert len(str(caught.value).splitlines()) == 2


def test_an_empty_file_is_the_defaults_with_the_spool_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text("", encoding="utf-8")
    config = load_config(path)
    assert config.storage.root == tmp_path / "spool"
    assert config.node == Config().node


def test_relative_paths_are_taken_from_the_files_folder(tmp_path: Path) -> None:
    (tmp_path / "models" / "site").mkdir(parents=True)
    path = tmp_path / "config.toml"
    path.write_text(
        '[pipeline]\nbundle = "models/site"\n[storage]\nroot = "s"\ndatabase_url = "sqlite:///l.sqlite"',
        encoding="utf-8",
    )
    config = load_config(path)
    assert config.pipeline.bundle == str(tmp_path / "models" / "site")
    assert config.storage.root == tmp_path / "s"
    assert config.ledger_url == f"sqlite:///{tmp_path}/l.sqlite"


@pytest.mark.parametrize("url", ["sqlite:////var/lib/l.sqlite", "postgresql+psycopg://node@db/ledger"])
def test_an_absolute_database_url_and_a_shipped_bundle_stay_as_they_are(tmp_path: Path, url: str) -> None:
    path = tmp_path / "config.toml"
    path.write_text(f'[storage]\ndatabase_url = "{url}"', encoding="utf-8")
    config = load_config(path)
    assert (config.ledger_url, config.pipeline.bundle) == (url, "phantom")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "none.toml")


@pytest.mark.parametrize(
    "text",
    [
        "[metrics]\nport = 2762",  # without TLS nobody listens there
        '[node]\nhost = "10.0.0.5"\n[metrics]\nport = 11112',  # on another address
        '[node]\nport = 2762\n[tls]\ncert_file = "a.pem"\nclient_certificates = "none"',  # nothing but TLS
    ],
)
def test_the_same_port_is_no_fault_where_it_is_not_the_same_place(text: str, tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(text, encoding="utf-8")
    load_config(path)
