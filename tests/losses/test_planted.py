"""The contract suite can fail: each fault that other libraries have had is planted, and named by the check."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from medclip_lab import distributed
from medclip_lab.losses import ClipLoss, SigLipLoss, functional
from medclip_lab.losses.base import Batch
from medclip_lab.losses.testing import Runner, check_loss


def gathered_without_gradient(local: Tensor) -> Tensor:
    parts = [torch.zeros_like(local) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, local.contiguous())
    return torch.cat([local if rank == dist.get_rank() else part for rank, part in enumerate(parts)])


class TowersOverWorldSize(nn.Module):
    """Gathering without a gradient: every rank sends only its own term to its own rows."""

    def forward(self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, *_: Any, **kw: Any) -> Any:
        if distributed.world_size() > 1:
            image_features, text_features = map(gathered_without_gradient, (image_features, text_features))
        loss = functional.clip_loss(functional.logits(image_features, text_features, logit_scale))
        return {"contrastive_loss": loss} if kw.get("output_dict") else loss


class ScaleTimes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 4 * gradient


class ScaleGradientTimesK(ClipLoss):
    """Accumulating over k parts adds up k times the gradient of the temperature."""

    def forward(self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, *rest: Any, **kw: Any) -> Any:
        return super().forward(image_features, text_features, ScaleTimes.apply(logit_scale), *rest, **kw)


class RowOrderTarget(nn.Module):
    """Own images against all texts, with the targets of the first rank on every rank."""

    def forward(self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, *_: Any, **kw: Any) -> Any:
        texts = distributed.gather(text_features)
        scores = functional.logits(image_features, texts, logit_scale)
        target = torch.arange(len(image_features))
        count = distributed.all_sum(torch.tensor(float(len(image_features))))
        share = nn.functional.cross_entropy(scores, target, reduction="sum") / count
        loss = distributed.total(share)
        return {"contrastive_loss": loss} if kw.get("output_dict") else loss


class UnmaskedPadding(nn.Module):
    """Shares padded to the longest, and the rows of padding counted as negatives."""

    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Any = None, **kw: Any
    ) -> Any:
        count = len(image_features)
        if distributed.world_size() > 1:
            counts = [row[0] for row in distributed.agree([count], "", image_features.device)]
            pad = max(counts) - count
            image_features, text_features = (
                distributed.gather(torch.cat([value, value.new_zeros(pad, value.shape[1])]))
                for value in (image_features, text_features)
            )
            count = sum(counts)
        scores = functional.logits(image_features, text_features, logit_scale, logit_bias)
        loss = functional.siglip_loss(scores) * len(scores) / count
        return {"contrastive_loss": loss} if kw.get("output_dict") else loss


class HiddenNan(SigLipLoss):
    def reference(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        return super().reference(logits.nan_to_num(), batch)


class HalfPrecision(SigLipLoss):
    """Logits rounded to half precision: the scale multiplies the rounding."""

    def reference(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        return super().reference(logits + (logits.bfloat16().to(logits.dtype) - logits).detach(), batch)


class PlainLogarithm(SigLipLoss):
    """log(1 + exp(z)) loses small terms to rounding; they are the loss when the bias is low."""

    def reference(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        return {"contrastive_loss": (1 + (logits - 15).exp()).log().sum() / len(logits)}


class Unsteady(ClipLoss):
    def reference(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        return super().reference(logits + 1e-6 * torch.rand_like(logits), batch)


class ForgottenFreeze(nn.Module):
    """A tower that asked for no gradient gets the other one's place."""

    def forward(self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, *_: Any, **kw: Any) -> Any:
        if not text_features.requires_grad:
            image_features = image_features.detach()
        loss = functional.clip_loss(functional.logits(image_features, text_features, logit_scale))
        return {"contrastive_loss": loss} if kw.get("output_dict") else loss


class WrongParameter(nn.Module):
    """A margin of its own whose gradient is four times the truth."""

    def __init__(self) -> None:
        super().__init__()
        self.margin = nn.Parameter(torch.tensor(0.5))

    def forward(self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, *_: Any, **kw: Any) -> Any:
        scores = functional.logits(image_features, text_features, logit_scale)
        loss = functional.clip_loss(scores - ScaleTimes.apply(self.margin) * torch.eye(len(scores)))
        return {"contrastive_loss": loss} if kw.get("output_dict") else loss


class WrongLayout(SigLipLoss):
    """Shares sent as their memory lies, transposed on one rank and not on the other."""

    def chunked(self, batch: Batch) -> dict[str, Tensor]:
        texts = batch.text_features
        if texts.stride(0) == 1 and distributed.world_size() > 1:
            batch = batch._replace(text_features=texts.t().reshape(texts.shape))
        return super().chunked(batch)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (WrongParameter(), "gradient of margin: along"),
        (WrongLayout(impl="chunked"), r"2 ranks .*: value on rank"),
        (TowersOverWorldSize(), r"2 ranks .* mean over ranks of the gradient of image_features"),
        (ScaleGradientTimesK(), "gradient of logit_scale: along"),
        (RowOrderTarget(), r"2 ranks .*: value on rank"),
        (UnmaskedPadding(), r"2 ranks with \[1, 3\] rows: value on rank"),
        (HiddenNan(), "nan in image_features is hidden"),
        (HalfPrecision(), r"along|float32|bfloat16"),
        (Unsteady(), "another value in another run|changes by|under no_grad|with output_dict|off by"),
        (ForgottenFreeze(), "text_features frozen: no gradient of image_features"),
        (PlainLogarithm(), "float32"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_planted_fault_is_found(fault: nn.Module, said: str, gloo: Callable[[int], Runner]) -> None:
    with pytest.raises(AssertionError, match=said):
        check_loss(fault, ranks=gloo, compiles=False)


def test_the_same_without_the_fault(gloo: Callable[[int], Runner]) -> None:
    check_loss(ClipLoss(), ranks=gloo, compiles=False)
    check_loss(SigLipLoss(), ranks=gloo, compiles=False)


def test_an_input_nobody_knows() -> None:
    class Own(nn.Module):
        inputs = ("lung_volume",)

    with pytest.raises(ValueError, match="Own wants lung_volume: pass make_inputs"):
        check_loss(Own())
