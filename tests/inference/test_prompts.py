"""Sorting and leaving out padding change how long it takes, and nothing else."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from torch import nn

from medclip_lab.errors import UserError
from medclip_lab.inference import prompts as rooms
from medclip_lab.inference.encoder import load
from medclip_lab.inference.labelset import LabelPrompts, LabelSet
from medclip_lab.inference.prompts import PromptTooLongError, encode_prompts

TEXTS = ["Edema.", "The heart is enlarged and the lungs are clear.", "No.", "Small left pleural effusion.", "Edema."]
VISION = {"timm_model_name": "test_resnet", "image_size": 32}
TEXT = {"context_length": 24, "width": 32, "heads": 2, "layers": 2, "vocab_size": 49408}


def model_of(text: dict[str, Any], custom: bool) -> nn.Module:
    torch.manual_seed(0)
    cls = open_clip.CustomTextCLIP if custom else open_clip.CLIP
    return cls(16, dict(VISION), TEXT | text).eval()


def widths(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the token ids that reach the tower."""
    seen: list[tuple[int, ...]] = []
    encode: Callable[..., Any] = model.encode_text
    monkeypatch.setattr(model, "encode_text", lambda ids: (seen.append(tuple(ids.shape)), encode(ids))[1])
    return seen


@pytest.mark.parametrize("custom", [False, True])
@pytest.mark.parametrize(
    ("text", "trims"),
    [
        ({}, True),
        ({"no_causal_mask": True}, False),  # SigLIP's: it reads the padding
        ({"no_causal_mask": True, "pool_type": "last"}, False),
    ],
)
def test_equals_open_clip_for_every_tower(
    text: dict[str, Any], trims: bool, custom: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = model_of(text, custom), open_clip.SimpleTokenizer(context_length=24)
    with torch.no_grad():
        expected = nn.functional.normalize(model.encode_text(tokenizer(TEXTS)), dim=-1).numpy()
    seen = widths(model, monkeypatch)
    monkeypatch.setattr(rooms, "TOKENS", 30)
    found = encode_prompts(model, tokenizer, TEXTS, torch.device("cpu"))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert found.dtype == np.float32
    assert (seen[-1][1] < 24) == trims


def test_the_bundle_encodes_prompts_as_texts(toy_bundle: Path) -> None:
    encoder = load(toy_bundle, device="cpu")
    np.testing.assert_allclose(encoder.encode_prompts(TEXTS), encoder.encode_texts(TEXTS), atol=1e-5)


def test_a_prompt_longer_than_the_context(toy_bundle: Path) -> None:
    encoder = load(toy_bundle, device="cpu")
    long = "The heart is enlarged, " * 20
    with pytest.raises(PromptTooLongError, match=r"tokens in a context of 80"):
        encoder.encode_prompts(["Edema.", long])
    cut = encoder.encode_prompts(["Edema.", long], truncate=True)
    np.testing.assert_allclose(cut, encoder.encode_texts(["Edema.", long]), atol=1e-5)
    own = LabelSet("size", [LabelPrompts("large", ["Large."], ["Small."]), LabelPrompts("wide", [long], ["Slim."])])
    with pytest.raises(UserError, match=r"label set size: a prompt of wide has \d+ tokens, the context 80: shorten"):
        encoder.zero_shot_classifier(own)
    assert encoder.zero_shot_classifier(own, truncate=True).names == ["large", "wide"]


def test_a_full_context_is_not_too_long(toy_bundle: Path) -> None:
    encoder = load(toy_bundle, device="cpu")
    texts = ["1 " * number + "1" * digits for number in range(40) for digits in (1, 2)]
    lengths = [int((row != 0).sum()) for row in encoder.tokenizer(texts, context_length=200)]
    full, over = texts[lengths.index(80)], texts[lengths.index(81)]
    np.testing.assert_allclose(encoder.encode_prompts([full]), encoder.encode_texts([full]), atol=1e-5)
    with pytest.raises(PromptTooLongError, match="81 tokens in a context of 80"):
        encoder.encode_prompts([full, over])
