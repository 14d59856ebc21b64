"""How long a run trains and on what: Lightning's trainer from the settings of a run."""

import logging
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from lightning.pytorch.strategies import Strategy

from medclip_lab import distributed
from medclip_lab.training.console import METRICS, Console, MetricsFile


@dataclass
class TrainerConfig:
    """How long and on what."""

    steps: int | None = None
    """Optimisation steps; without it, `epochs` decides."""
    epochs: float = 10.0
    """Passes over the first source."""
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"] = "auto"
    """"auto" takes bf16-mixed where the hardware multiplies bf16 and 32-true elsewhere."""
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: int = 1
    """Of this process; several are started with torchrun, one process each."""
    val_every: int = 0
    """Steps between passes over the validation split; 0 never."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    ema: float = 0.0
    """Decay a step of the moving average of the weights, which is what is validated and exported; 0 takes the weights
    themselves. 0.99 averages over about the last 100 steps."""
    gradient_cache: int = 0
    """Rows a tower sees at a time; 0 takes the whole batch. The loss is that of the whole batch all the same, and so is
    every gradient; memory is that of these rows, and each is run forward twice."""

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"trainer.steps must be at least 1, got {self.steps}")
        if self.epochs <= 0:
            raise ValueError(f"trainer.epochs must be positive, got {self.epochs}")
        if self.devices != 1:
            raise ValueError(
                f"trainer.devices: a process has one device, got {self.devices}; for more start "
                f"`torchrun --nproc_per_node {self.devices} -m medclip_lab train ...`"
            )
        if not 0 <= self.ema < 1:
            raise ValueError(f"trainer.ema is a decay in [0, 1), got {self.ema}")
        if self.val_every < 0 or self.log_every < 1 or self.gradient_cache < 0:
            raise ValueError(
                "trainer: val_every and gradient_cache cannot be negative, log_every must be at least 1, got "
                f"{self.val_every}, {self.gradient_cache} and {self.log_every}"
            )


def build_trainer(
    config: TrainerConfig,
    out: Path,
    steps: int,
    clip_norm: float,
    val_batches: int,
    strategy: Strategy,
    callbacks: Sequence[Callback],
) -> Trainer:
    """Lightning's trainer of a run: where it runs, how precisely, what it writes down and when.

    Args:
        callbacks: further ones.
    """
    shown: list[Callback] = [Console(), MetricsFile(out / METRICS, config.log_every)]
    if config.ema:
        shown.append(EMAWeightAveraging(decay=config.ema))
    world = distributed.launched_world()[1]
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
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
        precision=resolve_precision(config),
        gradient_clip_val=clip_norm or None,
        callbacks=[*shown, *callbacks],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=None,
        val_check_interval=min(config.val_every, steps) if val_batches else None,
        limit_val_batches=val_batches,
        default_root_dir=out,
    )


def device_of(config: TrainerConfig) -> torch.device:
    """Where this process computes."""
    if config.accelerator == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def resolve_precision(config: TrainerConfig) -> Literal["32-true", "bf16-mixed", "16-mixed"]:
    """What "auto" means on this machine."""
    if config.precision != "auto":
        return config.precision
    if config.accelerator != "cpu" and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported() else "16-mixed"
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # torch before 2.11 cannot say
    fast = capabilities.get("amx_bf16") or capabilities.get("avx512_bf16")
    return "bf16-mixed" if fast else "32-true"


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
