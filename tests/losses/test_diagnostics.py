import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from medclip_lab.losses.diagnostics import diagnose, effective_rank
from medclip_lab.losses.testing import Runner


def rows(count: int, seed: int, dim: int = 6) -> Tensor:
    return F.normalize(torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_effective_rank() -> None:
    assert effective_rank(torch.eye(8)[:4]).item() == pytest.approx(4)
    assert effective_rank(rows(1, 0).expand(9, -1)).item() == pytest.approx(1, abs=1e-4)


def test_against_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medclip_lab.losses.diagnostics.ROWS", 4)
    images = rows(11, 0)
    texts = F.normalize(images + 0.8 * rows(11, 1), dim=1)
    ids = torch.tensor([0, 1, 2, 0, 3, 4, 5, 6, 1, 0, 7])
    told = diagnose(images, texts, torch.tensor(10.0), torch.tensor(-2.0), ids)
    scores = 10 * images @ texts.T - 2
    eye = torch.eye(11, dtype=torch.bool)
    assert told["positive_logit"].item() == pytest.approx(scores[eye].mean().item(), rel=1e-5)
    assert told["negative_logit"].item() == pytest.approx(scores[~eye].mean().item(), rel=1e-4)
    assert told["image_to_text_top1"].item() == pytest.approx(
        (scores.argmax(1) == torch.arange(11)).float().mean().item()
    )
    assert told["text_to_image_top1"].item() == pytest.approx(
        (scores.argmax(0) == torch.arange(11)).float().mean().item()
    )
    assert 0 < told["image_to_text_top1"].item() < 1
    assert told["repeated_texts"].item() == pytest.approx(5 / 11)


def test_a_collapsed_model_does_not_look_perfect() -> None:
    same = rows(1, 0).expand(5, -1)
    told = diagnose(same, same, torch.tensor(10.0))
    assert told["image_to_text_top1"].item() == 0
    assert told["image_rank"].item() == pytest.approx(1, abs=1e-4)


def test_features_that_are_not_finite_say_so() -> None:
    bad = rows(5, 0).clone()
    bad[0, 0] = torch.nan
    told = diagnose(bad, rows(5, 1), torch.tensor(10.0))
    assert told["image_rank"].isnan()
    assert told["text_rank"].isfinite()


def test_texts_without_an_id_repeat_nothing() -> None:
    ids = torch.tensor([-1, -1, -1, 0, 1])
    assert diagnose(rows(5, 0), rows(5, 1), torch.tensor(1.0), text_ids=ids)["repeated_texts"].item() == 0
    with pytest.raises(ValueError, match="text_ids must be"):
        diagnose(rows(5, 0), rows(5, 1), torch.tensor(1.0), text_ids=ids[:3])


def test_unpaired_and_single_rows() -> None:
    assert set(diagnose(rows(3, 0), rows(5, 1), torch.tensor(1.0), paired=False)) == {"image_rank", "text_rank"}
    assert diagnose(rows(1, 0), rows(1, 1), torch.tensor(1.0))["negative_logit"].item() == 0


def on_rank() -> dict[str, Tensor]:
    own = slice(0, 4) if dist.get_rank() == 0 else slice(4, 7)
    ids = torch.tensor([0, 1, 2, 3, 4, 1, 5])
    return diagnose(rows(7, 0)[own], rows(7, 1)[own], torch.tensor(5.0), torch.tensor(1.0), ids[own])


def test_ranks_tell_the_global_batch(ranks: Runner) -> None:
    ids = torch.tensor([0, 1, 2, 3, 4, 1, 5])
    expected = diagnose(rows(7, 0), rows(7, 1), torch.tensor(5.0), torch.tensor(1.0), ids)
    for told in ranks(on_rank, ()):
        for name, value in expected.items():
            torch.testing.assert_close(told[name], value)
