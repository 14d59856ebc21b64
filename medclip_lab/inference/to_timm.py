"""The image tower of a bundle as a timm folder: `timm.create_model("local-dir:FOLDER", pretrained=True)` gives its
features. The projection is the classifier there, so that `num_classes=0` leaves what a fine-tuning begins with.
open_clip's own image transformer becomes the VisionTransformer that timm builds for CLIP's.
"""

import copy
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models import get_model_args, save_for_hf
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from medclip_lab.data.preprocess import PreprocessConfig
from medclip_lab.errors import UserError
from medclip_lab.files import atomic_folder, read_json, refuse_to_replace, write_json
from medclip_lab.inference.bundle import CONFIG
from medclip_lab.inference.encoder import Encoder, load
from medclip_lab.models.spec import quiet

FORMAT = "medclip-lab-timm/1"
MANIFEST = "medclip_lab.json"
TOLERANCE = 1e-4
"""Largest difference of a feature that is let pass."""
CLIP = {"GELU": "vit_base_patch16_clip_224", "QuickGELU": "vit_base_patch16_clip_quickgelu_224"}
"""timm's image transformer of CLIP by its activation; every size of it is an argument."""
CROPS = {"squash": "squash", "shortest": "center", "longest": "border"}
"""How timm calls the ways of resizing."""


def to_timm(bundle: str | Path, out: str | Path, command: str = "") -> dict[str, Any]:
    """Write the image tower of a bundle for timm to `out`, whole or not at all.

    timm opens what was written, and its features on random pixels are compared with the bundle's before the folder is
    kept.

    Returns:
        What stands in its `medclip_lab.json`.

    Raises:
        UserError: a tower that timm has no architecture for, or features that differ.
    """
    out = Path(out).expanduser()
    encoder = load(bundle, device="cpu")
    refuse_to_replace(out, MANIFEST, (FORMAT,), "folder for timm")
    visual = encoder.model.model.visual
    width = int(read_json(encoder.folder / CONFIG, "bundle")["model_cfg"]["embed_dim"])
    channels = encoder.model.channels
    model, arguments = (
        _of_timm(visual, width, channels) if hasattr(visual, "trunk") else _of_open_clip(visual, channels)
    )
    with atomic_folder(out) as folder:
        with quiet():
            data = _data(encoder.preprocess.config, channels)
            save_for_hf(model, folder, model_args=arguments, safe_serialization=True, data_config=data)
        difference = _difference(encoder, folder)
        if not difference <= TOLERANCE:
            raise UserError(f"timm: features differ by {difference:.1e}, more than {TOLERANCE:g}: not written")
        facts = {
            "format": FORMAT,
            "bundle": encoder.fingerprint,
            "architecture": read_json(folder / "config.json", "timm")["architecture"],
            "largest_difference": difference,
            "command": command,
        }
        write_json(folder / MANIFEST, facts)
    return facts


def _refuse_unless(right: bool, what: str) -> None:
    if not right:
        raise UserError(f"timm: no architecture there computes {what}: keep to open_clip, which opens the bundle")


def _of_timm(visual: Any, width: int, channels: int) -> tuple[nn.Module, dict[str, Any]]:
    """The trunk with its projection as classifier."""
    layers = dict(visual.head.named_children())
    _refuse_unless("pool" not in layers, "open_clip's own pooling of a timm tower (timm_pool: abs_attn, rot_attn)")
    _refuse_unless(set(layers) <= {"drop", "proj"}, "a head of several layers (timm_proj: mlp)")
    trunk = copy.deepcopy(visual.trunk).to(memory_format=torch.contiguous_format)  # or it cannot be saved
    pool = getattr(trunk, "global_pool", None)
    if "proj" in layers:
        trunk.reset_classifier(width)
        classifier = trunk.get_classifier()
        _refuse_unless(isinstance(classifier, nn.Linear), f"a projection in the place of a {type(classifier).__name__}")
        _classify(classifier, layers["proj"].weight, layers["proj"].bias)
    # A transformer that timm makes with this pooling has its last norm behind it; open_clip changes the pooling later.
    moved = isinstance(pool, str) and isinstance(getattr(trunk, "fc_norm", None), nn.Identity)
    arguments = {"global_pool": pool, "fc_norm": False} if moved else {}
    if channels != 3:  # timm must have made the stem itself to save it
        arguments |= {"in_chans": channels}
        state = trunk.state_dict()
        with quiet():
            trunk = timm.create_model(trunk.pretrained_cfg["architecture"], **(get_model_args(trunk) | arguments))
        trunk.load_state_dict(state)
    return trunk.eval(), arguments


def _of_open_clip(visual: Any, channels: int) -> tuple[nn.Module, dict[str, Any]]:
    """timm's own conversion of CLIP's image transformer."""
    _refuse_unless(hasattr(visual, "class_embedding") and hasattr(visual, "ln_pre"), f"this {type(visual).__name__}")
    _refuse_unless(visual.attn_pool is None and visual.pool_type == "tok", "this pooling of patches")
    _refuse_unless(not isinstance(visual.ln_pre, nn.Identity), "an image tower without its first norm")
    block = visual.transformer.resblocks[0]
    _refuse_unless(isinstance(block.attn, nn.MultiheadAttention), "this kind of attention")
    activation = type(block.mlp.gelu).__name__
    _refuse_unless(activation in CLIP, f"the activation {activation}")
    _refuse_unless(isinstance(getattr(block, "ls_1", None), nn.Identity), "scaled layers (ls_init_value)")
    dim = len(visual.class_embedding)
    arguments = {
        "img_size": list(visual.image_size),
        "patch_size": visual.patch_size[0],
        "in_chans": channels,
        "embed_dim": dim,
        "depth": len(visual.transformer.resblocks),
        "num_heads": block.attn.num_heads,
        "mlp_ratio": block.mlp.c_fc.out_features / dim,
        "num_classes": 0 if visual.proj is None else visual.proj.shape[1],
    }
    with quiet():
        model = timm.create_model(CLIP[activation], **arguments)
    state = {f"visual.{name}": value for name, value in visual.state_dict().items()}
    model.load_state_dict(checkpoint_filter_fn(state, model))
    return model.eval(), arguments


@torch.no_grad()
def _classify(classifier: nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
    classifier.weight.copy_(weight)
    if classifier.bias is not None:
        classifier.bias.zero_() if bias is None else classifier.bias.copy_(bias)


def _data(preprocess: PreprocessConfig, channels: int) -> dict[str, Any]:
    return {
        "input_size": (channels, preprocess.size, preprocess.size),
        "interpolation": preprocess.interpolation,
        "mean": preprocess.mean[:channels],
        "std": preprocess.std[:channels],
        "crop_pct": 1.0,
        "crop_mode": CROPS[preprocess.resize_mode],
    }


@torch.inference_mode()
def _difference(encoder: Encoder, folder: Path) -> float:
    """The largest difference of a unit-norm feature on random pixels."""
    try:
        with quiet():
            model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    except Exception as error:  # timm and every tower in it have their own
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"timm: it cannot open what it wrote of this tower: {first[:200]}") from None
    dual = encoder.model
    size = encoder.preprocess.config.size
    pixels = torch.rand(4, dual.channels, size, size, generator=torch.Generator().manual_seed(0))
    theirs = F.normalize(model((pixels - dual.mean) / dual.std), dim=-1)
    return float((dual.encode_image(pixels) - theirs).abs().max())
