"""Image towers alone, for LLaVA: tokens of every layer, other image sizes, and what is neither CLIP nor SigLIP."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.models import register_model

from medclip_lab.cli import main
from medclip_lab.errors import UserError
from medclip_lab.inference import to_vision as module
from medclip_lab.inference.encoder import load
from medclip_lab.inference.to_vision import to_vision
from tests.inference.towers import TEXT, VIT, make_bundle

SIGLIP = {"timm_model_name": "tiny_siglip", "image_size": 160, "timm_pool": "map", "timm_proj": "none"}


@register_model
def tiny_siglip(**options: Any) -> Any:
    """A SigLIP tower of two layers, which timm has none of."""
    shape = {"class_token": False, "embed_dim": 96, "num_heads": 3, "depth": 2, "img_size": 160}
    return timm.create_model("vit_tiny_patch16_224", **(shape | options))


@pytest.mark.parametrize(("vision", "kind", "size"), [(VIT, "CLIPVisionModel", 48), (SIGLIP, "SiglipVisionModel", 192)])
def test_towers_at_their_size_and_at_another(
    toy_bundle: Path, tmp_path: Path, vision: dict[str, Any], kind: str, size: int
) -> None:
    import transformers

    native = vision["image_size"]
    bundle = make_bundle(
        tmp_path / "bundle", toy_bundle, vision, TEXT, side=native, embed_dim=16 if vision is VIT else 96
    )
    assert to_vision(bundle, tmp_path / "own")["class"] == kind
    tower = getattr(transformers, kind).from_pretrained(tmp_path / "own").eval()
    pixels = torch.randn(2, 3, native, native)
    visual: Any = load(bundle, device="cpu").model.model.visual
    with torch.inference_mode():
        theirs = tower(pixels, output_hidden_states=True).hidden_states[1:]
        ours = visual.forward_intermediates(pixels)["image_intermediates"]
    assert len(theirs) == len(ours)
    for layer, patches in zip(theirs, ours, strict=True):
        patches = patches.flatten(2).transpose(1, 2)
        np.testing.assert_allclose(layer[:, -patches.shape[1] :], patches, atol=1e-4)

    arguments = ["--to", "vision", "--out", str(tmp_path / "other"), "--image-size", str(size)]
    assert main(["export", str(bundle), *arguments]) == 0
    facts = json.loads((tmp_path / "other" / "medclip_lab.json").read_text())
    assert (facts["image_size"], facts["interpolated_from"]) == (size, native)
    other = getattr(transformers, kind).from_pretrained(tmp_path / "other").eval()
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "other")
    made = processor(np.zeros((size, size, 3), np.uint8), return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        tokens = other(made).last_hidden_state
    patch = other.config.patch_size
    assert tokens.shape[1] == (size // patch) ** 2 + (kind == "CLIPVisionModel")


@pytest.mark.parametrize(
    ("vision", "reason"),
    [
        ({"timm_model_name": "test_resnet", "image_size": 32}, "a ResNet"),
        (SIGLIP | {"timm_model_name": "test_vit3"}, "class or register tokens"),
        ({"timm_model_name": "test_vit", "timm_pool": "token", "image_size": 160}, "not pooled by attention"),
        (VIT | {"attentional_pool": True}, "this pooling of patches"),
    ],
)
def test_other_towers_are_refused(toy_bundle: Path, tmp_path: Path, vision: dict[str, Any], reason: str) -> None:
    bundle = make_bundle(tmp_path / "bundle", toy_bundle, vision, TEXT, side=vision["image_size"], embed_dim=96)
    with pytest.raises(UserError, match=f"no class there computes .*{reason}"):
        to_vision(bundle, tmp_path / "vision")
    assert not (tmp_path / "vision").exists()


def test_a_difference_is_not_written(toy_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = module.vision_weights

    def turned(visual: Any) -> dict[str, torch.Tensor]:
        weights = whole(visual)
        return weights | {"post_layernorm.weight": weights["post_layernorm.weight"].flip(0) * torch.arange(1, 33)}

    monkeypatch.setattr(module, "vision_weights", turned)
    bundle = make_bundle(tmp_path / "bundle", toy_bundle, VIT, TEXT)
    with pytest.raises(UserError, match="patch tokens differ by"):
        to_vision(bundle, tmp_path / "vision")
    assert not (tmp_path / "vision").exists()


def test_one_channel_is_refused(toy_bundle: Path, tmp_path: Path) -> None:
    """The processor there gives three, whatever the tower takes."""
    from medclip_lab.inference.to_transformers import to_transformers

    vision = VIT | {"in_chans": 1, "layers": 1}
    bundle = make_bundle(tmp_path / "bundle", toy_bundle, vision, TEXT, mean=(0.5,) * 3, std=(0.25,) * 3)
    for write in (to_vision, to_transformers):
        with pytest.raises(UserError, match="no class there computes a tower of one channel"):
            write(bundle, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_no_number_is_not_written(toy_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A projection that leaves patch tokens as they are and spoils the feature."""
    bundle = make_bundle(tmp_path / "bundle", toy_bundle, VIT, TEXT)
    encoder = load(bundle, device="cpu")
    with torch.no_grad():
        encoder.model.model.visual.proj.fill_(torch.nan)
    monkeypatch.setattr(module, "load", lambda *_args, **_options: encoder)
    with pytest.raises(UserError, match="differ by nan"):
        to_vision(bundle, tmp_path / "vision")
    assert not (tmp_path / "vision").exists()
