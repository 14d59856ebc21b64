"""What a teacher makes of the same batch, taught to a student."""

from typing import ClassVar

import torch
from torch import Tensor

from medclip_lab import distributed
from medclip_lab.losses import functional
from medclip_lab.losses.base import Batch
from medclip_lab.losses.checks import check_tensors
from medclip_lab.losses.clip import SoftmaxLoss


class DistillLoss(SoftmaxLoss):
    """Divergence of the student's in-batch softmaxes from a teacher's, over the global batch: with the teacher's
    features u_i, v_j and its scale S,

        loss = w / N sum_i KL(softmax_j(S u_i . v_j) || softmax_j(s x_i . t_j)) + (1 - w) / M (the same over i)

    (TinyCLIP, Wu et al., ICCV 2023, arXiv 2309.12314, eq. 1, whose cross entropy is this plus the entropy of the
    teacher). It is 0 where the student ranks as sharply as the teacher. A bias does not change a softmax, so teachers
    of a sigmoid loss serve too, and their embed dim may be another.

    Args:
        image_to_text_weight, directions, options: as for `ClipLoss`; there are no fused kernels, "auto" does without.

    Called with `teacher_image_features` [N, E] and `teacher_text_features` [M, E], unit norm, and the scalar
    `teacher_logit_scale`, exponentiated. No gradient goes to them.
    """

    paired: ClassVar[bool] = False
    inputs = ("teacher_image_features", "teacher_text_features", "teacher_logit_scale")

    def check_inputs(self, image_features: Tensor, text_features: Tensor, **inputs: Tensor) -> None:
        """Refuse features of a teacher that do not fit the student's or each other."""
        check_tensors(inputs)
        teachers = [inputs[name] for name in self.inputs[:2]]
        for name, teacher, own in zip(self.inputs, teachers, (image_features, text_features), strict=False):
            if teacher.ndim != 2 or len(teacher) != len(own) or not teacher.is_floating_point():
                raise ValueError(
                    f"{name} must be floating point [{len(own)}, dim], a row for each of the student's; got "
                    f"{teacher.dtype} {tuple(teacher.shape)}"
                )
            if teacher.device != own.device:
                raise ValueError(f"{name} is on {teacher.device}, the student's features on {own.device}")
        if teachers[0].shape[1] != teachers[1].shape[1]:
            raise ValueError(f"the teacher's embed dims differ: {teachers[0].shape[1]} and {teachers[1].shape[1]}")
        if inputs["teacher_logit_scale"].numel() != 1:
            raise ValueError("teacher_logit_scale must be a tensor of one number")

    def _half(self, images: Tensor, texts: Tensor) -> tuple[torch.dtype | None, str | None]:
        del images, texts
        if self.impl == "fused":
            raise ValueError("impl='fused': DistillLoss has no fused kernels")
        return None, None

    def _teacher(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Own images times the scale and all texts, whose products are the teacher's logits."""
        images, texts, scale = (batch.inputs[name] for name in self.inputs)
        wide = functional.wide_dtype(images, texts)
        return images.to(wide) * scale.to(wide).reshape(()), distributed.gather(texts.to(wide), batch.text_sizes)

    def reference(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        with torch.no_grad(), torch.autocast(logits.device.type, enabled=False):
            images, texts = self._teacher(batch)
            taught = distributed.gather(images, batch.image_sizes) @ texts.T
        loss, floor = functional.soft_target_loss(logits, taught, 1.0, *self.weights)
        return {"contrastive_loss": loss - floor}

    def chunked(self, batch: Batch) -> dict[str, Tensor]:
        with torch.no_grad(), torch.autocast(batch.image_features.device.type, enabled=False):
            taught = list(self._teacher(batch))
        loss, floor = self.softmax_pairs(batch, label_values=taught)
        return {"contrastive_loss": loss - floor.detach()}
