"""Two ranks together give the loss and the gradients of one process with the whole batch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from medclip_lab.losses import ClipLoss, SigLipLoss, SoftTargetClipLoss

ROWS, DIM, LABELS = 7, 8, 3


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "image_features": F.normalize(normal(ROWS, DIM), dim=1),
        "text_features": F.normalize(normal(ROWS, DIM), dim=1),
        "logit_scale": torch.tensor(8.0, dtype=torch.float64),
        "logit_bias": torch.tensor(-4.0, dtype=torch.float64),
        "image_labels": (normal(ROWS, LABELS) > 0).double(),
        "text_labels": (normal(ROWS, LABELS) > 0).double(),
    }


def value_and_gradients(loss: nn.Module, values: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    names = ["image_features", "text_features", "logit_scale", "logit_bias"]
    leaves = {name: values[name].clone().requires_grad_() for name in names}
    extra = {name: values[name] for name in getattr(loss, "inputs", ())}
    value = loss(**leaves, **extra)
    value.backward()
    return value.detach(), {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def on_rank(loss: nn.Module, shares: list[int]) -> tuple[int, Any]:
    rank = dist.get_rank()
    start = sum(shares[:rank])
    values = {
        name: value if value.ndim == 0 else value[start : start + shares[rank]] for name, value in inputs().items()
    }
    return rank, value_and_gradients(loss, values)


@pytest.mark.parametrize("loss", [ClipLoss(), SigLipLoss(), SoftTargetClipLoss(target_temperature=0.2)])
@pytest.mark.parametrize("shares", [[4, 3], [6, 1]])
def test_ranks_equal_one_process(
    ranks: Callable[[Callable[..., Any], tuple[Any, ...]], list[Any]], loss: nn.Module, shares: list[int]
) -> None:
    expected, gradients = value_and_gradients(loss, inputs())
    answers = ranks(on_rank, (loss, shares))
    for value, _ in answers:
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    world = len(answers)
    for name in gradients:
        if gradients[name].ndim:
            # DDP averages over ranks: the rows of a rank carry W times their gradient, and nobody else carries it.
            found = torch.cat([answer[1][name] for answer in answers]) / world
        else:
            found = torch.stack([answer[1][name] for answer in answers]).mean()
        torch.testing.assert_close(found, gradients[name], rtol=1e-10, atol=1e-12)
