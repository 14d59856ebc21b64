"""Bundles with towers of open_clip's own, made without training."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from medclip_lab.data.preprocess import PreprocessConfig
from medclip_lab.data.tokenizer import EOS_ID
from medclip_lab.inference.bundle import finish_bundle, write_bundle
from medclip_lab.models.spec import build_spec, complete

VIT = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}
TEXT = {"context_length": 24, "width": 16, "heads": 2, "layers": 2}


def make_bundle(
    out: Path,
    tokenizer: Path,
    vision: dict[str, Any],
    text: dict[str, Any],
    side: int = 32,
    quick_gelu: bool = False,
    embed_dim: int = 16,
    **preprocess: Any,
) -> Path:
    """A bundle of random weights; `tokenizer` is a folder that has one, such as another bundle."""
    size = len(json.loads((tokenizer / "tokenizer.json").read_text())["model"]["vocab"])
    named: dict[str, Any] = {"hf_tokenizer_name": "tokenizer"}
    if "hf_config" not in text:
        named |= {"vocab_size": size, "pool_type": "eos", "eos_id": EOS_ID}
    spec = {"embed_dim": embed_dim, "vision_cfg": vision, "text_cfg": text | named, "custom_text": True}
    if quick_gelu:
        spec["quick_gelu"] = True
    if "hf_config" in text:
        spec = complete(spec)
    torch.manual_seed(0)
    model = build_spec(spec)
    out.mkdir(parents=True)
    write_bundle(
        out,
        weights={name: value.contiguous() for name, value in model.state_dict().items()},
        model_cfg=spec,
        preprocess=PreprocessConfig(size=side, **preprocess),
        tokenizer=tokenizer,
        labelsets=[],
        card={},
        augment={},
    )
    finish_bundle(out, "pytest", {})
    return out


def pictures(count: int, side: int = 32) -> list[Image.Image]:
    """Half of them in colour."""
    chance = np.random.default_rng(0)
    shapes = [(side, side) if number % 2 else (side, side, 3) for number in range(count)]
    return [Image.fromarray((chance.random(shape) * 255).astype(np.uint8)) for shape in shapes]
