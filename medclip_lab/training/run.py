"""A training run: composes the configs, trains, and leaves a folder that can be resumed and exported."""

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from lightning.pytorch import Trainer, seed_everything
from safetensors.torch import save_file
from torch import Tensor

from medclip_lab import distributed
from medclip_lab.config import load_config, to_yaml
from medclip_lab.data.manifest import Manifest
from medclip_lab.data.pipeline import BatchStream, DataConfig, SourceConfig, loader, steps_once
from medclip_lab.data.quarantine import listed
from medclip_lab.data.tokenizer import Tokenizer
from medclip_lab.doctor import commit
from medclip_lab.errors import StartAgainError, UserError
from medclip_lab.files import atomic_file, digest, write_json
from medclip_lab.losses import LossConfig, build_loss
from medclip_lab.models.dual_encoder import ModelConfig
from medclip_lab.training.branch import refuse_other_origin
from medclip_lab.training.build import prepare_model, start_temperature
from medclip_lab.training.checkpoint import CheckpointConfig, Store
from medclip_lab.training.checkpoint_files import read_tensors, tensors_in
from medclip_lab.training.module import ContrastiveModule
from medclip_lab.training.optim import OptimConfig
from medclip_lab.training.precision import compile_towers
from medclip_lab.training.ranks import RanksConfig, code_version, flat, refuse_odd_ranks
from medclip_lab.training.report import write_report
from medclip_lab.training.resume import CONFIG, DONE, FACTS, Start, find_start, refuse_other_run
from medclip_lab.training.saving import Saver, Saving
from medclip_lab.training.sharding import ShardedModule
from medclip_lab.training.show import shown
from medclip_lab.training.strategies import build_strategy
from medclip_lab.training.survival import Asked, RollBackError, SurvivalConfig, Watch, listening
from medclip_lab.training.teacher import DistillConfig, Teacher, with_teacher
from medclip_lab.training.trainer import TrainerConfig, budget, build_trainer, device_of, quiet_lightning

MODEL, WEIGHTS = "model.json", "model.safetensors"
T = TypeVar("T")


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
    """Folder of another run to take the first steps from, up to its newest checkpoint, or to one that is named: to cool
    a long run down, with another `trainer.steps` and `optim.decay`. All that was decided before there must be the
    same."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    survival: SurvivalConfig = field(default_factory=SurvivalConfig)
    ranks: RanksConfig = field(default_factory=RanksConfig)
    seed: int = 0
    out: str = "runs/run"
    """Folder of the run: config, tokenizer, checkpoints, metrics, weights."""


def train(config: RunConfig, resume: Literal["auto", "never"] = "auto", profile: int = 0) -> Path:
    """Train, or go on where an interrupted run of the same folder was; returns the run folder.

    Args:
        resume: "auto" goes on from the newest whole checkpoint of the folder, and begins where there is none; "never"
            refuses a folder that has one.
        profile: steps to look at with torch's profiler.

    Raises:
        UserError: a config that cannot work, a folder that holds another run, unusable data.
        StartAgainError: a signal asked the run to stop, or another rank was lost.
    """
    with quiet_lightning(), listening() as asked:
        try:
            with distributed.joined(config.ranks.timeout, device_of(config.trainer).type == "cuda"):
                return _train(config, resume, profile, asked)
        except Exception as error:
            if not distributed.lost_another(error):
                raise
            cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise StartAgainError(
                f"rank {distributed.rank()} lost another rank ({cause}): the job ends; start it again to go on from "
                "the newest checkpoint"
            ) from None


def _train(config: RunConfig, resume: Literal["auto", "never"], profile: int, asked: Asked) -> Path:
    out = Path(config.out).expanduser()
    facts: dict[str, Any] = {}
    problem = None
    try:
        facts = {"steps": budget(config.trainer, config.data), "shards": _shards_of(config)}
        _refuse_uneven(config)
        refuse_other_run(config, facts, out)
    except UserError as error:
        problem = str(error)
    refuse_odd_ranks(flat(config) | flat(facts, "run") | code_version(), problem)

    store = Store(out / "checkpoints", config.checkpoint)
    if _first((out / DONE).exists):
        return out
    out.mkdir(parents=True, exist_ok=True)
    start = _first(lambda: find_start(config, resume, store, facts["shards"]))
    rolled_back = 0
    while True:
        try:
            _attempt(config, facts, store, asked, start, rolled_back, profile)
            return out
        except RollBackError as back:
            rolled_back += 1
            newest = _first(lambda: find_start(config, "auto", store, facts["shards"]))
            start = replace(newest, batch=back.batch + 1)


def _first(act: Callable[[], T]) -> T:
    """What rank 0's `act` gives, on all ranks; its mistakes too."""
    value: Any = None
    problem = None
    if distributed.rank() == 0:
        try:
            value = act()
        except UserError as error:
            problem = str(error)
    value, problem = distributed.everyones((value, problem))[0]
    if problem is not None:
        raise UserError(problem)
    found: T = value
    return found


def _attempt(
    config: RunConfig,
    facts: dict[str, Any],
    store: Store,
    asked: Asked,
    start: Start,
    rolled_back: int,
    profile: int,
) -> None:
    """Train from `start` to the end, and write down the weights."""
    out, steps = Path(config.out).expanduser(), int(facts["steps"])
    rank, world_size = distributed.rank(), distributed.world_size()
    quarantine_path = out / "quarantine.jsonl"
    problem = None
    try:
        module, streams, tokenizer = _build(config, facts, start, quarantine_path)
        callbacks, loggers = shown(config, out, start.step, module.encoder, tokenizer, profile)
        mark = digest([[name, list(value.shape)] for name, value in module.state_dict().items()])
    except UserError as error:
        problem, mark = str(error), ""
    refuse_odd_ranks({"the model": mark}, problem)

    manifest = {
        "code": code_version() | {"commit": commit()},
        "shards": facts["shards"],
        "ranks": world_size,
        "strategy": config.ranks.strategy,
    }
    saver = Saver(store, manifest, to_yaml(config), config.ranks.timeout)
    begin = time.monotonic()
    if start.step < steps:
        watch = Watch(config.survival, asked, out, start.ahead, rolled_back)
        trainer = build_trainer(
            config.trainer,
            out,
            steps,
            config.optim.clip_norm,
            len(streams["val"]) if "val" in streams else 0,
            strategy=build_strategy(
                config.ranks.strategy,
                device_of(config.trainer),
                saver,
                config.ranks.timeout,
                module.freezing.changes,
            ),
            callbacks=[*callbacks, watch, Saving(saver, config.checkpoint, asked, start, config.seed)],
            loggers=loggers,
        )
        _fit(trainer, module, streams, start)
    if saver.problem is not None:
        raise UserError(
            f"checkpoint of step {steps}, the last, was not written: {saver.problem}. Make room, and call "
            "`medclip-lab train` again to go on"
        )
    if rank == 0:
        with atomic_file(out / WEIGHTS) as temporary:
            save_file(_weights(module, store.path(steps)), temporary)
        seconds = round(time.monotonic() - begin, 1)
        done: dict[str, Any] = {"steps": steps, "resumed_at": start.step, "seconds": seconds, "world_size": world_size}
        done["unusable"] = listed(quarantine_path)
        write_json(out / DONE, done)
        write_report(out, config, done)


def _weights(module: ContrastiveModule, checkpoint: Path) -> dict[str, Tensor]:
    """What a checkpoint exports: the averaged weights, if there are averages; whole, with adapters merged."""
    prefix = "state_dict/encoder."
    names = [name for name in tensors_in(checkpoint) if name.startswith(prefix)]
    found = {name.removeprefix(prefix): value for name, value in read_tensors(checkpoint, names).items()}
    if isinstance(module, ShardedModule):  # it has no adapters, and its parameters are only shards
        return {name.removeprefix("model."): value for name, value in found.items() if name.startswith("model.")}
    module.encoder.load_state_dict(found)
    return module.encoder.weights()


def _build(
    config: RunConfig, facts: dict[str, Any], start: Start, quarantine_path: Path
) -> tuple[ContrastiveModule, dict[str, BatchStream], Tokenizer]:
    """The model and the batches of this rank."""
    out, steps = Path(config.out).expanduser(), int(facts["steps"])
    rank, world_size = distributed.rank(), distributed.world_size()
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
    streams = {
        "train": BatchStream(
            config.data,
            tokenizer,
            steps + start.ahead,
            start=start.batch,
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
    if start.origin is not None:
        other = load_config(RunConfig, start.origin / CONFIG)
        refuse_other_origin(config, other, facts, start.origin, start.step, encoder.model, loss)
    kind = ShardedModule if config.ranks.strategy == "fsdp" and world_size > 1 else ContrastiveModule
    module = kind(
        encoder,
        loss,
        config.optim,
        steps,
        config.trainer.gradient_cache,
        config.trainer.log_every,
        streams["train"].finish,
        teacher,
    )
    if kind is ShardedModule and module.freezing.changes:
        raise UserError("optim.rules: shards cannot be frozen for a time only: set ranks.strategy to ddp")
    if config.trainer.compile:
        compile_towers(encoder.model, config.trainer.compile)
    return module, streams, tokenizer


def _fit(trainer: Trainer, module: ContrastiveModule, streams: dict[str, BatchStream], start: Start) -> None:
    try:
        trainer.fit(
            module,
            loader(streams["train"]),
            loader(streams["val"]) if "val" in streams else None,
            ckpt_path=start.path,
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


def _refuse_uneven(config: RunConfig) -> None:
    """What many ranks need of a config."""
    world = distributed.world_size()
    if config.ranks.strategy != "fsdp" or world == 1:
        return
    if config.trainer.ema:
        raise UserError("trainer.ema: averaged weights cannot be sharded: set it to 0, or ranks.strategy to ddp")
    if config.model.lora:
        raise UserError("model.lora: adapters are few and cannot be sharded: set ranks.strategy to ddp")
    if config.trainer.gradient_cache and config.data.batch_size % world:
        raise UserError(
            f"data.batch_size {config.data.batch_size} does not divide by {world} ranks: with ranks.strategy fsdp and "
            "a gradient cache all ranks must have as many rows"
        )


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
    steps = steps_once(data)
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


def _user_error(make: Any) -> Any:
    try:
        return make()
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from None
