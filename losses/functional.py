"""Reference maths of the losses: tensors in, tensors out, no modules, no process groups.

Shape suffixes: N image rows, M text rows, D embed dim, K labels. Features have unit norm.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def clip_loss(logits_NM: Tensor) -> Tensor:
    """Mean of the two directions of InfoNCE, row i and column i being a pair (Radford et al., ICML 2021).

    Args:
        logits_NM: square scaled similarities, images in rows.
    """
    target = torch.arange(logits_NM.shape[0], device=logits_NM.device)
    return (F.cross_entropy(logits_NM, target) + F.cross_entropy(logits_NM.T, target)) / 2


def siglip_loss(logits_NM: Tensor) -> Tensor:
    """Pairwise sigmoid loss: the sum over all pairs divided by the batch (Zhai et al., ICCV 2023, eq. 1).

    Args:
        logits_NM: square scaled and biased similarities; the diagonal holds the pairs.
    """
    # -log sigmoid(z) on the diagonal and -log sigmoid(-z) off it, which is softplus(z) minus z on the diagonal.
    return (F.softplus(logits_NM).sum() - logits_NM.diagonal().sum()) / logits_NM.shape[0]


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


def label_similarity(image_values_NK: Tensor, text_values_MK: Tensor, similarity: str) -> Tensor:
    """[N, M] agreement of label vectors: their dot product, or their cosine (0 for a vector of zeros)."""
    if similarity == "cosine":
        image_values_NK = F.normalize(image_values_NK, dim=-1)
        text_values_MK = F.normalize(text_values_MK, dim=-1)
    elif similarity != "dot":
        raise ValueError(f"similarity: 'dot' or 'cosine' expected, got {similarity!r}")
    return image_values_NK @ text_values_MK.T


def soft_target_loss(logits_NM: Tensor, similarity_NM: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Cross entropy against the softmax of a label similarity, mean of both directions (MedCLIP, EMNLP 2022, eq. 5).

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
    return (rows + columns) / 2, (row_floor + column_floor) / 2


def logits(
    image_features_ND: Tensor, text_features_MD: Tensor, logit_scale: Tensor, logit_bias: Tensor | None = None
) -> Tensor:
    """[N, M] `logit_scale * cosine + logit_bias` in at least float32, whatever autocast says.

    The softmax and the exponential amplify rounding by the scale (up to 100), so half precision stops here.
    """
    dtype = torch.promote_types(image_features_ND.dtype, torch.float32)
    with torch.autocast(image_features_ND.device.type, enabled=False):
        values = logit_scale.to(dtype) * (image_features_ND.to(dtype) @ text_features_MD.to(dtype).T)
    return values if logit_bias is None else values + logit_bias.to(dtype)


def check_features(image_features: Tensor, text_features: Tensor, paired: bool) -> None:
    """Refuse features no loss can use.

    Raises:
        ValueError: not two-dimensional, different embed dims, or different numbers of rows where rows are pairs.
    """
    if image_features.ndim != 2 or text_features.ndim != 2:
        raise ValueError(
            f"features must be [batch, dim]: image_features {tuple(image_features.shape)}, "
            f"text_features {tuple(text_features.shape)}"
        )
    if image_features.shape[1] != text_features.shape[1]:
        raise ValueError(
            f"embed dims differ: image_features {tuple(image_features.shape)}, "
            f"text_features {tuple(text_features.shape)}"
        )
    if paired and len(image_features) != len(text_features):
        raise ValueError(
            f"row i of both must be a pair: {len(image_features)} image_features, {len(text_features)} text_features"
        )
    if len(image_features) == 0 or len(text_features) == 0:
        raise ValueError(f"empty batch: {len(image_features)} image_features, {len(text_features)} text_features")
