"""Classification against learned prototypes, for labels beside reports."""

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medclip_lab import distributed
from medclip_lab.losses import functional
from medclip_lab.losses.base import agree_on
from medclip_lab.losses.checks import check_features, check_names, check_rows, check_states, choose


class PrototypeLoss(nn.Module):
    """Masked binary cross entropy of images against one learned prototype a class: the label term of DLILP (Silva-
    Rodriguez et al., 2025), which trains on labelled images without reports beside image-report pairs:

        loss = - mean over known (i, k) of y_ik log sigmoid(z_ik) + (1 - y_ik) log sigmoid(-z_ik)
        z_ik = s cos(head(x_i), p_k) + b_k

    The mean is over all labels of the global batch that are 1 or 0; uncertain and unmentioned ones count nothing.

    Args:
        classes: K, columns of the labels.
        dim: D of the features.
        head: give the images a linear head of their own before the prototypes, as DLILP does.
        grad_reduction: as for `PairLoss`.

    Called with `image_labels` [N, K]: 1 present, 0 absent, -1 uncertain, NaN not mentioned. Texts are not used. The
    prototypes, the head and the biases are parameters of the loss and train with the towers.
    """

    paired: ClassVar[bool] = False
    uses_bias: ClassVar[bool] = False
    init_logit_scale: ClassVar[float] = 1 / 0.07
    init_logit_bias: ClassVar[float | None] = None
    inputs = ("image_labels",)

    def __init__(
        self, classes: int, dim: int, head: bool = True, grad_reduction: Literal["mean", "sum"] = "mean"
    ) -> None:
        super().__init__()
        if classes < 1 or dim < 1:
            raise ValueError(f"classes and dim must be at least 1, got {classes} and {dim}")
        choose("grad_reduction", grad_reduction, ("mean", "sum"))
        self.grad_reduction = grad_reduction
        self.prototypes = nn.Parameter(F.normalize(torch.randn(classes, dim), dim=1))
        self.bias = nn.Parameter(torch.zeros(classes))
        self.head = nn.Linear(dim, dim, bias=False) if head else nn.Identity()
        if head:
            nn.init.eye_(self.head.weight)  # type: ignore[arg-type]

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
        **inputs: Tensor,
    ) -> Tensor | dict[str, Tensor]:
        """Loss of the global batch; 0, with gradients of 0, if it has no known label.

        Args:
            image_features: [N, D], unit norm.
            text_features: [M, D], not used.
            logit_scale: scalar, already exponentiated.
            logit_bias: not used.
            output_dict: return {"contrastive_loss": loss}.
            inputs: image_labels [N, K].

        Raises:
            ValueError: tensors that do not fit each other or the prototypes; ranks that disagree.
        """
        problem = None
        try:
            check_features(image_features, text_features, logit_scale, logit_bias, paired=False)
            check_names(type(self).__name__, inputs, self.inputs)
            self._check_labels(image_features, inputs["image_labels"])
        except ValueError as error:
            problem = str(error)
        agree_on(self, {"logit_scale": logit_scale, "image_features": image_features, **inputs}, problem)
        image_labels = inputs["image_labels"]
        dtype = torch.promote_types(functional.wide_dtype(image_features), self.prototypes.dtype)
        with torch.autocast(image_features.device.type, enabled=False):
            head = self.head.weight.to(dtype) if isinstance(self.head, nn.Linear) else None
            own = image_features.to(dtype) if head is None else image_features.to(dtype) @ head.T
            cosine = F.normalize(own, dim=1) @ F.normalize(self.prototypes.to(dtype), dim=1).T
            scores = logit_scale.to(dtype) * cosine + self.bias.to(dtype)
            known = (image_labels == 0) | (image_labels == 1)
            # -log sigmoid of the score, its sign turned where the label is absent.
            losses = F.softplus(torch.where(image_labels == 1, -scores, scores), threshold=40)
            count = distributed.all_sum(known.sum()).clamp_min(1)
            loss = distributed.total(torch.where(known, losses, 0.0).sum() / count)
        world = distributed.world_size()
        if self.grad_reduction == "sum" and world > 1:
            loss = loss / world + (loss - loss / world).detach()
        # Towers without a gradient would trouble DDP.
        unused = 0 * text_features.sum(dtype=loss.dtype)
        loss = loss + (unused if logit_bias is None else unused + 0 * logit_bias.reshape(()).to(loss.dtype))
        return {"contrastive_loss": loss} if output_dict else loss

    def _check_labels(self, image_features: Tensor, image_labels: Tensor) -> None:
        check_rows("image_labels", image_labels, len(image_features), 2, image_features.device)
        wanted = tuple(self.prototypes.shape)
        if (image_labels.shape[1], image_features.shape[1]) != wanted:
            raise ValueError(
                f"prototypes are [classes, dim] {wanted}; image_labels {tuple(image_labels.shape)}, "
                f"image_features {tuple(image_features.shape)}"
            )
        check_states("image_labels", image_labels)
