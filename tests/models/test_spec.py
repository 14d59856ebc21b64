"""Models of specs: what open_clip can say it loads from a bundle without us; what it cannot, it refuses."""

import contextlib
import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch.nn.functional import normalize

from medclip_lab.data.preprocess import PreprocessConfig
from medclip_lab.errors import UserError
from medclip_lab.inference.bundle import finish_bundle, write_bundle
from medclip_lab.inference.encoder import load
from medclip_lab.models.dual_encoder import DualEncoder
from medclip_lab.models.spec import beyond_open_clip, build_spec, complete, fit_image_size, load_folder, load_named

from .tiny import CLIP_VIT, CONVNEXT, RESNET, TEXT, VIT, hf_text, ids_of, pixels, save_tokenizer, save_transformer, spec

PREPROCESS = PreprocessConfig(size=32)
TEXTS = ["The heart is enlarged.", "no pleural effusion left lungs clear . the heart size is normal of the case"]
BIAS = {"embed_dim": 8, "custom_text": True, "init_logit_bias": -10.0}


def bundle(folder: Path, values: dict[str, Any], tokenizer: bool = True) -> Path:
    """Of a random model, as `export` writes it."""
    torch.manual_seed(0)
    values = complete(values)
    model: Any = build_spec(values)
    encoder = DualEncoder(fit(model, values), PREPROCESS)
    text = values["text_cfg"]
    if tokenizer:
        text["hf_tokenizer_name"] = "tokenizer"
    folder.mkdir()
    write_bundle(
        folder,
        weights=encoder.weights(),
        model_cfg=values,
        preprocess=PREPROCESS,
        tokenizer=save_tokenizer(folder.parent / "tokenizer") if tokenizer else None,
        labelsets=[],
        card={},
        augment={},
    )
    finish_bundle(folder, "pytest", {})
    return folder


def fit(model: Any, values: dict[str, Any]) -> Any:
    values |= fit_image_size(model, values)
    return model


SPECS: dict[str, tuple[dict[str, Any], str]] = {
    "open_clip's own": (BIAS | spec(), ""),
    "its ResNet": (BIAS | spec({"layers": [1, 1, 1, 1], "width": 32, "image_size": 32}), ""),
    "ConvNeXt, attention mask": (BIAS | spec(CONVNEXT, TEXT | {"no_causal_mask": True, "pool_type": "first"}), ""),
    "BERT, its pooler": (BIAS | spec(VIT, hf_text("bert", hf_pooler_type="cls_pooler")), ""),
    "BERT, null": (BIAS | spec(VIT, hf_text("bert", hf_pooler_type=None)), ""),
    "RoBERTa": (BIAS | spec(RESNET, hf_text("roberta", hf_proj_type="linear")), ""),
    "long BERT": (BIAS | spec(VIT, hf_text("bert", context_length=96)), ""),
    "patch dropout": (BIAS | spec(CLIP_VIT | {"patch_dropout": 0.5}), ""),
    "one channel": (BIAS | spec(VIT | {"in_chans": 1}), "vision_cfg.in_chans"),
    "fixed size": (BIAS | spec({"timm_model_name": "test_vit_fixed", "image_size": 32}), "vision_cfg.timm_input_size"),
    "Llama": (BIAS | spec(VIT, hf_text("llama", hf_pooler_type="last_pooler")), "the family llama"),
    "last four layers": (BIAS | spec(VIT, hf_text("bert", hf_layers=[-2, -1])), "text_cfg.hf_layers"),
    "maximum": (BIAS | spec(VIT, hf_text("bert", hf_pooler_type="max_pooler")), "hf_pooler_type max_pooler"),
    "last word": (BIAS | spec(VIT, hf_text("bert", hf_pooler_type="last_pooler")), "hf_pooler_type last_pooler"),
}


@pytest.fixture(scope="module", autouse=True)
def fixed_vit() -> None:
    """timm's tiny ViT, with position embeddings of one size as most have them."""
    from timm.models import register_model
    from timm.models._registry import _model_entrypoints
    from timm.models.vision_transformer import test_vit

    if "test_vit_fixed" not in _model_entrypoints:

        def test_vit_fixed(pretrained: bool = False, **options: Any) -> Any:
            return test_vit(pretrained, **{"dynamic_img_size": False} | options)

        test_vit_fixed.__module__ = test_vit.__module__
        register_model(test_vit_fixed)


@pytest.mark.parametrize("name", SPECS)
def test_a_bundle_opens_in_open_clip_where_that_can_express_it(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    values, beyond = SPECS[name]
    folder = bundle(tmp_path / "bundle", values)
    encoder = load(folder, device="cpu")
    assert str(tmp_path) not in (folder / "open_clip_config.json").read_text(), "a bundle may be moved"
    with torch.no_grad():
        images, texts = encoder.model.encode_image(pixels()), torch.from_numpy(encoder.encode_texts(TEXTS))
    monkeypatch.chdir(folder)  # where it finds the config of a text tower
    card = (folder / "README.md").read_text()
    if beyond:
        assert beyond in card
        with contextlib.redirect_stderr(None), pytest.raises((TypeError, KeyError, ValueError, RuntimeError)):
            # open_clip has a max pooler, which fails when it is called.
            open_clip.create_model("local-dir:.").encode_text(ids_of(12))
        return
    assert "plain open_clip `open_clip." in card or "plain open_clip: `open_clip." in card
    theirs = open_clip.create_model("local-dir:.").eval()
    ids = open_clip.get_tokenizer("local-dir:.")(TEXTS)
    with torch.no_grad():
        normalised = encoder.model.normalised(pixels())
        torch.testing.assert_close(theirs.encode_image(normalised, normalize=True), images, rtol=0, atol=1e-5)
        torch.testing.assert_close(theirs.encode_text(ids, normalize=True), texts, rtol=0, atol=1e-5)


def test_the_list_of_what_is_beyond_is_true() -> None:
    for values, beyond in SPECS.values():
        model = build_spec(values)
        found = ", ".join(beyond_open_clip(fit_image_size(model, complete(values))))
        assert beyond in found
        assert bool(beyond) == bool(found)


def test_patch_dropout_is_of_training_only(tmp_path: Path) -> None:
    for vision in (CLIP_VIT, VIT | {"timm_model_name": "test_vit"}):
        values = spec(vision | {"patch_dropout": 0.75})
        model: Any = build_spec(values)
        encoder = DualEncoder(model, PREPROCESS)
        first, second = (encoder.encode_image(pixels()) for _ in range(2))
        assert not torch.equal(first, second), "training drops patches"
        encoder.eval()
        with torch.no_grad():
            assert torch.equal(encoder.encode_image(pixels()), encoder.encode_image(pixels()))
            plain: Any = build_spec(spec(vision))
            plain.load_state_dict(model.state_dict())
            expected = DualEncoder(plain.eval(), PREPROCESS).encode_image(pixels())
            torch.testing.assert_close(encoder.encode_image(pixels()), expected)
    folder = bundle(tmp_path / "bundle", BIAS | values)
    assert "patch_dropout" not in json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]["vision_cfg"]


def test_a_text_tower_from_a_folder_is_found_and_long_enough(tmp_path: Path) -> None:
    folder = save_transformer(tmp_path / "bert")
    text = {"hf_model_name": str(folder), "context_length": 96}
    values = complete(spec(VIT, text))
    assert values["text_cfg"]["hf_config"]["max_position_embeddings"] == 96
    assert complete(values) == values, "what is complete stays as it is"
    model: Any = build_spec(values)
    assert model.text.transformer.embeddings.position_embeddings.weight.shape == (96, 16)
    with torch.no_grad():
        assert model.eval().encode_text(ids_of(96)).shape == (3, 8)
    roberta = complete(spec(VIT, hf_text("roberta", context_length=96)))
    assert roberta["text_cfg"]["hf_config"]["max_position_embeddings"] == 98, "RoBERTa counts from 2 on"


def test_a_folder_of_another_tool_brings_its_weights(tmp_path: Path) -> None:
    folder = bundle(tmp_path / "bundle", BIAS | spec(VIT, hf_text("bert")))
    (folder / "manifest.json").unlink()
    model, found = load_named(f"local-dir:{folder}", None)
    again, _ = load_folder(folder)
    assert found["text_cfg"]["hf_config"]["model_type"] == "bert"
    for (name, value), other in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, msg=name)
    (folder / "open_clip_model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0")
    with pytest.raises(UserError, match="is a Git-LFS pointer, not the weights"):
        load_folder(folder)
    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(UserError, match="holds no weights"):
        load_folder(folder)


def test_a_single_channel_takes_colour_as_its_grey_value() -> None:
    encoder = DualEncoder(build_spec(spec(VIT | {"in_chans": 1})), PREPROCESS).eval()
    grey = pixels()
    with torch.no_grad():
        expected = encoder.encode_image(grey)
        torch.testing.assert_close(encoder.encode_image(grey.expand(-1, 3, -1, -1)), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(encoder.encode_image(grey / 255), expected, rtol=0, atol=1e-5)
        assert (expected - normalize(encoder.model.encode_image(encoder.normalised(grey)))).abs().max() < 1e-6
    with pytest.raises(UserError, match="an image tower of one channel has one mean and one std"):
        DualEncoder(build_spec(spec(VIT | {"in_chans": 1})), PreprocessConfig(mean=(0.4, 0.5, 0.6)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"embed_dim": 8, "vision_cfg": VIT}, "has embed_dim, vision_cfg and text_cfg"),
        ({"vision_cfg": VIT, "text_cfg": TEXT}, "embed_dim must be a whole number, got None"),
        (spec({"timm_model_name": "vit_of_nobody"}), r"open_clip cannot build it: Unknown model \(vit_of_nobody\)"),
        (spec(CLIP_VIT | {"colour": 1}), "unexpected keyword argument 'colour'"),
        (spec(CLIP_VIT, TEXT | {"colour": 1}), "unexpected keyword argument 'colour'"),
        (spec(CLIP_VIT, hf_text("bert", colour=1)), "nobody knows colour"),
        (spec(VIT | {"in_chans": 2}), "in_chans is 1 or 3, got 2"),
        (spec(RESNET | {"timm_input_size": 64}), "ResNet has no input size to set to 64"),
        (spec({"timm_model_name": "test_byobnet_none"}), "Unknown model"),
        (spec(VIT, {"hf_model_name": "nowhere/at-all"}), "hf_model_name: 'nowhere/at-all' is no folder here"),
    ],
)
def test_specs_that_cannot_be_built(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        build_spec(values)
    assert "\n" not in str(error.value)


def test_an_image_size_that_a_tower_cannot_take() -> None:
    values = spec({"timm_model_name": "test_vit_fixed", "image_size": 8})
    with pytest.raises(UserError, match=r"vision_cfg.*8"):
        fit_image_size(build_spec(values), values)
    values = spec({"timm_model_name": "test_maxvit", "image_size": 33})
    with pytest.raises(UserError, match=r"test_maxvit cannot take images of 33 x 33"):
        fit_image_size(build_spec(values), values)
