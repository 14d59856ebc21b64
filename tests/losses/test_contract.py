"""Every loss, every implementation, in every way it is used: the contract suite."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from medclip_lab.losses import (
    ClipLoss,
    MultiPositiveClipLoss,
    MultiViewClipLoss,
    PrototypeLoss,
    SigLipLoss,
    SoftTargetClipLoss,
    WeightedSum,
)
from medclip_lab.losses.testing import Runner, check_loss, check_ranks, draw, outcome


@dataclass
class Kind:
    make: Callable[..., nn.Module]
    args: dict[str, Any] = field(default_factory=dict)

    def __call__(self, **options: Any) -> nn.Module:
        return self.make(**self.args, **options)


KINDS = {
    "clip": Kind(ClipLoss),
    "clip-convirt": Kind(ClipLoss, {"image_to_text_weight": 0.75, "temperature": 0.1}),
    "clip-smooth": Kind(ClipLoss, {"label_smoothing": 0.1, "directions": "sum", "logit_scale_range": [1.0, 100.0]}),
    "siglip": Kind(SigLipLoss),
    "siglip-ids": Kind(SigLipLoss, {"positives": "text", "ignored": ["patient", "study"]}),
    "multi-positive": Kind(MultiPositiveClipLoss, {"positives": ["study", "text"]}),
    "multi-positive-labels": Kind(MultiPositiveClipLoss, {"positives": "labels", "directions": "sum"}),
    "soft": Kind(SoftTargetClipLoss, {"target_temperature": 0.2, "absent": -0.5}),
    "soft-dot": Kind(SoftTargetClipLoss, {"similarity": "dot", "image_to_text_weight": 0.3}),
    "soft-ignore": Kind(SoftTargetClipLoss, {"uncertain": "ignore", "unmentioned": "ignore", "absent": -1.0}),
    "multi-view": Kind(MultiViewClipLoss),
}
CHUNKS = {"whole": None, "1": 1, "3": 3}


def weighted(**options: Any) -> nn.Module:
    terms = {"pairs": SigLipLoss(**options), "labels": SoftTargetClipLoss(**options), "classes": PrototypeLoss(5, 8)}
    return WeightedSum(terms, {"labels": 0.5, "classes": 2.0})


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_reference_keeps_the_contract(kind: Kind) -> None:
    check_loss(kind(impl="reference"), rows=(1, 2, 7, 64, 200), dims=(8, 96, 520), world_sizes=())


@pytest.mark.parametrize("chunk", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_chunked_keeps_the_contract(kind: Kind, chunk: int | None) -> None:
    loss = kind(impl="chunked", chunk_size=chunk)
    check_loss(loss, reference=kind(impl="reference"), rows=(1, 2, 7), dims=(8,), world_sizes=(), compiles=chunk == 3)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_chunked_is_the_reference_at_every_size(kind: Kind) -> None:
    loss = kind(impl="chunked", chunk_size=48)
    check_loss(
        loss, reference=kind(impl="reference"), rows=(64, 200), dims=(8, 96, 520), world_sizes=(), compiles=False
    )


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_ranks_are_one_process(
    kind: Kind, impl: str, reduction: str, world: int, gloo: Callable[[int], Runner]
) -> None:
    options = {"impl": impl, "chunk_size": 3, "grad_reduction": reduction}
    check_ranks(kind(**options).double(), world, gloo(world))


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_sums_and_prototypes_keep_the_contract(impl: str, gloo: Callable[[int], Runner]) -> None:
    check_loss(PrototypeLoss(5, 8), ranks=gloo)
    check_loss(PrototypeLoss(5, 8, head=False, grad_reduction="sum"), ranks=gloo, compiles=False)
    check_loss(weighted(impl=impl), ranks=gloo, compiles=False)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 40),
    dim=st.integers(1, 40),
    chunk=st.integers(1, 50),
    seed=st.integers(0, 2**31),
    name=st.sampled_from(list(KINDS)),
)
def test_any_shape(rows: int, dim: int, chunk: int, seed: int, name: str) -> None:
    kind = KINDS[name]
    reference = kind(impl="reference")
    inputs = draw(reference, rows, dim, seed)
    found, expected = outcome(kind(impl="chunked", chunk_size=chunk), inputs), outcome(reference, inputs)
    torch.testing.assert_close(found.value, expected.value, rtol=1e-10, atol=1e-12)
    for leaf, gradient in expected.gradients.items():
        torch.testing.assert_close(found.gradients[leaf], gradient, rtol=1e-8, atol=1e-11)


@settings(max_examples=20, deadline=None)
@given(scale=st.floats(0.01, 100), bias=st.floats(-30, 30), name=st.sampled_from(list(KINDS)))
def test_any_temperature(scale: float, bias: float, name: str) -> None:
    kind = KINDS[name]
    reference = kind(impl="reference")
    inputs = draw(reference, 9, 6)
    inputs.leaves["logit_scale"] = torch.tensor(scale, dtype=torch.float64)
    inputs.leaves["logit_bias"] = torch.tensor(bias, dtype=torch.float64)
    expected = outcome(reference, inputs)
    for dtype, within in ((torch.float64, 1e-9), (torch.float32, 2e-5)):
        found = outcome(kind(impl="chunked", chunk_size=4), inputs.to(dtype))
        torch.testing.assert_close(
            found.value.double(), expected.value, rtol=within, atol=1e-6 if within > 1e-6 else 1e-12
        )
        for leaf in ("image_features", "text_features"):
            error = (found.gradients[leaf].double() - expected.gradients[leaf]).norm()
            # Where nothing is left to learn, what remains is the rounding of the terms.
            assert error <= within * (expected.gradients[leaf].norm() + scale)


def test_memory_kept_for_the_backward_is_linear() -> None:
    """Bytes that autograd keeps beyond the inputs: 8 MiB of features, and nothing of the size of the pairs."""
    kept: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        kept[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    for kind in ("clip", "siglip", "multi-positive", "soft"):
        sizes = []
        for rows in (1024, 2048):
            loss = KINDS[kind](impl="chunked")
            inputs = draw(loss, rows, 512).to(torch.float32)
            leaves = {name: value.requires_grad_() for name, value in inputs.leaves.items()}
            kept.clear()
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
                value = loss(**leaves, **inputs.extra)
            value.backward()
            sizes.append(sum(kept.values()))
        assert sizes[1] <= 24 * 2**20
        assert sizes[1] <= 2.05 * sizes[0]


def test_second_derivative_is_refused() -> None:
    inputs = draw(SigLipLoss(), 4, 8)
    leaves = {name: value.requires_grad_() for name, value in inputs.leaves.items()}
    value = SigLipLoss(impl="chunked")(**leaves)
    (gradient,) = torch.autograd.grad(value, leaves["image_features"], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()
    value = SigLipLoss(impl="reference")(**leaves)
    (gradient,) = torch.autograd.grad(value, leaves["image_features"], create_graph=True)
    gradient.sum().backward()
