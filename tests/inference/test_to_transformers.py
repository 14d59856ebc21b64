"""Bundles in transformers: the same features, the pipeline offline, and refusals of what it cannot compute."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from medclip_lab.cli import main
from medclip_lab.errors import UserError
from medclip_lab.inference.encoder import load
from medclip_lab.inference.foreign import open_encoder
from medclip_lab.inference.to_transformers import to_transformers
from tests.inference.towers import TEXT, VIT, make_bundle

TEXTS = ["The heart is enlarged.", "Heart size is normal. No effusion."]


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    """Square and of the tower's size, so that nothing is resized: both sides must then see the same pixels."""
    return Image.fromarray((np.random.default_rng(0).random((32, 32)) * 255).astype(np.uint8))


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def refuse(*_: Any) -> None:
        raise AssertionError("nothing may ask the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.parametrize(
    ("vision", "text", "kind"),
    [
        (VIT, TEXT, "CLIPModel"),
        (VIT | {"mlp_ratio": 2.0}, TEXT | {"mlp_ratio": 3.0}, "CLIPModel"),
        ({"timm_model_name": "test_resnet", "image_size": 32}, TEXT, "VisionTextDualEncoderModel"),
        ({"timm_model_name": "test_resnet", "timm_pool": "max", "image_size": 32}, TEXT, "VisionTextDualEncoderModel"),
    ],
)
def test_features_are_the_same(
    toy_bundle: Path, tmp_path: Path, picture: Image.Image, vision: dict[str, Any], text: dict[str, Any], kind: str
) -> None:
    bundle = make_bundle(tmp_path / "bundle", toy_bundle, vision, text)
    facts = to_transformers(bundle, tmp_path / "hf")
    assert facts["class"] == kind
    ours, theirs = load(bundle, device="cpu"), open_encoder(f"hf:{tmp_path / 'hf'}", device="cpu")
    np.testing.assert_allclose(theirs.encode_texts(TEXTS), ours.encode_texts(TEXTS), atol=1e-5)
    np.testing.assert_allclose(theirs.encode_images([picture]), ours.encode_images([picture]), atol=1e-4)
    assert theirs.logit_scale == pytest.approx(ours.logit_scale, rel=1e-5)


@pytest.mark.parametrize("mode", ["squash", "shortest", "longest"])
def test_processors_see_what_we_see(toy_bundle: Path, tmp_path: Path, mode: Any) -> None:
    """torchvision resizes tensors where we resize Pillow images: a grey level or two at most, and no shift."""
    bundle = make_bundle(tmp_path / "bundle", toy_bundle, VIT, TEXT, resize_mode=mode)
    to_transformers(bundle, tmp_path / "hf")
    ours, theirs = load(bundle, device="cpu"), open_encoder(f"hf:{tmp_path / 'hf'}", device="cpu")
    image = Image.fromarray((np.random.default_rng(0).random((48, 64)) * 255).astype(np.uint8))
    pixels = ours.preprocess(image).expand(3, -1, -1).float() / 255
    expected = (pixels - ours.model.mean) / ours.model.std
    assert float((theirs.preprocess(image) - expected).abs().max()) <= 3 / 255 / 0.25


def test_the_pipeline_runs_offline(toy_bundle: Path, tmp_path: Path, picture: Image.Image) -> None:
    from transformers import pipeline

    assert main(["export", str(toy_bundle), "--to", "transformers", "--out", str(tmp_path / "hf")]) == 0
    classify = pipeline("zero-shot-image-classification", model=str(tmp_path / "hf"))
    found = classify(picture, candidate_labels=TEXTS, hypothesis_template="{}")
    encoder = load(toy_bundle, device="cpu")
    logits = encoder.logit_scale * encoder.encode_images([picture]) @ encoder.encode_texts(TEXTS).T
    expected = torch.from_numpy(logits[0]).softmax(0)
    assert {row["label"]: row["score"] for row in found} == {
        text: pytest.approx(float(value), abs=1e-3) for text, value in zip(TEXTS, expected, strict=True)
    }


def test_a_wrong_weight_is_not_written(toy_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries and keys exchanged: softmax(QK) is not softmax(KQ), and the check sees it."""
    from medclip_lab.inference import to_transformers as module

    whole = module._block_weights

    def exchanged(blocks: Any) -> dict[str, torch.Tensor]:
        return {
            name.replace("q_proj", "?").replace("k_proj", "q_proj").replace("?", "k_proj"): value
            for name, value in whole(blocks).items()
        }

    monkeypatch.setattr(module, "_block_weights", exchanged)
    monkeypatch.setattr(module, "TOLERANCE", 1e-7)
    bundle = make_bundle(tmp_path / "bundle", toy_bundle, VIT, TEXT)
    with pytest.raises(UserError, match="features differ by"):
        to_transformers(bundle, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    ("vision", "text", "reason"),
    [
        (VIT | {"ls_init_value": 0.1}, TEXT, "scaled layers"),
        (VIT | {"attentional_pool": True}, TEXT, "pooling of patches"),
        (VIT, TEXT | {"no_causal_mask": True}, "looks both ways"),
        (VIT, TEXT | {"embed_cls": True}, "class token at its end"),
        ({"timm_model_name": "test_resnet", "timm_proj": "mlp", "image_size": 32}, TEXT, "a head of several layers"),
        ({"timm_model_name": "test_resnet", "timm_proj_bias": True, "image_size": 32}, TEXT, "projection with a bias"),
    ],
)
def test_what_transformers_cannot_compute_is_refused(
    toy_bundle: Path, tmp_path: Path, vision: dict[str, Any], text: dict[str, Any], reason: str
) -> None:
    bundle = make_bundle(tmp_path / "bundle", toy_bundle, vision, text)
    with pytest.raises(UserError, match=f"no class there computes .*{reason}"):
        to_transformers(bundle, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_other_folders_are_not_replaced(toy_bundle: Path) -> None:
    with pytest.raises(UserError, match="exists and is no folder for transformers"):
        to_transformers(toy_bundle, toy_bundle)
