"""Optimizer and learning-rate schedule."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from medclip_lab.errors import UserError


@dataclass
class OptimConfig:
    """AdamW with a linear warm-up and a cosine decay."""

    lr: float = 1e-3
    """Peak learning rate."""
    lr_factors: dict[str, float] = field(default_factory=dict)
    """Regular expressions, and what multiplies the rate of the parameters whose names they match from the start, names
    as open_clip's `model.named_parameters()` gives them; the first match counts. {"text": 0.3} slows the text tower."""
    weight_decay: float = 0.05
    """On matrices and kernels only, never on norms, biases, embeddings of position, scale and bias."""
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    warmup: float = 0.05
    """Share of the steps in which the rate rises from 0."""
    final_lr: float = 0.01
    """The rate at the end, as a share of the peak."""
    clip_norm: float = 1.0
    """Largest norm of the gradient; 0 does not clip."""

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"optim.lr must be positive, got {self.lr}")
        if any(factor <= 0 for factor in self.lr_factors.values()):
            raise ValueError(f"optim.lr_factors must be positive, got {self.lr_factors}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"optim.warmup is a share of the steps in [0, 1), got {self.warmup}")


def parameter_groups(model: nn.Module, config: OptimConfig, loss: nn.Module | None = None) -> list[dict[str, object]]:
    """Groups of the trainable parameters, by rate and by weight decay (none if one-dimensional, or declared so).

    Args:
        loss: its parameters train too; their names begin with "loss.".

    Raises:
        UserError: a pattern of `lr_factors` matches no parameter.
    """
    exempt = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if callable(getattr(module, "no_weight_decay", None))
        for name in module.no_weight_decay()
    }
    parameters = list(model.named_parameters())
    if loss is not None:
        parameters += [(f"loss.{name}", parameter) for name, parameter in loss.named_parameters()]
    names = [name for name, _ in parameters]
    for pattern in config.lr_factors:
        if not any(re.match(pattern, name) for name in names):
            raise UserError(f"optim.lr_factors: no parameter of the model matches {pattern!r}; one is {names[-1]!r}")
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters:
        factor = next((factor for pattern, factor in config.lr_factors.items() if re.match(pattern, name)), 1.0)
        if parameter.requires_grad:
            decay = 0.0 if parameter.ndim <= 1 or name in exempt else config.weight_decay
            groups.setdefault((config.lr * factor, decay), []).append(parameter)
    return [{"params": group, "lr": lr, "weight_decay": decay} for (lr, decay), group in groups.items()]


def lr_factor(steps: int, warmup: float, final_lr: float) -> Callable[[int], float]:
    """The schedule as a function of the step: 0 to 1 over the warm-up, then a half cosine down to `final_lr`."""
    rising = max(1, round(steps * warmup))

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        done = min(1.0, (step - rising) / max(1, steps - rising))
        return final_lr + (1 - final_lr) * (1 + math.cos(math.pi * done)) / 2

    return factor


def build_optimizer(model: nn.Module, config: OptimConfig, loss: nn.Module | None = None) -> torch.optim.AdamW:
    """AdamW over the trainable parameters of `model` and of `loss`."""
    return torch.optim.AdamW(
        parameter_groups(model, config, loss),
        lr=config.lr,
        betas=(config.betas[0], config.betas[1]),
        eps=config.eps,
    )
