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
from medclip_lab.losses.kernels import targets
from medclip_lab.losses.testing import Inputs, Runner, check_loss, check_ranks, draw, outcome


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


def relabelled(inputs: Inputs, labels: str) -> Inputs:
    """As drawn, masks and all; without masks; with label vectors that repeat; with 40 labels."""
    if labels == "masked":
        return inputs
    extra = {name: value for name, value in inputs.extra.items() if not name.endswith("_mask")}
    for name in ("image_labels", "text_labels"):
        if labels == "few":
            extra[name] = extra[name][:, :2].nan_to_num(0.0)
        elif labels == "many":
            extra[name] = extra[name].repeat(1, 8)
    return Inputs(inputs.leaves, extra)


@pytest.mark.parametrize("name", ["soft", "soft-dot", "soft-ignore"])
@pytest.mark.parametrize("labels", ["masked", "known", "few", "many"])
@pytest.mark.parametrize("table", [True, False], ids=["table", "no table"])
def test_chunked_takes_any_label_vectors(name: str, labels: str, table: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few and many, with and without masks; with a table of their targets, or formed where they are wanted."""
    if not table:
        monkeypatch.setattr(targets, "TABLE_BYTES", 0)
    inputs = relabelled(draw(KINDS[name](), 70, 8), labels)
    found, expected = (outcome(KINDS[name](impl=impl, chunk_size=16), inputs) for impl in ("chunked", "reference"))
    torch.testing.assert_close(found.value, expected.value, rtol=1e-10, atol=1e-12)
    for leaf, gradient in expected.gradients.items():
        torch.testing.assert_close(found.gradients[leaf], gradient, rtol=1e-8, atol=1e-11)
    told, wanted = (
        KINDS[name](impl=impl, chunk_size=16)(**inputs.leaves, **inputs.extra, output_dict=True)["excess_loss"]
        for impl in ("chunked", "reference")
    )
    torch.testing.assert_close(told, wanted, rtol=1e-9, atol=1e-12)


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
    for dtype, floor in ((torch.float64, 1e-13), (torch.float32, 1e-6)):
        rounded = inputs.to(dtype)
        expected = outcome(reference, rounded.to(torch.float64))
        dense = outcome(kind(impl="reference"), rounded)
        found = outcome(kind(impl="chunked", chunk_size=4), rounded)
        # Never worse than the dense formula in the same precision, or than that precision's rounding of the logits.
        assert (found.value.double() - expected.value).abs() <= 4 * (
            (dense.value.double() - expected.value).abs() + floor * (1 + scale / 10)
        )
        for leaf in ("image_features", "text_features"):
            errors = [(got.gradients[leaf].double() - expected.gradients[leaf]).norm() for got in (found, dense)]
            size = expected.gradients[leaf].norm()
            assert errors[0] <= 4 * (errors[1] + floor * (1 + scale / 10) * size) + 1e-13 * scale


def test_pairs_that_are_learnt_keep_the_digits_of_their_gradient() -> None:
    """At scale 100 the probability of a good pair is nearly 1, and what is left of it is the gradient."""
    torch.manual_seed(0)
    texts = torch.nn.functional.normalize(torch.randn(128, 64, dtype=torch.float64), dim=1)
    images = torch.nn.functional.normalize(texts + 0.13 * torch.randn(128, 64, dtype=torch.float64), dim=1)
    inputs = draw(ClipLoss(), 128, 64)
    inputs.leaves.update(image_features=images, text_features=texts, logit_scale=torch.tensor(100.0).double())
    low = inputs.to(torch.float32)
    expected = outcome(ClipLoss(), low.to(torch.float64))
    assert expected.value < 0.01
    for name in ("image_features", "text_features", "logit_scale"):
        truth = expected.gradients[name]
        errors = [
            float((outcome(ClipLoss(impl=impl), low).gradients[name].double() - truth).norm() / truth.norm())
            for impl in ("chunked", "reference")
        ]
        assert errors[0] <= 2 * errors[1] + 1e-6, (name, errors)


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


@pytest.mark.parametrize("kind", ["clip", "siglip", "siglip-ids", "soft", "soft-ignore", "multi-positive"])
def test_operators_are_well_registered(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own check of the operators: schema, shapes and layouts of the fakes, autograd, compilation."""
    from medclip_lab.losses import clip, siglip

    calls = []
    for module, name in ((clip, "softmax_pairs"), (siglip, "siglip_pairs")):
        operator = getattr(module, name)

        def recording(*args: Any, operator: Any = operator) -> Any:
            calls.append((operator, args))
            return operator(*args)

        monkeypatch.setattr(module, name, recording)
    inputs = draw(KINDS[kind](), 5, 6).map(lambda value: value.t().contiguous().t())
    outcome(KINDS[kind](impl="chunked", chunk_size=2), inputs)
    assert len(calls) == 1
    operator, args = calls[0]
    fresh = [a.detach().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a for a in args]
    # What can be compiled is tried with the losses; the last of torch's checks wants second derivatives.
    torch.library.opcheck(
        operator, tuple(fresh), test_utils=("test_schema", "test_autograd_registration", "test_faketensor")
    )


def test_forward_mode_is_refused() -> None:
    inputs = draw(SigLipLoss(), 4, 8)

    def value(images: Tensor) -> Tensor:
        loss: Tensor = SigLipLoss(impl="chunked")(**{**inputs.leaves, "image_features": images})
        return loss

    step = (torch.ones(4, 8).double(),)
    with pytest.raises(ValueError, match="no forward-mode derivative"):
        torch.func.jvp(value, (inputs.leaves["image_features"],), step)

    def dense(images: Tensor) -> Tensor:
        loss: Tensor = SigLipLoss(impl="reference")(**{**inputs.leaves, "image_features": images})
        return loss

    _, tangent = torch.func.jvp(dense, (inputs.leaves["image_features"],), step)
    assert tangent != 0


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
