"""Low-rank adapters (Hu et al., ICLR 2022, arXiv 2106.09685) in the towers, by peft."""

import copy
import re
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from medclip_lab.errors import UserError


@dataclass
class LoraConfig:
    """Adapters of one tower: its own weights stand still, except those that `train` names."""

    target: str
    """Regular expression that the whole name of a module must match, names as the tower's `named_modules()` gives
    them: linear and convolutional layers, embeddings, and attentions of torch, of which queries, keys and values adapt.
    ".*[qv]_proj" is usual for a Llama, ".*(query|value)" for a BERT, ".*attn.qkv" for a ViT of timm, ".*attn" for
    one of open_clip."""
    rank: int = 8
    alpha: int = 16
    """The change is scaled by alpha / rank."""
    dropout: float = 0.0
    """Of what the adapters see."""
    train: list[str] = field(default_factory=lambda: [r"head\.", r"proj(\.|$)", "text_projection"])
    """Regular expressions; parameters of the tower whose names one of them matches from the start train too. These are
    the projections, which are new more often than not; ".*norm" or ".*bias$" adds others."""

    def __post_init__(self) -> None:
        for pattern in (self.target, *self.train):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"model.lora: {pattern!r} is no regular expression: {error}") from None
        if self.rank < 1 or self.alpha <= 0 or not 0 <= self.dropout < 1:
            raise ValueError(
                "model.lora: rank is at least 1, alpha positive and dropout in [0, 1), got "
                f"{self.rank}, {self.alpha} and {self.dropout}"
            )


def add_lora(tower: nn.Module, config: LoraConfig, name: str) -> None:
    """Put adapters into a tower, in place. They begin as no change.

    Args:
        name: of the tower, for errors.

    Raises:
        UserError: peft is not installed, nothing matches, or something that cannot be adapted does.
    """
    try:
        import peft
    except ImportError:
        raise UserError("model.lora needs peft: pip install 'medclip_lab[lora]'") from None
    setting = f"model.lora.{name}.target"
    matched = {path: module for path, module in tower.named_modules() if path and re.fullmatch(config.target, path)}
    if not matched:
        linear = [path for path, module in tower.named_modules() if isinstance(module, nn.Linear)]
        raise UserError(f"{setting}: no module of the tower matches {config.target!r}; linear ones are {_some(linear)}")
    for path, module in matched.items():
        if problem := _unfit(path, module, tower, config):
            raise UserError(f"{setting}: {path} {problem}")
    # peft's adapter of torch's attention adds to the frozen weights and subtracts again in every pass, and rounding
    # changes them; its adapter of a single parameter leaves them alone.
    attentions = [path for path, module in matched.items() if isinstance(module, nn.MultiheadAttention)]
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=[path for path in matched if path not in attentions],
        target_parameters=[f"{path}.in_proj_weight" for path in attentions] or None,
        fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in matched.values()),  # GPT-2's linear layers
        bias="none",
    )
    try:
        peft.inject_adapter_in_model(settings, tower)
    except (ValueError, TypeError, NotImplementedError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{setting}: peft cannot adapt {_some(list(matched))}: {first}") from None
    for path, parameter in tower.named_parameters():
        parameter.requires_grad_("lora_" in path or any(re.match(pattern, path) for pattern in config.train))


def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a model with its adapters merged into the weights: as if there had never been any."""
    state = model.state_dict()
    inside: list[str] = []
    for path, module in list(model.named_modules()):
        if not _is_adapter(module) or path.startswith(tuple(inside)):
            continue
        inside.append(f"{path}.")
        layer: Any = copy.deepcopy(module)
        layer.merge(safe_merge=True)
        state = {name: value for name, value in state.items() if not name.startswith(f"{path}.")}
        state |= {f"{path}.{name}": value for name, value in layer.get_base_layer().state_dict().items()}
    return state


def _unfit(path: str, module: nn.Module, tower: nn.Module, config: LoraConfig) -> str:
    """Why a module that matches cannot be adapted; nothing if it can."""
    above = path.rpartition(".")[0]
    if above and isinstance(tower.get_submodule(above), nn.MultiheadAttention):
        return f"is inside an attention of torch, which never calls it: match {above} and not its parts"
    if isinstance(module, nn.MultiheadAttention) and config.dropout:
        return "is an attention of torch, where adapters have no dropout: set it to 0"
    if isinstance(module, nn.MultiheadAttention) and not module._qkv_same_embed_dim:
        return "is an attention of torch with keys or values of another width, which peft cannot adapt"
    if isinstance(module, nn.Conv2d) and module.groups > 1:
        return "is a convolution in groups, whose adapter could not be merged: leave it out"
    return ""


def _is_adapter(module: nn.Module) -> bool:
    return hasattr(module, "lora_A") and hasattr(module, "get_base_layer")


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (" ..." if len(names) > 4 else "")
