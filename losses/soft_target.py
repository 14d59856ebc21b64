"""Semantic matching: targets from the labels instead of from who was paired with whom."""

from typing import ClassVar, Literal, overload

import torch
from torch import Tensor, nn

from medclip_lab.distributed import gather
from medclip_lab.losses import functional


class SoftTargetClipLoss(nn.Module):
    """MedCLIP's semantic matching loss over the global batch (Wang et al., EMNLP 2022, arXiv 2210.10163, eq. 1-5).

    An image and a text are as positive as their label vectors agree, so images without reports and reports without
    images train together. The defaults are the paper's equation with a cosine; `similarity="dot"` is what its code
    does. Two things the code lacks are settings here: with the softmax at temperature 1 the target of a matching pair
    in a batch of 1,024 is 0.27 % and the loss can hardly move, so `target_temperature` sharpens it; and a negated
    sentence ("no effusion") has the vector zero, so `absent` may give absence a value of its own.

    Args:
        similarity: "cosine" or "dot" of the label vectors.
        target_temperature: divides the similarity before the softmax that makes the targets.
        absent, uncertain, unmentioned: what these label states count as in the similarity; present counts as 1.
    """

    inputs: ClassVar[tuple[str, ...]] = ("image_labels", "text_labels")
    paired: ClassVar[bool] = False
    uses_bias: ClassVar[bool] = False
    init_logit_scale: ClassVar[float] = 1 / 0.07
    init_logit_bias: ClassVar[float | None] = None

    def __init__(
        self,
        similarity: Literal["cosine", "dot"] = "cosine",
        target_temperature: float = 1.0,
        absent: float = 0.0,
        uncertain: float = 0.0,
        unmentioned: float = 0.0,
    ) -> None:
        super().__init__()
        if similarity not in ("cosine", "dot"):
            raise ValueError(f"similarity: 'cosine' or 'dot' expected, got {similarity!r}")
        if target_temperature <= 0:
            raise ValueError(f"target_temperature must be positive, got {target_temperature}")
        self.similarity = similarity
        self.target_temperature = target_temperature
        self.absent = absent
        self.uncertain = uncertain
        self.unmentioned = unmentioned

    @overload
    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        *,
        image_labels: Tensor,
        text_labels: Tensor,
        output_dict: Literal[False] = False,
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        *,
        image_labels: Tensor,
        text_labels: Tensor,
        output_dict: Literal[True],
    ) -> dict[str, Tensor]: ...
    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        *,
        image_labels: Tensor,
        text_labels: Tensor,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Loss of the global batch.

        Args:
            image_features: [N, D], unit norm.
            text_features: [M, D], unit norm; need not be as many as the images, nor their reports.
            logit_scale: scalar, already exponentiated.
            logit_bias: added to every logit; the softmax does not change with it.
            image_labels, text_labels: [N, K] and [M, K]: 1 present, 0 absent, -1 uncertain, NaN not mentioned.
            output_dict: return {"contrastive_loss": loss, "excess_loss": loss above its floor, the target entropy}.

        Raises:
            ValueError: labels that do not fit the features or each other.
        """
        functional.check_features(image_features, text_features, paired=False)
        expected = (
            ("image_labels", image_labels, "image_features", image_features),
            ("text_labels", text_labels, "text_features", text_features),
        )
        for name, labels, of, features in expected:
            if labels.ndim != 2 or len(labels) != len(features):
                raise ValueError(f"{name} {tuple(labels.shape)} must be [rows of {of}, labels]: {len(features)} rows")
        if image_labels.shape[1] != text_labels.shape[1]:
            raise ValueError(f"labels differ: {image_labels.shape[1]} of images, {text_labels.shape[1]} of texts")

        scores = functional.logits(gather(image_features), gather(text_features), logit_scale, logit_bias)
        image_values, text_values = (
            functional.label_values(gather(labels).to(scores.dtype), self.absent, self.uncertain, self.unmentioned)
            for labels in (image_labels, text_labels)
        )
        with torch.no_grad():
            similarity = functional.label_similarity(image_values, text_values, self.similarity)
        loss, floor = functional.soft_target_loss(scores, similarity, self.target_temperature)
        return {"contrastive_loss": loss, "excess_loss": loss.detach() - floor} if output_dict else loss
