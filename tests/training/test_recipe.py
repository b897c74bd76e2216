"""A recipe that no bundle can be made of is refused before anything is trained by it."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_prepared import tiny_recipe

from training.recipe import RecipeError, load_recipe, shipped_recipes


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_every_shipped_recipe_is_one(name: str) -> None:
    assert load_recipe(name).name == name


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"inference": {"overlap": -1}}, r"inference\.overlap"),
        ({"inference": {"overlap": 16}}, r"overlap 16 must be below the window 16"),
        ({"inference": {"feather_mm": -1.0}}, r"inference\.feather_mm"),
        ({"inference": {"feather_mm": 101.0}}, r"inference\.feather_mm"),
        ({"inference": {"input_mask": "district"}}, "needs stitching 'hard'"),
        ({"inference": {"input_mask": "channel"}}, "in_channels is 1"),
        ({"version": ""}, "version"),
        ({"name": "n" * 65}, "name"),
        ({"networks": ["neck"]}, r"\['neck'\] are not among"),
        ({"train": {"batchsize": 4}}, r"train\.batchsize"),
    ],
)
def test_what_no_bundle_can_be_made_of_is_refused_by_name(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        tiny_recipe(**changes)
