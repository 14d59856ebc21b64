"""Tokens for losses that ask for them, and gradients that do not depend on how they were stored."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from medclip_lab.data.preprocess import PreprocessConfig
from medclip_lab.errors import UserError
from medclip_lab.models.dual_encoder import DualEncoder
from medclip_lab.models.lora import LoraConfig
from medclip_lab.models.spec import build_spec
from medclip_lab.models.tokens import TOKENS

from .tiny import CLIP_VIT, CONVNEXT, RESNET, TEXT, VIT, hf_text, ids_of, pixels, spec

PREPROCESS = PreprocessConfig(32)
BATCH: dict[str, Any] = {"image": pixels(3), "text": pad(ids_of(7), (0, 5))}


def encoder_of(values: dict[str, Any], seed: int = 0) -> DualEncoder:
    torch.manual_seed(seed)
    return DualEncoder(build_spec(values), PREPROCESS)


@pytest.mark.parametrize("vision", [VIT, CLIP_VIT, CONVNEXT, RESNET], ids=str)
@pytest.mark.parametrize("text", [TEXT, TEXT | {"proj_bias": True}, hf_text("bert"), hf_text("llama")], ids=str)
def test_tokens_are_there_when_asked_for(vision: dict[str, Any], text: dict[str, Any]) -> None:
    encoder = encoder_of(spec(vision | {"image_size": 64}, text)).eval()
    batch = BATCH | {"image": pixels(3, size=64), "second_text": BATCH["text"]}
    with torch.no_grad():
        plain = encoder(batch)
        encoder.tokens = frozenset(TOKENS)
        full = encoder(batch)
        encoder.tokens = frozenset({"text_mask"})
        assert set(encoder(batch)) == {"image", "text", "second_text", "text_mask"}
    assert set(plain) == {"image", "text", "second_text"}
    assert set(full) == set(plain) | set(TOKENS)
    for name, value in plain.items():
        torch.testing.assert_close(full[name], value, rtol=0, atol=1e-5)
    patches = {"test_vit": 16, "test_resnet": 4, "test_convnext": 4}.get(vision.get("timm_model_name", ""), 64)
    assert full["image_tokens"].shape == (3, patches, 8)
    assert full["text_tokens"].shape == (3, 12, 8)
    assert full["text_mask"].sum(1).tolist() == [7, 7, 7]
    assert full["text_mask"].dtype == torch.bool


def test_tokens_are_what_is_pooled() -> None:
    """Where features are the mean of patches or words, projected linearly, they are the mean of the tokens."""
    encoder = encoder_of(spec(VIT | {"image_size": 64}, hf_text("bert", hf_proj_type="linear"))).eval()
    encoder.tokens = frozenset(TOKENS)
    with torch.no_grad():
        made = encoder({"image": pixels(3, size=64), "text": BATCH["text"]})
        text = (made["text_tokens"] * made["text_mask"][..., None]).sum(1)
    torch.testing.assert_close(normalize(text, dim=-1), made["text"], rtol=0, atol=1e-5)
    torch.testing.assert_close(normalize(made["image_tokens"].mean(1), dim=-1), made["image"], rtol=0, atol=1e-5)


def test_tokens_follow_their_patch() -> None:
    """A change in one corner is seen most by the token of that corner, the first one."""
    encoder = encoder_of(spec(RESNET | {"image_size": 64})).eval()
    encoder.tokens = frozenset({"image_tokens"})
    changed = pixels(1, size=64)
    changed[..., :16, :16] = 255
    with torch.no_grad():
        first, second = (encoder({"image": image})["image_tokens"][0] for image in (pixels(1, size=64), changed))
    assert int((first - second).norm(dim=1).argmax()) == 0


def test_a_tower_without_tokens_is_named() -> None:
    encoder = encoder_of(spec({"layers": [1, 1, 1, 1], "width": 32, "image_size": 32})).eval()
    encoder.tokens = frozenset(TOKENS)
    with pytest.raises(UserError, match="the loss wants image_tokens, and ModifiedResNet gives none"):
        encoder(BATCH)


def gradients(encoder: DualEncoder) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(3)
    made = encoder.train()(BATCH)
    value = (made["image"] @ made["text"].T).logsumexp(1).sum()
    value.backward()
    named = encoder.model.named_parameters()
    return value.detach(), {name: parameter.grad for name, parameter in named if parameter.grad is not None}


CHECKPOINTED = {
    "ViT of timm, BERT": spec(VIT, hf_text("bert")),
    "ConvNeXt, Llama": spec(CONVNEXT, hf_text("llama")),
    "open_clip, patch dropout": spec(CLIP_VIT | {"patch_dropout": 0.5}),
    "ResNet, T5": spec(RESNET, hf_text("t5")),
}


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("name", CHECKPOINTED)
def test_gradients_do_not_depend_on_checkpointing(
    name: str, lora: bool, monkeypatch: pytest.MonkeyPatch, record_property: Any
) -> None:
    calls: list[int] = []
    original = torch.utils.checkpoint.checkpoint

    def counting(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        return original(*arguments, **options)

    for module in (
        "torch.utils.checkpoint",
        "timm.models._manipulate",
        "open_clip.transformer",
        "transformers.modeling_utils",
    ):
        monkeypatch.setattr(f"{module}.checkpoint", counting)
    results = []
    for checkpointed in (False, True):
        encoder = encoder_of(CHECKPOINTED[name])
        if lora:
            target = {"BERT": ".*query", "Llama": ".*q_proj", "T5": r".*\.q"}.get(name.split(", ")[1], r".*c_fc")
            encoder.adapt({"text": LoraConfig(target, dropout=0.5)})
        if checkpointed:
            encoder.checkpoint_activations()
        results.append(gradients(encoder))
        assert bool(calls) == checkpointed
    (plain, expected), (value, found) = results
    torch.testing.assert_close(value, plain)
    assert set(found) == set(expected)
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-6, msg=key)
    if lora:
        assert any("lora_A" in key for key in found)


def test_a_tower_that_cannot_be_checkpointed_is_refused() -> None:
    encoder = encoder_of(spec({"timm_model_name": "xcit_nano_12_p16_224", "image_size": 224}))
    encoder.model.visual.trunk.set_grad_checkpointing = _refuse
    with pytest.raises(UserError, match=r"model.gradient_checkpointing: a tower cannot: not here; set it to false"):
        encoder.checkpoint_activations()


def _refuse(enable: bool) -> None:
    raise AssertionError("not here")
