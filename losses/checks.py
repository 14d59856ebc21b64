"""What a loss refuses, with a line that says what would fit."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def choose(name: str, value: object, choices: Sequence[str]) -> None:
    """Refuse a value that is not one of a few words.

    Raises:
        ValueError: names the argument, the choices and the value.
    """
    if value not in choices:
        raise ValueError(f"{name}: one of {', '.join(map(repr, choices))} expected, got {value!r}")


def check_features(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor | None, paired: bool
) -> None:
    """Refuse features no loss can use.

    Raises:
        ValueError: not two-dimensional, different embed dims, different numbers of rows where rows are pairs, integers,
            different devices; a scale or bias that is no scalar tensor.
    """
    check_tensors({"image_features": image_features, "text_features": text_features})
    both = f"image_features {tuple(image_features.shape)}, text_features {tuple(text_features.shape)}"
    if image_features.ndim != 2 or text_features.ndim != 2:
        raise ValueError(f"features must be [batch, dim]: {both}")
    if image_features.shape[1] != text_features.shape[1]:
        raise ValueError(f"embed dims differ: {both}")
    if paired and len(image_features) != len(text_features):
        raise ValueError(
            f"row i of both must be a pair: {len(image_features)} image_features, {len(text_features)} text_features"
        )
    if not (image_features.is_floating_point() and text_features.is_floating_point()):
        raise ValueError(
            f"features must be floating point: image_features {image_features.dtype}, "
            f"text_features {text_features.dtype}"
        )
    if image_features.device != text_features.device:
        raise ValueError(
            f"features on different devices: image_features {image_features.device}, "
            f"text_features {text_features.device}"
        )
    for name, value in (("logit_scale", logit_scale), ("logit_bias", logit_bias)):
        if value is None and name == "logit_bias":
            continue
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
            shape = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise ValueError(f"{name} must be a floating point tensor of one number, got {shape}")
        if value.device != image_features.device:
            raise ValueError(f"{name} is on {value.device}, image_features on {image_features.device}")


def check_tensors(inputs: Mapping[str, Any]) -> None:
    """Refuse lists, arrays and None.

    Raises:
        ValueError: names the input and what it is.
    """
    for name, value in inputs.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def check_names(loss: str, inputs: Mapping[str, Any], needed: Iterable[str], optional: Iterable[str] = ()) -> None:
    """Refuse a call that lacks an input, or has one too many, or one that is no tensor.

    Raises:
        ValueError: names them.
    """
    if missing := [name for name in needed if name not in inputs]:
        raise ValueError(f"{loss} needs {', '.join(missing)}")
    if unknown := [name for name in inputs if name not in (*needed, *optional)]:
        raise ValueError(f"{loss} takes no {', '.join(unknown)}")
    check_tensors(inputs)


def check_states(name: str, labels: Tensor) -> None:
    """Refuse labels that are no state.

    Raises:
        ValueError: names the input and a value.
    """
    if torch.compiler.is_compiling():
        return
    fits = (labels == 0) | (labels == 1) | (labels == -1) | (labels != labels)  # the last: NaN
    if not bool(fits.all()):
        raise ValueError(
            f"{name} holds {labels[~fits][0].item():g}: 1, 0, -1 (uncertain) or NaN (not mentioned) expected"
        )


def check_rows(name: str, value: Tensor, rows: int, ndim: int, device: torch.device) -> None:
    """Refuse labels or ids that do not go with the features.

    Raises:
        ValueError: wrong number of dimensions or rows, another device.
    """
    shape = "[rows]" if ndim == 1 else "[rows, labels]"
    if value.ndim != ndim or len(value) != rows:
        raise ValueError(f"{name} must be {shape} with {rows} rows, as many as features; got {tuple(value.shape)}")
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}, the features on {device}")


def check_ids(image_features: Tensor, text_features: Tensor, inputs: dict[str, Any]) -> None:
    """Refuse ids and labels that do not fit the features.

    Raises:
        ValueError: names the input and both values.
    """
    for name, value in inputs.items():
        if name.endswith("_ids"):
            check_rows(name, value, len(image_features), 1, image_features.device)
            if value.dtype != torch.int64:
                raise ValueError(f"{name} must be int64, got {value.dtype}")
        elif name.endswith("_labels"):
            rows = len(image_features) if name.startswith("image") else len(text_features)
            check_rows(name, value, rows, 2, image_features.device)
            check_states(name, value)
    if "image_labels" in inputs and "text_labels" in inputs:
        images, texts = inputs["image_labels"].shape[1], inputs["text_labels"].shape[1]
        if images != texts:
            raise ValueError(f"labels differ: {images} of image_labels, {texts} of text_labels")
