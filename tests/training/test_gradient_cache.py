"""A batch in chunks gives the value and every gradient of the batch as a whole, for every loss."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medclip_lab.errors import UserError
from medclip_lab.losses import (
    ClipLoss,
    MultiPositiveClipLoss,
    PrototypeLoss,
    SigLipLoss,
    SoftTargetClipLoss,
    WeightedSum,
)
from medclip_lab.losses.testing import draw
from medclip_lab.training.gradient_cache import in_chunks, refuse_batch_statistics

ROWS, DIM = 8, 6
LOSSES: dict[str, Callable[[], nn.Module]] = {
    "clip": ClipLoss,
    "clip-chunked": lambda: ClipLoss(impl="chunked", chunk_size=3),
    "siglip": lambda: SigLipLoss("text"),
    "siglip-chunked": lambda: SigLipLoss("text", impl="chunked", chunk_size=3),
    "multi-positive": MultiPositiveClipLoss,
    "soft": SoftTargetClipLoss,
    "sum": lambda: WeightedSum({"a": ClipLoss(), "b": PrototypeLoss(5, DIM)}),
}


class Towers(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image = nn.Sequential(nn.Linear(5, 16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, DIM)).double()
        self.text = nn.Sequential(nn.Linear(4, 16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, DIM)).double()
        self.scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
        self.bias = nn.Parameter(torch.tensor(-2.0, dtype=torch.float64))

    def encode(self, name: str, rows: Tensor) -> Tensor:
        return F.normalize(getattr(self, name)(rows), dim=1)


def step(
    loss: nn.Module, chunk: int | None, dropout: float = 0.0, cache: bool = True
) -> tuple[Tensor, dict[str, Tensor]]:
    towers = Towers(dropout)
    generator = torch.Generator().manual_seed(1)
    batch = {
        name: torch.randn(ROWS, size, dtype=torch.float64, generator=generator)
        for name, size in (("image", 5), ("text", 4))
    }
    torch.manual_seed(7)
    features = {}
    for name, rows in batch.items():

        def tower(part: Tensor, name: str = name) -> Tensor:
            return towers.encode(name, part)

        if chunk is None:
            features[name] = tower(rows)
        elif cache:
            features[name] = in_chunks(tower, rows, chunk)
        else:
            features[name] = torch.cat([tower(part) for part in rows.split(chunk)])
    extra = draw(loss, ROWS, DIM).extra
    value = loss(features["image"], features["text"], towers.scale.exp(), towers.bias, **extra)
    torch.rand(3)  # what else draws between the two passes must not matter
    value.backward()
    gradients = {name: p.grad for name, p in towers.named_parameters() if p.grad is not None}
    return value.detach(), gradients


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("name", LOSSES)
def test_chunks_are_the_whole_batch(name: str, parts: int) -> None:
    torch.manual_seed(3)
    loss = LOSSES[name]().double()
    value, expected = step(loss, None)
    found_value, found = step(loss, ROWS // parts)
    torch.testing.assert_close(found_value, value, rtol=1e-12, atol=1e-12)
    assert set(found) == set(expected)
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-9, atol=1e-12)


def test_both_passes_drop_the_same_units() -> None:
    loss = ClipLoss()
    value, expected = step(loss, 2, dropout=0.5, cache=False)
    found_value, found = step(loss, 2, dropout=0.5)
    torch.testing.assert_close(found_value, value)
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient)
    other, _ = step(loss, None, dropout=0.0)
    assert other != value


def test_autocast_is_the_same_in_both_passes() -> None:
    layer = nn.Linear(5, DIM)
    rows = torch.randn(4, 5)
    seen = []

    def tower(part: Tensor) -> Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return layer(part).float()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = in_chunks(tower, rows, 2)
    features.sum().backward()
    assert seen == [True] * 4


def test_activations_are_not_kept() -> None:
    layer = nn.Sequential(nn.Linear(64, 4096), nn.GELU(), nn.Linear(4096, DIM))
    rows = torch.randn(32, 64)

    weights = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}

    def kept(tower: Callable[[], Tensor]) -> int:
        sizes: dict[int, int] = {}

        def pack(value: Tensor) -> Any:
            if value.untyped_storage().data_ptr() not in weights:
                sizes[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
            return value

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            tower()
        return sum(sizes.values())

    whole, chunked = kept(lambda: layer(rows)), kept(lambda: in_chunks(layer, rows, 4))
    assert whole > 32 * 4096 * 4
    assert chunked < 32 * 4096 * 4 / 4


def test_without_gradients_nothing_runs_twice() -> None:
    calls = []

    def tower(part: Tensor) -> Tensor:
        calls.append(len(part))
        return part

    with torch.no_grad():
        assert torch.equal(in_chunks(tower, torch.arange(5.0)[:, None], 2), torch.arange(5.0)[:, None])
    assert calls == [2, 2, 1]


def test_batch_norm_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    with pytest.raises(UserError, match=r"trainer.gradient_cache is 4, and 1 normalises over its batch"):
        refuse_batch_statistics(model, 4)
    refuse_batch_statistics(model.eval(), 4)
    refuse_batch_statistics(nn.Sequential(nn.GroupNorm(1, 2)), 4)
    with pytest.raises(UserError, match="normalises over its batch"):
        refuse_batch_statistics(nn.BatchNorm1d(3, track_running_stats=False).eval(), 4)
