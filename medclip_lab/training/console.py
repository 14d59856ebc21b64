"""What a run shows while it trains: a bar or lines on the console, and a diary that plain tools can read."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console as Terminal
from rich.console import Group
from rich.live import Live
from rich.text import Text

from medclip_lab import progress
from medclip_lab.files import atomic_file
from medclip_lab.training.meter import Reading

METRICS = "metrics.jsonl"
LINES = 20
HEALTH = {
    *("image_rank", "text_rank", "repeated_texts", "positive_logit", "negative_logit"),
    *("image_to_text_top1", "text_to_image_top1"),
}
MEASURED = {
    *("loss", "logit_scale", "logit_bias", "lr", "grad_norm", "samples_per_second", "samples_per_second_per_device"),
    *("data_wait", "tflops_per_second_per_device", "mfu", "memory_gib", "val_loss"),
}


class Diary:
    """Appends a JSON object a reading to a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rewind(self, step: int) -> None:
        """Drop the lines after a step: those steps will be made again."""
        if self.path.exists():
            lines = [line for line in self.path.read_text().splitlines() if json.loads(line)["step"] <= step]
            with atomic_file(self.path) as temporary:
                temporary.write_text("".join(f"{line}\n" for line in lines))

    def show(self, reading: Reading) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": reading.step, **reading.values}) + "\n")


def line(reading: Reading) -> str:
    """A reading in one line for people; what is not known is not in it."""
    values = dict(reading.values)
    parts = [f"step {reading.step}/{reading.steps}"]
    if "val_loss" in values:
        return f"{parts[0]}  val_loss {_number(values['val_loss'], '.4f')}"
    loss = f"loss {_number(values.get('loss'), '.4f')}"
    terms = [f"{name} {_number(v, '.4f')}" for name, v in values.items() if name not in MEASURED | HEALTH]
    parts.append(f"{loss} ({', '.join(terms)})" if terms else loss)
    formats = {
        "logit_scale": ("scale {}", ".2f"),
        "logit_bias": ("bias {}", ".2f"),
        "lr": ("lr {}", ".2e"),
        "grad_norm": ("grad {}", ".3g"),
        "samples_per_second_per_device": ("{} samples/s/device", ",.1f"),
        "data_wait": ("data {}", ".0%"),
        "mfu": ("MFU {}", ".1%"),
        "tflops_per_second_per_device": ("{} TFLOP/s", ",.3g"),
        "memory_gib": ("{} GiB", ".1f"),
    }
    for name, (text, how) in formats.items():
        told = values.get(name)
        if told is not None or name == "grad_norm":
            if name == "tflops_per_second_per_device" and "mfu" in values:
                continue
            parts.append(text.format(_number(told, how)))
    minutes, seconds = divmod(int(reading.left), 60)
    hours, minutes = divmod(minutes, 60)
    parts.append(f"{hours}:{minutes:02d}:{seconds:02d} left")
    return "  ".join(parts)


def _number(value: float | None, how: str) -> str:
    return "not finite" if value is None else format(value, how)


class Console(Callback):
    """A bar over a line of figures on a terminal; a line now and then anywhere else."""

    def __init__(self) -> None:
        self._live: Live | None = None
        self._bar = progress.bar()
        self._text = Text("")
        self._next = 0.0

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.is_global_zero and sys.stderr.isatty():
            self._task = self._bar.add_task("train", total=trainer.max_steps, completed=trainer.global_step)
            self._live = Live(Group(self._bar, self._text), console=Terminal(stderr=True), refresh_per_second=4)
            self._live.start()

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._live is not None:
            self._bar.update(self._task, completed=trainer.global_step)

    def show(self, reading: Reading) -> None:
        """A reading that is due."""
        if self._live is not None:
            self._text.plain = line(reading)
        elif "val_loss" in reading.values or reading.step >= self._next or reading.step == reading.steps:
            print(line(reading), file=sys.stderr)
            if "val_loss" not in reading.values:
                self._next = reading.step + reading.steps / LINES

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def diary(run: Path) -> Iterator[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    path = run / METRICS
    if path.exists():
        yield from (json.loads(text) for text in path.read_text(encoding="utf-8").splitlines())
