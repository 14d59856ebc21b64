"""CLIP and SigLIP as Hugging Face has them, as a start: both towers answer as they did in transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import register_model
from torch import Tensor

from medclip_lab.models.spec import build_spec
from medclip_lab.models.stems import Normalisation
from medclip_lab.models.warm_start import Report, WarmStartConfig, warm_start

from .tiny import spec

HALF = Normalisation((0.5,) * 3, (0.5,) * 3)
SMALL = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
WORDS = SMALL | {"vocab_size": 40, "max_position_embeddings": 12, "eos_token_id": 39, "bos_token_id": 38}
IMAGES = SMALL | {"hidden_size": 64, "intermediate_size": 256, "image_size": 32, "patch_size": 8}
OWN = {"layers": 2, "width": 64, "head_width": 32, "patch_size": 8, "image_size": 32}
TIMM = {"timm_model_name": "tiny_siglip_of_two", "image_size": 32, "timm_pool": "map", "timm_proj": "none"}
TEXT = {"context_length": 12, "vocab_size": 40, "width": 16, "heads": 2, "layers": 2}
BOTH_WAYS = TEXT | {"no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}}
IDS = torch.tensor([[38, 5, 9, 39, *[0] * 8], [38, *range(2, 12), 39], [38, 39, *[0] * 10]])


@register_model
def tiny_siglip_of_two(**options: Any) -> Any:
    shape = {"class_token": False, "embed_dim": 64, "num_heads": 2, "depth": 2, "img_size": 32, "patch_size": 8}
    return timm.create_model("vit_tiny_patch16_224", **(shape | options))


def saved(folder: Path, kind: str, activation: str = "gelu") -> Any:
    """A random model of transformers, none of its weights trivial, in a folder with its processor."""
    import transformers

    text, image = WORDS | {"hidden_act": activation}, IMAGES | {"hidden_act": activation}
    torch.manual_seed(1)
    if kind == "clip":
        config: Any = transformers.CLIPConfig(text_config=text, vision_config=image, projection_dim=8)
        model: Any = transformers.CLIPModel(config)
    else:
        config = transformers.SiglipConfig(text_config=text | {"projection_size": 64}, vision_config=image)
        model = transformers.SiglipModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    transformers.CLIPImageProcessor(image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(folder)
    return model.eval()


def started(folder: Path, vision: dict[str, Any], text: dict[str, Any], dim: int, **options: Any) -> Any:
    made = spec(vision, text) | {"embed_dim": dim}
    model: Any = build_spec(made)
    reports = warm_start(model, [WarmStartConfig(str(folder), **options)], HALF, speak=False)
    return model.eval(), reports


def nothing_left(reports: list[Report]) -> bool:
    return not any(r.missing or r.unused or r.misfit or r.reshaped or r.notes for r in reports)


@pytest.mark.parametrize(("kind", "vision", "text", "dim"), [("clip", OWN, TEXT, 8), ("siglip", TIMM, BOTH_WAYS, 64)])
def test_both_towers_answer_as_in_transformers(
    tmp_path: Path, kind: str, vision: dict[str, Any], text: dict[str, Any], dim: int
) -> None:
    theirs = saved(tmp_path, kind)
    ours, reports = started(tmp_path, vision, text, dim)
    assert [report.tower for report in reports] == ["image", "text"]
    assert nothing_left(reports), [report.line() for report in reports]
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        pairs: list[tuple[Tensor, Tensor]] = [
            (ours.encode_image(pixels), theirs.get_image_features(pixel_values=pixels).pooler_output),
            (ours.encode_text(IDS), theirs.get_text_features(input_ids=IDS).pooler_output),
        ]
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert float(ours.logit_scale.detach()) != float(theirs.logit_scale.detach()), "the loss says how it starts"


@pytest.mark.parametrize(("kind", "vision"), [("clip", OWN), ("siglip", TIMM)])
def test_an_image_tower_alone_at_another_size(tmp_path: Path, kind: str, vision: dict[str, Any]) -> None:
    """As LLaVA's folders have it; positions are interpolated as from any other source."""
    whole = saved(tmp_path / "whole", kind)
    tower = whole.vision_model
    tower.save_pretrained(tmp_path / "tower")
    record = json.loads((tmp_path / "tower" / "config.json").read_text())
    assert record["model_type"] == f"{kind}_vision_model"
    larger = vision | {"image_size": 64} | ({"timm_input_size": 64} if vision is TIMM else {})
    ours, (report,) = started(tmp_path / "tower", larger, TEXT, 64)
    assert report.tower == "image"
    assert list(report.reshaped) == [
        "visual.positional_embedding" if kind == "clip" else "visual.trunk.pos_embed",
    ]
    assert report.missing == (["visual.proj"] if kind == "clip" else [])
    assert not report.misfit
    assert not report.unused
    name = "visual.conv1.weight" if kind == "clip" else "visual.trunk.patch_embed.proj.weight"
    assert torch.equal(ours.state_dict()[name], tower.embeddings.patch_embedding.weight)


def test_another_activation_and_normalisation_are_told(tmp_path: Path) -> None:
    saved(tmp_path, "clip", "quick_gelu")
    _, reports = started(tmp_path, OWN, TEXT, 8)
    for report in reports:
        assert "it was trained with quick_gelu, and the tower computes gelu" in report.line()
    model: Any = build_spec(spec(OWN, TEXT) | {"quick_gelu": True})
    other = Normalisation((0.4,) * 3, (0.3,) * 3)
    image, text = warm_start(model, [WarmStartConfig(str(tmp_path))], other, speak=False)
    assert image.notes == [
        "pixels were normalised by [0.5, 0.5, 0.5] and [0.5, 0.5, 0.5] for it, and data.preprocess says "
        "[0.4, 0.4, 0.4] and [0.3, 0.3, 0.3]"
    ]
    assert not text.notes


def test_one_channel_made_from_three(tmp_path: Path) -> None:
    """The processor's normalisation is what the stem is adapted by."""
    whole = saved(tmp_path, "clip")
    ours, (image,) = started(tmp_path, OWN | {"in_chans": 1}, TEXT, 8, tower="image")
    assert not image.notes
    grey = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = whole.get_image_features(pixel_values=grey.expand(-1, 3, -1, -1)).pooler_output
        torch.testing.assert_close(ours.encode_image(grey), expected, rtol=1e-4, atol=1e-5)
