from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.bundle import load_bundle
from pipeline.networks import NetworkSpec
from training.build import BuildProgress, build_bundle, prepare_cases
from training.cases import Case, case_of, load_cases, save_case
from training.loop import learning_rate_factor, train_network
from training.patches import PatchSampler, augment, cut
from training.phantom import PhantomSpec, make_phantom
from training.pix2pix import Pix2Pix
from training.recipe import AugmentRecipe, Recipe, RecipeError, load_recipe

CPU = torch.device("cpu")


def tiny_recipe() -> Recipe:
    recipe = load_recipe("phantom")
    small = recipe.model.model_copy(update={"generator": NetworkSpec(width=2), "discriminator_width": 2})
    train = recipe.train.model_copy(update={"batch": 2})
    data = recipe.data.model_copy(update={"train_cases": 1, "test_cases": 1, "spacing_mm": (16.0, 16.0, 16.0)})
    return recipe.model_copy(update={"model": small, "train": train, "data": data})


@pytest.fixture(scope="module")
def case() -> Case:
    spec = PhantomSpec(seed=1, spacing_mm=(10.0, 10.0, 10.0), coverage=(0.0, 1.02), lesions=6)
    return case_of(make_phantom(spec), tiny_recipe().normalization)


def outputs(network: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = network(torch.linspace(0, 1, 32**3).view(1, 1, 32, 32, 32))
    return result


def test_two_steps_are_the_same_twice_and_differ_with_the_seed(case: Case) -> None:
    recipe = tiny_recipe()
    first, again, other = (
        train_network("trunk", [case], recipe, steps=2, device=CPU, seed=seed).network for seed in (0, 0, 1)
    )
    assert torch.equal(outputs(first), outputs(again))
    assert not torch.equal(outputs(first), outputs(other))


def test_an_interrupted_training_goes_on_as_if_it_had_not_been(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe()
    whole = train_network("head", [case], recipe, steps=4, device=CPU, seed=0)
    monkeypatch.setattr("training.loop.CHECKPOINT_EVERY", 2)
    real_step, calls = Pix2Pix.step, []

    def dies_at_the_third(self: Pix2Pix, *args: object) -> object:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real_step(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Pix2Pix, "step", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        train_network("head", [case], recipe, steps=4, device=CPU, seed=0, run_dir=tmp_path)
    resumed = train_network("head", [case], recipe, steps=4, device=CPU, seed=0, run_dir=tmp_path)
    assert len(calls) == 5  # two, the one that died, and only two more
    assert torch.equal(outputs(whole.network), outputs(resumed.network))


def test_a_checkpoint_of_another_recipe_is_not_resumed(case: Case, tmp_path: Path) -> None:
    recipe = tiny_recipe()
    train_network("legs", [case], recipe, steps=1, device=CPU, seed=0, run_dir=tmp_path)
    changed = recipe.model_copy(update={"train": recipe.train.model_copy(update={"lambda_l1": 1.0})})
    resumed = train_network("legs", [case], changed, steps=1, device=CPU, seed=0, run_dir=tmp_path)
    fresh = train_network("legs", [case], changed, steps=1, device=CPU, seed=0)
    assert torch.equal(outputs(resumed.network), outputs(fresh.network))


def test_training_lowers_the_loss(case: Case) -> None:
    recipe = tiny_recipe()
    seen: list[float] = []
    train_network("head", [case], recipe, steps=50, device=CPU, seed=0, on_progress=lambda p: seen.append(p.l1))
    assert seen[-1] < 0.9 * seen[0]


def test_patches_lie_in_their_district_and_weigh_it_fully(case: Case) -> None:
    sampler = PatchSampler([case], "head", window=16, neighbor_weight=0.5, lesion_share=0.0)
    batch = sampler.draw(8, np.random.default_rng(0))
    assert batch.ct.shape == batch.pet.shape == batch.weight.shape == (8, 1, 16, 16, 16)
    assert ((batch.weight == 1).sum(dim=(1, 2, 3, 4)) > 0).all()
    assert set(batch.weight.unique().tolist()) <= {0.0, 0.5, 1.0}
    assert (batch.ct[batch.weight == 0] == 0).all()  # table and air are masked after scaling: 0 is air
    assert (batch.ct[batch.weight == 1] > 0).float().mean() > 0.9


def test_the_papers_mask_hides_the_neighbors(case: Case) -> None:
    sampler = PatchSampler([case], "head", window=16, neighbor_weight=0.5, lesion_share=0.0, district_input=True)
    batch = sampler.draw(8, np.random.default_rng(0))
    assert (batch.ct[batch.weight < 1] == 0).all()


def test_lesions_can_be_aimed_at(case: Case) -> None:
    sampler = PatchSampler([case], "whole_body", window=16, neighbor_weight=0.5, lesion_share=1.0)
    aimed = sampler.draw(12, np.random.default_rng(0)).pet.amax(dim=(1, 2, 3, 4)).mean()
    plain = PatchSampler([case], "legs", window=16, neighbor_weight=0.0, lesion_share=0.0)
    assert aimed > plain.draw(12, np.random.default_rng(0)).pet.amax(dim=(1, 2, 3, 4)).mean()


def test_lesions_can_weigh_more_than_the_district_around_them(case: Case) -> None:
    sampler = PatchSampler([case], "whole_body", window=16, neighbor_weight=0.5, lesion_share=1.0, lesion_weight=4.0)
    batch = sampler.draw(4, np.random.default_rng(0))
    assert set(batch.weight.unique().tolist()) <= {0.0, 1.0, 4.0}
    assert (batch.weight == 4).any()


def test_a_district_that_no_case_shows_is_an_error(case: Case) -> None:
    headless = Case(name="x", ct=case.ct, pet=case.pet, lesions=case.lesions, districts=np.minimum(case.districts, 0))
    with pytest.raises(ValueError, match="head"):
        PatchSampler([headless], "head", window=16, neighbor_weight=0.5, lesion_share=0.0)


def test_a_cut_beyond_the_volume_is_air() -> None:
    volume = np.arange(1, 9).reshape(2, 2, 2)
    cube = cut(volume, (-1, -1, -1), 4)
    assert np.array_equal(cube[1:3, 1:3, 1:3], volume)
    assert cube.sum() == volume.sum()
    assert cut(volume, (5, 0, 0), 4).sum() == 0


def test_ct_and_pet_are_turned_together_and_noise_is_on_the_ct_only(case: Case) -> None:
    batch = PatchSampler([case], "trunk", window=16, neighbor_weight=1.0, lesion_share=0.0).draw(
        2, np.random.default_rng(0)
    )
    twins = type(batch)(batch.ct, batch.ct, batch.weight)
    turned = augment(twins, AugmentRecipe(rotation_deg=10, flips=True), np.random.default_rng(1))
    assert torch.equal(turned.ct, turned.pet)
    assert not torch.equal(turned.ct, batch.ct)
    noisy = augment(batch, AugmentRecipe(ct_noise=0.01), np.random.default_rng(1))
    assert torch.equal(noisy.pet, batch.pet)
    assert 0 < (noisy.ct - batch.ct).abs().max() < 0.06
    assert (noisy.ct[batch.ct == 0] == 0).all()
    untouched = augment(batch, AugmentRecipe(), np.random.default_rng(1))
    assert torch.equal(untouched.ct, batch.ct)


def test_the_learning_rate_falls_to_zero_over_the_last_part() -> None:
    factors = [learning_rate_factor(step, 150, 1 / 3) for step in (0, 99, 100, 125, 150)]
    assert factors == pytest.approx([1, 1, 1, 0.5, 0])
    assert learning_rate_factor(7, 10, 0.0) == 1


def test_cases_are_the_same_after_the_disk(case: Case, tmp_path: Path) -> None:
    save_case(case, tmp_path)
    (read,) = load_cases(tmp_path)
    assert read.name == case.name
    assert np.array_equal(read.pet, case.pet)
    assert np.array_equal(read.districts, case.districts)


def test_cases_of_another_recipe_are_not_trained_on(tmp_path: Path) -> None:
    recipe = tiny_recipe()
    two = recipe.model_copy(update={"data": recipe.data.model_copy(update={"train_cases": 2})})
    prepare_cases(two, tmp_path)
    assert len(load_cases(tmp_path)) == 2
    prepare_cases(recipe, tmp_path)
    assert len(load_cases(tmp_path)) == 1


def test_the_paper_recipe_holds_the_papers_numbers() -> None:
    recipe = load_recipe("paper")
    train, augmentation = recipe.train, recipe.augment
    assert (train.learning_rate, train.betas, train.batch, train.epochs) == (2e-4, (0.5, 0.999), 1, 150)
    assert (train.clip_norm, train.lambda_l1, train.adversarial_weight) == (5.0, 100.0, 1.0)
    assert train.decay_fraction * train.epochs == pytest.approx(50)
    assert (augmentation.rotation_deg, augmentation.flips, augmentation.ct_noise) == (10.0, True, 0.01)
    assert (recipe.inference.blending, recipe.inference.stitching, recipe.inference.overlap) == ("mean", "hard", 16)
    assert recipe.model.generator.window == 32
    assert train.steps_for("head", 710) == 150 * 710 * 64


def test_a_recipe_that_needs_patients_or_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="patient data"):
        build_bundle("paper", tmp_path)
    with pytest.raises(RecipeError, match="neither"):
        load_recipe("no-such-recipe")
    bad = tmp_path / "bad.toml"
    bad.write_text("name = 3\n")
    with pytest.raises(RecipeError, match=r"bad\.toml: "):
        load_recipe(str(bad))


def test_a_bundle_is_built_evaluated_and_reported_from_one_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(_toml())
    told: list[BuildProgress] = []
    report = build_bundle(
        str(recipe),
        tmp_path / "bundle",
        workers=1,
        steps=2,
        run_dir=tmp_path / "run",
        report_dir=tmp_path / "report",
        on_progress=told.append,
    )
    manifest = load_bundle(tmp_path / "bundle").manifest
    assert set(manifest.networks) == {"head", "trunk"}
    assert manifest.metrics == report.metrics
    assert manifest.metrics["cases"] == 1
    assert manifest.metrics["table"]["hu_lookup"]["trunk"]["mae"]["n"] == 1
    assert manifest.statistics["trunk"]["suv_mean"] > 0
    assert {p.stage for p in told} == {"cases", "train", "evaluate"}
    text = (tmp_path / "report" / "report.md").read_text()
    assert "not for clinical use" in text
    assert "HU-to-SUV look-up" in text
    assert (tmp_path / "report" / "phantom.png").stat().st_size > 1000


def _toml() -> str:
    return """
name = "tiny"
version = "1"
profile = "robust"
licence = "Apache-2.0"
statement = "Trained on computer phantoms only. Research only, not for clinical use."
networks = ["trunk", "head"]
[data]
source = "phantom"
train_cases = 1
test_cases = 1
spacing_mm = [16.0, 16.0, 16.0]
[model]
discriminator_width = 1
[model.generator]
width = 1
[augment]
[train]
batch = 1
learning_rate = 1e-3
discriminator_learning_rate = 2e-4
[inference]
"""
