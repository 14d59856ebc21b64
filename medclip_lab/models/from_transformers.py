"""CLIP and SigLIP as transformers names their parts, under the names of open_clip and timm."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

CLIP = ("clip", "clip_vision_model", "clip_text_model")
SIGLIP = ("siglip", "siglip_vision_model", "siglip_text_model")
LAYER = re.compile(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
OWN_LAYER = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
TIMM_LAYER = {
    "self_attn.out_proj": "attn.proj",
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
TEXT = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.": "ln_final.",
    "head.": "text_projection.",
}
CLIP_IMAGE = {
    "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding.": "conv1.",
    "embeddings.position_embedding.weight": "positional_embedding",
    "pre_layrnorm.": "ln_pre.",
    "post_layernorm.": "ln_post.",
}
SIGLIP_IMAGE = {
    "embeddings.patch_embedding.": "patch_embed.proj.",
    "embeddings.position_embedding.weight": "pos_embed",
    "post_layernorm.": "norm.",
    "head.probe": "attn_pool.latent",
    "head.attention.out_proj.": "attn_pool.proj.",
    "head.layernorm.": "attn_pool.norm.",
    "head.mlp.": "attn_pool.mlp.",
}


def as_open_clip(state: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """The weights of a `CLIPModel` or `SiglipModel`, or of one tower of either, as open_clip has them: text towers and
    CLIP's image tower are its own, SigLIP's image tower is timm's.

    Args:
        state: all weights, by transformers' names.
        kind: the `model_type`, of CLIP or SIGLIP.
    """
    alone = next((part for part in ("vision_model.", "text_model.") if kind.endswith(f"_{part[:-1]}")), "")
    parts: dict[str, dict[str, Tensor]] = {"vision_model.": {}, "text_model.": {}}
    named: dict[str, Tensor] = {}
    for name, value in state.items():
        if alone and not name.startswith(alone):
            name = f"{alone}{name}"
        part = next((part for part in parts if name.startswith(part)), None)
        if part is not None:
            parts[part][name.removeprefix(part)] = value
        elif name in ("visual_projection.weight", "text_projection.weight"):
            named["visual.proj" if name.startswith("visual") else "text.text_projection"] = value.T.contiguous()
        else:
            named[name] = value  # scale and bias
    if kind in CLIP:
        image = _tower(parts["vision_model."], CLIP_IMAGE, OWN_LAYER, "transformer.resblocks", "attn.in_proj_")
        named |= {f"visual.{name}": value for name, value in image.items()}
    else:
        image = _pooling(_tower(parts["vision_model."], SIGLIP_IMAGE, TIMM_LAYER, "blocks", "attn.qkv."))
        named |= {f"visual.trunk.{name}": value for name, value in image.items()}
    text = _tower(parts["text_model."], TEXT, OWN_LAYER, "transformer.resblocks", "attn.in_proj_")
    return named | {f"text.{name}": value for name, value in text.items()}


def activation_name(layer: nn.Module) -> str | None:
    """As transformers calls it; None for one that is neither of CLIP nor of SigLIP."""
    kind = type(layer).__name__
    if kind == "GELUTanh" or getattr(layer, "approximate", "none") == "tanh":
        return "gelu_pytorch_tanh"
    return {"GELU": "gelu", "QuickGELU": "quick_gelu"}.get(kind)


def _tower(
    state: Mapping[str, Tensor], names: Mapping[str, str], layer: Mapping[str, str], blocks: str, packed: str
) -> dict[str, Tensor]:
    """One tower; query, key and value of a layer become one weight. Names nobody knows stay, to be told as unused."""
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        match = LAYER.fullmatch(name)
        if match is None:
            begin = next((begin for begin in names if name.startswith(begin)), "")
            found[names.get(begin, "") + name.removeprefix(begin)] = value
        elif match[2] == "self_attn.q_proj":
            three = [state[name.replace("q_proj", f"{one}_proj")] for one in "qkv"]
            found[f"{blocks}.{match[1]}.{packed}{match[3]}"] = torch.cat(three)
        elif match[2] not in ("self_attn.k_proj", "self_attn.v_proj"):
            found[f"{blocks}.{match[1]}.{layer.get(match[2], match[2])}.{match[3]}"] = value
    return found


def _pooling(image: dict[str, Tensor]) -> dict[str, Tensor]:
    """SigLIP's image tower as timm has it: query apart from key and value, positions with a batch axis."""
    for kind in ("weight", "bias"):
        packed = image.pop(f"head.attention.in_proj_{kind}", None)
        if packed is not None:
            width = len(packed) // 3
            image |= {f"attn_pool.q.{kind}": packed[:width].clone(), f"attn_pool.kv.{kind}": packed[width:].clone()}
    if "pos_embed" in image:
        image["pos_embed"] = image["pos_embed"][None]
    return image
