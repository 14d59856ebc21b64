import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medclip_lab.losses import ClipLoss, LossConfig, SigLipLoss, SoftTargetClipLoss, build_loss, functional
from medclip_lab.losses.registry import LOSSES

from . import golden

TAU = torch.tensor(1 / 0.07, dtype=torch.float64)


def test_clip_golden() -> None:
    assert ClipLoss()(golden.IMAGES, golden.TEXTS, TAU).item() == pytest.approx(golden.CLIP_TAU_007, rel=1e-12)


def test_siglip_golden() -> None:
    loss = SigLipLoss()(golden.IMAGES, golden.TEXTS, torch.tensor(10.0), torch.tensor(-10.0))
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
def test_soft_target_golden(settings: dict[str, Any], expected: float) -> None:
    labels = {"image_labels": golden.IMAGE_LABELS, "text_labels": golden.TEXT_LABELS}
    loss = SoftTargetClipLoss(**settings)(golden.IMAGES, golden.TEXTS, TAU, **labels)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


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


@pytest.mark.parametrize(("loss", "manual"), [(SigLipLoss(), manual_siglip), (ClipLoss(), manual_clip)])
@pytest.mark.parametrize("rows", [1, 2, 7])
def test_value_and_gradients_against_the_formula(loss: nn.Module, manual: Any, rows: int) -> None:
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


@pytest.mark.parametrize("loss", [ClipLoss(), SigLipLoss()])
@pytest.mark.parametrize(
    ("images", "texts", "message"),
    [
        ((4, 8), (3, 8), "4 image_features, 3 text_features"),
        ((4, 8), (4, 6), "embed dims differ"),
        ((4,), (4, 8), r"must be \[batch, dim\]"),
        ((0, 8), (0, 8), "empty batch"),
    ],
)
def test_bad_shapes(loss: nn.Module, images: tuple[int, ...], texts: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loss(torch.ones(images), torch.ones(texts), TAU)


def test_bad_labels() -> None:
    with pytest.raises(ValueError, match=r"image_labels \(3, 2\)"):
        SoftTargetClipLoss()(
            features(4, 0), features(4, 1), TAU, image_labels=torch.ones(3, 2), text_labels=torch.ones(4, 2)
        )
    with pytest.raises(ValueError, match="2 of images, 3 of texts"):
        SoftTargetClipLoss()(
            features(4, 0), features(4, 1), TAU, image_labels=torch.ones(4, 2), text_labels=torch.ones(4, 3)
        )
    with pytest.raises(ValueError, match="target_temperature"):
        SoftTargetClipLoss(target_temperature=0)
    with pytest.raises(ValueError, match="similarity"):
        SoftTargetClipLoss(similarity="euclid")  # type: ignore[arg-type]


class OwnLoss(nn.Module):
    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight


def test_registry() -> None:
    assert {type(build_loss(LossConfig(name))).__name__ for name in LOSSES} == set(LOSSES)
    own = build_loss(LossConfig(f"{__name__}.OwnLoss", {"weight": 2.0}))
    assert isinstance(own, OwnLoss)
    assert own.weight == 2.0
    with pytest.raises(ValueError, match="did you mean SigLipLoss"):
        build_loss(LossConfig("SiglipLoss"))
    with pytest.raises(ValueError, match="cannot import"):
        build_loss(LossConfig("nowhere.Loss"))
    with pytest.raises(ValueError, match=r"loss\.args"):
        build_loss(LossConfig("ClipLoss", {"temperature": 1}))


def test_only_one_copy_can_be_imported() -> None:
    import subprocess
    import sys
    from pathlib import Path

    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", "import losses"], cwd=root, capture_output=True, text=True)
    assert result.returncode != 0
    assert "import medclip_lab.losses" in result.stderr
