"""3D CycleGAN: two generators, two discriminators, and one step of training (Zhu et al. 2017).

The CT and the PET of a batch come from the same places, since both domains need the same districts; but no loss
compares them. What ties a synthetic PET to its CT is the cycle alone.

The CycleGAN paper has no body: here every volume that a network makes or that is judged is 0 outside the body
(where the batch has no weight), as it will be after inference, and the cycle and identity losses average inside it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.networks import NetworkSpec, build_network
from training.models.discriminators import PatchDiscriminator, check_window, half_batches
from training.models.image_pool import ImagePool
from training.models.losses import least_squares_discriminator_loss, least_squares_loss, weighted_l1
from training.models.optimization import (
    Wrap,
    adam,
    average_into,
    averaged_copy,
    compile_in_place,
    identity,
    update,
    uses_bf16,
    warmed_decay,
)
from training.patches.sampler import Batch
from training.recipe import ModelRecipe, Recipe

CT_RESTING_LOGIT = 0.0  # sigmoid 0.5: water, in the middle of the fixed CT range


class Cycles(NamedTuple):
    """What the generators made of one batch, each (N, 1, w, w, w) float32, 0 outside the body."""

    pet: Tensor  # of the CT
    ct: Tensor  # of the PET
    ct_again: Tensor  # CT -> PET -> CT
    pet_again: Tensor  # PET -> CT -> PET
    same: tuple[Tensor, Tensor] | None  # (of the PET to PET, of the CT to CT): for the identity loss


class CycleGenerators(nn.Module):
    """Both generators as one module: what they make in one step is one forward, as DistributedDataParallel wants."""

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        self.ct_to_pet = build_network(spec)
        self.pet_to_ct = build_network(spec.model_copy(update={"in_channels": 1}), resting_logit=CT_RESTING_LOGIT)

    def forward(self, seen: Tensor, pet: Tensor, body: Tensor, with_same: bool) -> Cycles:
        """The input (N, c, w, w, w), whose first channel is the CT, and the PET of the same places, 0 outside.

        Where the CT-to-PET generator sees more channels than the CT (masks), a made CT takes the CT's place only.
        """
        made_pet, made_ct = self._to_pet(seen, body), self._to_ct(pet, body)
        ct_again = self._to_ct(made_pet, body)
        pet_again = self._to_pet(with_ct(seen, made_ct), body)
        if not with_same:
            return Cycles(made_pet, made_ct, ct_again, pet_again, None)
        same = self._to_pet(with_ct(seen, pet), body), self._to_ct(seen[:, :1] * body, body)
        return Cycles(made_pet, made_ct, ct_again, pet_again, same)

    def _to_pet(self, seen: Tensor, body: Tensor) -> Tensor:
        made: Tensor = self.ct_to_pet(seen).float() * body
        return made

    def _to_ct(self, pet: Tensor, body: Tensor) -> Tensor:
        made: Tensor = self.pet_to_ct(pet).float() * body
        return made


def with_ct(seen: Tensor, ct: Tensor) -> Tensor:
    """The input (N, c, w, w, w) with another first channel."""
    return torch.cat([ct, seen[:, 1:]], dim=1)


class CycleDiscriminators(nn.Module):
    """Both discriminators as one module; neither sees what its volume was made of."""

    def __init__(self, model: ModelRecipe) -> None:
        super().__init__()
        self.of_pet = PatchDiscriminator(1, model.discriminator_width, model.discriminator_layers)
        self.of_ct = PatchDiscriminator(1, model.discriminator_width, model.discriminator_layers)

    def forward(self, pet: Tensor, ct: Tensor) -> tuple[Tensor, Tensor]:
        """Volumes (N, 1, w, w, w) to their maps of scores (N, 1, m, m, m)."""
        return self.of_pet(pet), self.of_ct(ct)


class CycleGAN:
    """Trains a CT-to-PET generator without pairs. Seed torch before making one: the weights are drawn at once.

    `generator` and `averaged` are the CT-to-PET generator as plain modules; `wrap` goes around both pairs of
    networks. The image pools belong to this process: with several, each draws from its own.
    """

    def __init__(self, recipe: Recipe, device: torch.device, *, wrap: Wrap = identity) -> None:
        train, spec = recipe.train, recipe.model.cyclegan
        check_window(spec.window, recipe.model.discriminator_layers)
        self._train, self._cycle, self._device = train, recipe.cycle, device
        self._steps = 0  # taken so far
        self._bf16 = uses_bf16(train.precision, device)
        self.generators = CycleGenerators(spec).to(device)
        self.discriminators = CycleDiscriminators(recipe.model).to(device)
        self.generator = self.generators.ct_to_pet
        self.averaged = averaged_copy(self.generator)
        for network in self._networks().values():
            compile_in_place(network, train, device)
        self._generate, self._judge = wrap(self.generators), wrap(self.discriminators)
        self._g_optimizer = adam(self.generators.parameters(), train.learning_rate, train.betas)
        self._d_optimizer = adam(self.discriminators.parameters(), train.discriminator_learning_rate, train.betas)
        self._pools = {"pet_pool": ImagePool(recipe.cycle.pool), "ct_pool": ImagePool(recipe.cycle.pool)}

    def step(self, batch: Batch, rate: float, entropy: tuple[int, ...]) -> dict[str, Tensor]:
        """One update of the generators, then of the discriminators; `rate` scales all learning rates.

        Args:
            batch: CT and PET windows of the same places; their being pairs is not used.
            rate: 1 at first, falling to 0.
            entropy: integers of at least 0 that decide what the image pools exchange.

        Returns:
            Detached scalars on the device: "l1" (weighted, of the made PET against the true one: for the log only,
            nothing learns from it), "adversarial" and "cycle" (both directions added, unweighted), "identity" where
            the recipe has it, "generator" (the whole loss) and "discriminator" (both added).
        """
        body = batch.body
        pet, ct = batch.pet * body, batch.input[:, :1] * body
        with self._autocast():
            made: Cycles = self._generate(batch.input, pet, body, self._cycle.lambda_identity > 0)
        losses = self._update_generators(made, pet, ct, body, rate)

        rng = np.random.default_rng(entropy)
        old_pet = self._pools["pet_pool"].exchange(made.pet, rng)
        old_ct = self._pools["ct_pool"].exchange(made.ct, rng)
        losses["discriminator"] = self._update_discriminators((pet, old_pet), (ct, old_ct), rate)

        average_into(self.averaged, self.generator, warmed_decay(self._train.ema_decay, self._steps))
        self._steps += 1
        losses["l1"] = weighted_l1(made.pet, batch.pet, batch.weight)
        return {name: loss.detach() for name, loss in losses.items()}

    def _update_generators(self, made: Cycles, pet: Tensor, ct: Tensor, body: Tensor, rate: float) -> dict[str, Tensor]:
        cycle = self._cycle
        self.discriminators.requires_grad_(False)
        with self._autocast():
            scores = self.discriminators(made.pet, made.ct)
        adversarial = _added(least_squares_loss(score.float(), real=True) for score in scores)
        consistency = weighted_l1(made.pet_again, pet, body) + weighted_l1(made.ct_again, ct, body)
        loss = cycle.adversarial_weight * adversarial + cycle.lambda_cycle * consistency
        losses = {"adversarial": adversarial, "cycle": consistency}
        if made.same is not None:
            losses["identity"] = weighted_l1(made.same[0], pet, body) + weighted_l1(made.same[1], ct, body)
            loss = loss + cycle.lambda_identity * cycle.lambda_cycle * losses["identity"]
        networks = (self.generators.ct_to_pet, self.generators.pet_to_ct)
        update(self._g_optimizer, networks, loss, rate, self._train.clip_norm)
        self.discriminators.requires_grad_(True)
        return losses | {"generator": loss}

    def _update_discriminators(self, pets: tuple[Tensor, Tensor], cts: tuple[Tensor, Tensor], rate: float) -> Tensor:
        with self._autocast():
            scores = self._judge(torch.cat(pets), torch.cat(cts))  # real and made in one batch, see Pix2Pix
        loss = _added(least_squares_discriminator_loss(*half_batches(score)) for score in scores)
        networks = (self.discriminators.of_pet, self.discriminators.of_ct)
        update(self._d_optimizer, networks, loss, rate, self._train.clip_norm)
        return loss

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16)

    def _networks(self) -> dict[str, nn.Module]:
        return {
            "generator": self.generators.ct_to_pet,
            "ct_generator": self.generators.pet_to_ct,
            "discriminator": self.discriminators.of_pet,
            "ct_discriminator": self.discriminators.of_ct,
        }

    def state(self) -> dict[str, Any]:
        """Everything needed to go on, this process's image pools too: tensors and plain numbers only."""
        networks = self._networks() | {"averaged": self.averaged}
        return (
            {name: network.state_dict() for name, network in networks.items()}
            | {"g_optimizer": self._g_optimizer.state_dict(), "d_optimizer": self._d_optimizer.state_dict()}
            | {name: pool.state() for name, pool in self._pools.items()}
            | {"steps": self._steps}
        )

    def restore(self, state: dict[str, Any]) -> None:
        """The opposite of `state`: the next step is the one that would have followed, bit for bit on a CPU."""
        for name, network in (self._networks() | {"averaged": self.averaged}).items():
            network.load_state_dict(state[name])
        self._g_optimizer.load_state_dict(state["g_optimizer"])
        self._d_optimizer.load_state_dict(state["d_optimizer"])
        self._steps = state["steps"]
        for name, pool in self._pools.items():
            pool.restore(state[name], self._device)


def _added(losses: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(losses)).sum()
