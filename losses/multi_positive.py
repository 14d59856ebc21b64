"""InfoNCE with more than one positive a row."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from medclip_lab import distributed
from medclip_lab.losses import functional
from medclip_lab.losses.base import Batch, id_inputs, ids_of, ids_of_all
from medclip_lab.losses.checks import check_ids
from medclip_lab.losses.clip import SoftmaxLoss


class MultiPositiveClipLoss(SoftmaxLoss):
    """InfoNCE whose targets are spread evenly over all positives P(i) of a row, over the global batch:

        loss = -w / N sum_i 1 / |P(i)| sum_{j in P(i)} log softmax_j(s x_i . t_j)[j] - (1 - w) / N (the same of texts)

    Repeated reports ("No acute cardiopulmonary process.") are the rule in radiology; as negatives of each other they
    teach what is false. Row i of `image_features` and row i of `text_features` are a pair; so are rows that share an
    id. With ids of texts this is the cure for repeated reports, with labels it is SupCon's L_out across modalities
    (Khosla et al., NeurIPS 2020, arXiv 2004.11362, eq. 2), UniCL (Yang et al., CVPR 2022, arXiv 2204.03610) and the
    loss of FLAIR and MedImageInsight. Without any shared id it is `ClipLoss`.

    Args:
        positives: kinds of ids that make rows positive: "text", "study", "patient", "labels" for equal label vectors,
            or names of your own.
        image_to_text_weight, directions, options: as for `ClipLoss`.

    Called with an int64 [N] for every kind of ids, such as `text_ids`; rows share a group if their ids are equal and
    not negative. The kind "labels" wants `image_labels` and `text_labels` [N, K] instead. With `output_dict` it also
    tells "excess_loss", how far the loss is above its floor, the entropy of the targets.
    """

    def __init__(
        self,
        positives: str | Sequence[str] = ("text",),
        image_to_text_weight: float = 0.5,
        directions: Literal["mean", "sum"] = "mean",
        **options: Any,
    ) -> None:
        super().__init__(image_to_text_weight, directions, **options)
        self.positives = [positives] if isinstance(positives, str) else list(positives)
        if not self.positives:
            raise ValueError("positives: name at least one kind of ids; without any this is ClipLoss")
        self.inputs = id_inputs(*self.positives)

    def check_inputs(self, image_features: Tensor, text_features: Tensor, **inputs: Tensor) -> None:
        """Refuse ids that do not fit the features."""
        check_ids(image_features, text_features, inputs)

    def reference(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        images = distributed.gather(ids_of(self.positives, batch, "image"), batch.image_sizes)
        texts = distributed.gather(ids_of(self.positives, batch, "text"), batch.text_sizes)
        positive = functional.same_ids(images, texts) | torch.eye(len(logits), dtype=torch.bool, device=logits.device)
        loss, floor = functional.multi_positive_loss(logits, positive, *self.weights)
        return {"contrastive_loss": loss, "excess_loss": loss.detach() - floor}

    def chunked(self, batch: Batch) -> dict[str, Tensor]:
        loss, floor = self.softmax_pairs(batch, positive_ids=ids_of_all(self.positives, batch))
        return {"contrastive_loss": loss, "excess_loss": (loss - floor).detach()}
