"""Maps of a similarity: exact where the tower can be computed by hand, and pointing at what was planted."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from medclip_lab.cli import main
from medclip_lab.data.preprocess import PreprocessConfig
from medclip_lab.errors import UserError
from medclip_lab.inference.encoder import Encoder, load
from medclip_lab.inference.explain import explain, frame_of, overlay
from medclip_lab.models.dual_encoder import DualEncoder
from tests.inference.towers import TEXT, VIT, make_bundle


class Bright(nn.Module):
    """A convolutional trunk whose first channel is brightness, its second darkness; timm's names around it."""

    num_features = 2
    feature_info = ({"module": "stage"},)

    def __init__(self) -> None:
        super().__init__()
        self.stage = nn.Sequential(nn.AvgPool2d(8), nn.Conv2d(3, 2, 1))
        with torch.no_grad():
            self.stage[1].weight.copy_(torch.tensor([[1.0] * 3, [-1.0] * 3]).view(2, 3, 1, 1) / 3)
            self.stage[1].bias.zero_()

    def forward(self, pixels: Tensor) -> Tensor:
        return F.relu(self.stage(pixels)).mean((2, 3))


class Towers(nn.Module):
    """As much of an open_clip model as is asked for: the text "bright" lies along the first channel."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = nn.Module()
        self.visual.trunk = Bright()
        self.logit_scale = nn.Parameter(torch.zeros(()))
        self.logit_bias = None

    def encode_image(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.visual.trunk(pixels)
        return features

    def encode_text(self, ids: Tensor) -> Tensor:
        return torch.eye(2)[ids[:, 0]]


def bright_encoder() -> Encoder:
    config = PreprocessConfig(size=64, resize_mode="squash", mean=(0.5,) * 3, std=(0.25,) * 3)

    def tokenizer(texts: list[str]) -> Tensor:
        return torch.tensor([[0 if text == "bright" else 1] for text in texts])

    return Encoder(Path(), {"fingerprint": "f", "files": {}}, DualEncoder(Towers(), config), tokenizer, config)


@pytest.fixture
def spot() -> Image.Image:
    pixels = np.full((64, 64), 40, np.uint8)
    pixels[8:24, 40:56] = 230
    return Image.fromarray(pixels)


@pytest.mark.parametrize("method", ["gradcam", "hirescam"])
def test_the_map_lies_where_the_spot_is(spot: Image.Image, method: Any) -> None:
    told = explain(bright_encoder(), spot, "bright", method=method)
    assert told.relevance.shape == (8, 8)
    inside = np.zeros((8, 8), bool)
    inside[1:3, 5:7] = True
    assert inside[np.unravel_index(told.relevance.argmax(), (8, 8))]
    assert told.relevance[inside].min() > told.relevance[~inside].max()
    row, column = np.unravel_index(told.enlarged().argmax(), (64, 64))
    assert 8 <= row < 24
    assert 40 <= column < 56


def test_hirescam_by_hand(spot: Image.Image) -> None:
    """relu and mean after the stage: the gradient at a place is that of the mean where the channel is above zero."""
    encoder = bright_encoder()
    told = explain(encoder, spot, "bright", method="hirescam")
    pixels = torch.from_numpy(np.asarray(spot).copy()).float().div(255).sub(0.5).div(0.25).expand(1, 3, 64, 64)
    activation = encoder.model.model.visual.trunk.stage(pixels).detach().requires_grad_()
    similarity = F.normalize(F.relu(activation).mean((2, 3)), dim=-1)[0, 0]
    (gradient,) = torch.autograd.grad(similarity, activation)
    expected = (gradient * activation).sum(1)[0].clamp_min(0).detach().numpy()
    np.testing.assert_allclose(told.relevance, expected, atol=1e-6)
    assert told.similarity == pytest.approx(similarity.item(), abs=1e-6)


def test_the_map_of_a_tower_is_the_mean_of_its_stages(toy_bundle: Path, toy_image: Path) -> None:
    """Each counts the same, whatever its gradients are, at the size of the finest."""
    encoder = load(toy_bundle, device="cpu")
    prompts = "The heart is enlarged.", "The heart is normal."
    told = explain(encoder, toy_image, *prompts)
    assert told.method == "hirescam"
    count = len(encoder.model.model.visual.trunk.feature_info)
    stages = [explain(encoder, toy_image, *prompts, stage=stage).relevance for stage in range(count)]
    assert count > 1
    assert told.relevance.shape == max(one.shape for one in stages)
    expected = np.zeros(told.relevance.shape)
    for one in stages:
        grown = F.interpolate(torch.from_numpy(one)[None, None], told.relevance.shape, mode="bicubic").clamp_min(0)
        expected += (grown[0, 0] / max(float(grown.max()), 1e-12)).numpy() / count
    np.testing.assert_allclose(told.relevance, expected, atol=1e-5)


def test_what_both_texts_share_cancels(spot: Image.Image) -> None:
    encoder = bright_encoder()
    alone, against = explain(encoder, spot, "bright"), explain(encoder, spot, "bright", "dark")
    assert against.similarity < alone.similarity
    both = explain(encoder, spot, "bright", "bright")
    assert both.similarity == pytest.approx(0)
    assert both.relevance.max() == pytest.approx(0)


@pytest.mark.parametrize("pool", ["tok", "avg"])
def test_patches_of_open_clips_own_vit(toy_bundle: Path, tmp_path: Path, toy_image: Path, pool: str) -> None:
    """With an average pooling and no norm after it, the mean of the projected patches is the image's own feature."""
    bundle = make_bundle(tmp_path / "bundle", toy_bundle, VIT | {"pool_type": pool}, TEXT)
    encoder = load(bundle, device="cpu")
    told = explain(encoder, toy_image, "The heart is enlarged.")
    assert told.method == "patches"
    assert told.relevance.shape == (4, 4)
    assert np.abs(told.relevance).max() <= 1 + 1e-6
    text = torch.from_numpy(encoder.encode_texts(["The heart is enlarged."])[0])
    image = encoder.encode_images([toy_image])[0]
    assert told.similarity == pytest.approx(float(image @ text.numpy()), abs=1e-5)
    if pool == "avg":
        visual = encoder.model.model.visual
        pixels = encoder.preprocess(encoder.preprocess.window(Image.open(toy_image)))[None].float() / 255
        inputs = (pixels.expand(1, 3, -1, -1) - encoder.model.mean) / encoder.model.std
        with torch.no_grad():
            tokens = visual.ln_post(visual.transformer(visual._embeds(inputs)))[0, 1:] @ visual.proj
        np.testing.assert_allclose(F.normalize(tokens.mean(0), dim=0).numpy(), image, atol=1e-5)
        cosines = (F.normalize(tokens, dim=-1) @ text).numpy().reshape(4, 4)
        np.testing.assert_allclose(told.relevance, cosines, atol=1e-5)


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_patches_of_a_timm_vit(toy_bundle: Path, tmp_path: Path, toy_image: Path, pool: str) -> None:
    vision = {"timm_model_name": "test_vit", "timm_pool": pool, "image_size": 160}
    bundle = make_bundle(tmp_path / "bundle", toy_bundle, vision, TEXT, side=160)
    encoder = load(bundle, device="cpu")
    told = explain(encoder, toy_image, "The heart is enlarged.")
    visual = encoder.model.model.visual
    pixels = encoder.preprocess(encoder.preprocess.window(Image.open(toy_image)))[None].float() / 255
    with torch.no_grad():
        inputs = (pixels.expand(1, 3, -1, -1) - encoder.model.mean) / encoder.model.std
        tokens = visual.trunk.forward_features(inputs)[0, visual.trunk.num_prefix_tokens :]
        features = F.normalize(visual.head(visual.trunk.fc_norm(tokens)), dim=-1)
    expected = features.numpy() @ encoder.encode_texts(["The heart is enlarged."])[0]
    np.testing.assert_allclose(told.relevance.ravel(), expected, atol=1e-5)
    assert told.relevance.shape == (10, 10)


def test_nothing_of_the_model_changes(toy_bundle: Path, toy_image: Path) -> None:
    encoder = load(toy_bundle, device="cpu")
    before = {name: value.clone() for name, value in encoder.model.state_dict().items()}
    explain(encoder, toy_image, "The heart is enlarged.", method="gradcam")
    assert all(torch.equal(value, before[name]) for name, value in encoder.model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in encoder.model.parameters())
    assert not any(module._forward_hooks for module in encoder.model.modules())


@pytest.mark.parametrize(
    ("mode", "frame"),
    [
        ("squash", (0, 0, 1, 1)),
        ("longest", (0, -0.5, 1, 1.5)),
        ("shortest", (0.25, 0, 0.75, 1)),
    ],
)
def test_where_the_square_lies_in_a_wide_picture(mode: Any, frame: tuple[float, ...]) -> None:
    assert frame_of(PreprocessConfig(resize_mode=mode), 200, 100) == pytest.approx(frame)


def test_the_command_and_its_refusals(toy_bundle: Path, toy_image: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "map.png"
    command = ["explain", str(toy_bundle), str(toy_image), "The heart is enlarged.", "--out", str(out)]
    assert main([*command, "--against", "Heart size is normal."]) == 0
    assert "hirescam" in capsys.readouterr().out
    with Image.open(out) as picture:
        assert picture.size == (512, 512)
        assert picture.mode == "RGB"
    encoder = load(toy_bundle, device="cpu")
    with pytest.raises(UserError, match="no patch tokens: take --method hirescam"):
        explain(encoder, toy_image, "x", method="patches")
    with pytest.raises(UserError, match="no stage 9"):
        explain(encoder, toy_image, "x", stage=9)
    with pytest.raises(UserError, match="a prompt is needed"):
        explain(encoder, toy_image, [])
    flat = explain(bright_encoder(), Image.new("L", (64, 64), 0), "bright")
    assert overlay(flat).size == (64, 64)
