"""From `[pipeline]` to the options that segmenters get, and what docs/districts.md must say of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest

from dicom_node.config import Config, ConfigError, PipelineConfig, load_config
from dicom_node.worker import pipeline_options
from pipeline.districts import SEGMENTERS
from pipeline.types import DistrictOptions

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs" / "districts.md").read_text(encoding="utf-8")


def test_every_segmenter_can_be_configured_and_is_documented() -> None:
    (choice, _) = get_args(PipelineConfig.model_fields["districts"].annotation)
    assert set(get_args(choice)) == set(SEGMENTERS)
    assert [name for name in SEGMENTERS if f"| `{name}` |" not in DOCS] == []


def test_every_code_of_an_outside_segmenter_is_documented() -> None:
    sources = (ROOT / "pipeline" / "districts").glob("*.py")
    codes = {
        code for path in sources for code in re.findall(r'"(segmenter_[a-z_]+)"', path.read_text(encoding="utf-8"))
    }
    codes -= {"segmenter_timeout_s"}
    assert len(codes) == 10
    assert sorted(code for code in codes if f"| `{code}` |" not in DOCS) == []


def test_without_a_word_the_built_in_segmenter_runs_alone() -> None:
    assert pipeline_options(Config()).districts == DistrictOptions()


def test_the_chain_and_its_settings_reach_the_segmenters(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(
        '[pipeline]\ndistricts = ["nnunet_folder", "totalsegmentator", "builtin"]\nnnunet_folder = "models/body"\n'
        'totalsegmentator_weights = "/srv/weights"\nsegmenter_timeout_s = 20.0\ndevice = "cpu"\nthreads = 3\n',
        encoding="utf-8",
    )
    assert pipeline_options(load_config(file)).districts == DistrictOptions(
        chain=("nnunet_folder", "totalsegmentator", "builtin"),
        nnunet_folder=tmp_path / "models" / "body",  # from the configuration's folder
        totalsegmentator_weights=Path("/srv/weights"),
        timeout_s=20.0,
        device="cpu",
        threads=3,
    )


@pytest.mark.parametrize("line", ['districts = ["moose"]', "segmenter_timeout_s = 0.0", "nnunet_folder = 3"])
def test_a_wrong_value_is_refused_by_its_key(tmp_path: Path, line: str) -> None:
    file = tmp_path / "config.toml"
    file.write_text(f"[pipeline]\n{line}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=line.split(" ")[0]):
        load_config(file)
