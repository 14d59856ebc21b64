"""Which parameters train, when and how fast: rules on their names."""

import re
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from torch import nn

from medclip_lab.errors import UserError
from medclip_lab.training.layers import layers_above
from medclip_lab.training.schedule import Kind, Schedule, check_share, count

if TYPE_CHECKING:
    from medclip_lab.training.optim import OptimConfig

TEMPERATURE = ("logit_scale", "logit_bias")


@dataclass
class Rule:
    """What is different for the parameters of some names. Of several rules that match, a later one decides what both
    speak of; what none speaks of is as `optim` says."""

    match: str
    """Regular expression, from the start of the name that open_clip's `model.named_parameters()` gives; "visual" is the
    whole image tower, "text" the text tower. Parameters of a loss begin with "loss."."""
    lr_factor: float | None = None
    """Multiplies the rate."""
    weight_decay: float | None = None
    """Of matrices and kernels among them."""
    freeze: bool | None = None
    """True: they never train. False: they do, also where an earlier rule or the model froze them."""
    frozen_until: float | None = None
    """Share of the steps, or number of steps from 1 on, before which they do not train. Their schedule begins there."""
    frozen_from: float | None = None
    """The same for the end: from there on they train no more."""
    layer_decay: float | None = None
    """Multiplies the rate once for each layer between a parameter and the output of its tower."""
    schedule: Kind | None = None
    warmup: float | None = None
    decay: float | None = None
    final_lr: float | None = None
    """A schedule of their own: what is named here takes the place of the value of `optim`."""

    def __post_init__(self) -> None:
        try:
            re.compile(self.match)
        except re.error as error:
            raise ValueError(f"optim.rules: {self.match!r} is no regular expression: {error}") from None
        if all(getattr(self, field.name) is None for field in fields(self)[1:]):
            raise ValueError(f"optim.rules: the rule on {self.match!r} says nothing: give it lr_factor or freeze ...")
        if self.lr_factor is not None and self.lr_factor <= 0:
            raise ValueError(
                f"optim.rules: lr_factor of {self.match!r} must be positive, got {self.lr_factor}; to keep parameters "
                "as they are say freeze: true"
            )
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise ValueError(f"optim.rules: layer_decay of {self.match!r} is in (0, 1], got {self.layer_decay}")
        for name in ("frozen_until", "frozen_from", "warmup", "decay"):
            if (value := getattr(self, name)) is not None:
                check_share(f"optim.rules: {name} of {self.match!r}", value)


@dataclass(frozen=True)
class Treatment:
    """What is done with a parameter."""

    lr: float
    weight_decay: float
    schedule: Schedule
    by_adamw: bool = False
    """Where the optimizer is one of matrices, AdamW takes this: norms, biases, tables of embeddings, a loss's own."""


def of_matrices(config: "OptimConfig") -> bool:
    """Orthogonal updates are for matrices that something is multiplied with."""
    return config.name in ("muon", "adamuon", "nadamuon", "nmuon")


def treatments(
    model: nn.Module, config: "OptimConfig", steps: int, loss: nn.Module | None = None
) -> dict[str, Treatment | None]:
    """Name of every parameter of `model`, and of `loss` ("loss." before it), to its treatment; None never trains.

    Raises:
        UserError: a rule that matches nothing, or asks for what its parameters have not; a time when nothing trains.
    """
    parameters = dict(model.named_parameters())
    if loss is not None:
        parameters |= {f"loss.{name}": parameter for name, parameter in loss.named_parameters()}
    for rule in config.rules:
        if not any(re.match(rule.match, name) for name in parameters):
            raise UserError(f"optim.rules: no parameter matches {rule.match!r}; {_near(rule.match, list(parameters))}")
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag)}
    exempt = _exempt(model)
    above: dict[str, int] | None = None
    result: dict[str, Treatment | None] = {}
    for name, parameter in parameters.items():
        says: dict[str, Any] = {field.name: getattr(config, field.name, None) for field in fields(Rule)}
        for rule in config.rules:
            if re.match(rule.match, name):
                says |= {key: value for key, value in vars(rule).items() if value is not None}
        if says["freeze"] or (says["freeze"] is None and not parameter.requires_grad):
            result[name] = None
            continue
        factor = says["lr_factor"] or 1.0
        if says["layer_decay"] is not None:
            above = layers_above(model) if above is None else above
            factor *= says["layer_decay"] ** _layers(name, above, str(says["match"]))
        plain = parameter.ndim <= 1 or name in exempt
        try:
            schedule = _schedule(says, steps)
        except ValueError as error:
            raise UserError(str(error)) from None
        aside = of_matrices(config) and (plain or id(parameter) in tables or name.startswith("loss."))
        result[name] = Treatment(config.lr * factor, 0.0 if plain else float(says["weight_decay"]), schedule, aside)
    _refuse_standstill(result, steps)
    return result


def _schedule(says: dict[str, Any], steps: int) -> Schedule:
    start = count(steps, says["frozen_until"] or 0)
    return Schedule(
        kind=says["schedule"],
        steps=steps,
        warmup=count(steps - start, says["warmup"]),
        decay=count(steps - start, says["decay"]) if says["schedule"] in ("rsqrt", "wsd") else 0,
        final_lr=says["final_lr"],
        start=start,
        stop=None if says["frozen_from"] is None else count(steps, says["frozen_from"]),
    )


def _exempt(model: nn.Module) -> set[str]:
    """What a model declares to be without weight decay: embeddings of position and the like."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if callable(getattr(module, "no_weight_decay", None))
        for name in module.no_weight_decay()
    }


def _layers(name: str, above: dict[str, int], pattern: str) -> int:
    if name.startswith(("loss.", *TEMPERATURE)):
        return 0
    if name not in above:
        raise UserError(f"optim.rules: layer_decay of {pattern!r}: the tower of {name} has no layers that can be told")
    return above[name]


def _near(pattern: str, names: list[str]) -> str:
    prefixes = {name[:end] for name in names for end in (*(i for i, c in enumerate(name) if c == "."), len(name))}
    near = get_close_matches(pattern.replace("\\", ""), prefixes, n=1, cutoff=0.5)
    begins = ", ".join(dict.fromkeys(name.split(".")[0] for name in names))
    return f"did you mean {near[0]!r}?" if near else f"names begin with {begins}"


def _refuse_standstill(result: dict[str, Treatment | None], steps: int) -> None:
    schedules = {t.schedule for name, t in result.items() if t is not None and name not in TEMPERATURE}
    changes = sorted({0} | {c for s in schedules for c in (s.start, s.stop) if c is not None and c < steps})
    for step in changes:
        if not any(schedule.trains(step) for schedule in schedules):
            when = "" if len(changes) == 1 else f" from step {step} on"
            raise UserError(
                f"optim.rules: everything is frozen{when}: there is nothing to train. Leave a tower, a head or biases"
            )
