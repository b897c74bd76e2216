"""3D Pix2Pix: a generator, a discriminator that sees its input beside the PET, and one step of training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipeline.networks import build_network
from training.models.discriminators import PatchDiscriminator, check_window, half_batches
from training.models.losses import adversarial_loss, discriminator_loss, weighted_l1
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
from training.recipe import Recipe


class Pix2Pix:
    """Trains one generator (Isola et al. 2017, in 3D). Seed torch before making one: the weights are drawn at once.

    `generator`, `averaged` and `discriminator` are the plain modules; `wrap` goes around the two that are trained
    (DistributedDataParallel). Every loss is a mean over the batch, so averaged gradients are the whole batch's.
    """

    def __init__(self, recipe: Recipe, device: torch.device, *, wrap: Wrap = identity) -> None:
        train, spec, model = recipe.train, recipe.model.pix2pix, recipe.model
        check_window(spec.window, model.discriminator_layers)
        self._train, self._device = train, device
        self._steps = 0  # taken so far
        self._bf16 = uses_bf16(train.precision, device)
        self.generator = build_network(spec).to(device)
        pair = spec.in_channels + 1
        self.discriminator = PatchDiscriminator(pair, model.discriminator_width, model.discriminator_layers).to(device)
        self.averaged = averaged_copy(self.generator)
        for network in (self.generator, self.discriminator):
            compile_in_place(network, train, device)
        self._generate, self._judge = wrap(self.generator), wrap(self.discriminator)
        self._g_optimizer = adam(self.generator.parameters(), train.learning_rate, train.betas)
        self._d_optimizer = adam(self.discriminator.parameters(), train.discriminator_learning_rate, train.betas)

    def step(self, batch: Batch, rate: float, entropy: tuple[int, ...]) -> dict[str, Tensor]:  # noqa: ARG002
        """One update of the discriminator, then of the generator; `rate` scales both learning rates.

        Nothing here is random: `entropy` is what every model's step takes. The discriminator sees the PET inside
        the body only (where the batch has a weight): air is set to 0 after inference anyway.

        Returns:
            Detached scalars on the device: "l1" (weighted, in units of the scaled PET), "adversarial" (the
            generator's, unweighted), "generator" (its whole loss) and "discriminator".
        """
        train, seen, pet, weight, body = self._train, batch.input, batch.pet, batch.weight, batch.body
        with self._autocast():
            fake = self._generate(seen)
        fake = fake.float()
        real_pair, fake_pair = (torch.cat([seen, shown * body], dim=1) for shown in (pet, fake))

        # real and fake in one batch: instance normalization is per sample, and DDP wants one forward per backward
        with self._autocast():
            scores = self._judge(torch.cat([real_pair, fake_pair.detach()]))
        loss_d = discriminator_loss(*half_batches(scores))
        update(self._d_optimizer, [self.discriminator], loss_d, rate, train.clip_norm)

        self.discriminator.requires_grad_(False)
        with self._autocast():
            scores = self.discriminator(fake_pair)
        adversarial, l1 = adversarial_loss(scores.float(), real=True), weighted_l1(fake, pet, weight)
        loss_g = train.adversarial_weight * adversarial + train.lambda_l1 * l1
        update(self._g_optimizer, [self.generator], loss_g, rate, train.clip_norm)
        self.discriminator.requires_grad_(True)

        average_into(self.averaged, self.generator, warmed_decay(train.ema_decay, self._steps))
        self._steps += 1
        losses = {"l1": l1, "adversarial": adversarial, "generator": loss_g, "discriminator": loss_d}
        return {name: loss.detach() for name, loss in losses.items()}

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16)

    def state(self) -> dict[str, Any]:
        """Everything needed to go on: tensors and plain numbers only, under the plain modules' names."""
        return {
            "generator": self.generator.state_dict(),
            "discriminator": self.discriminator.state_dict(),
            "averaged": self.averaged.state_dict(),
            "g_optimizer": self._g_optimizer.state_dict(),
            "d_optimizer": self._d_optimizer.state_dict(),
            "steps": self._steps,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """The opposite of `state`: the next step is the one that would have followed, bit for bit on a CPU."""
        self.generator.load_state_dict(state["generator"])
        self.discriminator.load_state_dict(state["discriminator"])
        self.averaged.load_state_dict(state["averaged"])
        self._g_optimizer.load_state_dict(state["g_optimizer"])
        self._d_optimizer.load_state_dict(state["d_optimizer"])
        self._steps = state["steps"]
