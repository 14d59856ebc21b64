"""What a run shows while it trains: a bar or lines on the console, and a diary that plain tools can read."""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.progress import Progress

from medclip_lab import progress
from medclip_lab.files import atomic_file
from medclip_lab.training.module import ContrastiveModule

METRICS = "metrics.jsonl"


class MetricsFile(Callback):
    """Appends a JSON object a step to a file: the run's diary, which plain tools can read."""

    def __init__(self, path: Path, every: int) -> None:
        self.path = path
        self.every = every
        self._last = (0, time.monotonic())

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._last = (trainer.global_step, time.monotonic())
        if trainer.is_global_zero and self.path.exists():
            # Lines after the checkpoint belong to steps that will be made again.
            lines = [
                line for line in self.path.read_text().splitlines() if json.loads(line)["step"] <= trainer.global_step
            ]
            with atomic_file(self.path) as temporary:
                temporary.write_text("".join(f"{line}\n" for line in lines))

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step % self.every and step != trainer.max_steps:
            return
        assert isinstance(module, ContrastiveModule)
        before, then = self._last
        now = time.monotonic()
        rate = len(batch["image_id"]) * trainer.world_size * (step - before) / (now - then)
        self._last = (step, now)
        bias = module.encoder.logit_bias
        values: dict[str, float | None] = {name: float(value.detach()) for name, value in outputs.items()}
        values |= {
            "logit_scale": float(module.encoder.logit_scale.detach()),
            "logit_bias": None if bias is None else float(bias.detach()),
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
            "samples_per_second": round(rate, 1),
        }
        self._write(trainer, {"step": step, **values})

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        if "val_loss" in trainer.callback_metrics:
            self._write(trainer, {"step": trainer.global_step, "val_loss": float(trainer.callback_metrics["val_loss"])})

    def _write(self, trainer: Trainer, values: dict[str, Any]) -> None:
        if trainer.is_global_zero:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")


class Console(Callback):
    """A bar with loss, rate and time left on a terminal; twenty lines over the run anywhere else."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._start = (0, 0.0)

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._start = (trainer.global_step, time.monotonic())
        if trainer.is_global_zero and sys.stderr.isatty():
            self._bar = progress.bar()
            self._task = self._bar.add_task("train", total=trainer.max_steps, completed=trainer.global_step)
            self._bar.start()

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not trainer.is_global_zero:
            return
        step, total, loss = trainer.global_step, trainer.max_steps, float(outputs["loss"].detach())
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=f"train  loss {loss:.3f}")
        elif step % max(1, total // 20) == 0 or step == total:
            first, start = self._start
            rate = (step - first) / (time.monotonic() - start)
            left = (total - step) / rate
            line = (
                f"step {step}/{total}  loss {loss:.3f}  {rate:.2f} steps/s  {int(left // 60)}:{int(left % 60):02d} left"
            )
            print(line, file=sys.stderr)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def diary(run: Path) -> Iterator[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    path = run / METRICS
    if path.exists():
        yield from (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
