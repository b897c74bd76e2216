"""A recipe: everything that decides what a training run does. Read from `training/recipes/<name>.toml`."""

from __future__ import annotations

import hashlib
import tomllib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.bundle import NETWORK_KEYS, Normalization
from pipeline.networks import NetworkSpec

RECIPES = Path(__file__).parent / "recipes"


class RecipeError(Exception):
    """A recipe does not exist or says something that cannot be done."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DataRecipe(_Frozen):
    """Where the cases come from. Phantoms are seeded from `first_seed` on: training, then held out for the test."""

    source: Literal["phantom", "patients"]
    train_cases: int = Field(default=0, ge=0)
    test_cases: int = Field(default=0, ge=0)
    first_seed: int = 1000
    first_test_seed: int = 900_000
    max_lesions: int = Field(default=8, ge=0)
    spacing_mm: tuple[float, float, float] = (4.0, 4.0, 4.0)
    split_unit: Literal["patient", "study"] = "patient"
    split: tuple[float, float, float] = (0.7, 0.1, 0.2)


class ModelRecipe(_Frozen):
    """Generator and discriminator sizes."""

    generator: NetworkSpec
    discriminator_width: int = Field(default=64, ge=1)
    discriminator_layers: int = Field(default=2, ge=1)


class AugmentRecipe(_Frozen):
    """Rotation and flips act on CT and PET alike, noise on the CT only (in units of the scaled CT)."""

    rotation_deg: float = Field(default=0.0, ge=0, le=45)
    flips: bool = False
    ct_noise: float = Field(default=0.0, ge=0)


class TrainRecipe(_Frozen):
    """The optimization. The length is `steps`, or the paper's epochs times patches per volume."""

    batch: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    discriminator_learning_rate: float = Field(gt=0)
    betas: tuple[float, float] = (0.5, 0.999)
    clip_norm: float = Field(default=5.0, gt=0)
    lambda_l1: float = Field(default=100.0, ge=0)
    adversarial_weight: float = Field(default=1.0, ge=0)
    decay_fraction: float = Field(default=1 / 3, ge=0, le=1)  # of the run, at its end: linear to 0
    steps: dict[str, int] = {}
    epochs: int = Field(default=0, ge=0)
    patches_per_volume: int = Field(default=64, ge=1)
    ema_decay: float = Field(default=0.0, ge=0, lt=1)
    neighbor_weight: float = Field(default=0.5, ge=0, le=1)  # L1 weight of body voxels outside the district
    lesion_weight: float = Field(default=1.0, ge=1)  # L1 weight of lesion voxels
    lesion_share: float = Field(default=0.0, ge=0, le=1)  # share of patches placed on a lesion
    precision: Literal["fp32", "bf16"] = "fp32"

    def steps_for(self, key: str, cases: int) -> int:
        """Optimizer steps for one network."""
        if key in self.steps:
            return self.steps[key]
        return self.epochs * cases * self.patches_per_volume // self.batch


class InferenceRecipe(_Frozen):
    """Written to the manifest: how the trained networks are to be applied."""

    overlap: int = 16
    blending: Literal["mean", "gaussian"] = "gaussian"
    stitching: Literal["hard", "feathered"] = "feathered"
    feather_mm: float = 8.0
    input_mask: Literal["body", "district"] = "body"


class Recipe(_Frozen):
    """A whole recipe."""

    name: str
    version: str
    profile: Literal["robust", "paper"]
    seed: int = 0
    licence: str
    statement: str
    networks: tuple[str, ...] = NETWORK_KEYS
    normalization: Normalization = Normalization()
    data: DataRecipe
    model: ModelRecipe
    augment: AugmentRecipe
    train: TrainRecipe
    inference: InferenceRecipe

    @property
    def training_digest(self) -> str:
        """SHA-256 of what decides the weights: a checkpoint made with anything else is not resumed."""
        parts = {"data", "model", "augment", "train", "normalization"}
        chosen = self.model_dump_json(include=parts) + self.inference.input_mask
        return hashlib.sha256(chosen.encode()).hexdigest()


def load_recipe(name_or_path: str) -> Recipe:
    """A shipped recipe by name ("phantom", "paper"), or a TOML file.

    Raises:
        RecipeError: there is none, or a key is unknown or out of range; the text names it.
    """
    shipped = {path.stem: path for path in RECIPES.glob("*.toml")}
    path = shipped.get(name_or_path) or Path(name_or_path)
    try:
        with path.open("rb") as file:
            return Recipe.model_validate(tomllib.load(file))
    except OSError as error:
        raise RecipeError(f"recipe {name_or_path!r}: neither one of {sorted(shipped)} nor a readable file") from error
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"recipe {path.name}: not TOML: {error}") from error
    except ValidationError as error:
        lines = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:5])
        raise RecipeError(f"recipe {path.name}: {lines}") from error
