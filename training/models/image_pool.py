"""The image pool: discriminators are also shown fakes of earlier steps (Shrivastava et al. 2017, section 2.3)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class ImagePool:
    """The last fakes, exchanged at random, on the device where they were made.

    As in CycleGAN: until `size` fakes are held every fake is kept and passed on; then each is, with probability 1/2,
    exchanged for a held one, which is passed on in its place. Nothing is copied from the device: the choices are
    made from the host's generator of random numbers.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._images: list[Tensor] = []

    def exchange(self, fakes: Tensor, rng: np.random.Generator) -> Tensor:
        """Fakes (N, 1, z, y, x) to as many that the discriminator is to be shown; detached."""
        return torch.stack([self._one(fake, rng) for fake in fakes.detach()])

    def _one(self, fake: Tensor, rng: np.random.Generator) -> Tensor:
        if len(self._images) < self._size:
            self._images.append(fake.clone())  # a view would keep its whole batch in memory
            return fake
        if self._size == 0 or rng.random() >= 0.5:
            return fake
        index = int(rng.integers(self._size))
        held, self._images[index] = self._images[index], fake.clone()
        return held

    def state(self) -> list[Tensor]:
        """What is held, in order."""
        return list(self._images)

    def restore(self, images: list[Tensor], device: torch.device) -> None:
        """The opposite of `state`."""
        self._images = [image.to(device) for image in images]
