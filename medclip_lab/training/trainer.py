"""How long a run trains and on what: Lightning's trainer from the settings of a run."""

import logging
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import Strategy

from medclip_lab import distributed
from medclip_lab.data.pipeline import DataConfig, steps_per_epoch
from medclip_lab.training.averaging import MovingAverage
from medclip_lab.training.clock import ValidationClock
from medclip_lab.training.meter import LoaderTime
from medclip_lab.training.precision import Precision, resolve_precision

EPOCHS = 10.0


@dataclass
class TrainerConfig:
    """How long and on what."""

    steps: int | None = None
    """Optimisation steps."""
    samples: int | None = None
    """Or studies to see, each as often as it comes."""
    epochs: float | None = None
    """Or passes over the first source. Of the three at most one is given; without any it is 10 epochs."""
    precision: Precision = "auto"
    """"auto" takes bf16-mixed where the hardware multiplies bf16 and 32-true elsewhere; 16-mixed scales gradients."""
    tf32: bool = False
    """Matrix products of float32 in TF32 on a GPU; those of the loss stay in float32."""
    compile: str = ""
    """Backend of torch.compile for the towers, "inductor" is torch's own; empty: they are not compiled."""
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: int = 1
    """Of this process; several are started with torchrun, one process each."""
    val_every: int = 0
    """Steps between passes over the validation split; 0 never."""
    val_minutes: float = 0.0
    """Or minutes between them, and one at the end; looked at every `log_every` steps. 0 never."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl and points of the loggers."""
    tensorboard: bool = True
    """Write the metrics for TensorBoard too, into the run's folder."""
    wandb: str = ""
    """Project of Weights & Biases to write the metrics for; into the run's folder unless the environment says
    WANDB_MODE=online. Empty: none."""
    mlflow: str = ""
    """Experiment of MLflow to write the metrics for; into the run's folder unless the environment names a
    MLFLOW_TRACKING_URI. Empty: none."""
    ema: float = 0.0
    """Decay a step of the moving average of the weights, which is what is validated and exported; 0 takes the weights
    themselves. 0.99 averages over about the last 100 steps; in the first steps of a run the decay is less."""
    gradient_cache: int = 0
    """Rows a tower sees at a time; 0 takes the whole batch. The loss is that of the whole batch all the same, and so is
    every gradient; memory is that of these rows, and each is run forward twice."""

    def __post_init__(self) -> None:
        budgets = {name: getattr(self, name) for name in ("steps", "samples", "epochs")}
        given = {name: value for name, value in budgets.items() if value is not None}
        if len(given) > 1:
            raise ValueError(f"trainer: one of {', '.join(given)} ends a run: set the others to null, got {given}")
        for name in ("steps", "samples"):
            if budgets[name] is not None and budgets[name] < 1:
                raise ValueError(f"trainer.{name} must be at least 1, got {budgets[name]}")
        if self.epochs is not None and self.epochs <= 0:
            raise ValueError(f"trainer.epochs must be positive, got {self.epochs}")
        if self.devices != 1:
            raise ValueError(
                f"trainer.devices: a process has one device, got {self.devices}; for more start "
                f"`torchrun --nproc_per_node {self.devices} -m medclip_lab train ...`"
            )
        if not 0 <= self.ema < 1:
            raise ValueError(f"trainer.ema is a decay in [0, 1), got {self.ema}")
        if self.val_every and self.val_minutes:
            raise ValueError("trainer: val_every counts steps and val_minutes time: set one of them to 0")
        if min(self.val_every, self.val_minutes, self.gradient_cache) < 0:
            raise ValueError(
                "trainer: val_every, val_minutes and gradient_cache cannot be negative, got "
                f"{self.val_every}, {self.val_minutes} and {self.gradient_cache}"
            )
        if self.log_every < 1:
            raise ValueError(f"trainer.log_every must be at least 1, got {self.log_every}")

    @property
    def validates(self) -> bool:
        return bool(self.val_every or self.val_minutes)


def budget(config: TrainerConfig, data: DataConfig) -> int:
    """Steps of a run."""
    if config.steps is not None:
        return config.steps
    if config.samples is not None:
        return math.ceil(config.samples / data.batch_size)
    return max(1, round((config.epochs or EPOCHS) * steps_per_epoch(data)))


def build_trainer(
    config: TrainerConfig,
    out: Path,
    steps: int,
    clip_norm: float,
    val_batches: int,
    *,
    strategy: Strategy,
    callbacks: Sequence[Callback] = (),
    loggers: Sequence[Logger] = (),
) -> Trainer:
    """Lightning's trainer of a run: where it runs, how precisely, what it writes down and when.

    Args:
        callbacks: those that save come last, so that what the others show is shown before it is written.
    """
    every = list(callbacks)
    if config.ema:
        every.append(MovingAverage(config.ema))
    interval = None
    if val_batches:
        interval = min(config.val_every, steps) if config.val_every else steps
        if config.val_minutes:
            every.append(ValidationClock(config.val_minutes, config.log_every))
    world = distributed.launched_world()[1]
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if world > 1 else 1
    torch.set_float32_matmul_precision("high" if config.tf32 else "highest")
    return Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator=config.accelerator,
        devices=local,
        num_nodes=world // local,
        strategy=strategy,
        # Who starts the processes is told by RANK and WORLD_SIZE alone: under SLURM Lightning would take the signals,
        # and requeue by itself.
        plugins=TorchElasticEnvironment() if world > 1 else LightningEnvironment(),
        precision=resolve_precision(config.precision, config.accelerator),
        gradient_clip_val=clip_norm or None,
        callbacks=every,
        logger=list(loggers),
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=None,
        val_check_interval=interval,
        limit_val_batches=val_batches,
        default_root_dir=out,
        profiler=LoaderTime(),
    )


def device_of(config: TrainerConfig) -> torch.device:
    """Where this process computes."""
    if config.accelerator == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


class quiet_lightning:  # noqa: N801 - reads as the context manager it is
    """Hides Lightning's hints about this machine and this loader; its errors still come through."""

    def __enter__(self) -> None:
        self._level = logging.getLogger("lightning.pytorch").level
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        self._warnings = warnings.catch_warnings()
        self._warnings.__enter__()
        warnings.filterwarnings("ignore", module="lightning")
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # saving on one process says so

    def __exit__(self, *error: object) -> None:
        self._warnings.__exit__(*error)  # type: ignore[arg-type]
        logging.getLogger("lightning.pytorch").setLevel(self._level)
