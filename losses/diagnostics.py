"""What a batch of features says about a training run beside its loss."""

import torch
from torch import Tensor

from medclip_lab import distributed
from medclip_lab.losses import functional
from medclip_lab.losses.base import check_rows

ROWS = 1024
"""Rows of pairs that are held at a time."""


@torch.no_grad()
def diagnose(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None = None,
    text_ids: Tensor | None = None,
    paired: bool = True,
) -> dict[str, Tensor]:
    """Numbers to log now and then, over the global batch; a single product of images and texts, no gradient.

    Args:
        image_features, text_features: [N, D] and [M, D], unit norm.
        logit_scale, logit_bias: scalars, as the loss takes them.
        text_ids: int64 [M], equal for identical texts.
        paired: row i of both belong together.

    Returns:
        "image_rank" and "text_rank": effective rank of the features, exp of the entropy of their normalised singular
        values (Roy & Vetterli, EUSIPCO 2007): near 1 when a tower collapses, D at most. "repeated_texts": share of
        the texts that stand in the batch more than once, if `text_ids` are given. If `paired`, "positive_logit" and
        "negative_logit": means over the pairs and over all others; "image_to_text_top1" and "text_to_image_top1":
        share of rows whose own partner scores highest, which ties count against.
    """
    if text_ids is not None:
        check_rows("text_ids", text_ids, len(text_features), 1, text_features.device)
    counts = distributed.agree(
        [len(image_features), len(text_features)], f"diagnose {paired} {text_ids is not None}", image_features.device
    )
    image_sizes, text_sizes = [row[0] for row in counts], [row[1] for row in counts]
    images = distributed.gather(image_features.float(), image_sizes)
    texts = distributed.gather(text_features.float(), text_sizes)
    told = {"image_rank": effective_rank(images), "text_rank": effective_rank(texts)}
    if text_ids is not None:
        ids = distributed.gather(text_ids, text_sizes)
        _, group, many = torch.unique(ids, return_inverse=True, return_counts=True)
        told["repeated_texts"] = ((many[group] > 1) & (ids >= 0)).float().mean()
    if not paired:
        return told
    start, count = sum(image_sizes[: distributed.rank()]), len(images)
    # Own rows against all others, both ways; the sums of the ranks are those of the batch.
    sums = torch.zeros(4, dtype=torch.float64, device=images.device)
    for first in range(0, len(image_features), ROWS):
        own = slice(start + first, min(start + first + ROWS, start + len(image_features)))
        place = torch.arange(own.start, own.stop, device=images.device)
        for side, (queries, gallery) in enumerate(((images, texts), (texts, images))):
            scores = functional.logits(queries[own], gallery, logit_scale, logit_bias)
            pairs = scores.gather(1, place[:, None])
            if side == 0:
                sums[0] += pairs.sum(dtype=torch.float64)
                sums[1] += scores.sum(1).sum(dtype=torch.float64)
            scores.scatter_(1, place[:, None], float("-inf"))
            sums[2 + side] += (pairs[:, 0] > scores.amax(1)).sum()
    pairs_sum, all_sum, to_text, to_image = distributed.all_sum(sums).float()
    others = max(1, count * count - count)
    return told | {
        "positive_logit": pairs_sum / count,
        "negative_logit": (all_sum - pairs_sum) / others,
        "image_to_text_top1": to_text / count,
        "text_to_image_top1": to_image / count,
    }


def effective_rank(features: Tensor) -> Tensor:
    """exp of the entropy of the normalised singular values of [N, D]; between 1 and min(N, D), NaN if not finite."""
    if not bool(features.isfinite().all()):
        return features.new_tensor(float("nan"))
    values = torch.linalg.svdvals(features)
    shares = values / values.sum()
    rank: Tensor = torch.special.entr(shares).sum().exp()
    return rank
