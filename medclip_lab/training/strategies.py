"""Lightning's strategies for one process, for copies (DDP) and for shards (FSDP2), with checkpoints of our kind.

Every rank's gradient is W times its share of that of the global loss (see `medclip_lab.losses`), so both average over
ranks: DDP its buckets, FSDP2 its shards, and what FSDP2 leaves whole is averaged here.
"""

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy, Strategy
from torch import Tensor, nn

from medclip_lab import distributed
from medclip_lab.errors import UserError
from medclip_lab.files import read_json
from medclip_lab.training.checkpoint_files import STATE, join, read_tensors, tensors_in
from medclip_lab.training.saving import RANDOM, Saver

WEIGHTS = ("state_dict", "current_model_state")
"""Where Lightning keeps weights: those to export, and beside averaged ones those that train."""


class _Folders(Strategy):
    """Saves through a `Saver`, and loads what it wrote, whatever number of ranks and whatever strategy that was."""

    saver: Saver

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return _module(self).state_dict()

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """By names of parameters, which are those of any other run of this model."""
        names = _names(_module(self))
        state = optimizer.state_dict()
        order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
        groups = [group | {"params": [order[index] for index in group["params"]]} for group in state["param_groups"]]
        return {"state": {order[index]: value for index, value in state["state"].items()}, "param_groups": groups}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        names = _names(_module(self))
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            order = [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
            if order != [group["params"] for group in saved["param_groups"]]:
                raise UserError(
                    "the checkpoint's optimizer has other groups of parameters: go on with the optim settings it was "
                    "started with"
                )
            index = {name: number for number, name in enumerate(name for group in order for name in group)}
            groups = [group | {"params": [index[name] for name in group["params"]]} for group in saved["param_groups"]]
            optimizer.load_state_dict(
                {"state": {index[name]: value for name, value in saved["state"].items()}, "param_groups": groups}
            )

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        self.saver.save(checkpoint)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return load(Path(checkpoint_path), _module(self))

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        _module(self).load_state_dict(checkpoint["state_dict"], strict=strict)

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True


class OneProcess(_Folders, SingleDeviceStrategy):
    """One process, one device."""


class Copies(_Folders, DDPStrategy):
    """Every rank has the whole model."""


class Shards(_Folders, ModelParallelStrategy):
    """Every rank has a part of every matrix of the towers and of its optimizer state (FSDP2)."""


def build_strategy(
    kind: Literal["ddp", "fsdp"], device: torch.device, saver: Saver, timeout: timedelta, thaws: bool = False
) -> Strategy:
    """The strategy of a run; one process needs none of the others.

    Args:
        thaws: some parameters are frozen for a time only, so that not all have gradients at every step.
    """
    world = distributed.launched_world()[1]
    strategy: _Folders
    if world == 1:
        strategy = OneProcess(device)
    elif kind == "fsdp":
        strategy = Shards(data_parallel_size=world, tensor_parallel_size=1, timeout=timeout)
    else:
        strategy = Copies(timeout=timeout, find_unused_parameters=thaws)
    strategy.saver = saver
    return strategy


def load(path: Path, module: nn.Module) -> dict[str, Any]:
    """The state that Lightning handed over when the checkpoint was written, laid out as `module` is now.

    Raises:
        UserError: it is of another model.
    """
    state, found, own = read_json(path / STATE, "checkpoint"), tensors_in(path), module.state_dict()
    for name in sorted({*state["state_dict"]} ^ {*own}):
        where = "model" if name in own else "checkpoint"
        raise UserError(f"checkpoint {path} is of another model: only the {where} has {name}")
    parameters = dict(module.named_parameters())
    like: dict[str, Tensor] = {}
    for name, meta in found.items():
        section, *_ = parts = name.split("/")
        if section in WEIGHTS:
            mine = own[parts[1]]
            if meta.size != mine.shape:
                raise UserError(
                    f"checkpoint {path} is of another model: {parts[1]} has shape {list(meta.size)} there and "
                    f"{list(mine.shape)} here"
                )
            like[name] = mine
        elif section == "optimizer_states" and parts[3] in parameters and meta.size == parameters[parts[3]].shape:
            like[name] = parameters[parts[3]].detach()
    wanted = [name for name in found if not name.startswith(RANDOM)]
    whole: dict[str, Any] = join(state, read_tensors(path, wanted, like))
    return whole


def _module(strategy: Strategy) -> LightningModule:
    module = strategy.lightning_module
    assert module is not None
    return module


def _names(module: nn.Module) -> dict[nn.Parameter, str]:
    return {parameter: name for name, parameter in module.named_parameters()}
