"""Pairwise sigmoid loss."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from medclip_lab import distributed
from medclip_lab.losses import functional
from medclip_lab.losses.base import Batch, PairLoss, id_inputs, ids_of, ids_of_all
from medclip_lab.losses.checks import check_ids
from medclip_lab.losses.kernels.operators import siglip_pairs


class SigLipLoss(PairLoss):
    """Sigmoid loss over all pairs of the global batch, divided by its size: with y_ij 1 for a pair and -1 else,

        loss = -1 / N sum_ij log sigmoid(y_ij (s x_i . t_j + b))

    (Zhai et al., ICCV 2023, arXiv 2303.15343, eq. 1). Row i of `image_features` and row i of `text_features` are a
    pair; every other row is a negative, unless ids say otherwise. Without a `logit_bias` every pair starts as likely
    positive as negative.

    Args:
        positives: kinds of ids that make pairs of rows positive too: "text" for identical reports, "study", "patient",
            "labels" for equal label vectors, or a name of your own.
        ignored: kinds of ids whose other pairs count neither as positive nor as negative.
        options: arguments of `PairLoss`.

    Called with an int64 [N] for every kind of ids, such as `text_ids`; rows share a group if their ids are equal and
    not negative. The kind "labels" wants `image_labels` and `text_labels` [N, K] instead.
    """

    uses_bias: ClassVar[bool] = True
    init_logit_scale: ClassVar[float] = 10.0
    init_logit_bias: ClassVar[float | None] = -10.0

    def __init__(self, positives: str | Sequence[str] = (), ignored: str | Sequence[str] = (), **options: Any) -> None:
        super().__init__(**options)
        self.positives = [positives] if isinstance(positives, str) else list(positives)
        self.ignored = [ignored] if isinstance(ignored, str) else list(ignored)
        self.inputs = id_inputs(*self.positives, *self.ignored)

    def check_inputs(self, image_features: Tensor, text_features: Tensor, **inputs: Tensor) -> None:
        """Refuse ids that do not fit the features."""
        check_ids(image_features, text_features, inputs)

    def reference(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        masks: list[Tensor | None] = []
        for names in (self.positives, self.ignored):
            mask = None
            if names:
                images = distributed.gather(ids_of(names, batch, "image"), batch.image_sizes)
                texts = distributed.gather(ids_of(names, batch, "text"), batch.text_sizes)
                mask = functional.same_ids(images, texts)
            masks.append(mask)
        positive, ignored = masks
        if positive is not None:
            positive |= torch.eye(len(logits), dtype=torch.bool, device=logits.device)
        return {"contrastive_loss": functional.siglip_loss(logits, positive, ignored)}

    def chunked(self, batch: Batch) -> dict[str, Tensor]:
        bias = torch.zeros_like(batch.logit_scale) if batch.logit_bias is None else batch.logit_bias
        loss, *_ = siglip_pairs(
            batch.image_features,
            batch.text_features,
            batch.logit_scale,
            bias,
            ids_of_all(self.positives, batch),
            ids_of_all(self.ignored, batch),
            batch.text_sizes,
            sum(batch.image_sizes),
            self.chunk_size or 0,
            batch.half,
            self.needs(batch),
            self.grad_reduction == "mean",
        )
        return {"contrastive_loss": loss}
