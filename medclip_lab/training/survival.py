"""What a run does when it is told to stop, and when a batch spoils it."""

import json
import math
import signal
import statistics
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from medclip_lab import distributed
from medclip_lab.errors import UserError
from medclip_lab.training.checkpoint import loud
from medclip_lab.training.module import ContrastiveModule
from medclip_lab.training.random_state import random_state
from medclip_lab.training.replay import write_dump

SKIPPED = "skipped.jsonl"
DUMPS = "dumps"
MOST_DUMPS = 3  # each holds the weights
SPIKE_MEMORY = 200  # steps


@dataclass
class SurvivalConfig:
    """What a run does about batches that would spoil it."""

    not_finite: Literal["stop", "skip", "roll_back"] = "stop"
    """What follows a loss or gradient that is not finite. "stop" ends the run; "skip" makes no step of that batch;
    "roll_back" goes back to the newest checkpoint and on from there with the batches after the bad one, as PaLM did
    (Chowdhery et al. 2022, section 5.1). The step is written to `dumps` first, for `train --replay`."""
    spike: float = 0.0
    """Standard deviations above the mean of the last 200 losses from which a loss is a spike; 0 looks for none."""
    on_spike: Literal["skip", "roll_back"] = "roll_back"
    """What follows a spike."""
    patience: int = 10
    """Bad batches in a row, or rolls back, after which the run stops all the same."""

    def __post_init__(self) -> None:
        if self.spike < 0:
            raise ValueError(f"survival.spike cannot be negative, got {self.spike}")
        if self.patience < 1:
            raise ValueError(f"survival.patience must be at least 1, got {self.patience}")


class RollBackError(Exception):
    """The run must go back to its newest checkpoint, and on with the batch after `batch`."""

    def __init__(self, batch: int) -> None:
        super().__init__(f"batch {batch} is bad")
        self.batch = batch


class Asked:
    """Whether this process was asked to stop, by SIGTERM or SIGUSR1."""

    def __init__(self) -> None:
        self.received: str | None = None

    def listen(self) -> None:
        """Take the signals from whoever has them."""
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._hear)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name


@contextmanager
def listening() -> Iterator[Asked]:
    """Note SIGTERM and SIGUSR1 in the block instead of dying of them."""
    asked = Asked()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        asked.listen()
    except ValueError:  # not the main thread: whoever started it hears the signals
        yield asked
        return
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Watch(Callback):
    """Looks at every loss and gradient before the optimizer does.

    Args:
        out: folder of the run.
        ahead: how many batches the data are ahead of the steps.
        rolled_back: how often the run went back already.
    """

    def __init__(self, config: SurvivalConfig, asked: Asked, out: Path, ahead: int, rolled_back: int) -> None:
        self.config, self.asked, self.out, self.ahead, self.rolled_back = config, asked, out, ahead, rolled_back
        self.in_a_row = 0
        self.losses: deque[float] = deque(maxlen=SPIKE_MEMORY)
        self._batch: Any = None
        self._random: dict[str, Tensor] = {}
        self._buffers: dict[str, Tensor] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"losses": list(self.losses), "in_a_row": self.in_a_row} if self.config.spike else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.losses.extend(state_dict["losses"])
        self.in_a_row = state_dict["in_a_row"]

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        # Lightning has put handlers of its own in their place, which meet other ranks in the middle of anything.
        if self.asked.received is None:
            try:
                self.asked.listen()
            except ValueError:
                return

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._batch, self._random = batch, random_state()
        # Running means of a batch norm have seen a batch before anyone can know that it is bad.
        self._buffers = {
            name: buffer.clone() for name, buffer in module.named_buffers() if name.endswith(BATCH_STATISTICS)
        }

    def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer: Any) -> None:
        assert isinstance(module, ContrastiveModule)
        norm = module.measure_gradient(optimizer)
        loss = module.terms_now["loss"]
        # A scaler meets infinite gradients now and then, makes no step of them, and scales less.
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        finite = bool(loss.isfinite()) and (scaled or bool(norm.isfinite()))
        # All ranks must do the same: their sums may differ in the last bit.
        verdict = 2 if not finite else int(self._is_spike(float(loss)))
        verdict = int(distributed.all_max(torch.tensor(verdict, device=loss.device)))
        if verdict == 0:
            self.in_a_row = 0
            if self.config.spike:
                self.losses.append(float(loss))
            return
        self._act(trainer, module, optimizer, spike=verdict == 1)

    def _is_spike(self, loss: float) -> bool:
        if not self.config.spike or len(self.losses) < SPIKE_MEMORY // 10:
            return False
        return loss > statistics.fmean(self.losses) + self.config.spike * statistics.pstdev(self.losses)

    def _act(self, trainer: Trainer, module: ContrastiveModule, optimizer: Any, spike: bool) -> None:
        step, batch = trainer.global_step, trainer.global_step + self.ahead
        loss, norm = float(module.terms_now["loss"]), float(module.grad_norm)  # type: ignore[arg-type]
        studies = [
            key for keys in distributed.everyones([*self._batch["image_id"], *self._batch["text_id"]]) for key in keys
        ]
        what = f"the loss of step {step} is {loss:.4g}"
        if math.isfinite(loss):
            what = f"{what}, a spike" if spike else f"the gradient of step {step} is {norm}"
        told: dict[str, Any] = {
            "step": step,
            "steps": trainer.max_steps,
            "batch": batch,
            "loss": str(loss),
            "gradient_norm": str(norm),
            "studies": list(dict.fromkeys(studies)),
        }
        where = ""
        if not spike and len([*(self.out / DUMPS).glob("step-*")]) < MOST_DUMPS:
            path = self.out / DUMPS / f"step-{step:08d}"
            write_dump(path, self.out, module, told, self._buffers, self._random, trainer.precision)
            where = f"; `medclip-lab train --replay {path}` repeats the step"
        policy = self.config.on_spike if spike else self.config.not_finite
        if policy == "stop":
            some = ", ".join(told["studies"][:8])
            raise UserError(
                f"{what}; its studies: {some} ...{where}. survival.not_finite may be skip or roll_back instead"
            )
        if trainer.is_global_zero:
            with (self.out / SKIPPED).open("a", encoding="utf-8") as file:
                file.write(json.dumps(told | {"policy": policy}) + "\n")
            loud(f"{what}: {'no step is made of it' if policy == 'skip' else 'going back'}{where}")
        self.in_a_row += 1
        if max(self.in_a_row, self.rolled_back + (policy == "roll_back")) > self.config.patience:
            raise UserError(f"{what}, after {self.config.patience} others: survival.patience is at its end{where}")
        if policy == "roll_back":
            raise RollBackError(batch)
        for parameter in module.parameters():  # an optimizer passes over what has no gradient
            parameter.grad = None
        for name, buffer in module.named_buffers():
            if name in self._buffers:
                buffer.copy_(self._buffers[name])


BATCH_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
