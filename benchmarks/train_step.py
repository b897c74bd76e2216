"""Our Pix2Pix step and patches against a plain loop with MONAI, paired in one run: python benchmarks/train_step.py

The plain loop is what a user would write: the same networks, MONAI's PatchAdversarialLoss, Adam, clipping, and
torch's DataLoader over MONAI's random crops, turns, flips and noise of volumes held in memory. Three things are
timed on each side, in interleaved rounds: the loader alone, the step alone on one batch, and both together; the
medians of the rounds' ratios are what counts. In the plain loop's favor: it turns the patch after cutting it, so
that corners are empty (ours cuts a larger box), it reads no loss back, and it keeps no averaged weights.

On a GPU box:  python benchmarks/train_step.py --device cuda --widths 16 32 64 --steps 50 --rounds 7 --workers 8
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader, RandomSampler
from torch.utils.flop_counter import FlopCounterMode

from pipeline.bundle import Normalization
from pipeline.networks import build_network
from training.models.discriminators import PatchDiscriminator
from training.models.pix2pix import Pix2Pix
from training.patches.sampler import Batch, PatchSampler
from training.phantom import PhantomSpec, make_phantom
from training.prepared import PreparedStudy, StudyRecord
from training.recipe import AugmentRecipe, Recipe, load_recipe

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # MONAI's own deprecations
    from monai.data import Dataset, list_data_collate
    from monai.losses import PatchAdversarialLoss
    from monai.transforms import (
        Compose,
        FgBgToIndicesd,
        RandCropByPosNegLabeld,
        RandFlipd,
        RandGaussianNoised,
        RandRotated,
    )

EPOCHS, SCANS, PATCHES = 150, 710, 64  # the paper's training set; the patches per scan and epoch are ours
KEY = "whole_body"
Work = Callable[[], object]


@dataclass(frozen=True)
class Setting:
    """One line of the table."""

    recipe: Recipe
    device: torch.device
    workers: int

    @property
    def batch(self) -> int:
        return self.recipe.train.batch


def main() -> None:
    arguments = parse()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.workers} loader workers")
    rates = {precision: matrix_rate(device, precision) for precision in ("fp32", "tf32", "bf16")}
    if device.type != "cuda":
        del rates["tf32"]
    print("matrix product: " + ", ".join(f"{p} {rate / 1e12:.3g} TFLOP/s" for p, rate in rates.items()))
    with tempfile.TemporaryDirectory() as folder:
        studies = make_studies(Path(folder), arguments.studies, arguments.spacing)
        for width, batch, precision in itertools.product(arguments.widths, arguments.batches, arguments.precision):
            recipe = make_recipe(width, batch, precision, augment=not arguments.plain, compiled=arguments.compile)
            print(f"\nwidth {width}, batch {batch}, {precision}, window {recipe.window}, {describe(recipe.augment)}")
            measure(Setting(recipe, device, arguments.workers), studies, rates, arguments.rounds, arguments.steps)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="batches per round and side")
    parser.add_argument("--widths", type=int, nargs="+", default=[16], help="of generator and discriminator")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32"])
    parser.add_argument("--workers", type=int, default=0, help="processes of the plain loop's DataLoader")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of torch; 0: its own choice")
    parser.add_argument("--studies", type=int, default=2)
    parser.add_argument("--spacing", type=float, default=4.0, help="of the phantoms, mm")
    parser.add_argument("--plain", action="store_true", help="no augmentation on either side")
    parser.add_argument("--compile", action="store_true", help="torch.compile for our step (CUDA)")
    return parser.parse_args()


def make_recipe(width: int, batch: int, precision: str, *, augment: bool, compiled: bool) -> Recipe:
    """The recipe "paper" at this size, with the body as the mask, on both sides."""
    paper = load_recipe("paper")
    update = {"batch": batch, "precision": precision, "compile": compiled}
    model = {"pix2pix": paper.model.pix2pix.model_copy(update={"width": width}), "discriminator_width": width}
    return paper.model_copy(
        update={
            "train": paper.train.model_copy(update=update),
            "model": paper.model.model_copy(update=model),
            "augment": paper.augment if augment else AugmentRecipe(),
            "inference": paper.inference.model_copy(update={"input_mask": "body"}),
        }
    )


def describe(augment: AugmentRecipe) -> str:
    if augment == AugmentRecipe():
        return "not augmented"
    return f"turned up to {augment.rotation_deg:g} degrees, flipped, noise {augment.ct_noise:g}"


def make_studies(folder: Path, count: int, spacing_mm: float) -> list[PreparedStudy]:
    """Phantoms as `train prepare` leaves studies: cropped to the body, on disk, mapped."""
    studies, scale = [], Normalization()
    for seed in range(count):
        phantom = make_phantom(PhantomSpec(seed=seed, spacing_mm=(spacing_mm,) * 3, lesions=3))
        used = [np.flatnonzero(phantom.body.any(axis=other)) for other in ((1, 2), (0, 2), (0, 1))]
        box = tuple(slice(int(u[0]), int(u[-1]) + 1) for u in used)
        volumes = {
            "ct": scale.ct_to_unit(phantom.hu[box]).astype(np.float16),
            "pet": scale.suv_to_unit(phantom.suv[box]).astype(np.float16),
            "districts": phantom.districts[box],
            "lesions": (phantom.lesions[box] > 0).astype(np.uint8),
        }
        z, y, x = volumes["ct"].shape
        record = StudyRecord(
            id=f"phantom-{seed}",
            patient=str(seed),
            shape=(z, y, x),
            spacing_mm=(spacing_mm,) * 3,
            origin_mm=(0, 0, 0),
            files={},
            segmenter="given",
        )
        for name, volume in volumes.items():
            np.save(folder / f"{seed}.{name}.npy", volume)
        mapped = {name: np.load(folder / f"{seed}.{name}.npy", mmap_mode="r") for name in volumes}
        studies.append(PreparedStudy(record=record, **mapped))
    return studies


# --- the two sides


def ours(setting: Setting, studies: list[PreparedStudy]) -> dict[str, Work]:
    recipe = setting.recipe
    sampler = PatchSampler(
        studies, KEY, window=recipe.window, input_mask="body", train=recipe.train, augment=recipe.augment,
        device=setting.device,
    )  # fmt: skip
    model, count = Pix2Pix(recipe, setting.device), itertools.count()

    def load() -> Batch:
        number = next(count)
        return sampler.draw([(0, number, index) for index in range(setting.batch)])

    ready = load()
    return {
        "loader": load,
        "step": lambda: model.step(ready, 1.0, (0,)),
        "together": lambda: model.step(load(), 1.0, (0, next(count))),
    }


def plain(setting: Setting, studies: list[PreparedStudy]) -> dict[str, Work]:
    step = PlainStep(setting.recipe, setting.device)
    batches = plain_batches(setting, studies)

    def load() -> dict[str, Tensor]:
        batch = next(batches)
        return {name: batch[name].to(setting.device, non_blocking=True) for name in ("ct", "pet", "weight")}

    ready = load()
    return {"loader": load, "step": lambda: step(ready), "together": lambda: step(load())}


def plain_batches(setting: Setting, studies: list[PreparedStudy]) -> Iterator[dict[str, Tensor]]:
    """Endless batches from a DataLoader; the volumes are in memory as float32, their foreground indices computed."""
    augment, window = setting.recipe.augment, setting.recipe.window
    keys = ["ct", "pet", "weight"]
    indexed = FgBgToIndicesd(keys="weight")
    volumes = [indexed(as_user_would(study)) for study in studies]
    steps: list[object] = [
        RandCropByPosNegLabeld(
            keys=keys, label_key="weight", spatial_size=(window,) * 3, pos=1, neg=0, num_samples=1, allow_smaller=False,
            fg_indices_key="weight_fg_indices", bg_indices_key="weight_bg_indices",
        )
    ]  # fmt: skip
    if augment.rotation_deg:
        turns = (math.radians(augment.rotation_deg),) * 3
        modes = ("bilinear", "bilinear", "nearest")
        steps.append(RandRotated(keys, *turns, prob=1.0, mode=modes, padding_mode="zeros"))
    if augment.flips:
        steps += [RandFlipd(keys, prob=0.5, spatial_axis=axis) for axis in range(3)]
    if augment.ct_noise:
        steps.append(RandGaussianNoised("ct", prob=1.0, std=augment.ct_noise, sample_std=False))
    dataset = Dataset(volumes, Compose(steps))
    loader = DataLoader(
        dataset,
        batch_size=setting.batch,
        sampler=RandomSampler(dataset, replacement=True, num_samples=10**9),
        num_workers=setting.workers,
        collate_fn=list_data_collate,
        pin_memory=setting.device.type == "cuda",
        persistent_workers=setting.workers > 0,
    )
    return iter(loader)


def as_user_would(study: PreparedStudy) -> dict[str, Tensor]:
    body = torch.from_numpy(np.array(study.districts) > 0)[None].float()
    ct, pet = (torch.from_numpy(np.array(v))[None].float() * body for v in (study.ct, study.pet))
    return {"ct": ct, "pet": pet, "weight": body}


class PlainStep:
    """Pix2Pix from MONAI's parts, as its tutorials train adversarially: discriminator, then generator."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        train, model = recipe.train, recipe.model
        self.train, self.device = train, device
        self.generator = build_network(model.pix2pix).to(device)
        pair = model.pix2pix.in_channels + 1
        self.discriminator = PatchDiscriminator(pair, model.discriminator_width, model.discriminator_layers).to(device)
        rate, betas = train.learning_rate, train.betas
        self.g_optimizer = torch.optim.Adam(self.generator.parameters(), rate, betas)
        self.d_optimizer = torch.optim.Adam(self.discriminator.parameters(), rate, betas)
        self.adversarial = PatchAdversarialLoss(criterion="bce")

    def __call__(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        ct, pet, weight = batch["ct"], batch["pet"], batch["weight"]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.train.precision == "bf16"):
            fake = self.generator(ct)
            judged_fake = self.discriminator(torch.cat([ct, fake.detach().float() * weight], dim=1))
            judged_real = self.discriminator(torch.cat([ct, pet], dim=1))
        loss_d = self.adversarial(judged_fake.float(), target_is_real=False, for_discriminator=True)
        loss_d = 0.5 * (loss_d + self.adversarial(judged_real.float(), target_is_real=True, for_discriminator=True))
        self._update(self.d_optimizer, self.discriminator, loss_d)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.train.precision == "bf16"):
            judged = self.discriminator(torch.cat([ct, fake.float() * weight], dim=1))
        loss_g = self.adversarial(judged.float(), target_is_real=True, for_discriminator=False)
        loss_l1 = ((fake.float() - pet).abs() * weight).sum() / weight.sum().clamp(min=1)
        self._update(self.g_optimizer, self.generator, loss_g + self.train.lambda_l1 * loss_l1)
        return loss_d.detach(), loss_g.detach()

    def _update(self, optimizer: torch.optim.Optimizer, network: nn.Module, loss: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        clip_grad_norm_(network.parameters(), self.train.clip_norm)
        optimizer.step()


# --- measuring


def measure(setting: Setting, studies: list[PreparedStudy], rates: dict[str, float], rounds: int, steps: int) -> None:
    device, batch = setting.device, setting.batch
    flops = count_flops(setting)
    sides, peak = {}, {}
    for side, build in (("ours", ours), ("plain", plain)):
        before = start_peak(device)
        sides[side] = build(setting, studies)
        repeat(sides[side]["together"], 2, device)
        peak[side] = end_peak(device) - before
    work = {(side, part): call for part in ("loader", "step", "together") for side, call in sides_of(sides, part)}
    for call in work.values():
        repeat(call, 2, device)
    seconds: dict[tuple[str, str], list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, call in work.items():
            seconds[name].append(repeat(call, steps, device) / steps)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    print("           ours: batches/s   pairs/s    plain: batches/s   pairs/s    ratio (least, greatest)")
    for part in ("loader", "step", "together"):
        a, b = median["ours", part], median["plain", part]
        ratios = [p / o for o, p in zip(seconds["ours", part], seconds["plain", part], strict=True)]
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}, {max(ratios):.2f})"
        print(f"{part:9}  {1 / a:15.2f}  {batch / a:8.1f}   {1 / b:16.2f}  {batch / b:8.1f}    {ratio}")
    achieved = flops / median["ours", "step"]
    shares = ", ".join(f"{100 * achieved / rate:.1f} % of {name}" for name, rate in rates.items())
    print(f"step: {flops / 1e9:.3g} GFLOP, {achieved / 1e12:.3g} TFLOP/s: {shares} (matrix product)")
    if device.type == "cuda":
        used = ", ".join(f"{side} {peak[side] / 2**30:.2f} GiB" for side in peak)
        print(f"peak memory with weights, optimizers and (ours) volumes: {used}")
    hours = EPOCHS * SCANS * PATCHES * median["ours", "together"] / batch / 3600
    print(f"extrapolated, not run: {EPOCHS} epochs x {SCANS} scans x {PATCHES} patches: {hours:,.1f} h for one network")


def sides_of(sides: dict[str, dict[str, Work]], part: str) -> Iterator[tuple[str, Work]]:
    return ((side, parts[part]) for side, parts in sides.items())


def repeat(call: Work, times: int, device: torch.device) -> float:
    synchronize(device)
    began = time.perf_counter()
    for _ in range(times):
        call()
    synchronize(device)
    return time.perf_counter() - began


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def start_peak(device: torch.device) -> int:
    """Bytes allocated now, from which the next peak is counted."""
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def end_peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def count_flops(setting: Setting) -> int:
    """Of one of our steps: convolutions and products, forward and backward, 2 per multiply and add."""
    train = setting.recipe.train.model_copy(update={"compile": False})
    recipe = setting.recipe.model_copy(update={"train": train})
    model, shape = Pix2Pix(recipe, setting.device), (setting.batch, 1, *(recipe.window,) * 3)
    volume = torch.rand(shape, device=setting.device)
    with FlopCounterMode(display=False) as counter:
        model.step(Batch(volume, volume, torch.ones_like(volume)), 1.0, (0,))
    return counter.get_total_flops()


def matrix_rate(device: torch.device, precision: str) -> float:
    """FLOP/s of a square matrix product: the best of some, after warming up."""
    cuda = device.type == "cuda"
    side, times = (8192, 10) if cuda else (1024, 3)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    repeat(lambda: a @ b, times, device)
    best = min(repeat(lambda: a @ b, times, device) for _ in range(3))
    torch.set_float32_matmul_precision(before)
    return 2 * side**3 * times / best


if __name__ == "__main__":
    main()
