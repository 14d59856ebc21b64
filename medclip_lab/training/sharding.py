"""A model in shards (FSDP2): which parts travel together, and what stays whole."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import set_checkpoint_early_stop

from medclip_lab import distributed
from medclip_lab.training.module import ContrastiveModule


class ShardedModule(ContrastiveModule):
    """A `ContrastiveModule` whose towers are sharded over all ranks.

    Scale, bias and the loss's own parameters stay whole: they are few, and FSDP2 cannot shard a scalar.
    """

    def configure_model(self) -> None:
        if not any(isinstance(parameter, DTensor) for parameter in self.parameters()):
            assert self.device_mesh is not None
            shard(self.encoder.model, self.device_mesh["data_parallel"])

    def rows_at_a_time(self) -> int:
        # Without gradients nothing is kept, and ranks may have different numbers of chunks, each of them a collective.
        return self.gradient_cache if torch.is_grad_enabled() else 0

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        # A chunk that is run again must run to its end: there FSDP2 notes that it is through.
        with set_checkpoint_early_stop(False):
            super().backward(loss, *args, **kwargs)

    def on_after_backward(self) -> None:
        for parameter in self.parameters():
            if parameter.grad is not None and not isinstance(parameter, DTensor):
                distributed.all_sum(parameter.grad).div_(distributed.world_size())


def shard(model: Any, mesh: Any) -> None:
    """Shard an open_clip model in place: each block of its towers by itself, the rest together."""
    model.to(memory_format=torch.contiguous_format)  # of the weights: FSDP2 takes no other; inputs are as they were
    whole = {parameter for parameter in model.parameters() if parameter.ndim == 0}
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params=whole)
    for name in ("encode_image", "encode_text"):
        register_fsdp_forward_method(model, name)


def blocks_of(model: nn.Module) -> Iterator[nn.Module]:
    """The members of every list of like modules, such as the layers of a transformer; of nested lists the outer."""
    for child in model.children():
        members = list(child.children())
        alike = len({type(member) for member in members}) == 1 and len(members) > 1
        if isinstance(child, nn.ModuleList | nn.Sequential) and alike and all([*m.children()] for m in members):
            yield from members
        else:
            yield from blocks_of(child)
