"""What ranks say to each other besides features."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from medclip_lab import distributed
from medclip_lab.losses import ClipLoss, SigLipLoss
from medclip_lab.losses.base import PairLoss
from medclip_lab.losses.testing import Inputs, Runner, draw, outcome


def try_loss(losses: list[PairLoss], inputs: list[Inputs]) -> str:
    rank = dist.get_rank()
    try:
        outcome(losses[rank], inputs[rank])
    except ValueError as error:
        return str(error)
    return ""


def test_ranks_that_disagree_are_told(ranks: Runner) -> None:
    """Before the first step, on every rank, and not by hanging."""
    inputs = draw(ClipLoss(), 4, 8)
    for other, said in (
        (SigLipLoss(), "rank 0 has ClipLoss"),
        (ClipLoss(label_smoothing=0.1), "'label_smoothing': 0.1"),
        (ClipLoss(impl="chunked"), "'impl': 'chunked'"),
    ):
        messages = ranks(try_loss, ([ClipLoss(), other], [inputs, inputs]))
        assert all("ranks disagree" in message and said in message for message in messages)
    for changed, said in ((inputs.to(torch.float32), "torch.float32"), (draw(ClipLoss(), 4, 6), "((6,),")):
        messages = ranks(try_loss, ([ClipLoss(), ClipLoss()], [inputs, changed]))
        assert all("ranks disagree" in message and said in message for message in messages)
    assert ranks(try_loss, ([ClipLoss(), ClipLoss()], [inputs, inputs])) == ["", ""]


def test_an_empty_global_batch_is_refused(ranks: Runner) -> None:
    empty = draw(ClipLoss(), 3, 8).share([0], 0)
    for loss in (ClipLoss(impl="reference"), SigLipLoss(impl="chunked")):
        assert all("empty batch" in message for message in ranks(try_loss, ([loss, loss], [empty, empty])))


def frozen_on_one_rank(inputs: Inputs) -> str:
    frozen = ["text_features"] if dist.get_rank() else []
    try:
        outcome(ClipLoss(), inputs, frozen=frozen)
    except ValueError as error:
        return str(error)
    return ""


def test_a_tower_frozen_on_one_rank_only_is_told(ranks: Runner) -> None:
    """Its gradient would never be sent, and the other ranks would wait for it."""
    assert all("ranks disagree" in message for message in ranks(frozen_on_one_rank, (draw(ClipLoss(), 4, 8),)))


def sums() -> tuple[Tensor, Tensor, Tensor]:
    rank = dist.get_rank()
    value = torch.tensor([float(rank), float("-inf"), -1e5 * (rank + 1)], dtype=torch.float64)
    rows = torch.full((rank + 1, 2), float(rank))
    return distributed.all_logsumexp(value), distributed.all_sum(value.clone()), distributed.gather(rows)


def test_collectives(ranks: Runner) -> None:
    for exponents, total, rows in ranks(sums, ()):
        expected = torch.logsumexp(torch.tensor([[0, -torch.inf, -1e5], [1, -torch.inf, -2e5]]).double(), 0)
        torch.testing.assert_close(exponents, expected)
        assert total.tolist() == [1.0, float("-inf"), -3e5]
        assert rows.tolist() == [[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]]


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_one_process_needs_no_group(impl: str) -> None:
    assert not dist.is_initialized()
    assert outcome(ClipLoss(impl=impl), draw(ClipLoss(), 3, 4)).value.isfinite()  # type: ignore[arg-type]
