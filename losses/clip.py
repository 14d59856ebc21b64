"""InfoNCE between images and texts."""

from typing import ClassVar, Literal, overload

from torch import Tensor, nn

from medclip_lab.distributed import gather
from medclip_lab.losses import functional


class ClipLoss(nn.Module):
    """Symmetric InfoNCE over the global batch (CLIP, Radford et al., ICML 2021, arXiv 2103.00020).

    Row i of `image_features` and row i of `text_features` are a pair; every other row is a negative.
    """

    inputs: ClassVar[tuple[str, ...]] = ()
    """Names of the tensors a trainer passes beside features, scale and bias."""
    paired: ClassVar[bool] = True
    uses_bias: ClassVar[bool] = False
    init_logit_scale: ClassVar[float] = 1 / 0.07
    init_logit_bias: ClassVar[float | None] = None

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
            logit_bias: added to every logit; InfoNCE does not change with it.
            output_dict: return {"contrastive_loss": loss} as open_clip does.
        """
        functional.check_features(image_features, text_features, paired=True)
        scores = functional.logits(gather(image_features), gather(text_features), logit_scale, logit_bias)
        loss = functional.clip_loss(scores)
        return {"contrastive_loss": loss} if output_dict else loss
