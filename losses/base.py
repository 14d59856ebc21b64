"""What the losses over image-text pairs share: how they are called, checked, implemented and reduced."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from medclip_lab import distributed
from medclip_lab.losses import functional, kernels
from medclip_lab.losses.checks import check_features, check_names, choose

Impl = Literal["auto", "reference", "chunked", "fused"]
DENSE_PAIRS = 2**20
"""Up to so many pairs of the global batch (4 MiB of logits) "auto" takes the reference."""
NORM_TOLERANCE = 0.01
"""Features whose norms are farther from 1 are warned about; bfloat16 rounds a norm by 0.004."""


class Batch(NamedTuple):
    """Own features, and how many rows there are elsewhere."""

    image_features: Tensor
    """[N, D]"""
    text_features: Tensor
    """[M, D]"""
    logit_scale: Tensor
    logit_bias: Tensor | None
    inputs: dict[str, Tensor]
    image_sizes: list[int]
    """Images of every rank."""
    text_sizes: list[int]
    half: torch.dtype | None = None
    """In which the fused kernels take the features; None: they do not."""


class PairLoss(nn.Module):
    """A loss over all pairs of images and texts of the global batch.

    The value is the loss of the global batch on every rank, and every gradient is the gradient of that value, for any
    number of ranks, also with shares of different sizes, and any `impl`.

    Args:
        impl: "reference" holds the matrix of all pairs; "chunked" forms value and gradients a block of pairs at a time,
            keeps O(batch x dim) for the backward, and has no second derivative; "fused" does the same in Triton kernels
            on NVIDIA GPUs of compute capability 8.0 or above, for features of 16 bits or under autocast; "auto" takes
            the reference for small batches, else the fastest that can be had.
        chunk_size: images of a block; None fits the cache, or fills the GPU.
        grad_reduction: what happens to gradients between ranks afterwards: "mean", as DDP and FSDP do, or "sum".
        temperature: a fixed one, in place of the `logit_scale` the loss is called with, whose gradient is then 0.
        logit_scale_range: the scale is clamped to it. Outside, its gradient is 0: clamp the parameter after each step
            too, as the trainer does, or it stays outside.
    """

    paired: ClassVar[bool] = True
    """Row i of image_features and row i of text_features belong together; else they need not be as many."""
    uses_bias: ClassVar[bool] = False
    init_logit_scale: ClassVar[float] = 1 / 0.07
    init_logit_bias: ClassVar[float | None] = None
    inputs: tuple[str, ...] = ()
    """Names of the tensors a trainer passes beside features, scale and bias."""
    optional_inputs: tuple[str, ...] = ()
    """Names of further tensors the loss takes and can do without."""

    def __init__(
        self,
        impl: Impl = "auto",
        chunk_size: int | None = None,
        grad_reduction: Literal["mean", "sum"] = "mean",
        temperature: float | None = None,
        logit_scale_range: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        choose("impl", impl, ("auto", "reference", "chunked", "fused"))
        choose("grad_reduction", grad_reduction, ("mean", "sum"))
        if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
            raise ValueError(f"chunk_size must be a whole number of at least 1, got {chunk_size}")
        if temperature is not None and not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        if logit_scale_range is not None:
            if len(logit_scale_range) != 2 or not 0 < logit_scale_range[0] <= logit_scale_range[1]:
                raise ValueError(f"logit_scale_range: two positive numbers, least first, got {logit_scale_range}")
            if temperature is not None:
                raise ValueError("logit_scale_range: a fixed temperature leaves nothing to clamp")
        self.impl = impl
        self.chunk_size = chunk_size
        self.grad_reduction = grad_reduction
        self.temperature = temperature
        self.logit_scale_range = None if logit_scale_range is None else tuple(logit_scale_range)
        self._calls = 0
        self._warned = False
        self._told = False

    @overload
    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        output_dict: Literal[False] = False,
        **inputs: Tensor,
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
        **inputs: Tensor,
    ) -> dict[str, Tensor]: ...
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
            image_features: [N, D], unit norm, any floating dtype.
            text_features: [M, D], unit norm; M is N for a paired loss. A rank may have none, not all of them.
            logit_scale: scalar, already exponentiated.
            logit_bias: scalar; a loss of softmaxes does not change with it.
            output_dict: return {"contrastive_loss": loss, ...} as open_clip does, in place of the loss.
            inputs: the tensors named in the attributes `inputs` and `optional_inputs`.

        Raises:
            ValueError: tensors that do not fit each other; an empty global batch; ranks that disagree on the loss, the
                embed dim, the inputs or on which tower is frozen.
        """
        problem = half = lacking = None
        try:
            check_features(image_features, text_features, logit_scale, logit_bias, self.paired)
            check_names(type(self).__name__, inputs, self.inputs, self.optional_inputs)
            self.check_inputs(image_features, text_features, **inputs)
            half, lacking = self._half(image_features, text_features)
            if not torch.compiler.is_compiling():
                self._warn_of_norms(image_features, text_features)
        except ValueError as error:
            problem = str(error)
        tensors = {
            "image_features": image_features,
            "text_features": text_features,
            "logit_scale": logit_scale,
            "logit_bias": logit_bias,
            **inputs,
        }
        counts = agree_on(self, tensors, problem, [image_features, text_features], {"fused in": half})
        image_sizes, text_sizes = [row[0] for row in counts], [row[1] for row in counts]
        if sum(image_sizes) == 0 or sum(text_sizes) == 0:
            raise ValueError(f"empty batch: {sum(image_sizes)} image_features, {sum(text_sizes)} text_features")
        # What a loss does not depend on gets a gradient of 0: a parameter without any would trouble DDP.
        unused = [] if logit_bias is None or self.uses_bias else [logit_bias]
        wide = functional.wide_dtype(image_features, text_features)
        if self.temperature is not None:
            unused.append(logit_scale)
            logit_scale = torch.full((), 1 / self.temperature, dtype=wide, device=logit_scale.device)
        elif self.logit_scale_range is not None:
            logit_scale = logit_scale.to(wide).clamp(*self.logit_scale_range)
        batch = Batch(image_features, text_features, logit_scale, logit_bias, inputs, image_sizes, text_sizes, half)
        dense = sum(image_sizes) * sum(text_sizes) <= DENSE_PAIRS if self.impl == "auto" else self.impl == "reference"
        if not dense and not torch.compiler.is_compiling():
            _refuse_forward_mode(image_features, text_features, logit_scale, logit_bias)
            if lacking is not None and not self._told:
                self._told = True
                warnings.warn(f"{type(self).__name__} runs without its fused kernels: {lacking}", stacklevel=4)
        terms = self._dense(batch) if dense else self.chunked(batch)
        for scalar in unused:
            terms["contrastive_loss"] = terms["contrastive_loss"] + 0 * scalar.reshape(())
        return terms if output_dict else terms["contrastive_loss"]

    def check_inputs(self, image_features: Tensor, text_features: Tensor, **inputs: Tensor) -> None:
        """Refuse further inputs that do not fit.

        Raises:
            ValueError: which, and what would fit.
        """

    def reference(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """From the logits [N, M] of all ranks' images and texts: "contrastive_loss" and what else is worth logging."""
        raise NotImplementedError

    def chunked(self, batch: Batch) -> dict[str, Tensor]:
        """The same without that matrix."""
        raise NotImplementedError

    def _half(self, images: Tensor, texts: Tensor) -> tuple[torch.dtype | None, str | None]:
        """The dtype in which fused kernels can take the features, or what keeps them from it.

        Raises:
            ValueError: they were asked for and cannot be had.
        """
        device = images.device.type
        if self.impl not in ("auto", "fused") or (self.impl == "auto" and device == "cpu"):
            return None, None
        half = images.dtype if images.dtype == texts.dtype else None
        if torch.float32 in (images.dtype, texts.dtype) and torch.is_autocast_enabled(device):
            half = torch.get_autocast_dtype(device)
        columns = 0 if torch.compiler.is_compiling() else len(texts)
        lacking = kernels.missing(images.device, half, columns)
        if lacking is not None and self.impl == "fused":
            raise ValueError(f"impl='fused': {lacking}")
        return (half, None) if lacking is None else (None, lacking)

    def _dense(self, batch: Batch) -> dict[str, Tensor]:
        images = distributed.gather(batch.image_features, batch.image_sizes)
        texts = distributed.gather(batch.text_features, batch.text_sizes)
        bias = batch.logit_bias if self.uses_bias else None
        terms = self.reference(functional.logits(images, texts, batch.logit_scale, bias), batch)
        if self.grad_reduction == "sum" and (world := distributed.world_size()) > 1:
            loss = terms["contrastive_loss"]
            terms["contrastive_loss"] = loss / world + (loss - loss / world).detach()
        return terms

    def needs(self, batch: Batch) -> list[bool]:
        """Which gradients are wanted: of images, of texts, of scale and bias."""
        if not torch.is_grad_enabled():
            return [False, False, False]
        scalars = batch.logit_scale.requires_grad or (batch.logit_bias is not None and batch.logit_bias.requires_grad)
        return [batch.image_features.requires_grad, batch.text_features.requires_grad, scalars]

    def _warn_of_norms(self, *features: Tensor) -> None:
        # On calls 1, 2, 4, 8 ...: a tower that leaves the sphere later is met too, and the cost is nothing.
        self._calls += 1
        if self._warned or self._calls & (self._calls - 1):
            return
        for modality, values in zip(("image", "text"), features, strict=True):
            norms = values.detach().float().norm(dim=1)
            if len(norms) and bool(norms.isfinite().all()) and not bool((norms - 1).abs().max() < NORM_TOLERANCE):
                self._warned = True
                warnings.warn(
                    f"{modality}_features should have unit norm; theirs are {norms.min():.3g} to {norms.max():.3g}. "
                    "The loss is defined, but its logits are no cosines: normalise the features",
                    stacklevel=5,
                )


def _refuse_forward_mode(*tensors: Tensor | None) -> None:
    """An operator without a rule for tangents would drop them in silence."""
    for tensor in tensors:
        # torch has no types for it
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:  # type: ignore[no-untyped-call]
            raise ValueError("the losses over blocks of pairs have no forward-mode derivative: use impl='reference'")


def agree_on(
    loss: nn.Module,
    tensors: Mapping[str, Any],
    problem: str | None,
    rows: Sequence[Any] = (),
    more: Mapping[str, Any] | None = None,
) -> list[list[int]]:
    """Rows of every rank, after all ranks have found that they call the same loss on the same kind of tensors.

    Args:
        loss: its public settings must be equal.
        tensors: their trailing shapes, dtypes, whether they ask for a gradient, and the values of scalars must be
            equal.
        problem: what is wrong on this rank.
        rows: tensors whose rows are counted.
        more: what else must be equal.

    Raises:
        ValueError: on every rank, if one has a problem or they disagree.
    """
    what = ""
    if distributed.world_size() > 1 and problem is None:
        settings = {
            name: value
            for name, value in vars(loss).items()
            if not name.startswith("_") and name not in ("training", "chunk_size")
        }
        kinds = {name: _kind(name, value) for name, value in tensors.items() if isinstance(value, Tensor)}
        what = f"{type(loss).__name__} {settings | dict(more or {})} on {kinds}"
    device = next((value.device for value in tensors.values() if isinstance(value, Tensor)), torch.device("cpu"))
    counts = [0 for _ in rows] if problem is not None else [len(value) for value in rows]
    return distributed.agree(counts, what, device, problem)


def _kind(name: str, tensor: Tensor) -> tuple[Any, ...]:
    wanted = tensor.requires_grad and torch.is_grad_enabled()
    what = float(tensor.detach()) if name in ("logit_scale", "logit_bias") else tuple(tensor.shape[1:])
    return what, str(tensor.dtype), wanted


def ids_of(names: Sequence[str], batch: Batch, side: Literal["image", "text"]) -> Tensor:
    """[N or M, n] int64: the own rows' ids of these kinds, side by side; "labels" stands for equal label vectors."""
    columns = [
        functional.label_ids(batch.inputs[f"{side}_labels"]) if name == "labels" else batch.inputs[f"{name}_ids"]
        for name in names
    ]
    return torch.stack(columns, dim=1)


def ids_of_all(names: Sequence[str], batch: Batch) -> list[Tensor]:
    """Ids of the own images [N, n] and of all texts [M, n]; nothing for no names."""
    if not names:
        return []
    return [ids_of(names, batch, "image"), distributed.gather(ids_of(names, batch, "text"), batch.text_sizes)]


def id_inputs(*kinds: str) -> tuple[str, ...]:
    """Names of the inputs that hold ids of these kinds."""
    names = [("image_labels", "text_labels") if kind == "labels" else (f"{kind}_ids",) for kind in kinds]
    return tuple(dict.fromkeys(name for pair in names for name in pair))
