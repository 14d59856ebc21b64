"""Text towers of transformers: what they give does not depend on padding, and is open_clip's where it has them."""

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.hf_model import HFTextEncoder
from torch.nn.functional import pad

from medclip_lab.errors import UserError
from medclip_lab.models.hf_text import POOLERS, HuggingFaceText, pool, positions, text_config

from .tiny import FAMILIES, ids_of

Towers = dict[str, HuggingFaceText]


@pytest.fixture(scope="module")
def towers() -> Towers:
    torch.manual_seed(0)
    return {family: HuggingFaceText({"model_type": family} | values, 8).eval() for family, values in FAMILIES.items()}


@given(
    family=st.sampled_from(sorted(FAMILIES)),
    pooler=st.sampled_from(POOLERS),
    layers=st.sampled_from([None, [-1], [-2, -1], [0, 1, 2]]),
    words=st.integers(1, 9),
    padding=st.integers(1, 30),
    seed=st.integers(0, 5),
)
@settings(max_examples=150, deadline=None)
def test_features_do_not_depend_on_padding(
    towers: Towers, family: str, pooler: str, layers: list[int] | None, words: int, padding: int, seed: int
) -> None:
    tower = towers[family]
    tower.pooler, tower.layers = pooler, layers
    ids = ids_of(words, seed=seed)
    with torch.no_grad():
        alone = tower(ids)
        padded, tokens, mask = tower.with_tokens(pad(ids, (0, padding), value=tower.config.pad_token_id))
    torch.testing.assert_close(padded, alone, rtol=1e-4, atol=2e-6)
    assert mask.sum(1).tolist() == [words] * 3
    assert tokens.shape == (3, words + padding, 8)


@given(
    pooler=st.sampled_from(POOLERS),
    before=st.integers(0, 4),
    words=st.integers(1, 6),
    after=st.integers(0, 4),
    noise=st.floats(-1e4, 1e4),
)
def test_poolers_see_words_only_whatever_the_side(
    pooler: str, before: int, words: int, after: int, noise: float
) -> None:
    hidden = torch.randn(2, words, 5, generator=torch.Generator().manual_seed(0))
    expected = {
        "mean_pooler": hidden.mean(1),
        "max_pooler": hidden.amax(1),
        "last_pooler": hidden[:, -1],
    }.get(pooler, hidden[:, 0])
    mask = pad(torch.ones(2, words, dtype=torch.bool), (before, after), value=False)
    torch.testing.assert_close(pool(pad(hidden, (0, 0, before, after), value=noise), mask, pooler), expected)


def test_a_text_without_words_is_its_first_token(towers: Towers) -> None:
    for family in ("bert", "llama"):
        for pooler in POOLERS:
            towers[family].pooler, towers[family].layers = pooler, None
            with torch.no_grad():
                short, long = (towers[family](torch.zeros(1, length, dtype=torch.int64)) for length in (1, 9))
            assert short.isfinite().all()
            torch.testing.assert_close(long, short, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("pooler", ["mean_pooler", "cls_pooler", "cls_last_hidden_state_pooler"])
@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("proj", ["mlp", "linear"])
def test_the_same_as_open_clip_with_the_same_weights(tmp_path: Any, family: str, pooler: str, proj: str) -> None:
    ours = HuggingFaceText({"model_type": family} | FAMILIES[family], 8, pooler, proj).eval()
    ours.config.save_pretrained(tmp_path)
    theirs = HFTextEncoder(str(tmp_path), 8, pooler_type=pooler, proj_type=proj, pretrained=False).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ids = pad(ids_of(7), (0, 4), value=ours.config.pad_token_id)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids), rtol=0, atol=1e-6)


def test_chosen_layers_are_their_mean() -> None:
    torch.manual_seed(0)
    tower = HuggingFaceText({"model_type": "bert"} | FAMILIES["bert"], 16, proj=None, layers=[1, -1]).eval()
    ids = ids_of(5)
    with torch.no_grad():
        states = tower.transformer(ids, output_hidden_states=True).hidden_states
        torch.testing.assert_close(tower(ids), ((states[1] + states[2]) / 2).mean(1))


def test_tokens_are_projected_as_features_are() -> None:
    """Of a linear projection: the mean of the words' tokens is the feature of the mean pooler."""
    tower = HuggingFaceText({"model_type": "llama"} | FAMILIES["llama"], 8, proj="linear").eval()
    with torch.no_grad():
        features, tokens, mask = tower.with_tokens(pad(ids_of(6), (0, 3)))
    torch.testing.assert_close((tokens * mask[..., None]).sum(1) / 6, features)


def test_positions_that_a_text_has() -> None:
    assert positions(text_config({"model_type": "bert"} | FAMILIES["bert"])) == 48
    assert positions(text_config({"model_type": "roberta"} | FAMILIES["roberta"])) == 46
    assert positions(text_config({"model_type": "t5"} | FAMILIES["t5"])) == 0


@pytest.mark.parametrize(
    ("values", "settings", "message"),
    [
        ({"model_type": "berd"}, {}, "transformers knows no model_type 'berd'"),
        ({"model_type": "bert", "pad_token_id": None}, {}, "pad_token_id is not set"),
        ({"model_type": "bert", "num_attention_heads": 3}, {}, "transformers cannot build bert: The hidden size"),
        ({}, {"pooler": "mean"}, "unknown pooler 'mean'; known: mean_pooler, cls_pooler"),
        ({}, {"layers": [3]}, r"hf_layers: hidden states 0 to 2 or -1 to -3, got \[3\]"),
        ({}, {"layers": []}, "hf_layers"),
        ({}, {"proj": None}, "the transformer is 16 wide and embed_dim is 8: take linear or mlp"),
        ({}, {"proj": "none"}, "hf_proj_type: 'none' is none of mlp, linear, null"),
    ],
)
def test_settings_that_do_not_fit(values: dict[str, Any], settings: dict[str, Any], message: str) -> None:
    config = {"model_type": "bert"} | FAMILIES["bert"] | values
    with pytest.raises(UserError, match=message) as error:
        HuggingFaceText(config, 8, **settings)
    assert not re.search(r"\n", str(error.value))
