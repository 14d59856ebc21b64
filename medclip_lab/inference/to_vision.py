"""The image tower of a bundle alone, as what LLaVA and its kin take: a `CLIPVisionModel` or a `SiglipVisionModel`.

Hidden states of every layer, patch tokens and a processor that prepares images as the bundle does. open_clip's own
image transformer is CLIP's; a transformer of timm without class token, pooled by attention, is SigLIP's.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medclip_lab.errors import UserError
from medclip_lab.files import refuse_to_replace
from medclip_lab.inference.encoder import Encoder, load
from medclip_lab.inference.image_size import set_image_size
from medclip_lab.inference.to_transformers import (
    MANIFEST,
    ONE_CHANNEL,
    TOLERANCE,
    processor,
    refuse_unless,
    save_folder,
    vision_config,
    vision_weights,
)
from medclip_lab.models.from_transformers import activation_name

FORMAT = "medclip-lab-vision/1"


def to_vision(bundle: str | Path, out: str | Path, command: str = "", image_size: int | None = None) -> dict[str, Any]:
    """Write the image tower of a bundle and its processor for transformers to `out`, whole or not at all.

    Patch tokens of the last layer are compared with the bundle's on random pixels before the folder is kept.

    Args:
        image_size: side of the images that the tower is set to, its position embeddings interpolated; None leaves it.

    Returns:
        What stands in its `medclip_lab.json`.

    Raises:
        UserError: a tower that is neither, or an image size that it cannot be set to.
    """
    out = Path(out).expanduser()
    encoder = load(bundle, device="cpu")
    refuse_to_replace(out, MANIFEST, (FORMAT,), "folder of an image tower")
    refuse_unless(encoder.model.channels == 3, ONE_CHANNEL)
    native = encoder.preprocess.config.size
    if image_size is not None:
        set_image_size(encoder, image_size)
    visual = encoder.model.model.visual
    model = (_siglip(visual) if hasattr(visual, "trunk") else _clip(visual)).eval()
    difference = _difference(encoder, model)
    if not difference <= TOLERANCE:
        raise UserError(
            f"transformers: features or patch tokens differ by {difference:.1e}, more than {TOLERANCE:g}: not written"
        )
    parts = (model, processor(encoder.preprocess.config))
    return save_folder(out, parts, encoder, native, difference, {"format": FORMAT, "command": command})


def _clip(visual: Any) -> Any:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    return _filled(CLIPVisionModel(CLIPVisionConfig(**vision_config(visual))), vision_weights(visual))


def _siglip(visual: Any) -> Any:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    trunk = visual.trunk
    refuse_unless(hasattr(trunk, "blocks") and hasattr(trunk, "attn_pool"), f"a {type(trunk).__name__}")
    refuse_unless(trunk.attn_pool is not None, "a transformer of timm that is not pooled by attention")
    refuse_unless(trunk.num_prefix_tokens == 0, "a transformer of timm with class or register tokens")
    refuse_unless(trunk.pos_embed is not None, "a transformer without position embeddings")
    first = trunk.blocks[0]
    refuse_unless(isinstance(first.ls1, nn.Identity), "scaled layers (LayerScale)")
    config = SiglipVisionConfig(
        hidden_size=trunk.embed_dim,
        intermediate_size=first.mlp.fc1.out_features,
        num_hidden_layers=len(trunk.blocks),
        num_attention_heads=first.attn.num_heads,
        num_channels=trunk.patch_embed.proj.in_channels,
        image_size=trunk.patch_embed.img_size[0],
        patch_size=trunk.patch_embed.patch_size[0],
        hidden_act=_activation(first.mlp.act),
        layer_norm_eps=first.norm1.eps,
    )
    weights = {
        "embeddings.patch_embedding.weight": trunk.patch_embed.proj.weight,
        "embeddings.patch_embedding.bias": trunk.patch_embed.proj.bias,
        "embeddings.position_embedding.weight": trunk.pos_embed[0],
        "head.probe": trunk.attn_pool.latent,
    }
    for kind in ("weight", "bias"):
        for number, block in enumerate(trunk.blocks):
            place = f"encoder.layers.{number}"
            for name, part in zip("qkv", getattr(block.attn.qkv, kind).chunk(3), strict=True):
                weights[f"{place}.self_attn.{name}_proj.{kind}"] = part
            weights[f"{place}.self_attn.out_proj.{kind}"] = getattr(block.attn.proj, kind)
            for theirs, ours in (("layer_norm1", block.norm1), ("layer_norm2", block.norm2)):
                weights[f"{place}.{theirs}.{kind}"] = getattr(ours, kind)
            for layer in ("fc1", "fc2"):
                weights[f"{place}.mlp.{layer}.{kind}"] = getattr(getattr(block.mlp, layer), kind)
        pool = trunk.attn_pool
        weights[f"post_layernorm.{kind}"] = getattr(trunk.norm, kind)
        weights[f"head.attention.in_proj_{kind}"] = torch.cat([getattr(pool.q, kind), getattr(pool.kv, kind)])
        weights[f"head.attention.out_proj.{kind}"] = getattr(pool.proj, kind)
        weights[f"head.layernorm.{kind}"] = getattr(pool.norm, kind)
        for layer in ("fc1", "fc2"):
            weights[f"head.mlp.{layer}.{kind}"] = getattr(getattr(pool.mlp, layer), kind)
    return _filled(SiglipVisionModel(config), weights)


def _activation(layer: nn.Module) -> str:
    name = activation_name(layer)
    refuse_unless(name in ("gelu", "gelu_pytorch_tanh"), f"the activation {type(layer).__name__}")
    return str(name)


def _filled(model: Any, weights: dict[str, Tensor]) -> Any:
    # Some versions of transformers have the tower one level deeper.
    deeper = "vision_model." if any(name.startswith("vision_model.") for name in model.state_dict()) else ""
    state = {f"{deeper}{name}": value.detach().contiguous() for name, value in weights.items()}
    found = model.load_state_dict(state, strict=False)
    missing = [name for name in found.missing_keys if not name.endswith("position_ids")]
    refuse_unless(not missing and not found.unexpected_keys, f"{(found.unexpected_keys or missing or ['all'])[0]}")
    return model


@torch.inference_mode()
def _difference(encoder: Encoder, model: Any) -> float:
    """The largest difference of a patch token before the last norm, or of a unit-norm feature, on random pixels."""
    size = encoder.preprocess.config.size
    pixels = torch.rand(2, encoder.model.channels, size, size, generator=torch.Generator().manual_seed(0))
    inputs = encoder.model.normalised(pixels)
    visual = encoder.model.model.visual
    ours = visual.forward_intermediates(inputs, indices=1)["image_intermediates"][0].flatten(2).transpose(1, 2)
    made = model(inputs, output_hidden_states=True)
    tokens = (made.hidden_states[-1][:, -ours.shape[1] :] - ours).abs().max()
    projection = getattr(visual, "proj", None)  # which these classes leave to others
    pooled = made.pooler_output if projection is None else made.pooler_output @ projection
    feature = visual.trunk(inputs) if hasattr(visual, "trunk") else visual(inputs)
    features = (F.normalize(pooled, dim=-1) - F.normalize(feature, dim=-1)).abs().max()
    return float(torch.maximum(tokens, features))  # which lets nothing pass that is no number
