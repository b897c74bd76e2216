"""The documents name every command, every key and every state: a new one without its words fails here."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import typer
from pydantic import BaseModel
from typer.testing import CliRunner

from dicom_node.cli import app
from dicom_node.config import Config, RuleConfig, ScheduledPull, load_config
from storage.records import DeliveryState, JobState

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONFIG_TEXT = (ROOT / "config.toml").read_text(encoding="utf-8")
DOCS = README + "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").rglob("*.md")))


def commands() -> list[str]:
    root = typer.main.get_command(app)
    names = []
    for name, command in sorted(root.commands.items()):  # type: ignore[attr-defined]
        inner = getattr(command, "commands", None)
        names += [f"{name} {sub}" for sub in sorted(inner)] if inner else [name]
    return names


@pytest.mark.parametrize("command", commands())
def test_the_readme_names_the_command(command: str) -> None:
    assert re.search(rf"dicom-node {command}\b", README), f"README.md does not show `dicom-node {command}`"


@pytest.mark.parametrize("command", commands())
def test_the_command_has_help(command: str) -> None:
    root = typer.main.get_command(app)
    for part in command.split():
        root = root.commands[part]  # type: ignore[attr-defined]
    assert root.help
    for parameter in root.params:
        assert getattr(parameter, "help", None), f"{command}: {parameter.name} has no help"


@pytest.mark.parametrize("command", ["", *sorted({name.split()[0] for name in commands()} | set(commands()))])
def test_the_help_shows_every_word_in_brackets(command: str) -> None:
    """Rich takes `[table]` for markup and drops it, unless a backslash stands before it."""
    root = typer.main.get_command(app)
    for part in command.split():
        root = root.commands[part]  # type: ignore[attr-defined]
    texts = [root.help, *(getattr(parameter, "help", None) for parameter in root.params)]
    written = [word for text in texts for word in re.findall(r"[^\s]*\[[^\s]+", text or "")]
    shown = CliRunner().invoke(app, [*command.split(), "--help"], env={"COLUMNS": "400"}).output
    missing = [word for word in written if word.replace("\\", "") not in shown]
    assert not missing, f"dicom-node {command} --help lacks {missing}: write a backslash before each bracket"


def keys() -> list[tuple[str, str]]:
    found = []
    for table, field in Config.model_fields.items():
        model = getattr(field.annotation, "__args__", (field.annotation,))[0]
        assert issubclass(model, BaseModel)
        found += [(table, key) for key in model.model_fields]
    return found


@pytest.mark.parametrize(("table", "key"), keys())
def test_config_toml_has_and_explains_the_key(table: str, key: str) -> None:
    body = re.split(rf"^(?:# )?\[+{table}\]+", CONFIG_TEXT, flags=re.MULTILINE)[1]
    body = re.split(r"^(?:# )?\[", body, flags=re.MULTILINE)[0]
    line = next((one for one in body.splitlines() if re.match(rf"(?:# )?{key} *=", one)), None)
    assert line is not None, f"config.toml: [{table}] has no {key}"
    if table != "rules":  # conditions are explained once, at the first
        assert "#" in line.partition("=")[2], f"config.toml: [{table}] {key} has no comment"


def test_config_toml_shows_the_defaults() -> None:
    shown, default = load_config(ROOT / "config.toml"), Config()
    for table in ("node", "tls", "intake", "selection", "pipeline", "gate", "output", "engine", "log", "metrics"):
        paths = {"bundles": default.pipeline.bundles} if table == "pipeline" else {}  # relative to the file
        assert getattr(shown, table).model_copy(update=paths) == getattr(default, table), table
    raw = tomllib.loads(CONFIG_TEXT)
    assert raw["pipeline"]["bundles"] == str(default.pipeline.bundles)
    assert raw["storage"] == {
        key: str(value) if key == "root" else value for key, value in default.storage.model_dump().items()
    }


def test_the_commented_pull_is_a_pull_with_the_defaults() -> None:
    lines = CONFIG_TEXT[CONFIG_TEXT.index("# [[pulls]]") :].split("\n\n")[0].splitlines()
    [pull] = tomllib.loads("\n".join(line.removeprefix("# ") for line in lines))["pulls"]
    assert ScheduledPull.model_validate(pull) == ScheduledPull(name="missed", peer="pacs")
    assert pull.keys() == ScheduledPull.model_fields.keys()


def test_the_commented_rule_is_a_rule() -> None:
    block = CONFIG_TEXT[CONFIG_TEXT.index("# [[rules]]") : CONFIG_TEXT.index("\n[selection]")]
    text = "\n".join(line.removeprefix("# ") for line in block.splitlines())
    RuleConfig.model_validate(tomllib.loads(text)["rules"][0])


@pytest.mark.parametrize("state", [*JobState, *DeliveryState])
def test_the_documents_explain_the_state(state: str) -> None:
    assert f"`{state}`" in DOCS


def codes_of_the_pipeline() -> list[str]:
    """The first argument of every `raise UnsupportedSeries("code", …)` and its like in the pipeline's source."""
    source = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "pipeline").rglob("*.py")))
    errors = "UnsupportedSeries|DistrictError|GateRefusal|BundleError|OutputError|DeviceError"
    return sorted(set(re.findall(rf'(?:{errors})\(\s*"([a-z_]+)"', source)))


@pytest.mark.parametrize("code", codes_of_the_pipeline())
def test_the_documents_explain_the_reason_code(code: str) -> None:
    assert f"`{code}`" in DOCS, f"docs/operation.md does not explain {code}"


def test_every_link_to_a_file_of_ours_leads_somewhere() -> None:
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (path.parent / target).exists(), f"{path.name}: {target}"
