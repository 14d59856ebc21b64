"""InfoNCE between two views and two texts of every study."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from medclip_lab.losses.base import agree_on
from medclip_lab.losses.checks import check_names
from medclip_lab.losses.clip import ClipLoss


class MultiViewClipLoss(nn.Module):
    """CXR-CLIP's loss (You et al., MICCAI 2023, arXiv 2310.13292): with views I, J and texts T, U of every study

        loss = (clip(I, T) + clip(J, T) + clip(I, U) + clip(J, U)) / 4 + v clip(I, J) + u clip(T, U)

    where clip is `ClipLoss` over the global batch and all share one temperature.

    Args:
        image_image_weight: v.
        text_text_weight: u.
        options: arguments of `ClipLoss`.

    Called with `second_image_features` and `second_text_features` [N, D], unit norm. With `output_dict` it also tells
    the parts: "image_text_loss", "image_image_loss", "text_text_loss".
    """

    paired: ClassVar[bool] = True
    uses_bias: ClassVar[bool] = False
    init_logit_scale: ClassVar[float] = 1 / 0.07
    init_logit_bias: ClassVar[float | None] = None
    inputs = ("second_image_features", "second_text_features")

    def __init__(self, image_image_weight: float = 1.0, text_text_weight: float = 0.5, **options: Any) -> None:
        super().__init__()
        for name, value in (("image_image_weight", image_image_weight), ("text_text_weight", text_text_weight)):
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        self.clip = ClipLoss(**options)
        self.grad_reduction = self.clip.grad_reduction
        self.image_image_weight = image_image_weight
        self.text_text_weight = text_text_weight

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
        **inputs: Tensor,
    ) -> Tensor | dict[str, Tensor]:
        """Loss of the global batch.

        Args:
            image_features, text_features: [N, D] of the first views and texts, unit norm.
            logit_scale, logit_bias, output_dict: as for `ClipLoss`.
            inputs: second_image_features, second_text_features: [N, D] of the second ones.

        Raises:
            ValueError: as for `ClipLoss`.
        """
        problem = None
        try:
            check_names(type(self).__name__, inputs, self.inputs)
        except ValueError as error:
            problem = str(error)
        agree_on(self, inputs, problem)
        # ClipLoss checks each pair of features, on all ranks at once.
        views = (image_features, inputs["second_image_features"])
        texts = (text_features, inputs["second_text_features"])

        def clip(first: Tensor, second: Tensor) -> Tensor:
            value: Tensor = self.clip(first, second, logit_scale, logit_bias)
            return value

        between = torch.stack([clip(view, text) for view in views for text in texts]).mean()
        terms = {"contrastive_loss": between, "image_text_loss": between.detach()}
        for name, weight, pair in (
            ("image_image_loss", self.image_image_weight, views),
            ("text_text_loss", self.text_text_weight, texts),
        ):
            if weight:
                value = clip(*pair)
                terms["contrastive_loss"] = terms["contrastive_loss"] + weight * value
                terms[name] = value.detach()
        return terms if output_dict else terms["contrastive_loss"]
