"""A student taught by a teacher: the contract, and against the formula written out."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from medclip_lab.losses import ClipLoss, DistillLoss, SigLipLoss, WeightedSum
from medclip_lab.losses.testing import Inputs, Runner, check_loss, check_ranks, draw, outcome


def taught(rows: int, dim: int, generator: torch.Generator) -> dict[str, Tensor]:
    """A teacher of another embed dim, sharper than the student."""

    def unit() -> Tensor:
        return F.normalize(torch.randn(rows, dim + 3, generator=generator, dtype=torch.float64), dim=1)

    scale = torch.tensor(14.0, dtype=torch.float64)
    return {"teacher_image_features": unit(), "teacher_text_features": unit(), "teacher_logit_scale": scale}


def test_reference_keeps_the_contract() -> None:
    check_loss(DistillLoss(impl="reference"), make_inputs=taught, rows=(2, 64), dims=(8,), world_sizes=())


def test_chunked_keeps_the_contract() -> None:
    loss = DistillLoss(impl="chunked", chunk_size=3, image_to_text_weight=0.3)
    reference = DistillLoss(impl="reference", image_to_text_weight=0.3)
    check_loss(loss, reference=reference, make_inputs=taught, rows=(2, 7), world_sizes=(), compiles=False)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_ranks_are_one_process(impl: Any, reduction: Any, gloo: Callable[[int], Runner]) -> None:
    loss = DistillLoss(impl=impl, chunk_size=3, grad_reduction=reduction)
    check_ranks(loss.double(), 2, gloo(2), make_inputs=taught)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_it_is_the_divergence_of_both_directions(impl: Any) -> None:
    inputs = draw(DistillLoss(), 6, 8, make_inputs=taught)
    leaves, extra = inputs.leaves, inputs.extra
    student = leaves["logit_scale"] * leaves["image_features"] @ leaves["text_features"].T
    teacher = extra["teacher_logit_scale"] * extra["teacher_image_features"] @ extra["teacher_text_features"].T
    parts = [
        F.kl_div(own.log_softmax(1), other.log_softmax(1), log_target=True, reduction="batchmean")
        for own, other in ((student, teacher), (student.T, teacher.T))
    ]
    found = outcome(DistillLoss(impl=impl, image_to_text_weight=0.25), inputs)
    torch.testing.assert_close(found.value, 0.25 * parts[0] + 0.75 * parts[1])


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(impl: Any) -> None:
    inputs = draw(ClipLoss(), 6, 8)
    extra = {f"teacher_{name}": value for name, value in inputs.leaves.items() if name != "logit_bias"}
    found = outcome(DistillLoss(impl=impl), Inputs(inputs.leaves, extra))
    assert abs(float(found.value)) < 1e-12
    for name in ("image_features", "text_features", "logit_scale"):
        assert float(found.gradients[name].norm()) < 1e-12
    assert not found.gradients["logit_bias"].any(), "a bias has a gradient of 0, not none: DDP waits for it"


def test_nothing_flows_back_to_the_teacher() -> None:
    inputs = draw(DistillLoss(), 4, 8, make_inputs=taught)
    extra = {name: value.requires_grad_() for name, value in inputs.extra.items()}
    for impl in ("reference", "chunked"):
        DistillLoss(impl=impl)(**inputs.leaves, **extra).requires_grad_().backward()  # type: ignore[arg-type]
    assert all(value.grad is None for value in extra.values())


def test_beside_another_loss() -> None:
    inputs = draw(DistillLoss(), 5, 8, make_inputs=taught)
    terms = WeightedSum({"student": SigLipLoss(), "distill": DistillLoss()}, {"distill": 2.0})
    assert terms.paired
    assert terms.uses_bias
    assert terms.init_logit_scale == 10
    found = terms(**inputs.leaves, **inputs.extra, output_dict=True)
    expected = SigLipLoss()(**inputs.leaves) + 2 * DistillLoss()(**inputs.leaves, **inputs.extra)
    torch.testing.assert_close(found["contrastive_loss"], expected)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "teacher_image_features",
            lambda value: value[:-1],
            r"teacher_image_features must be .* \[4, dim\].* \(3, 11\)",
        ),
        ("teacher_text_features", lambda value: value.long(), r"teacher_text_features must be floating point"),
        ("teacher_text_features", lambda value: value[:, :5], "the teacher's embed dims differ: 11 and 5"),
        ("teacher_logit_scale", lambda value: value.expand(3), "teacher_logit_scale must be a tensor of one number"),
        ("teacher_logit_scale", lambda _: 14.0, r"teacher_logit_scale must be a torch\.Tensor"),
    ],
)
def test_teachers_that_do_not_fit(name: str, change: Callable[[Any], Any], message: str) -> None:
    inputs = draw(DistillLoss(), 4, 8, make_inputs=taught)
    with pytest.raises(ValueError, match=message):
        DistillLoss()(**inputs.leaves, **{**inputs.extra, name: change(inputs.extra[name])})


def test_no_fused_kernels() -> None:
    inputs = draw(DistillLoss(), 4, 8, make_inputs=taught)
    with pytest.raises(ValueError, match="DistillLoss has no fused kernels"):
        DistillLoss(impl="fused")(**inputs.leaves, **inputs.extra)
