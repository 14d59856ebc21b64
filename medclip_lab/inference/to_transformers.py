"""A bundle as a transformers folder: `pipeline("zero-shot-image-classification", model=folder)` runs it offline.

open_clip's own image transformer becomes a `CLIPModel`, a timm tower a `VisionTextDualEncoderModel` around timm's code;
the text tower is open_clip's transformer in both. What these classes cannot compute is refused, never approximated.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medclip_lab.data.preprocess import PreprocessConfig
from medclip_lab.errors import UserError
from medclip_lab.files import atomic_folder, read_json, refuse_to_replace, write_json
from medclip_lab.inference.bundle import CONFIG
from medclip_lab.inference.encoder import Encoder, load
from medclip_lab.inference.image_size import set_image_size

FORMAT = "medclip-lab-transformers/1"
MANIFEST = "medclip_lab.json"
TOLERANCE = 1e-4
"""Largest difference of a feature that is let pass."""
ONE_CHANNEL = "a tower of one channel behind its processor of three"
LEGACY_EOS = 2
"""With this id transformers takes the largest id of a text as its end, as open_clip's "argmax" does."""


def to_transformers(
    bundle: str | Path, out: str | Path, command: str = "", image_size: int | None = None
) -> dict[str, Any]:
    """Write a bundle's model, processor and tokenizer for transformers to `out`, whole or not at all.

    The features of the written folder are compared with the bundle's on random pixels and prompts before it is kept.
    A `CLIPModel`'s folder opens as a `CLIPVisionModel` too, as LLaVA wants its image tower.

    Args:
        image_size: side of the images that the tower is set to, its position embeddings interpolated (bicubic, as
            open_clip does); None leaves it.

    Returns:
        What stands in its `medclip_lab.json`: the bundle's fingerprint and the largest difference of a feature.

    Raises:
        UserError: a tower, pooling or preprocessing that transformers' classes do not have, or an image size that the
            tower cannot be set to.
    """
    out = Path(out).expanduser()
    encoder = load(bundle, device="cpu")
    refuse_to_replace(out, MANIFEST, (FORMAT,), "folder for transformers")
    refuse_unless(encoder.model.channels == 3, ONE_CHANNEL)
    spec = read_json(encoder.folder / CONFIG, "bundle")["model_cfg"]
    native = encoder.preprocess.config.size
    if image_size is not None:
        set_image_size(encoder, image_size)
        spec["vision_cfg"]["timm_input_size"] = image_size
    model = _model(encoder, spec).eval()
    difference = _difference(encoder, model)
    if not difference <= TOLERANCE:  # nor one that is no number
        raise UserError(f"transformers: features differ by {difference:.1e}, more than {TOLERANCE:g}: not written")
    parts = (model, processor(encoder.preprocess.config), _tokenizer(encoder))
    told = {"format": FORMAT, "logit_bias": encoder.logit_bias, "command": command}
    return save_folder(out, parts, encoder, native, difference, told)


def save_folder(
    out: Path, parts: Sequence[Any], encoder: Encoder, native: int, difference: float, told: Mapping[str, Any]
) -> dict[str, Any]:
    """Write what transformers opens, whole or not at all, and what is known of it; returns that.

    Args:
        parts: the model, and what prepares its inputs.
        native: side of the images that the bundle takes, whatever the encoder was set to.
    """
    size = encoder.preprocess.config.size
    facts = {
        "bundle": encoder.fingerprint,
        "class": type(parts[0]).__name__,
        "image_size": size,
        "interpolated_from": native if size != native else None,
        "largest_difference": difference,
        **told,
    }
    with atomic_folder(out) as folder:
        for part in parts:
            part.save_pretrained(folder)
        write_json(folder / MANIFEST, facts)
    return facts


def _model(encoder: Encoder, spec: Mapping[str, Any]) -> Any:
    from transformers import (
        CLIPConfig,
        CLIPModel,
        CLIPTextConfig,
        CLIPVisionConfig,
        TimmWrapperConfig,
        VisionTextDualEncoderConfig,
        VisionTextDualEncoderModel,
    )

    towers: Any = encoder.model.model
    text = getattr(towers, "text", towers)
    visual = towers.visual
    text_config = CLIPTextConfig(**_text_config(text, spec))
    width = int(spec["embed_dim"])
    weights = {"logit_scale": towers.logit_scale.detach().reshape(())}
    weights |= {f"text_model.{name}": value for name, value in _text_weights(text).items()}
    weights["text_projection.weight"] = _projection(getattr(text, "text_projection", None), text.ln_final.bias, width)
    if hasattr(visual, "trunk"):
        config = TimmWrapperConfig(
            architecture=spec["vision_cfg"]["timm_model_name"],
            model_args=_timm_arguments(spec["vision_cfg"]),
            hidden_size=int(visual.trunk.num_features),
        )
        model: Any = VisionTextDualEncoderModel(
            config=VisionTextDualEncoderConfig.from_vision_text_configs(config, text_config, projection_dim=width)
        )
        trunk = visual.trunk.state_dict()
        weights |= {f"vision_model.timm_model.{name}": value for name, value in trunk.items()}
        weights["visual_projection.weight"] = _timm_projection(visual, width)
    else:
        image_config = CLIPVisionConfig(**vision_config(visual))
        model = CLIPModel(CLIPConfig(vision_config=image_config, text_config=text_config, projection_dim=width))
        weights |= {f"vision_model.{name}": value for name, value in vision_weights(visual).items()}
        weights["visual_projection.weight"] = _projection(visual.proj, visual.ln_post.bias, width)
    found = model.load_state_dict({name: value.contiguous() for name, value in weights.items()}, strict=False)
    missing = [name for name in found.missing_keys if not name.endswith("position_ids")]
    if missing or found.unexpected_keys:
        raise UserError(
            f"transformers: {type(model).__name__} has no place for {(found.unexpected_keys or missing)[0]}"
        )
    return model


def refuse_unless(right: bool, what: str) -> None:
    if not right:
        raise UserError(f"transformers: no class there computes {what}: keep to open_clip, which opens the bundle")


def _text_config(text: Any, spec: Mapping[str, Any]) -> dict[str, Any]:
    refuse_unless(hasattr(text, "token_embedding"), "this text tower (a Hugging Face model with open_clip's pooling)")
    refuse_unless(text.attn_mask is not None, "a text tower that looks both ways")
    refuse_unless(getattr(text, "cls_emb", None) is None, "a text tower with a class token at its end")
    pool = getattr(text, "pool_type", None) or text.text_pool_type
    eos = getattr(text, "eos_id", None) if hasattr(text, "eos_id") else text.text_eos_id
    right = pool == "argmax" or (pool == "eos" and eos != LEGACY_EOS)
    refuse_unless(right, f"text pooling {pool!r}")
    block = text.transformer.resblocks[0]
    return _blocks(text.transformer.resblocks) | {
        "vocab_size": text.token_embedding.num_embeddings,
        "hidden_size": text.token_embedding.embedding_dim,
        "max_position_embeddings": len(text.positional_embedding),
        "hidden_act": _activation(block),
        "eos_token_id": LEGACY_EOS if pool == "argmax" else eos,
        "bos_token_id": None,
        "pad_token_id": None,
        "projection_dim": int(spec["embed_dim"]),
    }


def _blocks(blocks: Any) -> dict[str, Any]:
    first = blocks[0]
    for name in ("ls_1", "ls_2"):
        refuse_unless(isinstance(getattr(first, name, None), torch.nn.Identity), "scaled layers (ls_init_value)")
    refuse_unless(isinstance(first.attn, torch.nn.MultiheadAttention), "this kind of attention")
    return {
        "intermediate_size": first.mlp.c_fc.out_features,
        "num_hidden_layers": len(blocks),
        "num_attention_heads": first.attn.num_heads,
        "layer_norm_eps": first.ln_1.eps,
    }


def _activation(block: Any) -> str:
    name = type(block.mlp.gelu).__name__
    refuse_unless(name in ("GELU", "QuickGELU"), f"the activation {name}")
    return "gelu" if name == "GELU" else "quick_gelu"


def vision_config(visual: Any) -> dict[str, Any]:
    refuse_unless(hasattr(visual, "class_embedding") and hasattr(visual, "ln_pre"), "this image tower")
    refuse_unless(visual.attn_pool is None and visual.pool_type == "tok", "this pooling of patches")
    refuse_unless(not isinstance(visual.ln_pre, torch.nn.Identity), "an image tower without its first norm")
    refuse_unless(visual.image_size[0] == visual.image_size[1], "images that are not square")
    return _blocks(visual.transformer.resblocks) | {
        "hidden_size": len(visual.class_embedding),
        "image_size": visual.image_size[0],
        "patch_size": visual.patch_size[0],
        "hidden_act": _activation(visual.transformer.resblocks[0]),
    }


def _timm_arguments(vision: Mapping[str, Any]) -> dict[str, Any]:
    pool = vision.get("timm_pool", "avg")
    refuse_unless(pool not in ("abs_attn", "rot_attn"), f"the pooling {pool!r}")
    size = {"img_size": vision["timm_input_size"]} if "timm_input_size" in vision else {}
    return ({"global_pool": pool} if pool else {}) | size


def _timm_projection(visual: Any, width: int) -> Tensor:
    layers = dict(visual.head.named_children())
    refuse_unless(set(layers) <= {"drop", "proj"}, "a head of several layers (timm_proj: mlp)")
    if "proj" not in layers:
        refuse_unless(visual.trunk.num_features == width, "a tower whose classifier is its projection")
        return torch.eye(width)
    refuse_unless(layers["proj"].bias is None, "a projection with a bias")
    weight: Tensor = layers["proj"].weight.detach()
    return weight


def _projection(projection: Any, like: Tensor, width: int) -> Tensor:
    if projection is None:
        refuse_unless(len(like) == width, "a tower without projection")
        return torch.eye(width)
    if isinstance(projection, torch.nn.Linear):
        refuse_unless(projection.bias is None, "a projection with a bias")
        return projection.weight.detach()
    transposed: Tensor = projection.detach().T
    return transposed


def _block_weights(blocks: Any) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for number, block in enumerate(blocks):
        place = f"encoder.layers.{number}"
        for kind in ("weight", "bias"):
            packed = getattr(block.attn, f"in_proj_{kind}").detach()
            for name, part in zip("qkv", packed.chunk(3), strict=True):
                weights[f"{place}.self_attn.{name}_proj.{kind}"] = part
            weights[f"{place}.self_attn.out_proj.{kind}"] = getattr(block.attn.out_proj, kind).detach()
            for theirs, ours in (("layer_norm1", block.ln_1), ("layer_norm2", block.ln_2)):
                weights[f"{place}.{theirs}.{kind}"] = getattr(ours, kind).detach()
            for theirs, ours in (("mlp.fc1", block.mlp.c_fc), ("mlp.fc2", block.mlp.c_proj)):
                weights[f"{place}.{theirs}.{kind}"] = getattr(ours, kind).detach()
    return weights


def _text_weights(text: Any) -> dict[str, Tensor]:
    return _block_weights(text.transformer.resblocks) | {
        "embeddings.token_embedding.weight": text.token_embedding.weight.detach(),
        "embeddings.position_embedding.weight": text.positional_embedding.detach(),
        "final_layer_norm.weight": text.ln_final.weight.detach(),
        "final_layer_norm.bias": text.ln_final.bias.detach(),
    }


def vision_weights(visual: Any) -> dict[str, Tensor]:
    weights = _block_weights(visual.transformer.resblocks) | {
        "embeddings.class_embedding": visual.class_embedding.detach(),
        "embeddings.patch_embedding.weight": visual.conv1.weight.detach(),
        "embeddings.position_embedding.weight": visual.positional_embedding.detach(),
    }
    for theirs, ours in (("pre_layrnorm", visual.ln_pre), ("post_layernorm", visual.ln_post)):
        weights |= {f"{theirs}.{kind}": getattr(ours, kind).detach() for kind in ("weight", "bias")}
    return weights


@torch.inference_mode()
def _difference(encoder: Encoder, model: Any) -> float:
    """The largest difference of a unit-norm feature, on random pixels and on prompts of several lengths."""
    size = encoder.preprocess.config.size
    pixels = torch.rand(4, 3, size, size, generator=torch.Generator().manual_seed(0))
    ids = encoder.tokenizer(["Effusion.", "No pleural effusion is seen on the left.", "Normal heart size."])
    mean, std = encoder.model.mean, encoder.model.std
    theirs_image = model.get_image_features(pixel_values=(pixels - mean) / std).pooler_output
    theirs_text = model.get_text_features(input_ids=ids).pooler_output
    pairs = ((encoder.model.encode_image(pixels), theirs_image), (encoder.model.encode_text(ids), theirs_text))
    return float(
        torch.stack(
            [(ours - torch.nn.functional.normalize(theirs, dim=-1)).abs().max() for ours, theirs in pairs]
        ).max()
    )


def processor(preprocess: PreprocessConfig) -> Any:
    from transformers import CLIPImageProcessor

    side = preprocess.size
    if preprocess.resize_mode == "longest":
        refuse_unless(preprocess.fill_color == 0, "a border that is not black")
    sizes = {
        "squash": {"height": side, "width": side},
        "shortest": {"shortest_edge": side},
        "longest": {"max_height": side, "max_width": side},
    }
    # "longest" rounds the shorter side down where open_clip rounds it to the nearest: a row of pixels at most.
    return CLIPImageProcessor(
        size=sizes[preprocess.resize_mode],
        do_center_crop=preprocess.resize_mode != "squash",  # which also pads what is smaller, around the middle
        crop_size={"height": side, "width": side},
        resample={"bicubic": 3, "bilinear": 2}[preprocess.interpolation],
        image_mean=list(preprocess.mean),
        image_std=list(preprocess.std),
    )


def _tokenizer(encoder: Encoder) -> Any:
    """The bundle's own tokenizer, which cuts at the context of the text tower."""
    from transformers import AutoTokenizer

    if not (encoder.folder / "tokenizer.json").exists():
        raise UserError(
            "transformers: the bundle has no tokenizer.json (open_clip's own tokenizer is no Hugging Face one): it can "
            "not be exported"
        )
    tokenizer = AutoTokenizer.from_pretrained(encoder.folder, local_files_only=True)
    towers: Any = encoder.model.model
    tokenizer.model_max_length = int(getattr(towers, "text", towers).context_length)
    return tokenizer
