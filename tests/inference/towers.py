"""Bundles with towers of open_clip's own, made without training."""

import json
from pathlib import Path
from typing import Any

import torch

from medclip_lab.data.preprocess import PreprocessConfig
from medclip_lab.data.tokenizer import EOS_ID
from medclip_lab.inference.bundle import finish_bundle, write_bundle
from medclip_lab.models.spec import build_spec

VIT = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}
TEXT = {"context_length": 24, "width": 16, "heads": 2, "layers": 2}


def make_bundle(
    out: Path, tokenizer: Path, vision: dict[str, Any], text: dict[str, Any], side: int = 32, **preprocess: Any
) -> Path:
    """A bundle of random weights; `tokenizer` is a folder that has one, such as another bundle."""
    size = len(json.loads((tokenizer / "tokenizer.json").read_text())["model"]["vocab"])
    named = {"vocab_size": size, "hf_tokenizer_name": "tokenizer", "pool_type": "eos", "eos_id": EOS_ID}
    spec = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text | named, "custom_text": True}
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
