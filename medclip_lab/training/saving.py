"""Checkpoints written beside training: copied to the memory of the host at once, and to disk in the background."""

import math
import shutil
import threading
import time
from datetime import timedelta
from typing import Any, Protocol

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, WeightAveraging
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.tensor import DTensor

from medclip_lab import distributed
from medclip_lab.errors import StartAgainError, UserError
from medclip_lab.training.checkpoint import CheckpointConfig, Store, in_gb, loud, room
from medclip_lab.training.checkpoint_files import SaveError, read_tensors, split, tensors_in, write
from medclip_lab.training.random_state import random_state, restore_random, seed_random
from medclip_lab.training.resume import Start

FACTS = "medclip_lab"
"""Key of the state under which `Saving` hands over what the manifest shall say."""


RANDOM = "random"
"""Before the names of the random numbers of each rank."""


class Asked(Protocol):
    """Whether somebody asked this process to stop."""

    received: str | None


class Saver:
    """Writes one checkpoint at a time, in a thread; every rank has one and calls the same methods.

    Args:
        facts: for every manifest: code, data, ranks.
        config: YAML of the run.
        timeout: how long ranks wait for each other.
    """

    def __init__(self, store: Store, facts: dict[str, Any], config: str, timeout: timedelta) -> None:
        self.store, self.facts, self.config = store, facts, config
        self.problem: str | None = None
        """Why the last one was not written."""
        self._group = distributed.side_group(timeout)
        self.timeout = timeout
        self._thread: threading.Thread | None = None
        cuda = torch.cuda.is_available()
        self._stager = DefaultStager(StagingOptions(cuda, False, False, cuda))

    def save(self, state: dict[str, Any]) -> None:
        """Take a copy of `state`, and return while it is being written; waits for the one before."""
        self.wait()
        facts = self.facts | state.pop(FACTS)
        said, tensors = split(state)
        mine = self._share(tensors)
        rank = distributed.rank()
        mine |= {f"{RANDOM}/{rank}/{name}": value for name, value in random_state().items()}
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        staged: Any = self._stager.stage(mine)
        arguments = (said, staged, facts, size)
        self._thread = threading.Thread(target=self._write, args=arguments, name="checkpoint", daemon=True)
        self._thread.start()

    def _share(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Shards, and of what every rank has whole a part: together they write each once."""
        rank, world = distributed.rank(), distributed.world_size()
        whole = [name for name, tensor in tensors.items() if not isinstance(tensor, DTensor)]
        order = sorted(whole, key=lambda name: (-tensors[name].numel(), name))
        others = set(order) - set(order[rank::world])
        return {name: tensor.detach() for name, tensor in tensors.items() if name not in others}

    def _write(self, state: Any, tensors: dict[str, Tensor], facts: dict[str, Any], size: int) -> None:
        path = self.store.path(facts["step"])
        first = distributed.rank() == 0
        try:
            problem = None
            if first:
                path.parent.mkdir(parents=True, exist_ok=True)
                free = shutil.disk_usage(path.parent).free
                if free < size:
                    problem = f"it needs {in_gb(size)}, and {in_gb(free)} are free"
            problem = distributed.everyones(problem, self._group)[0]
            if problem is not None:
                raise SaveError(problem)
            if not path.exists():  # else the step was saved before, and a rerun of it is the same
                write(path, state, tensors, facts, self.config, self._group)
            if first:
                self.store.settle()
            self.problem = None
        except Exception as error:  # whatever it was, training goes on
            self.problem = str(error)
            if first and not distributed.lost_another(error):
                steps = self.store.here()
                newest = f"the newest whole one is of step {steps[-1]}" if steps else "there is none yet"
                loud(f"checkpoint of step {facts['step']} was not written: {error}. The run goes on; {newest}")

    def wait(self) -> None:
        """Until nothing is being written any more."""
        if self._thread is not None:
            self._thread.join(self.timeout.total_seconds() + 60)
            self._thread = None


class Saving(Checkpoint):
    """When to save: by steps, by minutes, after the best validation, at the end, and when asked to stop.

    Args:
        start: where the run begins.
        seed: of the run, for ranks that the checkpoint knows nothing of.
    """

    def __init__(self, saver: Saver, config: CheckpointConfig, asked: Asked, start: Start, seed: int) -> None:
        self.saver, self.config, self.asked, self.start, self.seed = saver, config, asked, start, seed
        self._saved = start.step if start.path is not None else -1
        self._metrics: dict[str, float] = {}
        self._pending = False
        self._clock = time.monotonic()
        self._voted: Any = None
        self._group = distributed.side_group(saver.timeout)
        best = distributed.everyones(saver.store.best())[0] if config.keep_best else None
        self._lowest = math.inf if best is None else best[0]

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._clock = time.monotonic()
        if problem := self._no_room(trainer, module):
            raise UserError(problem)
        if self.start.path is not None:
            go_on_with_random(self.start, self.seed)

    def _no_room(self, trainer: Trainer, module: LightningModule) -> str | None:
        """For parameters, two numbers of the optimizer for each that trains, and their average."""
        weights = sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())
        trained = sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)
        averaged = any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks)  # type: ignore[attr-defined]
        size = weights * (1 + averaged) + 2 * trained
        problem = room(self.saver.store.folder, size, self.config) if trainer.is_global_zero else None
        found: str | None = distributed.everyones(problem)[0]
        return found

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        minutes = self.config.minutes > 0 and time.monotonic() - self._clock >= 60 * self.config.minutes
        stop, late = self._agreed(self.asked.received is not None, minutes)
        if stop and step < trainer.max_steps:
            self._save(trainer)
            self.saver.wait()
            raise StartAgainError(self._told(step))
        if late or step % self.config.every == 0 or step == trainer.max_steps:
            # After the validation of this step, so that its result is told and a resume need not repeat it.
            if validates(trainer):
                self._pending = True
            else:
                self._save(trainer)

    def _told(self, step: int) -> str:
        asked = self.asked.received or "another rank was told to stop"
        if self.saver.problem is None:
            return f"{asked}: saved at step {step}; start it again to go on"
        return f"{asked}: stopped at step {step}, and saving failed: {self.saver.problem}; start it again to go on"

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        value = float(trainer.callback_metrics["val_loss"]) if "val_loss" in trainer.callback_metrics else math.nan
        better = self.config.keep_best and value < self._lowest
        if better:
            self._lowest = value
        if better or self._pending:
            self._pending = False
            self._save(trainer, {"val_loss": value} if math.isfinite(value) else {})

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        step = trainer.global_step
        checkpoint[FACTS] = {"step": step, "batch": step + self.start.ahead, "metrics": self._metrics}

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.saver.wait()
        if self._voted is not None:
            distributed.outcome(self._voted)

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        self.saver.wait()

    def _save(self, trainer: Trainer, metrics: dict[str, float] | None = None) -> None:
        step = trainer.global_step
        self._clock = time.monotonic()
        if step != self._saved:
            self._saved, self._metrics = step, metrics or {}
            trainer.save_checkpoint(self.saver.store.path(step))

    def _agreed(self, *mine: bool) -> list[bool]:
        """What any rank says, on all ranks alike: what they said a step ago, so that nobody waits for it now."""
        if distributed.world_size() == 1:
            return list(mine)
        before, self._voted = self._voted, distributed.vote(mine, self._group)
        return [False] * len(mine) if before is None else distributed.outcome(before)


def validates(trainer: Trainer) -> bool:
    """Whether a validation by steps follows this one."""
    every = trainer.val_check_batch
    return bool(trainer.enable_validation and every and trainer.global_step % every == 0)


def go_on_with_random(start: Start, seed: int) -> None:
    """The random numbers of this rank where its checkpoint left them; fresh ones if that knows of no such rank."""
    assert start.path is not None
    prefix = f"{RANDOM}/{distributed.rank()}/"
    names = [name for name in tensors_in(start.path) if name.startswith(prefix)]
    if names:
        restore_random({name.removeprefix(prefix): value for name, value in read_tensors(start.path, names).items()})
    else:
        seed_random(seed, start.step, distributed.rank())
