"""Names of the losses for configs. A user's own loss is named by its dotted path and needs no registration."""

import importlib
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from torch import nn

from medclip_lab.losses.clip import ClipLoss
from medclip_lab.losses.siglip import SigLipLoss
from medclip_lab.losses.soft_target import SoftTargetClipLoss

LOSSES: dict[str, type[nn.Module]] = {
    "ClipLoss": ClipLoss,
    "SigLipLoss": SigLipLoss,
    "SoftTargetClipLoss": SoftTargetClipLoss,
}


@dataclass
class LossConfig:
    """Which objective a run minimises."""

    name: str = "SigLipLoss"
    """A name of the registry, or the dotted path of an nn.Module ("my_package.losses.MyLoss")."""
    args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of its constructor."""


def build_loss(config: LossConfig) -> nn.Module:
    """The loss a config asks for.

    Raises:
        ValueError: no such loss, or arguments it does not take.
    """
    if "." in config.name:
        module, _, attribute = config.name.rpartition(".")
        try:
            kind = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"loss.name: cannot import {config.name!r}: {error}") from None
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            raise ValueError(f"loss.name: {config.name!r} is not a torch.nn.Module class")
    elif config.name in LOSSES:
        kind = LOSSES[config.name]
    else:
        near = get_close_matches(config.name, LOSSES, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"loss.name: unknown loss {config.name!r}; {hint}known: {', '.join(LOSSES)}")
    try:
        loss: nn.Module = kind(**config.args)
    except TypeError as error:
        raise ValueError(f"loss.args: {error}") from None
    return loss
