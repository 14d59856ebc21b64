"""Pairwise sigmoid loss."""

from typing import ClassVar, Literal, overload

from torch import Tensor, nn

from medclip_lab.distributed import gather
from medclip_lab.losses import functional


class SigLipLoss(nn.Module):
    """Sigmoid loss over all pairs of the global batch, divided by its size (Zhai et al., ICCV 2023, arXiv 2303.15343).

    Row i of `image_features` and row i of `text_features` are a pair; every other row is a negative.
    """

    inputs: ClassVar[tuple[str, ...]] = ()
    paired: ClassVar[bool] = True
    uses_bias: ClassVar[bool] = True
    init_logit_scale: ClassVar[float] = 10.0
    init_logit_bias: ClassVar[float | None] = -10.0

    @overload
    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
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
        output_dict: Literal[True],
    ) -> dict[str, Tensor]: ...
    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Loss of the global batch.

        Args:
            image_features, text_features: [B, D], unit norm.
            logit_scale: scalar, already exponentiated.
            logit_bias: scalar; without it every pair starts as likely positive as negative.
            output_dict: return {"contrastive_loss": loss} as open_clip does.
        """
        functional.check_features(image_features, text_features, paired=True)
        scores = functional.logits(gather(image_features), gather(text_features), logit_scale, logit_bias)
        loss = functional.siglip_loss(scores)
        return {"contrastive_loss": loss} if output_dict else loss
