"""Several losses at once."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class WeightedSum(nn.Module):
    """A weighted sum of losses over the same features, each logged by its name.

    Args:
        terms: losses by name; in a config each is {name, args, weight}, as a loss of its own.
        weights: by the same names; 1 where none is given.

    Called with what any of its losses wants. With `output_dict` it also tells every loss, unweighted, under its name,
    and whatever else a loss tells under "name/what".
    """

    def __init__(self, terms: Mapping[str, nn.Module], weights: Mapping[str, float] | None = None) -> None:
        super().__init__()
        if not terms:
            raise ValueError("terms: at least one loss")
        if taken := [name for name in terms if name in ("loss", "contrastive_loss") or "." in name]:
            raise ValueError(f"terms: {taken[0]!r} is no name for a term: the sum is called so, or it has a dot")
        weights = weights or {}
        if unknown := [name for name in weights if name not in terms]:
            raise ValueError(f"weights: no loss is named {', '.join(unknown)}; the terms are {', '.join(terms)}")
        self.terms = nn.ModuleDict(terms)
        self.weights = {name: float(weights.get(name, 1.0)) for name in terms}
        self.inputs = tuple(dict.fromkeys(name for loss in terms.values() for name in getattr(loss, "inputs", ())))
        self.optional_inputs = tuple(
            dict.fromkeys(name for loss in terms.values() for name in getattr(loss, "optional_inputs", ()))
        )
        self.paired = any(getattr(loss, "paired", True) for loss in terms.values())
        self.uses_bias = any(getattr(loss, "uses_bias", True) for loss in terms.values())
        reductions = {name: getattr(loss, "grad_reduction", "mean") for name, loss in terms.items()}
        self.grad_reduction = next(iter(reductions.values()))
        if len(set(reductions.values())) > 1:
            raise ValueError(f"terms: one grad_reduction for all, got {reductions}")
        # One temperature serves them all; the first term says where it starts and how far it goes.
        first = next(iter(terms.values()))
        self.logit_scale_range = getattr(first, "logit_scale_range", None)
        self.init_logit_scale = getattr(first, "init_logit_scale", 1 / 0.07)
        biases = [getattr(loss, "init_logit_bias", None) for loss in terms.values()]
        self.init_logit_bias = next((bias for bias in biases if bias is not None), None)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
        **inputs: Any,
    ) -> Tensor | dict[str, Tensor]:
        """Weighted sum of the losses of the global batch; arguments and errors are those of the terms."""
        if unknown := [name for name in inputs if name not in (*self.inputs, *self.optional_inputs)]:
            raise ValueError(f"no term takes {', '.join(unknown)}")
        told: dict[str, Tensor] = {}
        values = []
        for name, loss in self.terms.items():
            wanted = (*getattr(loss, "inputs", ()), *getattr(loss, "optional_inputs", ()))
            own = {key: value for key, value in inputs.items() if key in wanted}
            parts = dict(loss(image_features, text_features, logit_scale, logit_bias, output_dict=True, **own))
            value = parts.pop("contrastive_loss")
            values.append(self.weights[name] * value)
            told[name] = value.detach()
            told |= {f"{name}/{key}": part for key, part in parts.items()}
        total = torch.stack(values).sum()
        return {**told, "contrastive_loss": total} if output_dict else total
