from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medclip_lab.data.tokenizer import BOS_ID, EOS_ID, PAD_ID, UNK_ID, Tokenizer, load_tokenizer, train_tokenizer

REPORTS = ["No pleural effusion or pneumothorax.", "The heart is enlarged. 2.5 cm nodule.", "Heart size is normal."] * 5


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    assert train_tokenizer(REPORTS, 400, folder) <= 400
    return load_tokenizer(folder, 24)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=200))
def test_any_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer([text])[0].tolist()
    assert len(ids) == 24
    assert ids[0] == BOS_ID
    assert ids.count(EOS_ID) == 1, "also a text that is cut keeps its end"
    assert UNK_ID not in ids
    assert set(ids[ids.index(EOS_ID) + 1 :]) <= {PAD_ID}


def wordpiece(folder: Path) -> Tokenizer:
    """As of BERT: [CLS] text [SEP], padded."""
    from transformers import BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "no", "effusion", "."]
    BertTokenizerFast(vocab={word: number for number, word in enumerate(words)}).save_pretrained(str(folder))
    return load_tokenizer(folder, 24)


def clips_own(_: Path) -> Tokenizer:
    import open_clip

    return open_clip.get_tokenizer("ViT-B-32", context_length=24)


def ours(folder: Path) -> Tokenizer:
    train_tokenizer(REPORTS, 400, folder)
    return load_tokenizer(folder, 24)


@pytest.mark.parametrize("make", [ours, wordpiece, clips_own])
def test_a_text_that_is_cut_still_ends_in_the_end_token(make: Callable[[Path], Tokenizer], tmp_path: Path) -> None:
    tokenizer = make(tmp_path)
    short, long, longer = tokenizer(["No effusion.", "No effusion. " * 40, "No effusion. " * 400])
    end = short[short != short[-1]][-1]  # the last before the padding
    assert short[-1] != end
    assert long[-1] == end
    assert (long == longer).all()
    assert (long[:-1] != end).all(), "the end stands only at the end"
    assert (long[:2] == short[:2]).all()


def test_case_does_not_matter(tokenizer: Tokenizer) -> None:
    assert (tokenizer(["NO PLEURAL EFFUSION"]) == tokenizer(["no pleural effusion"])).all()


def test_training_is_deterministic(tmp_path: Path) -> None:
    for name in "ab":
        train_tokenizer(iter(REPORTS), 300, tmp_path / name)
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == (tmp_path / "b" / "tokenizer.json").read_bytes()
