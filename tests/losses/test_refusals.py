"""Settings and inputs that losses refuse or warn about, and in which words."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from medclip_lab.losses import (
    ClipLoss,
    MultiPositiveClipLoss,
    MultiViewClipLoss,
    PrototypeLoss,
    SigLipLoss,
    SoftTargetClipLoss,
    WeightedSum,
)

from .test_losses import TAU, features


@pytest.mark.parametrize(
    ("kind", "args", "said"),
    [
        (ClipLoss, {"impl": "fast"}, "impl: one of 'auto', 'reference', 'chunked', 'fused' expected, got 'fast'"),
        (ClipLoss, {"chunk_size": 0}, "chunk_size must be a whole number of at least 1, got 0"),
        (ClipLoss, {"chunk_size": 2.5}, "chunk_size must be a whole number of at least 1, got 2.5"),
        (WeightedSum, {"terms": {"loss": ClipLoss()}}, "'loss' is no name for a term"),
        (WeightedSum, {"terms": {"contrastive_loss": ClipLoss()}}, "'contrastive_loss' is no name for a term"),
        (ClipLoss, {"grad_reduction": "max"}, "grad_reduction: one of"),
        (ClipLoss, {"temperature": 0.0}, "temperature must be positive, got 0.0"),
        (ClipLoss, {"logit_scale_range": [100, 1]}, "logit_scale_range: two positive numbers"),
        (ClipLoss, {"logit_scale_range": [1, 100], "temperature": 0.1}, "nothing to clamp"),
        (ClipLoss, {"image_to_text_weight": 2}, "image_to_text_weight is a share between 0 and 1, got 2"),
        (ClipLoss, {"directions": "both"}, "directions: one of"),
        (ClipLoss, {"label_smoothing": -1}, "label_smoothing is a share"),
        (MultiPositiveClipLoss, {"positives": []}, "positives: name at least one"),
        (SoftTargetClipLoss, {"uncertain": "skip"}, "uncertain: a number or 'ignore' expected, got 'skip'"),
        (MultiViewClipLoss, {"image_image_weight": -1}, "image_image_weight must not be negative, got -1"),
        (PrototypeLoss, {"classes": 0, "dim": 8}, "at least 1, got 0 and 8"),
        (WeightedSum, {"terms": {}}, "at least one loss"),
        (WeightedSum, {"terms": {"a": ClipLoss()}, "weights": {"b": 1}}, "no loss is named b; the terms are a"),
    ],
)
def test_bad_settings(kind: Callable[..., nn.Module], args: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        kind(**args)


def test_bad_inputs() -> None:
    images, texts = features(4, 0), features(4, 1)
    ids = torch.zeros(4, dtype=torch.int64)
    for call, said in (
        (lambda: SigLipLoss("text")(images, texts, TAU), "SigLipLoss needs text_ids"),
        (lambda: SigLipLoss()(images, texts, TAU, text_ids=ids), "SigLipLoss takes no text_ids"),
        (lambda: SigLipLoss("text")(images, texts, TAU, text_ids=ids[:3]), "text_ids must be [rows] with 4 rows"),
        (lambda: SigLipLoss("text")(images, texts, TAU, text_ids=ids.float()), "text_ids must be int64, got"),
        (lambda: SigLipLoss("text")(images, texts, TAU, text_ids=[1]), "text_ids must be a torch.Tensor, got list"),
        (lambda: ClipLoss()(images.numpy(), texts, TAU), "image_features must be a torch.Tensor, got ndarray"),
        (lambda: MultiViewClipLoss()(images, texts, TAU), "MultiViewClipLoss needs second_image_features, second_text"),
        (lambda: PrototypeLoss(2, 12)(images, texts, TAU), "PrototypeLoss needs image_labels"),
        (
            lambda: PrototypeLoss(1, 12)(images, texts, TAU, image_labels=torch.full((4, 1), 0.3)),
            "image_labels holds 0.3",
        ),
        (
            lambda: SoftTargetClipLoss()(
                images, texts, TAU, image_labels=torch.ones(4, 1), text_labels=torch.ones(4, 1) * 7
            ),
            "text_labels holds 7: 1, 0, -1 (uncertain) or NaN",
        ),
        (lambda: ClipLoss()(images.long(), texts.long(), TAU), "features must be floating point"),
        (lambda: ClipLoss()(images, texts, torch.ones(2)), "logit_scale must be a floating point tensor of one"),
        (lambda: ClipLoss()(images, texts, 14.0), "logit_scale must be a floating point tensor of one number, got 14"),
        (lambda: ClipLoss()(images, texts.to("meta"), TAU), "features on different devices"),
        (
            lambda: SoftTargetClipLoss()(
                images, texts, TAU, image_labels=ids[:, None], text_labels=ids[:, None], image_label_mask=ids[:, None]
            ),
            "image_label_mask must be bool (4, 1)",
        ),
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            call()


@pytest.mark.parametrize("loss", [ClipLoss(), SigLipLoss(impl="chunked")])
def test_features_that_are_not_normalised_are_warned_about_once(loss: nn.Module) -> None:
    with pytest.warns(UserWarning, match=r"image_features should have unit norm; theirs are 3 to 3"):
        loss(3 * features(4, 0), features(4, 1), TAU)
    loss(3 * features(4, 0), features(4, 1), TAU)  # a second warning would be an error


def test_features_that_leave_the_sphere_later_are_warned_about_too() -> None:
    loss = ClipLoss()
    loss(features(4, 0), features(4, 1), TAU)
    with pytest.warns(UserWarning, match="text_features should have unit norm"):
        loss(features(4, 0), 50 * features(4, 1), TAU)


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
    with pytest.raises(ValueError, match=r"image_labels must be .* with 4 rows, .* got \(3, 2\)"):
        SoftTargetClipLoss()(
            features(4, 0), features(4, 1), TAU, image_labels=torch.ones(3, 2), text_labels=torch.ones(4, 2)
        )
    with pytest.raises(ValueError, match="2 of image_labels, 3 of text_labels"):
        SoftTargetClipLoss()(
            features(4, 0), features(4, 1), TAU, image_labels=torch.ones(4, 2), text_labels=torch.ones(4, 3)
        )
    with pytest.raises(ValueError, match="target_temperature"):
        SoftTargetClipLoss(target_temperature=0)
    with pytest.raises(ValueError, match="similarity"):
        SoftTargetClipLoss(similarity="euclid")  # type: ignore[arg-type]
