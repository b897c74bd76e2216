"""A recipe: everything that decides what preparation and training do. Read from `training/recipes/<name>.toml`."""

from __future__ import annotations

import hashlib
import json
import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.bundle import INPUT_CHANNELS, NETWORK_KEYS, InputMask, Normalization
from pipeline.errors import listed
from pipeline.networks import NetworkSpec

RECIPES = Path(__file__).parent / "recipes"
ModelName = Literal["pix2pix", "cyclegan"]
MODELS: tuple[ModelName, ...] = ("pix2pix", "cyclegan")


class RecipeError(Exception):
    """A recipe does not exist or says something that cannot be done."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PrepareRecipe(_Frozen):
    """How a study becomes volumes on one grid.

    Without `spacing_mm` the grid is the PET's own (the paper), and a study whose PET has another spacing than the
    first one's is refused: a bundle has one spacing. With it, CT and PET are both resampled to that spacing.
    `districts` are tried in turn: "given" is a label file or SEG beside the study, the others are segmenters of
    the pipeline.
    """

    spacing_mm: tuple[float, float, float] | None = None  # (z, y, x)
    registration: bool = True
    max_shift_mm: float = Field(default=15.0, gt=0)
    max_rotation_deg: float = Field(default=5.0, gt=0)
    districts: tuple[str, ...] = ("given", "builtin")


class SplitRecipe(_Frozen):
    """Shares of training, validation and test; every patient (or study) is on one side only."""

    unit: Literal["patient", "study"] = "patient"
    shares: tuple[float, float, float] = (0.7, 0.1, 0.2)
    seed: int = 0

    @model_validator(mode="after")
    def _sums_to_one(self) -> SplitRecipe:
        if abs(sum(self.shares) - 1) > 1e-6 or min(self.shares) < 0:
            raise ValueError(f"split shares {self.shares} must be at least 0 and sum to 1")
        return self


class ModelRecipe(_Frozen):
    """Generator and discriminator sizes."""

    pix2pix: NetworkSpec
    cyclegan: NetworkSpec
    discriminator_width: int = Field(default=64, ge=1)
    discriminator_layers: int = Field(default=2, ge=1)

    def generator(self, model: ModelName) -> NetworkSpec:
        """The spec of one model's generator."""
        return self.pix2pix if model == "pix2pix" else self.cyclegan


class AugmentRecipe(_Frozen):
    """Rotation and flips act on CT and PET alike, noise on the CT only (in units of the scaled CT)."""

    rotation_deg: float = Field(default=0.0, ge=0, le=45)
    flips: bool = False
    ct_noise: float = Field(default=0.0, ge=0)


class CycleRecipe(_Frozen):
    """What only CycleGAN has. `adversarial_weight` scales the LSGAN terms of both generators."""

    lambda_cycle: float = Field(default=10.0, ge=0)
    lambda_identity: float = Field(default=0.0, ge=0)  # of lambda_cycle, as in the CycleGAN paper
    pool: int = Field(default=50, ge=0)
    adversarial_weight: float = Field(default=1.0, ge=0)


class ValidationRecipe(_Frozen):
    """Whole-volume inference on validation studies, every so many steps. `patience` checks without a gain end it."""

    every_steps: int = Field(default=0, ge=0)  # 0: never
    studies: int = Field(default=4, ge=1)
    patience: int = Field(default=0, ge=0)  # 0: no early stop


class TrainRecipe(_Frozen):
    """The optimization. The length is `steps[model][network]`, or the paper's epochs times patches per volume."""

    batch: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    discriminator_learning_rate: float = Field(gt=0)
    betas: tuple[float, float] = (0.5, 0.999)
    clip_norm: float = Field(default=5.0, gt=0)
    lambda_l1: float = Field(default=100.0, ge=0)
    adversarial_weight: float = Field(default=1.0, ge=0)
    decay_fraction: float = Field(default=1 / 3, ge=0, le=1)  # of the run, at its end: linear to 0
    steps: dict[ModelName, dict[str, int]] = {}
    epochs: int = Field(default=0, ge=0)
    patches_per_volume: int = Field(default=64, ge=1)
    ema_decay: float = Field(default=0.0, ge=0, lt=1)
    neighbor_weight: float = Field(default=0.5, ge=0, le=1)  # L1 weight of body voxels outside the district
    lesion_weight: float = Field(default=1.0, ge=1)  # L1 weight of lesion voxels
    lesion_share: float = Field(default=0.0, ge=0, le=1)  # share of patches placed on a lesion
    precision: Literal["fp32", "bf16", "auto"] = "fp32"  # auto: bf16 where the GPU has it
    compile: bool = False  # torch.compile, on a GPU only

    def steps_for(self, model: ModelName, key: str, studies: int) -> int:
        """Optimizer steps for one network trained on so many studies."""
        if key in self.steps.get(model, {}):
            return self.steps[model][key]
        return self.epochs * studies * self.patches_per_volume // self.batch


class InferenceRecipe(_Frozen):
    """Written to the manifest, whose limits these are: how the trained networks are to be applied."""

    overlap: int = Field(default=16, ge=0)
    blending: Literal["mean", "gaussian"] = "gaussian"
    stitching: Literal["hard", "feathered"] = "feathered"
    feather_mm: float = Field(default=8.0, ge=0, le=100)
    input_mask: InputMask = "body"


class Recipe(_Frozen):
    """A whole recipe."""

    name: str = Field(min_length=1, max_length=64)
    version: str = Field(min_length=1, max_length=64)
    profile: Literal["robust", "paper"]
    seed: int = 0
    licence: str
    statement: str
    networks: tuple[str, ...] = NETWORK_KEYS
    normalization: Normalization = Normalization()
    prepare: PrepareRecipe = PrepareRecipe()
    split: SplitRecipe = SplitRecipe()
    model: ModelRecipe
    augment: AugmentRecipe = AugmentRecipe()
    train: TrainRecipe
    cycle: CycleRecipe = CycleRecipe()
    validation: ValidationRecipe = ValidationRecipe()
    inference: InferenceRecipe = InferenceRecipe()

    @model_validator(mode="after")
    def _parts_fit(self) -> Recipe:
        unknown = sorted(set(self.networks) - set(NETWORK_KEYS))
        if unknown or not self.networks:
            raise ValueError(f"networks {unknown} are not among {list(NETWORK_KEYS)}")
        channels = INPUT_CHANNELS[self.inference.input_mask]
        for model in MODELS:
            spec = self.model.generator(model)
            if spec.in_channels != channels:
                text = f"model.{model}.in_channels is {spec.in_channels}, input_mask {self.inference.input_mask!r}"
                raise ValueError(f"{text} needs {channels}")
            if spec.window != self.model.pix2pix.window:
                raise ValueError(f"model.{model}.window {spec.window} is not pix2pix's {self.model.pix2pix.window}")
        if self.inference.overlap >= self.window:
            raise ValueError(f"inference.overlap {self.inference.overlap} must be below the window {self.window}")
        if self.inference.input_mask == "district" and self.inference.stitching == "feathered":
            raise ValueError("inference.input_mask 'district' needs stitching 'hard': it sees air beyond its border")
        return self

    @property
    def window(self) -> int:
        """Side of a window in voxels, in training and inference."""
        return self.model.pix2pix.window

    @property
    def prepare_digest(self) -> str:
        """SHA-256 of what decides the prepared volumes and the split."""
        return _digest(self.model_dump(mode="json", include={"normalization", "prepare", "split"}))

    def training_digest(self, model: ModelName, key: str) -> str:
        """SHA-256 of what decides one network's weights: a checkpoint made with anything else is not resumed.

        What only another network or the other model reads (its steps, its size) is left out, and so is how often
        is validated unless validation may end the training.
        """
        parts = self.model_dump(mode="json", include={"normalization", "prepare", "split", "augment"})
        train = self.train.model_dump(mode="json", exclude={"steps", "compile"})
        steps = self.train.steps.get(model, {}).get(key)
        sizes = {"width": self.model.discriminator_width, "layers": self.model.discriminator_layers}
        parts |= {
            "train": train | {"steps": steps},
            "generator": self.model.generator(model).model_dump(mode="json"),
            "discriminator": sizes,
            "cycle": self.cycle.model_dump(mode="json") if model == "cyclegan" else None,
            "validation": self.validation.model_dump(mode="json") if self.validation.patience else None,
            "input_mask": self.inference.input_mask,
            "model": model,
            "network": key,
        }
        return _digest(parts)


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the product, by name."""
    return {path.stem: path for path in sorted(RECIPES.glob("*.toml"))}


def load_recipe(name_or_path: str) -> Recipe:
    """A shipped recipe by name ("phantom", "paper", "robust"), or a TOML file.

    Raises:
        RecipeError: there is none, or a key is unknown or out of range; the text names it.
    """
    shipped = shipped_recipes()
    path = shipped.get(name_or_path) or Path(name_or_path)
    try:
        with path.open("rb") as file:
            content = tomllib.load(file)
    except OSError as error:
        raise RecipeError(f"recipe {name_or_path!r}: neither one of {sorted(shipped)} nor a readable file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {path.name}: not TOML: {error}") from error
    return parse_recipe(content, path.name)


def parse_recipe(content: dict[str, Any], name: str) -> Recipe:
    """A recipe from its parsed TOML; raises RecipeError that names the keys at fault."""
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise RecipeError(f"recipe {name}: {listed(error, 5)}") from error
