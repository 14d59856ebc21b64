"""What a batch of features says about a training run beside its loss."""

import torch
from torch import Tensor

from medclip_lab import distributed
from medclip_lab.losses import functional
from medclip_lab.losses.checks import check_features, check_rows

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

    Raises:
        ValueError: tensors that do not fit each other, on any rank.
    """
    problem = None
    try:
        check_features(image_features, text_features, logit_scale, logit_bias, paired)
        if text_ids is not None:
            check_rows("text_ids", text_ids, len(text_features), 1, text_features.device)
    except ValueError as error:
        problem = str(error)
    what = f"diagnose {paired} {text_ids is not None}"
    counts = distributed.agree([len(image_features), len(text_features)], what, image_features.device, problem)
    image_sizes, text_sizes = [row[0] for row in counts], [row[1] for row in counts]
    told = {"image_rank": effective_rank(image_features), "text_rank": effective_rank(text_features)}
    if text_ids is not None:
        ids = distributed.gather(text_ids, text_sizes)
        _, group, many = torch.unique(ids, return_inverse=True, return_counts=True)
        told["repeated_texts"] = ((many[group] > 1) & (ids >= 0)).float().mean()
    if not paired:
        return told
    texts = distributed.gather(text_features.float(), text_sizes)
    start, count = sum(image_sizes[: distributed.rank()]), len(texts)
    # Own images against all texts; the best rival of every text is found among the images of all ranks.
    sums = torch.zeros(3, dtype=torch.float64, device=texts.device)
    pairs, rivals = (texts.new_full((count,), float("-inf")) for _ in range(2))
    for first in range(0, len(image_features), ROWS):
        images = image_features[first : first + ROWS].float()
        place = torch.arange(start + first, start + first + len(images), device=texts.device)
        scores = functional.logits(images, texts, logit_scale, logit_bias)
        sums[1] += scores.sum(1).sum(dtype=torch.float64)
        pairs[place] = own = scores.gather(1, place[:, None])[:, 0]
        scores.scatter_(1, place[:, None], float("-inf"))
        sums[0] += own.sum(dtype=torch.float64)
        sums[2] += (own > scores.amax(1)).sum()
        rivals = torch.maximum(rivals, scores.amax(0))
    pairs_sum, whole_sum, to_text = distributed.all_sum(sums).float()
    to_image = distributed.all_max(pairs) > distributed.all_max(rivals)
    return told | {
        "positive_logit": pairs_sum / count,
        "negative_logit": (whole_sum - pairs_sum) / max(1, count * count - count),
        "image_to_text_top1": to_text / count,
        "text_to_image_top1": to_image.float().mean(),
    }


def effective_rank(features: Tensor) -> Tensor:
    """exp of the entropy of the normalised singular values of the features of all ranks; NaN if they are not finite.

    Args:
        features: [N, D] of this rank; the result is between 1 and D.
    """
    # The squares of the singular values are the eigenvalues of a D x D matrix that ranks can add up; float64, as a
    # square root makes much of a small error.
    wide = features.double()
    squares = distributed.all_sum(wide.T @ wide)
    if not bool(squares.isfinite().all()):
        return features.new_tensor(float("nan"), dtype=torch.float32)
    values = torch.linalg.eigvalsh(squares).clamp_min(0).sqrt()
    rank: Tensor = torch.special.entr(values / values.sum()).sum().exp().float()
    return rank
