"""Towers that begin with the weights of others, and a list of what that did."""

import difflib
import json
import re
import sys
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor

from medclip_lab.errors import UserError
from medclip_lab.models.from_transformers import activation_name
from medclip_lab.models.hf_text import HuggingFaceText, reserved
from medclip_lab.models.stems import Normalisation, adapt_stem, add_constant, channels_of, find_stem, is_exact
from medclip_lab.models.weights import SETTING, Weights, read_weights

PREFIX = {"image": "visual.", "text": "text."}
TEXT_POSITIONS = re.compile(r"text\.(positional_embedding|.*\b(position_embeddings|wpe|embed_positions)\.weight)$")


@dataclass
class WarmStartConfig:
    """Weights that a tower begins with."""

    source: str
    """A file (.safetensors, .pt, .pth, .bin), or a folder: a bundle or a run of ours, a model of open_clip, timm or
    transformers; by name if it is in Hugging Face's cache; "hf-hub:NAME" fetches it."""
    tower: Literal["image", "text", "all"] = "all"
    """"all" takes what there is. Scale and bias are never taken: the loss says how they start."""
    at_least: float = 0.5
    """Share of a tower's weights that must be found; less is refused."""
    mean: tuple[float, float, float] | None = None
    """How pixels were normalised for these weights, where the source does not tell: a stem of one channel made from
    three needs it."""
    std: tuple[float, float, float] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.at_least <= 1:
            raise ValueError(f"model.warm_start.at_least is a share in (0, 1], got {self.at_least}")
        if (self.mean is None) != (self.std is None):
            raise ValueError("model.warm_start: mean and std go together")


@dataclass
class Report:
    """What became of the weights of one source in one tower; names as the model has them."""

    source: str
    tower: str
    loaded: list[str] = field(default_factory=list)
    reshaped: dict[str, str] = field(default_factory=dict)
    """Name to the change of shape."""
    misfit: dict[str, str] = field(default_factory=dict)
    """There, but of another shape: not loaded."""
    missing: list[str] = field(default_factory=list)
    """Left as they were."""
    unused: list[str] = field(default_factory=list)
    """Of the source, which the tower has no place for."""
    notes: list[str] = field(default_factory=list)
    share: float = 0.0
    """Of the tower's weights that were found."""

    def line(self) -> str:
        """One line for the console."""

        def told(names: list[str], what: str) -> str:
            return f"{len(names)} {what}" + (f" ({', '.join(names)})" if 0 < len(names) <= 4 else "")

        reshaped, misfit = ([f"{name} {how}" for name, how in kind.items()] for kind in (self.reshaped, self.misfit))
        parts = [f"{len(self.loaded)} loaded", told(reshaped, "reshaped"), told(misfit, "of another shape")]
        parts += [told(self.missing, "missing"), told(self.unused, "unused"), *self.notes]
        return f"warm start of the {self.tower} tower from {self.source}: {', '.join(parts)}"

    def record(self) -> dict[str, Any]:
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return values


def warm_start(model: Any, configs: list[WarmStartConfig], target: Normalisation, speak: bool = True) -> list[Report]:
    """Fill the towers of an open_clip model, in place, one source after the other.

    Args:
        target: how pixels will be normalised.
        speak: say a line for each tower on standard error.

    Raises:
        UserError: a source that cannot be read, or in which too little fits.
    """
    reports = []
    for config in configs:
        weights = read_weights(config.source)
        named, shapes = _named(weights, model)
        towers = [tower for tower in ("image", "text") if config.tower in (tower, "all")]
        held = [tower for tower in towers if any(name.startswith(PREFIX[tower]) for name in named)]
        if not held or (config.tower != "all" and config.tower not in held):
            raise UserError(
                f"{SETTING}: {weights.path} holds nothing for {config.tower}: " + _nearest(model, towers, named)
            )
        source = weights.normalisation
        if config.mean is not None and config.std is not None:
            source = Normalisation(config.mean, config.std)
        for tower in held:
            report = _fill(model, tower, named, shapes, config, source, target)
            theirs, ours = weights.activations.get(tower), _activation(model, tower)
            if theirs is not None and ours is not None and theirs != ours:
                report.notes.append(f"it was trained with {theirs}, and the tower computes {ours}")
            reports.append(report)
            if speak:
                print(report.line(), file=sys.stderr)
    return reports


def stretch(rows: Tensor, count: int, kept: int = 0) -> Tensor:
    """[count, C] position embeddings of [P, C]: the first ones where fewer are wanted, else interpolated as open_clip
    does; the first `kept` rows belong to no position and stay."""
    special, places = rows[:kept], rows[kept:]
    wanted = count - kept
    if wanted <= len(places):
        return torch.cat([special, places[:wanted]])
    wide = F.interpolate(places.float().T[None], size=wanted, mode="linear", align_corners=False)[0].T
    return torch.cat([special, wide.to(rows.dtype)])


def _named(weights: Weights, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The weights under the names that the model would give them, and the shapes they had in the source."""
    state = {name: value for name, value in weights.state.items() if not name.endswith("position_ids")}
    if weights.kind == "transformers":
        if not isinstance(model.text, HuggingFaceText):
            raise UserError(
                f"{SETTING}: {weights.path} is a model of transformers, and the text tower is open_clip's own: set "
                "model.spec.text_cfg.hf_model_name"
            )
        named = {f"text.transformer.{name}": value for name, value in state.items()}
        return named, _shapes(named)
    trunk = getattr(model.visual, "trunk", None)
    if weights.kind == "timm":
        if trunk is None:
            raise UserError(
                f"{SETTING}: {weights.path} holds no model of open_clip; if it is one of timm, set "
                "model.spec.vision_cfg.timm_model_name"
            )
        named = {f"visual.trunk.{name}": value for name, value in _by_timm(state, trunk).items()}
        return named, _shapes(named) | _shapes({f"visual.trunk.{name}": value for name, value in state.items()})
    state = open_clip.model.convert_to_custom_text_state_dict(open_clip.convert.convert_state_dict(model, state))
    shapes, part = _shapes(state), "visual.trunk."
    inner = {name.removeprefix(part): value for name, value in state.items() if name.startswith(part)}
    state = {name: value for name, value in state.items() if name.startswith(("visual.", "text.")) and part not in name}
    if trunk is not None:
        inner = _by_timm(inner, trunk)
    named = state | {f"{part}{name}": value for name, value in inner.items()}
    return named, _shapes(named) | shapes


def _by_timm(state: dict[str, Tensor], trunk: Any) -> dict[str, Tensor]:
    """As timm reads them for this architecture: other names of other years, position embeddings of other sizes."""
    convert = getattr(sys.modules[type(trunk).__module__], "checkpoint_filter_fn", None)
    if convert is None or not state:
        return state
    try:
        converted: dict[str, Tensor] = convert(dict(state), trunk)
    except (KeyError, RuntimeError, AttributeError, ValueError):
        return state  # weights of something else; what does not fit is told later
    return converted


def _fill(
    model: Any,
    tower: str,
    named: dict[str, Tensor],
    shapes: dict[str, str],
    config: WarmStartConfig,
    source: Normalisation | None,
    target: Normalisation,
) -> Report:
    report = Report(config.source, tower)
    prefix = PREFIX[tower]
    wanted = {name: value for name, value in model.state_dict().items() if name.startswith(prefix)}
    own = {name: value for name, value in named.items() if name.startswith(prefix)}
    fitting = {}
    if tower == "image":
        own = _fit_stem(model, own, report, source, target)
    for name, place in wanted.items():
        if name not in own:
            report.missing.append(name)
            continue
        value = own[name]
        if value.shape != place.shape:
            value = _reshape(name, value, place, model)
        if value.shape != place.shape:
            report.misfit[name] = f"{_shape(value)}, not {_shape(place)}"
            continue
        if shapes[name] != _shape(place):
            report.reshaped[name] = f"{shapes[name]} -> {_shape(place)}"
        else:
            report.loaded.append(name)
        fitting[name] = value
    report.unused = sorted(set(own) - set(wanted))
    total = sum(value.numel() for value in wanted.values())
    report.share = round(sum(value.numel() for value in fitting.values()) / max(total, 1), 4)
    if report.share < config.at_least:
        raise UserError(
            f"{SETTING}: {report.share:.1%} of the {tower} tower's weights are in {config.source}, at_least is "
            f"{config.at_least:.0%}: {_nearest(model, [tower], named, report)}"
        )
    model.load_state_dict(fitting, strict=False)
    return report


def _fit_stem(
    model: Any, own: dict[str, Tensor], report: Report, source: Normalisation | None, target: Normalisation
) -> dict[str, Tensor]:
    """Weights for three channels, made into those for one, if that is what the tower has."""
    if channels_of(model.visual) == 3:
        if source is not None and source != target:
            report.notes.append(
                f"pixels were normalised by {_numbers(source.mean)} and {_numbers(source.std)} for it, and "
                f"data.preprocess says {_numbers(target.mean)} and {_numbers(target.std)}"
            )
        return own
    stem, conv = find_stem(model.visual)
    name = f"visual.{stem}.weight"
    weight = own.get(name)
    if weight is None or weight.ndim != 4 or weight.shape[1] != 3:
        return own
    source = source or target
    adapted, constant = adapt_stem(weight, source, target)
    inside = {key.removeprefix("visual."): value for key, value in own.items()}
    taken = add_constant(model.visual, inside, stem, constant)
    if not is_exact(conv, constant, bool(taken)):
        report.notes.append(
            "the stem of one channel is near the one of three and not equal to it; nearest with data.preprocess.mean "
            f"{sum(source.mean) / 3:.3g} and std {sum(source.std) / 3:.3g}"
        )
    return own | {name: adapted} | {f"visual.{key}": value for key, value in taken.items()}


def _activation(model: Any, tower: str) -> str | None:
    """Of the first layer of a transformer of open_clip or timm; None for any other tower."""
    part = model.visual if tower == "image" else model.text
    trunk = getattr(part, "trunk", getattr(part, "transformer", part))
    blocks = getattr(trunk, "resblocks", getattr(trunk, "blocks", None))
    mlp = getattr(blocks[0], "mlp", None) if blocks is not None else None
    layer = getattr(mlp, "gelu", getattr(mlp, "act", None))
    return None if layer is None else activation_name(layer)


def _reshape(name: str, value: Tensor, place: Tensor, model: Any) -> Tensor:
    """Position embeddings of another image size or text length; anything else as it is."""
    if name == "visual.positional_embedding":
        state = {name: value}
        open_clip.model.resize_pos_embed(state, model)
        return state[name]
    if TEXT_POSITIONS.match(name) and value.ndim == 2 and value.shape[1] == place.shape[1]:
        kept = reserved(model.text.config) if isinstance(model.text, HuggingFaceText) else 0
        return stretch(value, len(place), kept)
    return value


def _nearest(model: Any, towers: list[str], named: dict[str, Tensor], report: Report | None = None) -> str:
    """What is wanted, and what there is that looks most like it."""
    names = [name for name in model.state_dict() if name.startswith(tuple(PREFIX[tower] for tower in towers))]
    if report is not None:
        if report.misfit:
            name, how = next(iter(report.misfit.items()))
            return f"{name} is {how} there; is it another size of model?"
        names = report.missing or names
    weights = [name for name in names if name.endswith("weight")] or names
    near = difflib.get_close_matches(weights[0], list(named), n=1, cutoff=0.0)
    return f"{weights[0]} is wanted, the nearest is {near[0] if near else 'nothing'}"


def _shape(value: Tensor) -> str:
    return "x".join(map(str, value.shape)) or "scalar"


def _shapes(state: dict[str, Tensor]) -> dict[str, str]:
    return {name: _shape(value) for name, value in state.items()}


def _numbers(values: tuple[float, ...]) -> str:
    return "[" + ", ".join(f"{value:g}" for value in values) + "]"
