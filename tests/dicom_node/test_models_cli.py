"""`dicom-node models`: a bundle is installed whole, found by name, and a broken one does not hide the others."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

import pytest
from click.testing import Result
from tiny_bundle import write_tiny_bundle
from typer.testing import CliRunner

from dicom_node.cli import app
from dicom_node.config import load_config
from dicom_node.worker import pipeline_options
from pipeline.bundle import CARD, MANIFEST

RUNNER = CliRunner()


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "site" / "config.toml"
    path.parent.mkdir()
    path.write_text('[pipeline]\ndevice = "cpu"\n', encoding="utf-8")
    return path


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return add_card(write_tiny_bundle(tmp_path / "exported"), "# tiny\nfor tests \x1b[31monly\n")


def add_card(folder: Path, text: str) -> Path:
    (folder / CARD).write_text(text)
    return change(folder, files={CARD: sha256(text.encode()).hexdigest()})


def change(folder: Path, **changes: object) -> Path:
    content = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(content | changes))
    return folder


def models(*words: object) -> Result:
    return RUNNER.invoke(app, ["models", *map(str, words)], env={"COLUMNS": "250"})


def said(result: Result) -> str:
    return " ".join((result.output + result.stderr).split())


def test_an_installed_bundle_is_listed_verified_and_found_by_name(config: Path, bundle: Path) -> None:
    done = models("install", bundle, "--config", config)
    assert done.exit_code == 0, done.output
    assert (config.parent / "bundles" / "tiny" / MANIFEST).is_file()
    rows = {row["name"]: row for row in json.loads(models("list", "--config", config, "--json").stdout)}
    assert rows["phantom"]["where"] == "shipped"
    assert rows["tiny"]["where"].startswith("installed: ")
    assert rows["tiny"]["licence"] == "Apache-2.0"
    assert models("verify", "tiny", "--config", config).exit_code == 0
    config.write_text('[pipeline]\nbundle = "tiny"\nshadow = "tiny"\n', encoding="utf-8")
    options = pipeline_options(load_config(config))
    assert (options.bundle, options.shadow) == (Path("tiny"), Path("tiny"))
    assert options.bundles == (config.parent / "bundles",)


def test_the_folder_of_installed_bundles_is_the_configuration_s(config: Path, bundle: Path) -> None:
    config.write_text('[pipeline]\nbundles = "elsewhere/models"\n', encoding="utf-8")
    assert models("install", bundle, "--config", config).exit_code == 0
    assert (config.parent / "elsewhere" / "models" / "tiny" / MANIFEST).is_file()


def test_another_bundle_of_that_name_needs_replace(config: Path, bundle: Path) -> None:
    models("install", bundle, "--config", config)
    change(bundle, version="2")
    refused = models("install", bundle, "--config", config)
    assert (refused.exit_code, "--replace" in said(refused)) == (1, True)
    assert models("install", bundle, "--config", config, "--replace").exit_code == 0
    rows = json.loads(models("list", "--config", config, "--json").stdout)
    assert [row["version"] for row in rows if row["name"] == "tiny"] == ["2"]


def test_a_bundle_with_one_byte_changed_is_not_installed(config: Path, bundle: Path) -> None:
    weights = bundle / "head.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x07")
    refused = models("install", bundle, "--config", config)
    assert (refused.exit_code, "weights_altered" in said(refused)) == (1, True)
    assert not (config.parent / "bundles").exists()


def test_a_name_that_leads_out_of_the_folder_is_refused(config: Path, bundle: Path) -> None:
    change(bundle, name="../../evil")
    refused = models("install", bundle, "--config", config)
    assert (refused.exit_code, "bundle_name" in said(refused)) == (1, True)


def test_a_broken_bundle_is_shown_with_its_reason_beside_the_others(config: Path, bundle: Path) -> None:
    models("install", bundle, "--config", config)
    broken = write_tiny_bundle(config.parent / "bundles" / "broken")
    (broken / "legs.safetensors").unlink()
    shown = models("list", "--config", config)
    assert shown.exit_code == 0
    text = said(shown)
    assert "BROKEN: weights_missing" in text
    assert "phantom" in text
    assert "random weights, for tests only" in text


def test_the_card_is_printed_without_control_characters(config: Path, bundle: Path) -> None:
    models("install", bundle, "--config", config)
    assert models("card", "tiny", "--config", config).stdout == "# tiny\nfor tests [31monly\n"
    (config.parent / "bundles" / "tiny" / CARD).write_text("other")
    refused = models("card", "tiny", "--config", config)
    assert (refused.exit_code, "file_altered" in said(refused)) == (1, True)


def test_a_bundle_without_a_card_says_so(config: Path, tmp_path: Path) -> None:
    refused = models("card", write_tiny_bundle(tmp_path / "plain"), "--config", config)
    assert (refused.exit_code, "has no model card" in said(refused)) == (1, True)


def test_without_a_configuration_the_shipped_bundles_are_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "phantom" in models("list").output


def test_check_finds_a_shadow_that_is_not_there(config: Path) -> None:
    config.write_text('[pipeline]\nshadow = "gone"\n[intake]\nmin_free_bytes = 1\n', encoding="utf-8")
    result = RUNNER.invoke(app, ["check", "--json", "--config", str(config)])
    found = {row["check"]: row for row in json.loads(result.stdout)}
    assert found["shadow"]["verdict"] == "FAIL"
    assert "bundle_missing" in found["shadow"]["text"]
    assert result.exit_code == 1
