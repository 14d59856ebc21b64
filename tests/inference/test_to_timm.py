"""Image towers in timm: the same features by timm's own loader, and refusals of what it has no architecture for."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F

from medclip_lab.cli import main
from medclip_lab.errors import UserError
from medclip_lab.inference import to_timm as module
from medclip_lab.inference.encoder import load
from medclip_lab.inference.to_timm import to_timm
from tests.inference.towers import TEXT, VIT, make_bundle, pictures

RESNET = {"timm_model_name": "test_resnet", "image_size": 32}
TIMM_VIT = {"timm_model_name": "test_vit", "image_size": 64, "timm_input_size": 64}
ONE_NORMALISATION = {"mean": (0.5,) * 3, "std": (0.25,) * 3}


@pytest.mark.parametrize(
    ("vision", "options", "architecture"),
    [
        (VIT, {}, "vit_base_patch16_clip_224"),
        (VIT | {"mlp_ratio": 2.0}, {"quick_gelu": True}, "vit_base_patch16_clip_quickgelu_224"),
        (VIT | {"in_chans": 1}, ONE_NORMALISATION, "vit_base_patch16_clip_224"),
        (RESNET | {"timm_proj_bias": True}, {}, "test_resnet"),
        (RESNET | {"timm_pool": "max"}, {"resize_mode": "squash"}, "test_resnet"),
        (RESNET | {"in_chans": 1}, ONE_NORMALISATION, "test_resnet"),
        (TIMM_VIT | {"timm_pool": "token"}, {}, "test_vit"),
        (TIMM_VIT | {"timm_pool": "avg"}, {}, "test_vit"),
    ],
)
def test_features_by_timm_are_the_same(
    toy_bundle: Path, tmp_path: Path, vision: dict[str, Any], options: dict[str, Any], architecture: str
) -> None:
    bundle = make_bundle(tmp_path / "bundle", toy_bundle, vision, TEXT, side=vision["image_size"], **options)
    facts = to_timm(bundle, tmp_path / "timm")
    assert facts["architecture"] == architecture
    model = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    ours = load(bundle, device="cpu")
    data = timm.data.resolve_model_data_config(model)
    images = [image.convert("RGB") for image in pictures(3, vision["image_size"])]
    pixels = torch.stack([ours.preprocess(image) for image in images]).float() / 255
    pixels = ours.model.fitted(pixels)
    normalised = (pixels - torch.tensor(data["mean"]).view(-1, 1, 1)) / torch.tensor(data["std"]).view(-1, 1, 1)
    assert data["input_size"][1:] == (vision["image_size"],) * 2
    with torch.inference_mode():
        theirs = F.normalize(model(normalised), dim=-1).numpy()
    np.testing.assert_allclose(theirs, ours.encode_images(images), atol=1e-4)


def test_the_command_line_and_what_fine_tuning_begins_with(toy_bundle: Path, tmp_path: Path) -> None:
    assert main(["export", str(toy_bundle), "--to", "timm", "--out", str(tmp_path / "timm")]) == 0
    facts = json.loads((tmp_path / "timm" / "medclip_lab.json").read_text())
    encoder = load(toy_bundle, device="cpu")
    assert facts["bundle"] == encoder.fingerprint
    trunk = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True, num_classes=0).eval()
    pixels = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        np.testing.assert_allclose(trunk(pixels), encoder.model.model.visual.trunk(pixels), atol=1e-5)


@pytest.mark.parametrize(
    ("vision", "reason"),
    [
        (VIT | {"attentional_pool": True}, "this pooling of patches"),
        (VIT | {"ls_init_value": 0.1}, "scaled layers"),
        (VIT | {"no_ln_pre": True}, "an image tower without its first norm"),
        (RESNET | {"timm_proj": "mlp"}, "a head of several layers"),
        ({"layers": [1, 1, 1, 1], "width": 16, "head_width": 16, "image_size": 32}, "this ModifiedResNet"),
    ],
)
def test_what_timm_cannot_compute_is_refused(
    toy_bundle: Path, tmp_path: Path, vision: dict[str, Any], reason: str
) -> None:
    bundle = make_bundle(tmp_path / "bundle", toy_bundle, vision, TEXT)
    with pytest.raises(UserError, match=f"timm: no architecture there computes {reason}"):
        to_timm(bundle, tmp_path / "timm")
    assert not (tmp_path / "timm").exists()


def test_a_lost_projection_is_not_written(toy_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_classify", lambda *_: None)
    with pytest.raises(UserError, match="timm: features differ by"):
        to_timm(toy_bundle, tmp_path / "timm")
    assert list(tmp_path.iterdir()) == []


def test_other_folders_are_not_replaced(toy_bundle: Path) -> None:
    with pytest.raises(UserError, match="exists and is no folder for timm"):
        to_timm(toy_bundle, toy_bundle)
