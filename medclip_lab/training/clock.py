"""Validation by the clock."""

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class ValidationClock(Callback):
    """Validates so many minutes after the last time, and at the end; the first rank's clock counts for all.

    Lightning's own interval of time lets each rank look at its own clock: where they differ by a step, all wait for
    ever.

    Args:
        minutes: between two validations.
        every: steps between looks at the clock.
    """

    def __init__(self, minutes: float, every: int) -> None:
        self.seconds = 60 * minutes
        self.every = every
        self._last = 0.0

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._last = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        last = trainer.global_step == trainer.max_steps
        due = last
        if not last and trainer.global_step % self.every == 0:
            due = trainer.strategy.broadcast(time.monotonic() - self._last >= self.seconds)
        # Lightning validates where the number of batches so far is a multiple of this.
        done = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        trainer.val_check_batch = done if due else done + 1

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._last = time.monotonic()
