"""The contestants of `bench train`: our trainer, a bare loop over the same parts, and open_clip's trainer.

Each runs in a process of its own and notes when each of its steps begins.
"""

import json
import logging
import math
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medclip_lab.bench.machine import memory_mib
from medclip_lab.training.run import RunConfig

Moments = list[tuple[float, float]]
"""The clock and the CPU time of this process, its loader not included, where each step begins."""
LR, WEIGHT_DECAY, BETAS, EPS, CLIP_NORM = 1e-4, 0.05, (0.9, 0.98), 1e-8, 1.0
CROP, ASPECT = (0.9, 1.0), 4 / 3  # open_clip's random resized crop; ours does the same


def main() -> None:
    """Measure what the JSON of the first argument asks for and print the result as JSON."""
    job = json.loads(sys.argv[1])
    moments: Moments = []
    {"train": our_trainer, "bare": bare_loop, "open_clip": their_trainer}[job["side"]](job, moments)
    print(json.dumps({"moments": moments, "peak_mib": round(memory_mib(peak=True), 1)}))


def run_config(job: dict[str, Any], out: str) -> RunConfig:
    """What all three train: the same model, data, loss, optimizer and number of steps."""
    from medclip_lab.data.augment import AugmentConfig
    from medclip_lab.data.pipeline import DataConfig, SourceConfig
    from medclip_lab.data.preprocess import PreprocessConfig
    from medclip_lab.losses import LossConfig
    from medclip_lab.models.dual_encoder import ModelConfig
    from medclip_lab.training.checkpoint import CheckpointConfig
    from medclip_lab.training.optim import OptimConfig
    from medclip_lab.training.trainer import TrainerConfig

    return RunConfig(
        data=DataConfig(
            sources={"bench": SourceConfig(job["shards"])},
            batch_size=job["batch"],
            preprocess=PreprocessConfig(size=job["size"], resize_mode="squash"),
            augment=AugmentConfig(crop=CROP, aspect=ASPECT),
            workers=1,
        ),
        model=ModelConfig(spec=f"local-dir:{job['model']}", tokenizer="spec", truncation="end", channels_last=False),
        loss=LossConfig("ClipLoss"),
        optim=OptimConfig(lr=LR, weight_decay=WEIGHT_DECAY, betas=BETAS, eps=EPS, clip_norm=CLIP_NORM),
        trainer=TrainerConfig(steps=job["steps"], precision="32-true", accelerator="cpu"),
        checkpoint=CheckpointConfig(every=job["save_every"]),
        out=out,
    )


def our_trainer(job: dict[str, Any], moments: Moments) -> None:
    """`medclip-lab train`, as its users run it."""
    from medclip_lab.training.module import ContrastiveModule
    from medclip_lab.training.run import train

    step = ContrastiveModule.training_step

    def noted(module: ContrastiveModule, batch: Any, index: int) -> Any:
        moments.append((time.perf_counter(), time.process_time()))
        return step(module, batch, index)

    ContrastiveModule.training_step = noted  # type: ignore[assignment, method-assign]
    with tempfile.TemporaryDirectory(prefix="medclip-lab-bench-") as folder:
        train(run_config(job, f"{folder}/run"))


def bare_loop(job: dict[str, Any], moments: Moments) -> dict[str, Any]:
    """The shortest loop that trains the same: no log, no checkpoint, no Lightning; returns the weights."""
    import torch

    from medclip_lab.data.pipeline import BatchStream, loader
    from medclip_lab.losses import build_loss
    from medclip_lab.training.build import prepare_model
    from medclip_lab.training.module import SCALE_RANGE
    from medclip_lab.training.optim import build_optimizer, parameter_groups
    from medclip_lab.training.rules import treatments

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(prefix="medclip-lab-bench-") as folder:
        config = run_config(job, folder)
        encoder, tokenizer, _ = prepare_model(config.model, config.data, Path(folder), 0)
    loss = build_loss(config.loss)
    treated = treatments(encoder.model, config.optim, job["steps"])
    groups = parameter_groups(dict(encoder.model.named_parameters()), treated)
    optimizer, schedules = build_optimizer(groups, config.optim)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, schedules)
    parameters = [value for group in optimizer.param_groups for value in group["params"]]
    least, most = map(math.log, SCALE_RANGE)
    encoder.train()
    for batch in loader(BatchStream(config.data, tokenizer, job["steps"])):
        moments.append((time.perf_counter(), time.process_time()))
        features = encoder(batch)
        loss(features["image"], features["text"], encoder.logit_scale).backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        with torch.no_grad():
            encoder.model.logit_scale.clamp_(least, most)
    weights: dict[str, Any] = encoder.model.state_dict()
    return weights


def their_trainer(job: dict[str, Any], moments: Moments) -> None:
    """One epoch of open_clip's `train_one_epoch` over its own loader, model, loss, optimizer and transforms."""
    import open_clip
    import torch
    from open_clip_train.scheduler import cosine_lr
    from open_clip_train.train import train_one_epoch

    from medclip_lab.bench.peer import open_clip_data

    logging.basicConfig(level=logging.ERROR)
    name = f"local-dir:{job['model']}"
    model, transform, _ = open_clip.create_model_and_transforms(name, aug_cfg={"scale": CROP}, output_dict=True)
    args = _their_arguments(job)
    made = open_clip_data().get_wds_dataset(args, transform, True, tokenizer=open_clip.get_tokenizer(name))
    made.dataloader = _Noted(made.dataloader, moments)
    decayed = [value for value in model.parameters() if value.ndim >= 2]
    others = [value for value in model.parameters() if value.ndim < 2]
    groups = [{"params": others, "weight_decay": 0.0}, {"params": decayed, "weight_decay": WEIGHT_DECAY}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS)
    schedule = cosine_lr(optimizer, LR, max(1, job["steps"] // 20), job["steps"])
    train_one_epoch(model, {"train": made}, open_clip.ClipLoss(), 0, optimizer, None, schedule, None, args)


def _their_arguments(job: dict[str, Any]) -> Namespace:
    return Namespace(
        train_data="::".join(str(path) for path in sorted(Path(job["their_shards"]).glob("*.tar"))),
        train_data_upsampling_factors=None,
        train_num_samples=job["steps"] * job["batch"],
        dataset_resampled=True,  # the shards hold fewer than the steps take
        seed=0,
        batch_size=job["batch"],
        workers=1,
        world_size=1,
        rank=0,
        local_rank=0,
        device="cpu",
        precision="fp32",
        accum_freq=1,
        grad_clip_norm=CLIP_NORM,
        skip_scheduler=False,
        distill=False,
        horovod=False,
        log_every_n_steps=100,
        log_local=False,
        wandb=False,
    )


class _Noted:
    """A loader that notes when each of its batches is handed over."""

    def __init__(self, loader: Any, moments: Moments) -> None:
        self.loader, self.moments = loader, moments
        self.num_batches, self.num_samples = loader.num_batches, loader.num_samples

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            self.moments.append((time.perf_counter(), time.process_time()))
            yield batch


if __name__ == "__main__":
    main()
