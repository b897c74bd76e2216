"""One conditional GAN: generator, discriminator, their optimizers, and one step of training."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from pipeline.networks import build_network
from training.discriminators import PatchDiscriminator
from training.losses import discriminator_loss, generator_loss, weighted_l1
from training.patches import Batch
from training.recipe import Recipe


@dataclass(frozen=True, slots=True)
class StepLosses:
    """What one step saw: for the log."""

    generator: float
    discriminator: float
    l1: float


class Pix2Pix:
    """Trains one generator. Seed torch before making one: the weights are drawn at once."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self._train, self._device = recipe.train, device
        model = recipe.model
        self.generator = build_network(model.generator).to(device)
        self.discriminator = PatchDiscriminator(model.discriminator_width, model.discriminator_layers).to(device)
        self.averaged = copy.deepcopy(self.generator).requires_grad_(False)
        train = recipe.train
        self._g_optimizer = torch.optim.Adam(self.generator.parameters(), train.learning_rate, train.betas)
        self._d_optimizer = torch.optim.Adam(
            self.discriminator.parameters(), train.discriminator_learning_rate, train.betas
        )

    def step(self, batch: Batch, rate: float) -> StepLosses:
        """One update of the discriminator, then of the generator; `rate` scales both learning rates."""
        self._set_rates(rate)
        ct, pet, weight = (t.to(self._device) for t in (batch.ct, batch.pet, batch.weight))
        body = batch.body.to(self._device)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._train.precision == "bf16"):
            fake = self.generator(ct)
        fake = fake.float()
        real_seen, fake_seen = pet * body, fake * body  # air is not judged: it is set to 0 after inference anyway

        loss_d = discriminator_loss(self.discriminator(ct, real_seen), self.discriminator(ct, fake_seen.detach()))
        self._update(self._d_optimizer, self.discriminator, loss_d)

        self.discriminator.requires_grad_(False)
        logits = self.discriminator(ct, fake_seen)
        loss_g = generator_loss(logits, fake, pet, weight, self._train.lambda_l1, self._train.adversarial_weight)
        self._update(self._g_optimizer, self.generator, loss_g)
        self.discriminator.requires_grad_(True)

        self._average()
        l1 = weighted_l1(fake.detach(), pet, weight)
        return StepLosses(loss_g.item(), loss_d.item(), l1.item())

    def _update(self, optimizer: torch.optim.Optimizer, network: nn.Module, loss: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        clip_grad_norm_(network.parameters(), self._train.clip_norm)
        optimizer.step()

    def _set_rates(self, rate: float) -> None:
        for optimizer, base in (
            (self._g_optimizer, self._train.learning_rate),
            (self._d_optimizer, self._train.discriminator_learning_rate),
        ):
            for group in optimizer.param_groups:
                group["lr"] = base * rate

    @torch.no_grad()
    def _average(self) -> None:
        keep = self._train.ema_decay
        for mean, now in zip(self.averaged.parameters(), self.generator.parameters(), strict=True):
            mean.lerp_(now, 1 - keep)

    def state(self) -> dict[str, Any]:
        """Everything needed to go on: tensors and plain numbers only."""
        return {
            "generator": self.generator.state_dict(),
            "discriminator": self.discriminator.state_dict(),
            "averaged": self.averaged.state_dict(),
            "g_optimizer": self._g_optimizer.state_dict(),
            "d_optimizer": self._d_optimizer.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """The opposite of `state`."""
        self.generator.load_state_dict(state["generator"])
        self.discriminator.load_state_dict(state["discriminator"])
        self.averaged.load_state_dict(state["averaged"])
        self._g_optimizer.load_state_dict(state["g_optimizer"])
        self._d_optimizer.load_state_dict(state["d_optimizer"])
