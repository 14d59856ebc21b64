"""Names of the losses for configs. A user's own loss is named by its dotted path and needs no registration."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from torch import nn

from medclip_lab.losses.clip import ClipLoss
from medclip_lab.losses.multi_positive import MultiPositiveClipLoss
from medclip_lab.losses.multi_view import MultiViewClipLoss
from medclip_lab.losses.prototype import PrototypeLoss
from medclip_lab.losses.siglip import SigLipLoss
from medclip_lab.losses.soft_target import SoftTargetClipLoss
from medclip_lab.losses.weighted_sum import WeightedSum

LOSSES: dict[str, type[nn.Module]] = {
    kind.__name__: kind
    for kind in (
        ClipLoss,
        SigLipLoss,
        SoftTargetClipLoss,
        MultiPositiveClipLoss,
        MultiViewClipLoss,
        PrototypeLoss,
        WeightedSum,
    )
}


@dataclass
class LossConfig:
    """Which objective a run minimises."""

    name: str = "SigLipLoss"
    """A name of the registry, or the dotted path of an nn.Module ("my_package.losses.MyLoss")."""
    args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of its constructor."""


def build_loss(config: LossConfig) -> nn.Module:
    """The loss a config asks for. The terms of a `WeightedSum` are mappings of name, args and weight.

    Raises:
        ValueError: no such loss, or arguments it does not take.
    """
    return _build(config.name, config.args, "loss")


def _build(name: str, args: Mapping[str, Any], where: str) -> nn.Module:
    if "." in name:
        module, _, attribute = name.rpartition(".")
        try:
            kind = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"{where}.name: cannot import {name!r}: {error}") from None
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            raise ValueError(f"{where}.name: {name!r} is not a torch.nn.Module class")
    elif name in LOSSES:
        kind = LOSSES[name]
    else:
        near = get_close_matches(name, LOSSES, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"{where}.name: unknown loss {name!r}; {hint}known: {', '.join(LOSSES)}")
    if kind is WeightedSum:
        args = _terms(args, where)
    try:
        loss: nn.Module = kind(**args)
    except TypeError as error:
        raise ValueError(f"{where}.args: {error}") from None
    except ValueError as error:
        raise ValueError(f"{where}.args.{error}") from None
    return loss


def _terms(args: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Arguments of a `WeightedSum` from a config: its terms built, their weights beside them."""
    terms = args.get("terms")
    if not isinstance(terms, Mapping) or set(args) != {"terms"}:
        raise ValueError(f"{where}.args of a WeightedSum: {{terms: {{NAME: {{name: LOSS, args: ..., weight: 1.0}}}}}}")
    built, weights = {}, {}
    for key, term in terms.items():
        place = f"{where}.args.terms.{key}"
        if isinstance(term, nn.Module):
            built[key] = term
            continue
        if not isinstance(term, Mapping) or "name" not in term or set(term) - {"name", "args", "weight"}:
            raise ValueError(f"{place}: {{name: LOSS, args: ..., weight: 1.0}} expected, got {term!r}")
        built[key] = _build(term["name"], term.get("args", {}), place)
        weights[key] = term.get("weight", 1.0)
    return {"terms": built, "weights": weights}
