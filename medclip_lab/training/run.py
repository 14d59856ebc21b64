"""A training run: composes the configs, trains, and leaves a folder that can be resumed and exported."""

import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import seed_everything
from safetensors.torch import save_file

from medclip_lab import distributed
from medclip_lab.config import load_config, to_yaml
from medclip_lab.data.manifest import Manifest
from medclip_lab.data.pipeline import BatchStream, DataConfig, SourceConfig, loader, steps_once
from medclip_lab.data.quarantine import listed
from medclip_lab.data.tokenizer import Tokenizer
from medclip_lab.errors import UserError
from medclip_lab.files import atomic_file, digest, existing_folder, read_json, write_json
from medclip_lab.losses import LossConfig, build_loss
from medclip_lab.models.dual_encoder import ModelConfig
from medclip_lab.training.branch import refuse_other_origin
from medclip_lab.training.build import prepare_model, start_temperature
from medclip_lab.training.module import ContrastiveModule
from medclip_lab.training.optim import OptimConfig
from medclip_lab.training.precision import compile_towers
from medclip_lab.training.report import write_report
from medclip_lab.training.show import shown
from medclip_lab.training.teacher import DistillConfig, Teacher, with_teacher
from medclip_lab.training.trainer import TrainerConfig, budget, build_trainer, quiet_lightning

CONFIG, MODEL, WEIGHTS = "config.yaml", "model.json", "model.safetensors"
FACTS, DONE = "run.json", "done.json"


@dataclass
class RunConfig:
    """A training run."""

    data: DataConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    distill: DistillConfig | None = None
    """A teacher to learn from: {bundle: FOLDER, weight: 1.0}."""
    branch_from: str | None = None
    """Folder of another run to take the first steps from, up to its last checkpoint: to cool a long run down, with
    another `trainer.steps` and `optim.decay`. All that was decided before there must be the same."""
    seed: int = 0
    out: str = "runs/run"
    """Folder of the run: config, tokenizer, checkpoints, metrics, weights."""


def train(config: RunConfig, profile: int = 0) -> Path:
    """Train, or go on where an interrupted run of the same folder was; returns the run folder.

    Args:
        profile: steps to look at with torch's profiler.

    Raises:
        UserError: a config that cannot work, a folder that holds another run, unusable data.
    """
    out = Path(config.out).expanduser()
    rank, world_size = distributed.launched_world()
    steps = budget(config.trainer, config.data)
    facts = {"steps": steps, "shards": _shards_of(config)}
    _refuse_other_run(config, facts, out)
    if (out / DONE).exists():
        return out
    out.mkdir(parents=True, exist_ok=True)
    quarantine_path = out / "quarantine.jsonl"

    with quiet_lightning():
        seed_everything(config.seed, verbose=False)
        loss = _user_error(lambda: build_loss(config.loss))
        if config.data.control != "none" and not getattr(loss, "paired", True):
            raise UserError(
                f"data.control: {type(loss).__name__} trains on labels and not on pairs, so shuffling pairs changes "
                "nothing: it would be no control"
            )
        teacher = None
        if config.distill is not None:
            teacher = Teacher(config.distill.bundle, config.data)
            loss = with_teacher(loss, config.distill)
        encoder, tokenizer, spec = prepare_model(config.model, config.data, out, rank)
        if isinstance(config.model.spec, dict):
            start_temperature(config.model, encoder, loss)
        if rank == 0:
            write_json(out / MODEL, {"model_cfg": spec, "preprocess_cfg": config.data.preprocess.record()})
            with atomic_file(out / CONFIG) as temporary:
                temporary.write_text(to_yaml(config), encoding="utf-8")
            write_json(out / FACTS, facts)

        last = out / "checkpoints" / "last.ckpt"
        origin = Path(config.branch_from).expanduser() if config.branch_from and not last.exists() else None
        if origin is not None:
            last = existing_folder(origin, "branch_from") / "checkpoints" / "last.ckpt"
            if not last.exists():
                raise UserError(f"branch_from: {origin} has no checkpoint")
        start = int(torch.load(last, map_location="cpu", weights_only=True)["global_step"]) if last.exists() else 0
        streams = {
            "train": BatchStream(
                config.data,
                tokenizer,
                steps,
                start=start,
                seed=config.seed,
                rank=rank,
                world_size=world_size,
                quarantine_path=quarantine_path,
                teacher_tokenizer=None if teacher is None else teacher.tokenizer,
            )
        }
        if config.trainer.validates:
            streams["val"] = _validation_stream(config, tokenizer, rank, world_size, quarantine_path)
            streams["val"].teacher_tokenizer = streams["train"].teacher_tokenizer
        if origin is not None:
            other = load_config(RunConfig, origin / CONFIG)
            refuse_other_origin(config, other, facts, origin, start, encoder.model, loss)
        module = ContrastiveModule(
            encoder,
            loss,
            config.optim,
            steps,
            config.trainer.gradient_cache,
            config.trainer.log_every,
            streams["train"].finish,
            teacher,
        )
        val_batches = len(streams["val"]) if "val" in streams else 0
        if config.trainer.compile:
            compile_towers(encoder.model, config.trainer.compile)
        callbacks, loggers = shown(config, out, start, encoder, tokenizer, profile)
        trainer = build_trainer(
            config.trainer,
            out,
            steps,
            config.optim.clip_norm,
            val_batches,
            callbacks=callbacks,
            loggers=loggers,
            thaws=module.freezing.changes,
        )
        begin = time.monotonic()
        try:
            trainer.fit(
                module,
                loader(streams["train"]),
                loader(streams["val"]) if "val" in streams else None,
                ckpt_path=last if last.exists() else None,
                weights_only=True,
            )
        except UserError as error:
            # A loader process hands its error on as text, with its traceback in front.
            raise UserError(str(error).rstrip().rpartition("UserError: ")[2]) from None
        except SystemExit:
            if not trainer.interrupted:
                raise
            # Lightning ends the process on Ctrl-C, deaf to further ones; the caller decides here.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt from None
    if trainer.is_global_zero:
        with atomic_file(out / WEIGHTS) as temporary:
            save_file(encoder.weights(), temporary)
        seconds = round(time.monotonic() - begin, 1)
        done: dict[str, Any] = {"steps": steps, "resumed_at": start, "seconds": seconds, "world_size": world_size}
        done["unusable"] = listed(quarantine_path)
        write_json(out / DONE, done)
        write_report(out, config, done)
    return out


def _validation_stream(
    config: RunConfig, tokenizer: Tokenizer, rank: int, world_size: int, quarantine_path: Path
) -> BatchStream:
    if trained := [name for name, source in config.data.sources.items() if "val" in source.split.split("+")]:
        raise UserError(
            f"trainer: data.sources.{trained[0]} trains on the split 'val'; set val_every and val_minutes to 0"
        )
    sources = {
        name: SourceConfig(source.shards, "val", source.weight)
        for name, source in config.data.sources.items()
        if any(shard.split == "val" for shard in Manifest.load(source.shards).shards)
    }
    if len(sources) < len(config.data.sources):
        raise UserError("trainer: a source has no split 'val' to validate on; set val_every and val_minutes to 0")
    data = DataConfig(**{**vars(config.data), "sources": sources, "workers": 0, "control": "none"})
    # The last batch may be short: a small validation split is no reason to refuse a run.
    steps = steps_once(data, world_size)
    return BatchStream(
        data,
        tokenizer,
        steps,
        seed=config.seed,
        rank=rank,
        world_size=world_size,
        training=False,
        quarantine_path=quarantine_path,
    )


def _shards_of(config: RunConfig) -> dict[str, str]:
    """Per source, a digest of the shards that a run reads."""
    return {
        name: digest(
            [shard.sha256 or [shard.name, shard.bytes] for shard in Manifest.load(source.shards).of_split(source.split)]
        )
        for name, source in config.data.sources.items()
    }


def _refuse_other_run(config: RunConfig, facts: dict[str, Any], out: Path) -> None:
    """A folder holds one run: going on with another config or other data would mix two. Other ranks are no matter."""

    def settings(text: str) -> str:
        # Where the folder lies is no setting of the run: it may have been moved.
        return "\n".join(line for line in text.splitlines() if not line.startswith("out:"))

    recorded = out / CONFIG
    if recorded.exists() and settings(recorded.read_text(encoding="utf-8")) != settings(to_yaml(config)):
        raise UserError(f"out: {out} holds a run with another config: choose another --out, or remove it")
    if not (out / FACTS).exists():
        return
    before = read_json(out / FACTS, "run")
    if before["shards"] != facts["shards"]:
        raise UserError(f"out: {out} holds a run on other data: the shards changed since. Choose another --out")
    if before["steps"] != facts["steps"] and not (out / DONE).exists():
        raise UserError(
            f"out: {out} was started with {before['steps']} steps, and this would be {facts['steps']}: go on as it was "
            "started"
        )


def _user_error(make: Any) -> Any:
    try:
        return make()
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from None
