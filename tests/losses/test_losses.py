import math
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medclip_lab.losses import (
    ClipLoss,
    LossConfig,
    MultiPositiveClipLoss,
    MultiViewClipLoss,
    PrototypeLoss,
    SigLipLoss,
    SoftTargetClipLoss,
    WeightedSum,
    build_loss,
    functional,
)
from medclip_lab.losses.base import PairLoss
from medclip_lab.losses.registry import LOSSES

from . import golden

IMPLS: list[dict[str, Any]] = [
    {"impl": "reference"},
    {"impl": "chunked"},
    {"impl": "chunked", "chunk_size": 1},
    {"impl": "chunked", "chunk_size": 3},
]
TAU = torch.tensor(1 / 0.07, dtype=torch.float64)


@pytest.mark.parametrize("impl", IMPLS)
def test_clip_golden(impl: dict[str, Any]) -> None:
    assert ClipLoss(**impl)(golden.IMAGES, golden.TEXTS, TAU).item() == pytest.approx(golden.CLIP_TAU_007, rel=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
def test_siglip_golden(impl: dict[str, Any]) -> None:
    loss = SigLipLoss(**impl)(golden.IMAGES, golden.TEXTS, torch.tensor(10.0), torch.tensor(-10.0))
    assert loss.item() == pytest.approx(golden.SIGLIP_T10_B_MINUS_10, rel=1e-12)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"similarity": "dot"}, golden.MEDCLIP_DOT_T1),
        ({}, golden.MEDCLIP_COSINE_T1),
        ({"target_temperature": 0.5}, golden.MEDCLIP_COSINE_T05),
        ({"target_temperature": 0.1}, golden.MEDCLIP_COSINE_T01),
    ],
)
@pytest.mark.parametrize("impl", IMPLS)
def test_soft_target_golden(settings: dict[str, Any], expected: float, impl: dict[str, Any]) -> None:
    labels = {"image_labels": golden.IMAGE_LABELS, "text_labels": golden.TEXT_LABELS}
    loss = SoftTargetClipLoss(**settings, **impl)(golden.IMAGES, golden.TEXTS, TAU, **labels)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
def test_golden_of_the_variants(impl: dict[str, Any]) -> None:
    """ConVIRT's direction weight, MGCA's sum, UniCL's categories, CXR-CLIP's two views and texts."""
    two = golden.IMAGES, golden.TEXTS
    convirt = ClipLoss(temperature=0.1, image_to_text_weight=0.75, **impl)(*two, TAU)
    assert convirt.item() == pytest.approx(golden.CONVIRT_TAU_01_LAMBDA_075, rel=1e-12)
    mgca = ClipLoss(directions="sum", **impl)(*two, TAU)
    assert mgca.item() == pytest.approx(golden.MGCA_TAU_007, rel=1e-12)
    unicl = MultiPositiveClipLoss("category", **impl)(*two, TAU, category_ids=torch.tensor([0, 1, 0, 2]))
    assert unicl.item() == pytest.approx(golden.UNICL_TAU_007, rel=1e-12)
    second = {"second_image_features": golden.SECOND_IMAGES, "second_text_features": golden.SECOND_TEXTS}
    views = MultiViewClipLoss(0.0, 0.0, **impl)(*two, TAU, **second)
    assert views.item() == pytest.approx(golden.CXRCLIP_MVS_TAU_007, rel=1e-12)
    full = MultiViewClipLoss(1.0, 0.5, **impl)(*two, TAU, **second, output_dict=True)
    assert full["contrastive_loss"].item() == pytest.approx(golden.CXRCLIP_FULL_TAU_007, rel=1e-12)
    parts = full["image_text_loss"] + full["image_image_loss"] + 0.5 * full["text_text_loss"]
    assert parts.item() == pytest.approx(full["contrastive_loss"].item(), rel=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
def test_identities(impl: dict[str, Any]) -> None:
    """Losses that should be each other where their targets are."""
    images, texts = features(9, 0), features(9, 1)
    clip = ClipLoss(**impl)(images, texts, TAU)
    alone = torch.arange(9)
    torch.testing.assert_close(MultiPositiveClipLoss("text", **impl)(images, texts, TAU, text_ids=alone), clip)
    nobody = torch.full((9,), -1)
    torch.testing.assert_close(MultiPositiveClipLoss("text", **impl)(images, texts, TAU, text_ids=nobody), clip)
    eye = torch.eye(9, dtype=torch.float64)
    hard = SoftTargetClipLoss(target_temperature=1e-3, **impl)(images, texts, TAU, image_labels=eye, text_labels=eye)
    torch.testing.assert_close(hard, clip)
    groups = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2])
    by_id = MultiPositiveClipLoss("text", **impl)(images, texts, TAU, text_ids=groups)
    labels = torch.nn.functional.one_hot(groups).double()
    by_label = MultiPositiveClipLoss("labels", **impl)(images, texts, TAU, image_labels=labels, text_labels=labels)
    by_softmax = SoftTargetClipLoss(target_temperature=1e-3, **impl)(
        images, texts, TAU, image_labels=labels, text_labels=labels
    )
    torch.testing.assert_close(by_label, by_id)
    torch.testing.assert_close(by_softmax, by_id)
    torch.testing.assert_close(ClipLoss(label_smoothing=1e-12, **impl)(images, texts, TAU), clip)


@pytest.mark.parametrize("impl", IMPLS)
def test_siglip_with_ids_pair_by_pair(impl: dict[str, Any]) -> None:
    images, texts = features(6, 0), features(6, 1)
    text_ids, patient_ids = torch.tensor([0, 1, 0, -1, -1, 1]), torch.tensor([5, 5, 6, 6, 7, -1])
    expected = 0.0
    for i in range(6):
        for j in range(6):
            same_text = text_ids[i] == text_ids[j] >= 0
            same_patient = patient_ids[i] == patient_ids[j] >= 0
            z = 10 * images[i] @ texts[j] - 2
            if i == j or same_text:
                expected -= F.logsigmoid(z).item()
            elif not same_patient:
                expected -= F.logsigmoid(-z).item()
    found = SigLipLoss("text", "patient", **impl)(
        images,
        texts,
        torch.tensor(10.0).double(),
        torch.tensor(-2.0).double(),
        text_ids=text_ids,
        patient_ids=patient_ids,
    )
    assert found.item() == pytest.approx(expected / 6, rel=1e-12)


def test_label_ids() -> None:
    nan = math.nan
    rows = torch.tensor([[1.0, 0.0], [1.0, nan], [1.0, 0.0], [nan, nan], [nan, nan], [-1.0, 0.0], [0.0, 0.0]])
    ids = functional.label_ids(rows).tolist()
    assert ids[0] == ids[2]
    assert ids[3] == ids[4] == functional.NO_GROUP
    assert len({ids[0], ids[1], ids[5], ids[6], ids[3]}) == 5
    assert min(value for index, value in enumerate(ids) if index not in (3, 4)) >= 0


def test_ignored_labels_leave_the_comparison() -> None:
    """A label that one side does not know changes nothing, whatever the other says about it."""
    known = torch.tensor([[1.0, 0.0, 1.0]])
    for third in (1.0, 0.0):
        text = torch.tensor([[1.0, 0.0, third]])
        similar = functional.label_similarity(known, text, "cosine", torch.tensor([[1.0, 1.0, 0.0]]), torch.ones(1, 3))
        assert similar.item() == pytest.approx(1.0)
    loss = SoftTargetClipLoss(unmentioned="ignore")
    labels = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
    hidden = labels.clone()
    hidden[:, 2] = math.nan
    images, texts = features(2, 0), features(2, 1)
    by_nan = loss(images, texts, TAU, image_labels=hidden, text_labels=labels)
    mask = torch.tensor([[True, True, False]]).expand(2, 3)
    by_mask = SoftTargetClipLoss()(images, texts, TAU, image_labels=labels, text_labels=labels, image_label_mask=mask)
    torch.testing.assert_close(by_nan, by_mask)


def test_prototypes_by_hand() -> None:
    loss = PrototypeLoss(classes=2, dim=3, head=False).double()
    images = features(2, 0, 3)
    labels = torch.tensor([[1.0, math.nan], [-1.0, 0.0]]).double()
    scores = 9 * images @ F.normalize(loss.prototypes, dim=1).T + loss.bias
    expected = (-F.logsigmoid(scores[0, 0]) - F.logsigmoid(-scores[1, 1])) / 2
    found = loss(images, images, torch.tensor(9.0).double(), image_labels=labels)
    torch.testing.assert_close(found, expected)
    nothing = loss(images, images, torch.tensor(9.0).double(), image_labels=torch.full((2, 2), math.nan))
    assert nothing.item() == 0.0
    with pytest.raises(ValueError, match=r"prototypes are \[classes, dim\] \(2, 3\); image_labels \(2, 5\)"):
        loss(images, images, torch.tensor(9.0).double(), image_labels=torch.ones(2, 5))


def test_weighted_sum() -> None:
    config = LossConfig(
        "WeightedSum",
        {
            "terms": {
                "pairs": {"name": "SigLipLoss", "args": {"positives": "text"}},
                "labels": {"name": "SoftTargetClipLoss", "weight": 0.5},
            }
        },
    )
    loss = build_loss(config)
    assert isinstance(loss, WeightedSum)
    assert set(loss.inputs) == {"text_ids", "image_labels", "text_labels"}
    assert loss.paired
    assert loss.uses_bias
    assert loss.init_logit_bias == -10.0
    labels = {"image_labels": golden.IMAGE_LABELS, "text_labels": golden.TEXT_LABELS}
    ids = {"text_ids": torch.tensor([0, 1, 0, 2])}
    told = loss(golden.IMAGES, golden.TEXTS, TAU, torch.tensor(-1.0), **labels, **ids, output_dict=True)
    pairs = SigLipLoss("text")(golden.IMAGES, golden.TEXTS, TAU, torch.tensor(-1.0), **ids)
    soft = SoftTargetClipLoss()(golden.IMAGES, golden.TEXTS, TAU, **labels)
    torch.testing.assert_close(told["contrastive_loss"], pairs + 0.5 * soft)
    torch.testing.assert_close(told["pairs"], pairs)
    torch.testing.assert_close(told["labels"], soft)
    assert "labels/excess_loss" in told
    for args, said in (
        ({}, "WeightedSum: {terms"),
        (
            {"terms": {"a": {"name": "ClipLos"}}},
            "loss.args.terms.a.name: unknown loss 'ClipLos'; did you mean ClipLoss",
        ),
        ({"terms": {"a": {"name": "ClipLoss", "wieght": 1}}}, "loss.args.terms.a: {name"),
        ({"terms": {"a": {"name": "ClipLoss", "args": {"impl": "fast"}}}}, "loss.args.terms.a.args.impl: one of"),
    ):
        with pytest.raises(ValueError, match="(?s)" + re.escape(said)):
            build_loss(LossConfig("WeightedSum", args))


def test_half_precision_texts_do_not_overflow_what_does_not_use_them() -> None:
    texts = F.normalize(torch.ones(8192, 512), dim=1).half()
    loss = PrototypeLoss(2, 512)(texts, texts, torch.tensor(10.0), image_labels=torch.ones(8192, 2))
    assert loss.isfinite()


def test_excess_loss_keeps_no_graph() -> None:
    images, texts = features(4, 0).requires_grad_(), features(4, 1)
    for impl in IMPLS:
        told = MultiPositiveClipLoss(**impl)(images, texts, TAU, text_ids=torch.arange(4), output_dict=True)
        assert told["contrastive_loss"].requires_grad
        assert not told["excess_loss"].requires_grad


def test_temperature_and_range() -> None:
    images, texts = features(4, 0), features(4, 1)
    fixed, scale = ClipLoss(temperature=0.1), torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    value = fixed(images, texts, scale)
    torch.testing.assert_close(value, ClipLoss()(images, texts, torch.tensor(10.0).double()))
    value.backward()
    assert scale.grad is not None
    assert scale.grad.item() == 0
    low = ClipLoss(temperature=0.07)(images, texts, torch.tensor(1.0).bfloat16())
    torch.testing.assert_close(low, ClipLoss()(images, texts, torch.tensor(1 / 0.07).double()))
    clamped = ClipLoss(logit_scale_range=[1, 50])(images, texts, torch.tensor(80.0).double())
    torch.testing.assert_close(clamped, ClipLoss()(images, texts, torch.tensor(50.0).double()))


@pytest.mark.parametrize(
    ("size", "floor"), [(100, golden.MEDCLIP_FLOOR_ONE_MATCH_OF_100), (1024, golden.MEDCLIP_FLOOR_ONE_MATCH_OF_1024)]
)
def test_floor_of_one_match(size: int, floor: float) -> None:
    """At target temperature 1 the floor is nearly log(B): the reason why the excess is what we log."""
    similarity = torch.eye(size, dtype=torch.float64)
    _, entropy = functional.soft_target_loss(torch.zeros(size, size, dtype=torch.float64), similarity, 1.0)
    assert entropy.item() == pytest.approx(floor, rel=1e-12)


def features(rows: int, seed: int, dim: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, dim, generator=generator, dtype=torch.float64), dim=1)


def manual_siglip(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for i, image in enumerate(images):
        for j, text in enumerate(texts):
            z = scale * (image @ text) + bias
            total = total - F.logsigmoid(z if i == j else -z)
    return total / len(images)


def manual_clip(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    scores = scale * images @ texts.T + bias
    for i in range(len(images)):
        total = total - scores[i, i] + scores[i].logsumexp(0)
        total = total - scores[i, i] + scores[:, i].logsumexp(0)
    return total / (2 * len(images))


@pytest.mark.parametrize(("kind", "manual"), [(SigLipLoss, manual_siglip), (ClipLoss, manual_clip)])
@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize("impl", IMPLS)
def test_value_and_gradients_against_the_formula(
    kind: type[PairLoss], manual: Any, rows: int, impl: dict[str, Any]
) -> None:
    loss = kind(**impl)
    leaves = [features(rows, 0), features(rows, 1), torch.tensor(9.0).double(), torch.tensor(-3.0).double()]
    ours = [leaf.clone().requires_grad_() for leaf in leaves]
    theirs = [leaf.clone().requires_grad_() for leaf in leaves]
    value, expected = loss(*ours), manual(*theirs)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    value.backward()
    expected.backward()
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, reference.grad, rtol=1e-10, atol=1e-12)


def test_soft_targets_become_hard_ones() -> None:
    """With identity labels and a low temperature the semantic loss is InfoNCE."""
    images, texts, labels = features(6, 0), features(6, 1), torch.eye(6, dtype=torch.float64)
    soft = SoftTargetClipLoss(target_temperature=1e-3)(images, texts, TAU, image_labels=labels, text_labels=labels)
    torch.testing.assert_close(soft, ClipLoss()(images, texts, TAU), rtol=1e-12, atol=1e-12)


def test_excess_is_zero_at_the_optimum() -> None:
    similarity = torch.rand(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    loss, floor = functional.soft_target_loss(similarity / 0.3, similarity, 0.3)
    assert (loss - floor).item() == pytest.approx(0, abs=1e-12)


def test_images_and_texts_may_differ_in_number() -> None:
    labels = {"image_labels": torch.eye(5)[:3].double(), "text_labels": torch.eye(5).double()}
    loss = SoftTargetClipLoss()(features(3, 0), features(5, 1), TAU, **labels, output_dict=True)
    assert math.isfinite(loss["contrastive_loss"].item())
    assert loss["excess_loss"].item() > 0


def test_states_of_labels() -> None:
    labels = torch.tensor([1.0, 0.0, -1.0, math.nan])
    assert functional.label_values(labels).tolist() == [1, 0, 0, 0]
    assert functional.label_values(labels, absent=-1, uncertain=0.5, unmentioned=0.25).tolist() == [1, -1, 0.5, 0.25]


def test_absence_can_count() -> None:
    """ "No effusion" is nearer to an image without effusion than to one with it, if absence has a value."""
    image_labels, text_labels = torch.tensor([[1.0, 1.0], [1.0, 0.0]]), torch.tensor([[math.nan, 0.0]])
    image, text = (functional.label_values(labels, absent=-1.0) for labels in (image_labels, text_labels))
    with_effusion, without = functional.label_similarity(image, text, "cosine").flatten().tolist()
    assert without > 0 > with_effusion


def test_half_precision_features_do_not_round_the_logits() -> None:
    images, texts = features(8, 0, 64).bfloat16(), features(8, 1, 64).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = ClipLoss()(images, texts, torch.tensor(100.0))
    exact = ClipLoss()(images.double(), texts.double(), torch.tensor(100.0).double())
    assert low.dtype == torch.float32
    assert low.item() == pytest.approx(exact.item(), rel=1e-5)


def test_nan_comes_out() -> None:
    images = features(4, 0)
    images[0, 0] = math.nan
    assert math.isnan(SigLipLoss()(images, features(4, 1), TAU, torch.tensor(-1.0)).item())


class OwnLoss(nn.Module):
    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight


def test_registry() -> None:
    needed: dict[str, dict[str, Any]] = {
        "PrototypeLoss": {"classes": 14, "dim": 8},
        "WeightedSum": {"terms": {"pairs": {"name": "ClipLoss"}}},
    }
    assert {type(build_loss(LossConfig(name, needed.get(name, {})))).__name__ for name in LOSSES} == set(LOSSES)
    own = build_loss(LossConfig(f"{__name__}.OwnLoss", {"weight": 2.0}))
    assert isinstance(own, OwnLoss)
    assert own.weight == 2.0
    with pytest.raises(ValueError, match="did you mean SigLipLoss"):
        build_loss(LossConfig("SiglipLoss"))
    with pytest.raises(ValueError, match="cannot import"):
        build_loss(LossConfig("nowhere.Loss"))
    with pytest.raises(ValueError, match=r"loss\.args"):
        build_loss(LossConfig("ClipLoss", {"tau": 1}))


def test_only_one_copy_can_be_imported() -> None:
    import subprocess
    import sys
    from pathlib import Path

    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", "import losses"], cwd=root, capture_output=True, text=True)
    assert result.returncode != 0
    assert "import medclip_lab.losses" in result.stderr
