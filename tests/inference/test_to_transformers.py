"""Bundles in transformers: the same features, the pipeline offline, and refusals of what it cannot compute."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from medclip_lab.cli import main
from medclip_lab.errors import UserError
from medclip_lab.inference import to_transformers as module
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


def test_patch_tokens_are_those_of_the_bundle(toy_bundle: Path, tmp_path: Path) -> None:
    """As LLaVA takes them: a CLIPVisionModel of the folder, hidden states of every layer, patches without the class."""
    from transformers import CLIPVisionModel

    bundle = make_bundle(tmp_path / "bundle", toy_bundle, VIT, TEXT)
    to_transformers(bundle, tmp_path / "hf")
    tower = CLIPVisionModel.from_pretrained(tmp_path / "hf").eval()
    pixels = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        theirs = tower(pixels, output_hidden_states=True).hidden_states[1:]
        ours = load(bundle, device="cpu").model.model.visual.forward_intermediates(pixels)["image_intermediates"]
    assert len(theirs) == len(ours) == 2
    for layer, patches in zip(theirs, ours, strict=True):
        np.testing.assert_allclose(layer[:, 1:], patches.flatten(2).transpose(1, 2), atol=1e-4)


def test_llava_takes_the_tower_at_another_size(toy_bundle: Path, tmp_path: Path) -> None:
    from transformers import CLIPImageProcessor, CLIPVisionModel, LlamaConfig, LlavaConfig, LlavaModel

    bundle = make_bundle(tmp_path / "bundle", toy_bundle, VIT, TEXT)
    out = str(tmp_path / "hf")
    assert main(["export", str(bundle), "--to", "transformers", "--out", out, "--image-size", "48"]) == 0
    tower = CLIPVisionModel.from_pretrained(out).eval()
    assert tower.config.image_size == 48
    picture = Image.fromarray((np.random.default_rng(0).random((48, 48)) * 255).astype(np.uint8))
    pixels = CLIPImageProcessor.from_pretrained(out)(picture, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 48, 48)
    words = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1)
    llava = LlavaModel(LlavaConfig(vision_config=tower.config, text_config=words, image_token_index=3)).eval()
    llava.vision_tower.load_state_dict(tower.state_dict())
    with torch.inference_mode():
        tokens = llava.get_image_features(pixels).pooler_output[0]
        expected = llava.multi_modal_projector(tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:])[0]
    assert tokens.shape == (36, 16)
    np.testing.assert_allclose(tokens, expected, atol=1e-5)


@pytest.mark.parametrize("size", [24, 32, 48])
def test_position_embeddings_are_interpolated(toy_bundle: Path, tmp_path: Path, size: int) -> None:
    from transformers import CLIPVisionModel

    bundle = make_bundle(tmp_path / "bundle", toy_bundle, VIT, TEXT)
    facts = to_transformers(bundle, tmp_path / "hf", image_size=size)
    assert (facts["image_size"], facts["interpolated_from"]) == (size, None if size == 32 else 32)
    found = CLIPVisionModel.from_pretrained(tmp_path / "hf").state_dict()
    (name,) = [name for name in found if name.endswith("position_embedding.weight")]
    old = load(bundle, device="cpu").model.model.visual.positional_embedding.detach()
    grid = old[1:].T.reshape(1, 32, 4, 4)
    grown = torch.nn.functional.interpolate(grid, (size // 8,) * 2, mode="bicubic", antialias=True)
    np.testing.assert_allclose(found[name], torch.cat([old[:1], grown.flatten(2)[0].T]), atol=1e-6)


def test_a_timm_transformer_takes_another_size(toy_bundle: Path, tmp_path: Path) -> None:
    vision = {"timm_model_name": "test_vit", "timm_pool": "token", "image_size": 160}
    bundle = make_bundle(tmp_path / "bundle", toy_bundle, vision, TEXT, side=160)
    facts = to_transformers(bundle, tmp_path / "hf", image_size=192)
    theirs = open_encoder(f"hf:{tmp_path / 'hf'}", device="cpu")
    assert facts["class"] == "VisionTextDualEncoderModel"
    assert theirs.encode_images([Image.new("L", (192, 192), 99)]).shape == (1, 16)


@pytest.mark.parametrize(
    ("vision", "size", "reason"),
    [
        (VIT, 50, "50 is no multiple of the patches' 8: take 48"),
        (VIT, 0, "0 is no multiple of the patches' 8: take 8"),
        ({"timm_model_name": "test_resnet", "image_size": 32}, 64, "ResNet has no position embeddings to interpolate"),
        (
            {"layers": [1, 1, 1, 1], "width": 16, "head_width": 16, "image_size": 32},
            64,
            "ModifiedResNet has no position",
        ),
    ],
)
def test_sizes_that_do_not_go_are_refused(
    toy_bundle: Path, tmp_path: Path, vision: dict[str, Any], size: int, reason: str
) -> None:
    bundle = make_bundle(tmp_path / "bundle", toy_bundle, vision, TEXT)
    with pytest.raises(UserError, match=f"image size: {reason}"):
        to_transformers(bundle, tmp_path / "hf", image_size=size)
    assert not (tmp_path / "hf").exists()


def test_other_folders_are_not_replaced(toy_bundle: Path) -> None:
    with pytest.raises(UserError, match="exists and is no folder for transformers"):
        to_transformers(toy_bundle, toy_bundle)


@pytest.mark.parametrize("tower", ["image", "text"])
def test_what_is_no_number_is_not_written(
    toy_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tower: str
) -> None:
    bundle = make_bundle(tmp_path / "bundle", toy_bundle, VIT, TEXT)
    encoder = load(bundle, device="cpu")
    model: Any = encoder.model.model
    with torch.no_grad():
        (model.visual.proj if tower == "image" else model.text.text_projection).fill_(torch.nan)
    monkeypatch.setattr(module, "load", lambda *_args, **_options: encoder)
    with pytest.raises(UserError, match="features differ by nan"):
        to_transformers(bundle, tmp_path / "out")
    assert not (tmp_path / "out").exists()
