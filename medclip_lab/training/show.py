"""Everything that looks at a run while it trains, put together."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import Logger

from medclip_lab import distributed
from medclip_lab.data.tokenizer import Tokenizer
from medclip_lab.models.dual_encoder import DualEncoder
from medclip_lab.training.console import METRICS, Console, Diary
from medclip_lab.training.flops import flops_per_row, peak_flops
from medclip_lab.training.loggers import LoggerSink, build_loggers
from medclip_lab.training.meter import Meter
from medclip_lab.training.precision import resolve_precision
from medclip_lab.training.profile import StepProfile

if TYPE_CHECKING:
    from medclip_lab.training.run import RunConfig


def shown(
    config: "RunConfig", out: Path, start: int, encoder: DualEncoder, tokenizer: Tokenizer, profile: int = 0
) -> tuple[list[Callback], list[Logger]]:
    """Callbacks and loggers of a run.

    Args:
        start: the step it goes on from.
        encoder: with what is frozen frozen, before a strategy has it.
        profile: steps to profile; 0 none.

    Raises:
        UserError: a logger whose package is not installed.
    """
    trainer = config.trainer
    loggers = build_loggers(trainer, out, dataclasses.asdict(config), start)
    console, diary = Console(), Diary(out / METRICS)
    if distributed.launched_world()[0] == 0:
        diary.rewind(start)
    peak = None
    if trainer.accelerator != "cpu" and torch.cuda.is_available():
        halves = resolve_precision(trainer.precision, trainer.accelerator) != "32-true"
        peak = peak_flops(torch.cuda.get_device_name()) if halves else None
    flops = flops_per_row(encoder, config.data.preprocess.size, tokenizer(["a"]).shape[1])
    meter = Meter(trainer.log_every, config.data.batch_size, flops, peak, [console, diary, LoggerSink(loggers)])
    callbacks: list[Callback] = [console, meter]
    if profile:
        callbacks.append(StepProfile(profile, out))
    return callbacks, loggers
