"""Where the time of a step goes: torch's profiler over a few steps."""

import sys
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.profiler import ProfilerActivity, profile, schedule

from medclip_lab.errors import UserError

TRACE = "trace.json"
WAIT, WARM = 10, 2  # the first steps allocate and choose kernels; the profiler itself wants some too
ROWS = 20


class StepProfile(Callback):
    """Profiles some steps of the first rank: a Chrome trace in the run's folder, and a table on standard error.

    Args:
        steps: to profile, after those that warm up.
        out: folder of the run.
    """

    def __init__(self, steps: int, out: Path) -> None:
        self.steps = steps
        self.path = out / TRACE
        self._profiler: profile | None = None
        self._device = "cpu"
        self._table = ""

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        left = trainer.max_steps - trainer.global_step
        if left < self.steps + WARM:
            raise UserError(f"--profile: {self.steps} steps after {WARM} to warm up, and the run has {left} left")
        if not trainer.is_global_zero:
            return
        activities = [ProfilerActivity.CPU]
        if module.device.type == "cuda":
            self._device = "device"
            activities.append(ProfilerActivity.CUDA)
        wait = min(WAIT, left - self.steps - WARM)
        self._profiler = profile(
            activities=activities,
            schedule=schedule(wait=wait, warmup=WARM, active=self.steps, repeat=1),
            on_trace_ready=self._write,
        )
        self._profiler.start()

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._profiler is not None:
            self._profiler.step()

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None
            # Not before the end: a table does not go into a live display.
            print(self._table, file=sys.stderr)

    def _write(self, profiler: profile) -> None:
        profiler.export_chrome_trace(str(self.path))
        table = profiler.key_averages().table(sort_by=f"self_{self._device}_time_total", row_limit=ROWS)
        print(
            f"{table}\n{self.steps} steps: {self.path} opens in chrome://tracing and ui.perfetto.dev", file=sys.stderr
        )
