"""A large contrastive batch in little memory: towers run a few rows at a time, twice, and the loss sees them all.

The first pass keeps the features only; the loss is formed over the whole batch; the backward runs each chunk again and
sends its part of the gradient through it (Gao et al., RepL4NLP 2021, arXiv 2101.06983). Here that is torch's activation
checkpointing over chunks of the batch, so every gradient, the temperature's too, is that of the whole batch, and both
passes see the same random numbers (dropout, patch dropout) and the same autocast.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from medclip_lab.errors import UserError


def in_chunks(tower: Callable[[Tensor], Tensor], rows: Tensor, chunk_size: int) -> Tensor:
    """`tower(rows)`, without keeping what lies between; `chunk_size` rows at a time.

    Args:
        tower: maps [n, ...] to [n, D], each row by itself.
        rows: [N, ...].
    """
    parts = torch.split(rows, chunk_size)
    if not torch.is_grad_enabled():
        return torch.cat([tower(part) for part in parts])
    return torch.cat([checkpoint(tower, part, use_reentrant=False, preserve_rng_state=True) for part in parts])


def refuse_batch_statistics(model: nn.Module, chunk_size: int) -> None:
    """A tower whose rows depend on each other is another tower in chunks.

    Raises:
        UserError: a batch norm that trains.
    """
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or not module.track_running_stats):
            raise UserError(
                f"trainer.gradient_cache is {chunk_size}, and {name} normalises over its batch: in chunks of "
                f"{chunk_size} it would be another model. Use a tower with layer or group norm, or no gradient cache"
            )
