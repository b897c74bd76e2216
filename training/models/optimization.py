"""What the steps of both models share: precision, compilation, clipped updates, averaged weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Adam
from torch.optim.swa_utils import get_ema_multi_avg_fn

from training.recipe import TrainRecipe

Wrap = Callable[[nn.Module], nn.Module]


def identity(module: nn.Module) -> nn.Module:
    """The wrap of a single process: nothing."""
    return module


def uses_bf16(precision: str, device: torch.device) -> bool:
    """Whether networks compute in bfloat16: where the recipe says so, with "auto" where a GPU does it in hardware."""
    if precision != "auto":
        return precision == "bf16"
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def compile_in_place(module: nn.Module, train: TrainRecipe, device: torch.device) -> None:
    """torch.compile on a GPU where the recipe wants it. In place: the names in the state dict stay the plain ones.

    Static shapes: the discriminators see batches of N and 2N, which would otherwise turn into one slower kernel
    for any size.
    """
    if train.compile and device.type == "cuda":
        module.compile(dynamic=False)


def averaged_copy(network: nn.Module) -> nn.Module:
    """The start of the averaged weights: a copy that no optimizer touches. Taken before compilation."""
    return copy.deepcopy(network).requires_grad_(False).eval()


def warmed_decay(decay: float, step: int) -> float:
    """The decay of the averaged weights after so many earlier steps: min(decay, (1 + step) / (10 + step)).

    So that the random weights of the start are forgotten in a short run too: at 0.995 they would still make up a
    fifth of the average after 300 steps.
    """
    return min(decay, (1 + step) / (10 + step))


def average_into(averaged: nn.Module, network: nn.Module, decay: float) -> None:
    """averaged = decay * averaged + (1 - decay) * network, in place, all tensors at once (one kernel on a GPU)."""
    average = get_ema_multi_avg_fn(decay)
    average(list(averaged.parameters()), list(network.parameters()), None)


def update(optimizer: Adam, networks: Iterable[nn.Module], loss: Tensor, rate: float, clip_norm: float) -> None:
    """One step of Adam down `loss`, at `rate` times its own learning rate, each network's gradient clipped by norm.

    The gradients stay where they are until the next update.
    """
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    for network in networks:
        clip_grad_norm_(network.parameters(), clip_norm)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["base_lr"]
    optimizer.step()


def adam(parameters: Iterable[nn.Parameter], learning_rate: float, betas: tuple[float, float]) -> Adam:
    """Adam whose groups remember the recipe's learning rate as `base_lr`."""
    return Adam([{"params": list(parameters), "base_lr": learning_rate}], lr=learning_rate, betas=betas)
