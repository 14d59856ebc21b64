"""The optimizer of a run: which one, over which groups of parameters."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn

from medclip_lab.errors import UserError
from medclip_lab.training.rules import Rule, Treatment, of_matrices
from medclip_lab.training.schedule import Kind, check_share

BETAS, EPS = (0.9, 0.98), 1e-8


@dataclass
class OptimConfig:
    """Which optimizer, and how its rate goes over the steps."""

    name: str = "adamw"
    """"adamw" is torch's, fused on a GPU; "muon", "lion", "lamb", "adafactorbv" or any other name of timm's is timm's;
    a dotted path ("torch.optim.Adafactor") any torch optimizer."""
    args: dict[str, Any] = field(default_factory=dict)
    """Further keyword arguments of its constructor."""
    lr: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.05
    """On matrices and kernels only, never on norms, biases, embeddings of position, scale and bias."""
    betas: tuple[float, float] = BETAS
    """Of AdamW. The second is .95 to .98 for large batches, .999 for small ones."""
    eps: float = EPS
    """Of AdamW."""
    rules: list[Rule] = field(default_factory=list)
    """What is different for some parameters, by their names: rate, decay, freezing, schedule. The last match counts."""
    schedule: Kind = "cosine"
    """"cosine", "constant", "rsqrt", or "wsd": constant until a decay at the end."""
    warmup: float = 0.05
    """Share of the steps, or number of steps from 1 on, in which the rate rises from 0."""
    decay: float = 0.2
    """Share or number of the last steps, in which the rate of "wsd" and "rsqrt" goes down to `final_lr`."""
    final_lr: float = 0.01
    """The rate at the end, as a share of the peak."""
    clip_norm: float = 1.0
    """Largest norm of the gradient; 0 does not clip."""

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"optim.lr must be positive, got {self.lr}")
        check_share("optim.warmup", self.warmup)
        check_share("optim.decay", self.decay)
        if self.schedule == "wsd" and not self.decay:
            raise ValueError("optim.decay: without a decay at the end, 'wsd' is 'constant': call it so")
        if not 0 <= self.final_lr <= 1 or self.clip_norm < 0:
            raise ValueError(
                f"optim: final_lr is a share in [0, 1] and clip_norm not negative, got {self.final_lr} and "
                f"{self.clip_norm}"
            )
        if self.name != "adamw" and (tuple(self.betas), self.eps) != (BETAS, EPS):
            raise ValueError(f"optim.betas, optim.eps: those of AdamW; say what {self.name} takes in optim.args")


def parameter_groups(
    parameters: Mapping[str, nn.Parameter], treated: Mapping[str, Treatment | None]
) -> list[tuple[Treatment, list[nn.Parameter]]]:
    """The parameters that train at some time, those of one treatment together."""
    groups: dict[Treatment, list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        treatment = treated[name]
        if treatment is not None:
            groups.setdefault(treatment, []).append(parameter)
    return list(groups.items())


def build_optimizer(
    groups: list[tuple[Treatment, list[nn.Parameter]]], config: OptimConfig, fused: bool = False
) -> tuple[torch.optim.Optimizer, list[Callable[[int], float]]]:
    """An optimizer over the groups, and the schedule of each.

    Args:
        fused: let AdamW take its fused kernel, on a GPU and without a gradient scaler.

    Raises:
        UserError: no such optimizer, or arguments it does not take.
    """
    made = [{"params": params, "lr": t.lr, "weight_decay": t.weight_decay} for t, params in groups]
    schedules = [treatment.schedule.function() for treatment, _ in groups]
    options: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay, **config.args}
    make: Callable[..., torch.optim.Optimizer]
    if config.name == "adamw":
        make = torch.optim.AdamW
        options |= {"betas": tuple(config.betas), "eps": config.eps, "fused": True if fused else None} | config.args
    elif "." in config.name:
        make = _by_path(config.name)
    else:
        make = _of_timm(config.name)
        if of_matrices(config):
            made = [group | {"use_fallback": t.by_adamw} for group, (t, _) in zip(made, groups, strict=True)]
    try:
        return make(made, **options), schedules
    except (TypeError, ValueError) as error:
        raise UserError(f"optim.args: {config.name} does not take them: {error}") from None


def _by_path(name: str) -> Callable[..., torch.optim.Optimizer]:
    module, _, attribute = name.rpartition(".")
    try:
        kind = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"optim.name: cannot import {name!r}: {error}") from None
    if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
        raise UserError(f"optim.name: {name!r} is no torch optimizer")
    return kind


def _of_timm(name: str) -> Callable[..., torch.optim.Optimizer]:
    from functools import partial

    from timm.optim import create_optimizer_v2, list_optimizers

    known = list_optimizers()
    if name not in known:
        near = get_close_matches(name, ["adamw", *known], n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else "known: adamw and those of timm.optim.list_optimizers()"
        raise UserError(f"optim.name: unknown optimizer {name!r}; {hint}")
    return partial(create_optimizer_v2, opt=name)
