"""What a run measures of itself while it trains."""

import math
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.profilers import Profiler

from medclip_lab.training.module import ContrastiveModule


class LoaderTime(Profiler):
    """Seconds that the loop has waited for its loader: Lightning tells a profiler when it begins and ends."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0
        self._begin = 0.0

    def start(self, action_name: str) -> None:
        if action_name.endswith("train_dataloader_next"):
            self._begin = time.monotonic()

    def stop(self, action_name: str) -> None:
        if action_name.endswith("train_dataloader_next"):
            self.seconds += time.monotonic() - self._begin


@dataclass(frozen=True)
class Reading:
    """What is known at a step; of a validation only "val_loss"."""

    step: int
    steps: int
    values: dict[str, float | None]
    """None for what is not finite, or not there."""
    left: float = 0.0
    """Seconds to the end at the present speed."""


class Sink(Protocol):
    """Where readings go."""

    def show(self, reading: Reading) -> None: ...


class Meter(Callback):
    """Reads loss, its terms, temperature, rate, norm of the gradient, speed and memory every few steps.

    Only then values are fetched from the device: a look at every step would make it wait.

    Args:
        every: steps between readings; the last step is read too.
        batch_size: studies of a global batch.
        flops: modality -> floating-point operations of a row, if they could be counted.
        peak: what a device could do a second, if that is known.
        sinks: who gets the readings, on the first rank.
    """

    def __init__(
        self, every: int, batch_size: int, flops: dict[str, float] | None, peak: float | None, sinks: Sequence[Sink]
    ) -> None:
        self.every = every
        self.batch_size = batch_size
        self.flops = flops
        self.peak = peak
        self.sinks = sinks
        self._begin = self._last = (0, 0.0, 0.0)

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._begin = self._last = self._now(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if not trainer.is_global_zero or (step % self.every and step != trainer.max_steps):
            return
        assert isinstance(module, ContrastiveModule)
        encoder = module.encoder
        values: dict[str, Any] = {name: value.detach() for name, value in outputs.items()}
        bias = encoder.logit_bias
        values |= {"logit_scale": encoder.logit_scale.detach(), "logit_bias": None if bias is None else bias.detach()}
        values["grad_norm"] = module.grad_norm
        values["lr"] = max(group["lr"] for group in trainer.optimizers[0].param_groups)
        known = {name: None if value is None else _finite(float(value)) for name, value in values.items()}
        # Only now is the device through with the step: reading the loss has waited for it.
        now = self._now(trainer)
        steps, seconds, waited = (later - sooner for later, sooner in zip(now, self._last, strict=True))
        self._last = now
        known["samples_per_second"] = round(self.batch_size * steps / seconds, 1)
        known["samples_per_second_per_device"] = round(self.batch_size * steps / seconds / trainer.world_size, 1)
        known["data_wait"] = round(waited / seconds, 4)
        known |= self._speed(encoder.towers_of(batch), batch, steps / seconds)
        known["memory_gib"] = round(_memory(module.device) / 2**30, 3)
        speed = (step - self._begin[0]) / (now[1] - self._begin[1])
        self._show(Reading(step, trainer.max_steps, known, (trainer.max_steps - step) / speed))

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.is_global_zero and "val_loss" in trainer.callback_metrics:
            values = {"val_loss": _finite(float(trainer.callback_metrics["val_loss"]))}
            self._show(Reading(trainer.global_step, trainer.max_steps, values))

    def _now(self, trainer: Trainer) -> tuple[int, float, float]:
        profiler = trainer.profiler  # type: ignore[attr-defined] # set by one of Lightning's connectors
        waited = profiler.seconds if isinstance(profiler, LoaderTime) else 0.0
        return trainer.global_step, time.monotonic(), waited

    def _speed(self, towers: Any, batch: Any, steps_per_second: float) -> dict[str, float | None]:
        if self.flops is None:
            return {}
        step = sum(self.flops[name.removeprefix("second_")] * len(batch[name]) for name in towers)
        speed: dict[str, float | None] = {"tflops_per_second_per_device": round(step * steps_per_second / 1e12, 4)}
        return speed if self.peak is None else speed | {"mfu": round(step * steps_per_second / self.peak, 4)}

    def _show(self, reading: Reading) -> None:
        for sink in self.sinks:
            sink.show(reading)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _memory(device: torch.device) -> int:
    """Bytes this process has held at most: of the GPU, else of the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
