"""Under DDP, FSDP2 and plain torch.distributed the parameters get the gradients of one process with the whole batch."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from medclip_lab.losses import ClipLoss, SigLipLoss, SoftTargetClipLoss
from medclip_lab.losses.testing import Runner, draw

SHARES, DIM = [5, 2], 6
Gradients = dict[str, Tensor]


class Model(nn.Module):
    """Two towers, temperature and bias; returns what a loss takes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(5, DIM).double(), nn.Linear(4, DIM).double()
        # FSDP2 shards along the first axis, so these have one.
        self.scale = nn.Parameter(torch.full((1,), 2.0, dtype=torch.float64))
        self.bias = nn.Parameter(torch.full((1,), -2.0, dtype=torch.float64))

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, ...]:
        return F.normalize(self.image(image), dim=1), F.normalize(self.text(text), dim=1), self.scale.exp(), self.bias


def inputs(loss: nn.Module, rows: slice) -> tuple[list[Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    data = [torch.randn(sum(SHARES), size, dtype=torch.float64, generator=generator)[rows] for size in (5, 4)]
    return data, {name: value[rows] for name, value in draw(loss, sum(SHARES), DIM).extra.items()}


def gradients(model: nn.Module, loss: nn.Module, rows: slice) -> tuple[Tensor, Gradients]:
    data, extra = inputs(loss, rows)
    value = loss(*model(*data), **extra)
    value.backward()
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        gradient: Any = parameter.grad
        found[name.removeprefix("module.")] = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
    return value.detach(), found


def on_rank(wrapper: str, loss: nn.Module) -> tuple[Tensor, Gradients]:
    rank = dist.get_rank()
    start = sum(SHARES[:rank])
    rows = slice(start, start + SHARES[rank])
    model: nn.Module = Model()
    if wrapper == "ddp":
        model = DistributedDataParallel(model)
    elif wrapper == "fsdp2":
        model = fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    value, found = gradients(model, loss, rows)
    if wrapper == "none":
        for gradient in found.values():
            dist.all_reduce(gradient)
    return value, found


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2", "none"])
@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("kind", [ClipLoss, SigLipLoss, SoftTargetClipLoss])
def test_parameters_get_the_exact_gradient(kind: Any, impl: str, wrapper: str, ranks: Runner) -> None:
    reduction = "sum" if wrapper == "none" else "mean"
    loss = kind(impl=impl, chunk_size=2, grad_reduction=reduction)
    expected_value, expected = gradients(Model(), loss, slice(None))
    for value, found in ranks(on_rank, (wrapper, loss)):
        torch.testing.assert_close(value, expected_value, rtol=1e-12, atol=1e-12)
        assert set(found) == set(expected)
        for name, gradient in expected.items():
            torch.testing.assert_close(
                found[name], gradient, rtol=1e-9, atol=1e-12, msg=lambda text, n=name: f"{n}: {text}"
            )
