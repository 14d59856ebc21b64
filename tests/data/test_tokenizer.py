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


def test_case_does_not_matter(tokenizer: Tokenizer) -> None:
    assert (tokenizer(["NO PLEURAL EFFUSION"]) == tokenizer(["no pleural effusion"])).all()


def test_training_is_deterministic(tmp_path: Path) -> None:
    for name in "ab":
        train_tokenizer(iter(REPORTS), 300, tmp_path / name)
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == (tmp_path / "b" / "tokenizer.json").read_bytes()
