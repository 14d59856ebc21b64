"""InfoNCE between images and texts."""

from typing import Any, Literal

from torch import Tensor

from medclip_lab.losses import functional
from medclip_lab.losses.base import Batch, PairLoss
from medclip_lab.losses.checks import choose
from medclip_lab.losses.kernels.operators import softmax_pairs


class SoftmaxLoss(PairLoss):
    """A cross entropy over the texts of every image and one over the images of every text.

    Args:
        image_to_text_weight: share of the first in the loss; ConVIRT takes 0.75.
        directions: "mean" weighs the two to a sum of 1, "sum" to a sum of 2 as MGCA does.
        options: arguments of `PairLoss`.
    """

    def __init__(
        self, image_to_text_weight: float = 0.5, directions: Literal["mean", "sum"] = "mean", **options: Any
    ) -> None:
        super().__init__(**options)
        if not 0 <= image_to_text_weight <= 1:
            raise ValueError(f"image_to_text_weight is a share between 0 and 1, got {image_to_text_weight}")
        choose("directions", directions, ("mean", "sum"))
        factor = 1 if directions == "mean" else 2
        self.weights = factor * image_to_text_weight, factor * (1 - image_to_text_weight)

    def softmax_pairs(
        self,
        batch: Batch,
        *,
        positive_ids: list[Tensor] | None = None,
        label_values: list[Tensor] | None = None,
        similarity: str = "dot",
        temperature: float = 1.0,
        smoothing: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """The chunked loss and its floor; the arguments are those of the operator."""
        loss, *_, floor = softmax_pairs(
            batch.image_features,
            batch.text_features,
            batch.logit_scale,
            positive_ids or [],
            label_values or [],
            similarity,
            temperature,
            smoothing,
            list(self.weights),
            batch.text_sizes,
            sum(batch.image_sizes),
            self.chunk_size or 0,
            batch.half,
            self.needs(batch),
            self.grad_reduction == "mean",
        )
        return loss, floor


class ClipLoss(SoftmaxLoss):
    """InfoNCE over the global batch: for images i and texts j of unit norm, with scale s,

        loss = -w / N sum_i log softmax_j(s x_i . t_j)[i] - (1 - w) / N sum_j log softmax_i(s x_i . t_j)[j]

    (CLIP, Radford et al., ICML 2021, arXiv 2103.00020). Row i of `image_features` and row i of `text_features` are a
    pair; every other row is a negative.

    Args:
        label_smoothing: share of the target that is spread evenly over all candidates.
        image_to_text_weight, directions: w above; ConVIRT takes 0.75 (Zhang et al., MLHC 2022, arXiv 2010.00747,
            eq. 5), MGCA the sum of both.
        options: arguments of `PairLoss`.
    """

    def __init__(
        self,
        label_smoothing: float = 0.0,
        image_to_text_weight: float = 0.5,
        directions: Literal["mean", "sum"] = "mean",
        **options: Any,
    ) -> None:
        super().__init__(image_to_text_weight, directions, **options)
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing is a share between 0 and 1, got {label_smoothing}")
        self.label_smoothing = label_smoothing

    def reference(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:  # noqa: ARG002 - what others need
        return {"contrastive_loss": functional.clip_loss(logits, *self.weights, self.label_smoothing)}

    def chunked(self, batch: Batch) -> dict[str, Tensor]:
        loss, _ = self.softmax_pairs(batch, smoothing=self.label_smoothing)
        return {"contrastive_loss": loss}
