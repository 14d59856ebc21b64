"""What ranks say to each other besides features."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from medclip_lab import distributed
from medclip_lab.losses import ClipLoss, MultiViewClipLoss, PrototypeLoss, SigLipLoss
from medclip_lab.losses.testing import Inputs, Runner, draw, outcome, processes


def try_loss(losses: list[nn.Module], inputs: list[Inputs]) -> str:
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
        (MultiViewClipLoss(), "rank 0 has ClipLoss"),
    ):
        theirs = draw(other, 4, 8)
        messages = ranks(try_loss, ([ClipLoss(), other], [inputs, theirs]))
        assert all("ranks disagree" in message and said in message for message in messages)
    for changed, said in ((inputs.to(torch.float32), "torch.float32"), (draw(ClipLoss(), 4, 6), "((6,),")):
        messages = ranks(try_loss, ([ClipLoss(), ClipLoss()], [inputs, changed]))
        assert all("ranks disagree" in message and said in message for message in messages)
    assert ranks(try_loss, ([ClipLoss(), ClipLoss()], [inputs, inputs])) == ["", ""]


def test_ranks_that_disagree_on_scalars_are_told(ranks: Runner) -> None:
    inputs = draw(SigLipLoss(), 4, 8)
    for name in ("logit_scale", "logit_bias"):
        other = Inputs({**inputs.leaves, name: inputs.leaves[name] + 1}, {})
        messages = ranks(try_loss, ([SigLipLoss(), SigLipLoss()], [inputs, other]))
        assert all("ranks disagree" in message and name in message for message in messages)
    without = Inputs({name: value for name, value in inputs.leaves.items() if name != "logit_bias"}, {})
    messages = ranks(try_loss, ([SigLipLoss(), SigLipLoss()], [inputs, without]))
    assert all("ranks disagree" in message for message in messages)


def test_bad_input_on_one_rank_is_told_to_all(ranks: Runner) -> None:
    """To raise on that rank alone would leave the others waiting."""
    loss = SigLipLoss("text")
    inputs = draw(loss, 4, 8)
    short = Inputs(inputs.leaves, {"text_ids": inputs.extra["text_ids"][:3]})
    good, bad = ranks(try_loss, ([loss, loss], [inputs, short]))
    assert bad.startswith("text_ids must be [rows] with 4 rows")
    assert good == f"on rank 1: {bad}"
    labels = PrototypeLoss(5, 8)
    inputs = draw(labels, 4, 8)
    wrong = Inputs(inputs.leaves, {"image_labels": inputs.extra["image_labels"][:, :3]})
    good, bad = ranks(try_loss, ([labels.double()] * 2, [inputs, wrong]))
    assert good == f"on rank 1: {bad}"
    views = MultiViewClipLoss()
    inputs = draw(views, 4, 8)
    lacking = Inputs({k: v for k, v in inputs.leaves.items() if k != "second_text_features"}, {})
    good, bad = ranks(try_loss, ([views, views], [lacking, inputs]))
    assert bad == f"on rank 0: {good}"
    assert good == "MultiViewClipLoss needs second_text_features"


def raise_on_one(what: str) -> None:
    if dist.get_rank() == 1:
        raise RuntimeError(what)
    dist.barrier()


def test_an_error_on_a_rank_is_told_and_not_waited_for() -> None:
    with processes(2) as run, pytest.raises(AssertionError, match="on rank 1 of 2: RuntimeError: no empty share"):
        run(raise_on_one, ("no empty share",))


def gathered_twice() -> tuple[Tensor, str]:
    a, b = (torch.tensor([float(dist.get_rank() + 1)], requires_grad=True) for _ in range(2))
    ((distributed.gather(a) + distributed.gather(b)) ** 2).sum().backward()
    assert a.grad is not None
    c = torch.tensor([1.0], requires_grad=True)
    (first,) = torch.autograd.grad((distributed.gather(c) ** 2).sum(), c, create_graph=True)
    try:
        first.sum().backward()
    except RuntimeError as error:
        return a.grad, str(error)
    return a.grad, ""


def test_gather_shares_no_gradient_and_has_no_second(ranks: Runner) -> None:
    for rank, (gradient, refused) in enumerate(ranks(gathered_twice, ())):
        # Each of two ranks has the gradient 2 (a + b) of its rows; their sum comes back.
        assert gradient.tolist() == [2 * 2 * 2 * (rank + 1)]
        assert refused


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
