"""Semantic matching: targets from the labels instead of from who was paired with whom."""

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from medclip_lab import distributed
from medclip_lab.losses import functional
from medclip_lab.losses.base import Batch
from medclip_lab.losses.checks import check_ids, check_rows, choose
from medclip_lab.losses.clip import SoftmaxLoss

State = float | Literal["ignore"]


class SoftTargetClipLoss(SoftmaxLoss):
    """MedCLIP's semantic matching loss over the global batch (Wang et al., EMNLP 2022, arXiv 2210.10163, eq. 1-5):

        loss = -w / N sum_ij softmax_j(a_ij / T) log softmax_j(s x_i . t_j) - (1 - w) / M (the same over i)

    An image and a text are as positive as their label vectors agree, a_ij, so images without reports and reports
    without images train together. The defaults are the paper's equation with a cosine; `similarity="dot"` is what its
    code does. Two things the code lacks are settings here: with the softmax at temperature 1 the target of a matching
    pair in a batch of 1,024 is 0.27 % and the loss can hardly move, so `target_temperature` sharpens it; and a negated
    sentence ("no effusion") has the vector zero, so `absent` may give absence a value of its own.

    Args:
        similarity: "cosine" or "dot" of the label vectors.
        target_temperature: T, divides the similarity before the softmax that makes the targets.
        absent: what an absent finding counts as in the similarity; present counts as 1.
        uncertain, unmentioned: what these states count as, or "ignore": a pair is then compared on the labels that are
            known of both sides only.
        image_to_text_weight, directions, options: as for `ClipLoss`.

    Called with `image_labels` [N, K] and `text_labels` [M, K]: 1 present, 0 absent, -1 uncertain, NaN not mentioned. A
    label that was never asked of a row (another hospital's list) is told by `image_label_mask` [N, K] or
    `text_label_mask` [M, K], False where a label is to be ignored. With `output_dict` the loss also tells
    "excess_loss", how far it is above its floor, the entropy of the targets: the number to watch.
    """

    paired: ClassVar[bool] = False
    inputs = ("image_labels", "text_labels")
    optional_inputs = ("image_label_mask", "text_label_mask")

    def __init__(
        self,
        similarity: Literal["cosine", "dot"] = "cosine",
        target_temperature: float = 1.0,
        absent: float = 0.0,
        uncertain: State = 0.0,
        unmentioned: State = 0.0,
        image_to_text_weight: float = 0.5,
        directions: Literal["mean", "sum"] = "mean",
        **options: Any,
    ) -> None:
        super().__init__(image_to_text_weight, directions, **options)
        choose("similarity", similarity, ("cosine", "dot"))
        if not target_temperature > 0:
            raise ValueError(f"target_temperature must be positive, got {target_temperature}")
        for name, value in (("uncertain", uncertain), ("unmentioned", unmentioned)):
            if isinstance(value, str) and value != "ignore":
                raise ValueError(f"{name}: a number or 'ignore' expected, got {value!r}")
        self.similarity = similarity
        self.target_temperature = target_temperature
        self.absent = absent
        self.uncertain = uncertain
        self.unmentioned = unmentioned

    def check_inputs(self, image_features: Tensor, text_features: Tensor, **inputs: Tensor) -> None:
        """Refuse labels that do not fit the features or each other."""
        check_ids(image_features, text_features, inputs)
        for side, features in (("image", image_features), ("text", text_features)):
            mask = inputs.get(f"{side}_label_mask")
            if mask is None:
                continue
            check_rows(f"{side}_label_mask", mask, len(features), 2, features.device)
            if mask.dtype != torch.bool or mask.shape != inputs[f"{side}_labels"].shape:
                raise ValueError(
                    f"{side}_label_mask must be bool {tuple(inputs[f'{side}_labels'].shape)}, as {side}_labels; "
                    f"got {mask.dtype} {tuple(mask.shape)}"
                )

    def _values(self, batch: Batch, side: Literal["image", "text"], dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Values [N, K] of own labels and, if any label of any row may be ignored, 1 where they count."""
        labels = batch.inputs[f"{side}_labels"].to(dtype)
        states = {"uncertain": self.uncertain, "unmentioned": self.unmentioned}
        numbers = {name: 0.0 if isinstance(value, str) else value for name, value in states.items()}
        values = functional.label_values(labels, self.absent, **numbers)
        masked = any(name in batch.inputs for name in self.optional_inputs)
        if not masked and not any(isinstance(value, str) for value in states.values()):
            return values, None
        known = torch.ones_like(labels, dtype=torch.bool)
        if self.uncertain == "ignore":
            known &= labels != -1
        if self.unmentioned == "ignore":
            known &= ~labels.isnan()
        mask = batch.inputs.get(f"{side}_label_mask")
        return values, (known if mask is None else known & mask).to(dtype)

    def reference(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        # The targets' temperature multiplies rounding, so half precision stops here too.
        with torch.no_grad(), torch.autocast(logits.device.type, enabled=False):
            sides: list[list[Tensor | None]] = []
            for side, sizes in (("image", batch.image_sizes), ("text", batch.text_sizes)):
                pair = self._values(batch, side, logits.dtype)  # type: ignore[arg-type]
                sides.append([None if value is None else distributed.gather(value, sizes) for value in pair])
            (images, image_known), (texts, text_known) = sides
            assert images is not None
            assert texts is not None
            similar = functional.label_similarity(images, texts, self.similarity, image_known, text_known)
        loss, floor = functional.soft_target_loss(logits, similar, self.target_temperature, *self.weights)
        return {"contrastive_loss": loss, "excess_loss": loss.detach() - floor}

    def chunked(self, batch: Batch) -> dict[str, Tensor]:
        dtype = functional.wide_dtype(batch.image_features, batch.text_features)
        with torch.no_grad():
            images, image_known = self._values(batch, "image", dtype)
            texts, text_known = self._values(batch, "text", dtype)
            similarity: str = self.similarity
            if image_known is None and similarity == "cosine":
                # Once for all blocks; where labels are ignored the norms belong to pairs.
                images, texts, similarity = F.normalize(images, dim=1), F.normalize(texts, dim=1), "dot"
            values = [images, distributed.gather(texts, batch.text_sizes)]
            if image_known is not None and text_known is not None:
                values += [image_known, distributed.gather(text_known, batch.text_sizes)]
        loss, floor = self.softmax_pairs(
            batch, label_values=values, similarity=similarity, temperature=self.target_temperature
        )
        return {"contrastive_loss": loss, "excess_loss": (loss - floor).detach()}
