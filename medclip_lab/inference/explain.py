"""Where in an image a similarity to a text comes from.

For towers of patches (ViT), "patches": each patch token goes through the tower's own pooling and projection as if it
were the whole image, and its cosine to the text is the map (the dense reading of a contrastive model: Zhou et al., ECCV
2022; Boecking et al., ECCV 2022). For convolutional towers, gradients of the similarity at a stage's output A:

- "gradcam": relu of the sum over channels of A weighted by the mean gradient of its channel (Selvaraju et al., 2017);
- "hirescam": the same with the gradient at each place in place of its mean (Draelos & Carin, 2020), which is right at
  any stage and not only before an average pooling. So the maps of all stages can be laid over each other, each with 1
  as its highest: the coarse ones know what it is and the fine ones where (as LayerCAM does: Jiang et al., TIP 2021).

A map says what moved the score, not what is ill.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from medclip_lab.data.decode import read_image
from medclip_lab.data.preprocess import Box, PreprocessConfig, normalise, stack
from medclip_lab.errors import UserError
from medclip_lab.files import atomic_file
from medclip_lab.inference.encoder import Encoder

Method = Literal["auto", "patches", "gradcam", "hirescam"]
MIN_CELLS = 6
"""Cells along a side that a map of "gradcam" has at least, where its stage is not named: fewer point nowhere."""


@dataclass(frozen=True)
class Explanation:
    """A map over what the tower saw."""

    relevance: NDArray[np.float32]
    """[h, w], in the cells of the tower or its finest stage; gradient maps are not negative, patch maps are cosines."""
    similarity: float
    """Of the whole image to the text, less that to the texts against it."""
    method: str
    seen: NDArray[np.uint8]
    """[S, S] or [S, S, 3]: the square the tower saw."""
    frame: Box
    """Where that square lies in the picture, as shares of its sides; beyond 0 and 1 where it was padded."""

    def enlarged(self) -> NDArray[np.float32]:
        """[S, S]: the map at the size of what was seen, bicubic: bilinear ones are flat at the border."""
        side = self.seen.shape[0]
        grown = Image.fromarray(self.relevance).resize((side, side), Image.Resampling.BICUBIC)
        return np.asarray(grown, dtype=np.float32)


def explain(
    encoder: Encoder,
    image: str | Path | Image.Image,
    prompt: str | Sequence[str],
    against: str | Sequence[str] = (),
    *,
    method: Method = "auto",
    stage: int | None = None,
) -> Explanation:
    """The map of one image for a text, or for the mean of several.

    Args:
        against: texts whose similarity is taken away, such as "No pleural effusion.": what both share then cancels.
        method: "auto" takes "patches" for a tower of patches and "hirescam" for a convolutional one.
        stage: of a convolutional tower, counted as timm does; the last, -1, is the coarsest. None takes all of them for
            "hirescam", and for "gradcam" the last one whose map has at least six cells a side.

    Raises:
        UserError: a tower that the method cannot read, a stage that does not exist, an image that cannot be read.
    """
    decoded = image if isinstance(image, Image.Image) else read_image(image)
    picture = encoder.preprocess.window(decoded)
    pixels = stack([encoder.preprocess(picture)])
    direction = _direction(encoder, prompt, against)
    visual: Any = getattr(getattr(encoder.model, "model", None), "visual", None)
    if visual is None:
        raise UserError("explain: only towers that open_clip runs can be looked into, not those of transformers")
    has_patches = _has_patches(visual)
    if method == "auto":
        method = "patches" if has_patches else "hirescam"
    if method == "patches" and not has_patches:
        raise UserError("explain: this tower has no patch tokens: take --method hirescam")
    with _float_inputs(encoder, pixels) as inputs:
        if method == "patches":
            relevance, similarity = _patches(encoder, visual, inputs, direction)
        else:
            relevance, similarity = _gradients(encoder, visual, inputs, direction, stage, pooled=method == "gradcam")
    seen = pixels[0].permute(1, 2, 0).numpy()
    return Explanation(
        relevance=relevance,
        similarity=similarity,
        method=method,
        seen=seen[..., 0] if seen.shape[2] == 1 else seen,
        frame=frame_of(encoder.preprocess.config, *picture.size),
    )


def _direction(encoder: Encoder, prompt: str | Sequence[str], against: str | Sequence[str]) -> Tensor:
    """[D] mean feature of the texts, unit norm, less that of those against."""
    means = []
    for texts in (prompt, against):
        listed = [texts] if isinstance(texts, str) else list(texts)
        if listed:
            mean = encoder.encode_texts(listed).mean(0)
            means.append(torch.from_numpy(mean / np.linalg.norm(mean)))
    if not means:
        raise UserError("explain: a prompt is needed")
    return (means[0] - means[1] if len(means) > 1 else means[0]).to(encoder.model.mean.device)


class _float_inputs:  # noqa: N801 - used as a function
    """Normalised pixels with a gradient, while the weights need none."""

    def __init__(self, encoder: Encoder, pixels: Tensor) -> None:
        self.model = encoder.model
        pixels = pixels.to(self.model.mean.device)
        self.inputs = normalise(pixels, self.model.mean, self.model.std).requires_grad_()

    def __enter__(self) -> Tensor:
        self.wanted = [parameter.requires_grad for parameter in self.model.parameters()]
        self.model.requires_grad_(False)
        return self.inputs

    def __exit__(self, *_: object) -> None:
        for parameter, wanted in zip(self.model.parameters(), self.wanted, strict=True):
            parameter.requires_grad_(wanted)


def _has_patches(visual: Any) -> bool:
    if hasattr(visual, "trunk"):
        return hasattr(visual.trunk, "patch_embed") and hasattr(visual.trunk, "num_prefix_tokens")
    return hasattr(visual, "class_embedding") and getattr(visual, "attn_pool", None) is None


@torch.no_grad()
def _patches(encoder: Encoder, visual: Any, inputs: Tensor, direction: Tensor) -> tuple[NDArray[np.float32], float]:
    if hasattr(visual, "trunk"):
        trunk = visual.trunk
        tokens = trunk.forward_features(inputs)
        extra = int(trunk.num_prefix_tokens)
        patches = tokens[0, extra:]
        # A sequence that is one patch and nothing else: whatever the pooling takes of it, it takes that patch.
        alone = patches[:, None].expand(-1, extra + 1, -1)
        features = visual.head(trunk.forward_head(alone))
        grid = trunk.patch_embed.dynamic_feat_size(inputs.shape[-2:])
    else:
        kept: list[Tensor] = []
        handle = visual.transformer.register_forward_hook(lambda _m, _i, output: kept.append(output))
        try:
            visual(inputs)
        finally:
            handle.remove()
        features = visual.ln_post(kept[0][0, 1:])
        features = features @ visual.proj if visual.proj is not None else features
        grid = visual.grid_size
    cosines = F.normalize(features.float(), dim=-1) @ direction
    whole = F.normalize(encoder.model.model.encode_image(inputs).float(), dim=-1) @ direction
    return cosines.reshape(int(grid[0]), int(grid[1])).cpu().numpy(), float(whole[0])


def _gradients(
    encoder: Encoder, visual: Any, inputs: Tensor, direction: Tensor, stage: int | None, pooled: bool
) -> tuple[NDArray[np.float32], float]:
    modules = _stages(visual, stage)
    kept: list[Tensor] = []
    handles = [module.register_forward_hook(lambda _m, _i, output: kept.append(output)) for module in modules]
    try:
        with torch.enable_grad():
            features = F.normalize(encoder.model.model.encode_image(inputs).float(), dim=-1)
            similarity = (features @ direction).sum()
            maps = [output for output in kept if output.ndim == 4]
            if not maps:
                raise UserError("explain: this stage has no map of places: take another --stage")
            if pooled:
                maps = [next((m for m in reversed(maps) if sorted(m.shape[1:])[1] >= MIN_CELLS), maps[0])]
            gradients = torch.autograd.grad(similarity, maps)
    finally:
        for handle in handles:
            handle.remove()
    found = [_weighted(*pair, pooled) for pair in zip(maps, gradients, strict=True)]
    relevance = found[0] if len(found) == 1 else _overlaid(found)
    return relevance.detach().float().cpu().numpy(), float(similarity.detach())


def _weighted(activation: Tensor, gradient: Tensor, pooled: bool) -> Tensor:
    """[h, w]: what the places of one stage add to the similarity."""
    # Swin and its kind keep channels last: channels are the axis that is not a side of the map.
    axis = 1 if activation.shape[2] == activation.shape[3] else 3
    weights = gradient.mean(dim=[d for d in (1, 2, 3) if d != axis], keepdim=True) if pooled else gradient
    return (weights * activation).sum(axis)[0].clamp_min(0)


def _overlaid(maps: Sequence[Tensor]) -> Tensor:
    """[h, w]: the mean of maps at the size of the finest, each with 1 as its highest."""
    side = max(maps, key=lambda one: one.shape[0]).shape
    grown = [F.interpolate(one[None, None].float(), side, mode="bicubic")[0, 0].clamp_min(0) for one in maps]
    return torch.stack([one / one.max().clamp_min(1e-12) for one in grown]).mean(0)


def _stages(visual: Any, stage: int | None) -> list[nn.Module]:
    """The modules that end the stages of a timm tower, or of open_clip's own ResNet; one of them if it is named."""
    if hasattr(visual, "trunk"):
        names = [str(entry["module"]) for entry in getattr(visual.trunk, "feature_info", [])]
        parent: nn.Module = visual.trunk
    else:
        names, parent = [name for name, _ in visual.named_children() if name.startswith("layer")], visual
    if not names or (stage is not None and not -len(names) <= stage < len(names)):
        raise UserError(f"explain: this tower has {len(names)} stages, no stage {stage}")
    return [parent.get_submodule(name) for name in (names if stage is None else [names[stage]])]


def frame_of(config: PreprocessConfig, width: int, height: int) -> Box:
    """Where the square that the tower sees lies in a picture, as shares of its sides."""
    if config.resize_mode == "squash":
        return 0.0, 0.0, 1.0, 1.0
    side = max(width, height) if config.resize_mode == "longest" else min(width, height)
    across, down = side / width, side / height
    return (1 - across) / 2, (1 - down) / 2, (1 + across) / 2, (1 + down) / 2


def overlay(explanation: Explanation) -> Image.Image:
    """What the tower saw, with the map over it: the warmer, the more; below the map's median nothing is laid over."""
    grown = explanation.enlarged().astype(np.float64)
    low, high = float(np.median(grown)), float(grown.max())
    share = np.clip((grown - low) / (high - low), 0, 1)[..., None] if high > low else np.zeros((*grown.shape, 1))
    base = explanation.seen.astype(np.float64)
    base = np.repeat(base[..., None], 3, axis=2) if base.ndim == 2 else base
    warm = np.array([255.0, 230.0 * 0.35, 0.0]) * (1 - share) + np.array([255.0, 235.0, 60.0]) * share
    return Image.fromarray(np.rint(base * (1 - 0.65 * share) + warm * 0.65 * share).astype(np.uint8))


def save_overlay(explanation: Explanation, path: Path) -> None:
    """Write the overlay as PNG, at 512 px a side at least."""
    picture = overlay(explanation)
    side = max(512, picture.width)
    with atomic_file(path) as temporary:
        picture.resize((side, side), Image.Resampling.BICUBIC).save(temporary, "PNG")
