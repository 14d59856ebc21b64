"""Reference maths of the losses: tensors in, tensors out, no modules, no process groups.

Shape suffixes: N image rows, M text rows, D embed dim, K labels, n kinds of ids. Features have unit norm.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

NO_GROUP = -1
"""The id of a row that belongs to no group: it equals no other id, not even itself."""


def clip_loss(
    logits_NM: Tensor, image_to_text: float = 0.5, text_to_image: float = 0.5, label_smoothing: float = 0.0
) -> Tensor:
    """Weighted sum of the two directions of InfoNCE, row i and column i being a pair (Radford et al., ICML 2021).

    Args:
        logits_NM: square scaled similarities, images in rows.
        image_to_text, text_to_image: weights of the directions.
        label_smoothing: share of the target that is spread evenly over all candidates.
    """
    target = torch.arange(logits_NM.shape[0], device=logits_NM.device)
    rows = F.cross_entropy(logits_NM, target, label_smoothing=label_smoothing)
    columns = F.cross_entropy(logits_NM.T, target, label_smoothing=label_smoothing)
    return image_to_text * rows + text_to_image * columns


def siglip_loss(logits_NM: Tensor, positive_NM: Tensor | None = None, ignored_NM: Tensor | None = None) -> Tensor:
    """Pairwise sigmoid loss: the sum over all pairs divided by the batch (Zhai et al., ICCV 2023, eq. 1).

    Args:
        logits_NM: square scaled and biased similarities.
        positive_NM: bool, which pairs are positive; None takes the diagonal.
        ignored_NM: bool, pairs that count neither way, except where they are positive.
    """
    if positive_NM is None:
        positive_NM = torch.eye(len(logits_NM), dtype=torch.bool, device=logits_NM.device)
    # -log sigmoid(z) of a positive, -log sigmoid(-z) of a negative. The sign is changed before and not after, so that
    # small values keep their digits; past the threshold softplus(z) is z to the last bit of float64.
    losses = F.softplus(torch.where(positive_NM, -logits_NM, logits_NM), threshold=40)
    if ignored_NM is not None:
        losses = torch.where(ignored_NM & ~positive_NM, 0.0, losses)
    return losses.sum() / logits_NM.shape[0]


def same_ids(image_ids_Nn: Tensor, text_ids_Mn: Tensor) -> Tensor:
    """[N, M] bool: image and text share an id of one kind at least. Ids below 0 are shared with nobody."""
    same = torch.zeros(len(image_ids_Nn), len(text_ids_Mn), dtype=torch.bool, device=image_ids_Nn.device)
    for rows, columns in zip(image_ids_Nn.unbind(1), text_ids_Mn.unbind(1), strict=True):
        same |= (rows[:, None] == columns) & (rows >= 0)[:, None]
    return same


def row_ids(codes_NL: Tensor) -> Tensor:
    """[N] int64 of at least 0, equal where rows of integers are equal; the same on every machine.

    Args:
        codes_NL: int64, such as tokens.
    """
    ids = torch.zeros(len(codes_NL), dtype=torch.int64, device=codes_NL.device)
    for column in codes_NL.unbind(1):
        ids = ids * 6364136223846793005 + column + 1  # wraps around: a polynomial hash modulo 2**64
    return ids & (2**63 - 1)


def label_ids(labels_NK: Tensor) -> Tensor:
    """[N] int64, equal where the label vectors are equal; `NO_GROUP` where no label is mentioned.

    Args:
        labels_NK: 1 present, 0 absent, -1 uncertain, NaN not mentioned.
    """
    unmentioned = labels_NK.isnan()
    codes = torch.where(unmentioned, 2.0, labels_NK.to(torch.float64)).to(torch.int64) + 1
    return torch.where(unmentioned.all(1), NO_GROUP, row_ids(codes))


def multi_positive_loss(
    logits_NM: Tensor, positive_NM: Tensor, image_to_text: float = 0.5, text_to_image: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Cross entropy against targets spread evenly over the positives, in both directions.

    This is SupCon's L_out (Khosla et al., NeurIPS 2020, eq. 2) across two modalities, and UniCL's loss (Yang et al.,
    CVPR 2022, eq. 2-4) with targets that sum to 1 as in its code.

    Args:
        positive_NM: bool; every row and every column has one at least.

    Returns:
        The loss, and the entropy of the targets: the least value the loss can reach.
    """

    def one_direction(logits: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
        many = positive.sum(1).to(logits.dtype)
        # Not a product with the target: where a logit is infinite, 0 times it would be NaN.
        own = torch.where(positive, logits, 0.0).sum(1) / many
        return (logits.logsumexp(1) - own).mean(), many.log().mean()

    rows, row_floor = one_direction(logits_NM, positive_NM)
    columns, column_floor = one_direction(logits_NM.T, positive_NM.T)
    return (
        image_to_text * rows + text_to_image * columns,
        image_to_text * row_floor + text_to_image * column_floor,
    )


def label_values(labels: Tensor, absent: float = 0.0, uncertain: float = 0.0, unmentioned: float = 0.0) -> Tensor:
    """Numbers whose products say how far two label vectors agree.

    Args:
        labels: [..., K] with 1 present, 0 absent, -1 uncertain, NaN not mentioned.
        absent, uncertain, unmentioned: what these states count as; present counts as 1.

    Returns:
        A tensor of the same shape and dtype without NaN.
    """
    values = torch.full_like(labels, unmentioned)
    values = torch.where(labels == 1, 1.0, values)
    values = torch.where(labels == 0, absent, values)
    return torch.where(labels == -1, uncertain, values)


def label_similarity(
    image_values_NK: Tensor,
    text_values_MK: Tensor,
    similarity: str,
    image_known_NK: Tensor | None = None,
    text_known_MK: Tensor | None = None,
) -> Tensor:
    """[N, M] agreement of label vectors: their dot product, or their cosine (0 for a vector of zeros).

    Args:
        image_known_NK, text_known_MK: 1 where a label counts, 0 where it is ignored. A pair is compared on the labels
            that count for both; None counts them all.
    """
    if similarity not in ("dot", "cosine"):
        raise ValueError(f"similarity: 'dot' or 'cosine' expected, got {similarity!r}")
    if image_known_NK is None or text_known_MK is None:
        if similarity == "cosine":
            image_values_NK = F.normalize(image_values_NK, dim=-1)
            text_values_MK = F.normalize(text_values_MK, dim=-1)
        return image_values_NK @ text_values_MK.T
    images, texts = image_values_NK * image_known_NK, text_values_MK * text_known_MK
    products = images @ texts.T
    if similarity == "dot":
        return products
    # The norms are those of the labels both know, so they belong to the pair and not to the row.
    squares = (images.square() @ text_known_MK.T) * (image_known_NK @ texts.square().T)
    return products / squares.sqrt().clamp_min(1e-12)


def soft_target_loss(
    logits_NM: Tensor,
    similarity_NM: Tensor,
    temperature: float,
    image_to_text: float = 0.5,
    text_to_image: float = 0.5,
) -> tuple[Tensor, Tensor]:
    """Cross entropy against the softmax of a label similarity, in both directions (MedCLIP, EMNLP 2022, eq. 5).

    Args:
        logits_NM: scaled similarities of the features; N and M may differ, rows need not be pairs.
        similarity_NM: agreement of the labels.
        temperature: divides the similarity before its softmax; small values make the targets hard.

    Returns:
        The loss, and the entropy of the targets: the least value the loss can reach.
    """

    def one_direction(logits: Tensor, similarity: Tensor) -> tuple[Tensor, Tensor]:
        log_target = F.log_softmax(similarity / temperature, dim=1)
        target = log_target.exp()
        # A target of exactly zero contributes nothing; its logarithm, -inf, would give NaN.
        entropy = -torch.where(target > 0, target * log_target, 0.0).sum(1).mean()
        return -(target * F.log_softmax(logits, dim=1)).sum(1).mean(), entropy

    rows, row_floor = one_direction(logits_NM, similarity_NM)
    columns, column_floor = one_direction(logits_NM.T, similarity_NM.T)
    return (
        image_to_text * rows + text_to_image * columns,
        image_to_text * row_floor + text_to_image * column_floor,
    )


def logits(
    image_features_ND: Tensor, text_features_MD: Tensor, logit_scale: Tensor, logit_bias: Tensor | None = None
) -> Tensor:
    """[N, M] `logit_scale * cosine + logit_bias` in at least float32, whatever autocast says.

    The softmax and the exponential amplify rounding by the scale (up to 100), so half precision stops here.
    """
    dtype = wide_dtype(image_features_ND, text_features_MD)
    with torch.autocast(image_features_ND.device.type, enabled=False):
        values = logit_scale.to(dtype) * (image_features_ND.to(dtype) @ text_features_MD.to(dtype).T)
    return values if logit_bias is None else values + logit_bias.to(dtype)


def wide_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype in which logits of these features are formed: float32, or float64 if one of them is."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype
