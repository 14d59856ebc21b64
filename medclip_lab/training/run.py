"""A training run: composes the configs, trains, and leaves a folder that can be resumed and exported."""

import json
import logging
import os
import signal
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from safetensors.torch import save_file

from medclip_lab import distributed
from medclip_lab.config import to_yaml
from medclip_lab.data.manifest import Manifest
from medclip_lab.data.pipeline import BatchStream, DataConfig, SourceConfig, loader, steps_once, steps_per_epoch
from medclip_lab.data.quarantine import Quarantine, listed
from medclip_lab.data.reader import read_split
from medclip_lab.data.tokenizer import EOS_ID, FILES, Tokenizer, load_tokenizer, train_tokenizer
from medclip_lab.errors import UserError
from medclip_lab.files import atomic_file, atomic_folder, digest, read_json, write_json
from medclip_lab.losses import LossConfig, build_loss
from medclip_lab.models.dual_encoder import DualEncoder, ModelConfig, build_spec, load_named
from medclip_lab.training.module import Console, ContrastiveModule, MetricsFile
from medclip_lab.training.optim import OptimConfig

CONFIG, MODEL, WEIGHTS, METRICS = "config.yaml", "model.json", "model.safetensors", "metrics.jsonl"
FACTS, DONE = "run.json", "done.json"


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
    checkpoint_every: int = 500
    """Steps between checkpoints, from which an interrupted run goes on."""
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
        if self.val_every < 0 or self.checkpoint_every < 1 or self.log_every < 1 or self.gradient_cache < 0:
            raise ValueError(
                "trainer: val_every and gradient_cache cannot be negative, checkpoint_every and log_every must be at "
                f"least 1, got {self.val_every}, {self.gradient_cache}, {self.checkpoint_every} and {self.log_every}"
            )


@dataclass
class RunConfig:
    """A training run."""

    data: DataConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    seed: int = 0
    out: str = "runs/run"
    """Folder of the run: config, tokenizer, checkpoints, metrics, weights."""


def train(config: RunConfig) -> Path:
    """Train, or go on where an interrupted run of the same folder was; returns the run folder.

    Raises:
        UserError: a config that cannot work, a folder that holds another run, unusable data.
    """
    out = Path(config.out).expanduser()
    rank, world_size = distributed.launched_world()
    steps = config.trainer.steps or max(1, round(config.trainer.epochs * steps_per_epoch(config.data)))
    facts = {"steps": steps, "shards": _shards_of(config)}
    _refuse_other_run(config, facts, out)
    if (out / DONE).exists():
        return out
    out.mkdir(parents=True, exist_ok=True)
    quarantine_path = out / "quarantine.jsonl"

    with _quiet_lightning():
        seed_everything(config.seed, verbose=False)
        loss = _user_error(lambda: build_loss(config.loss))
        if config.data.control != "none" and not getattr(loss, "paired", True):
            raise UserError(
                f"data.control: {type(loss).__name__} trains on labels and not on pairs, so shuffling pairs changes "
                "nothing: it would be no control"
            )
        encoder, tokenizer, spec = prepare_model(config, out, rank)
        if isinstance(config.model.spec, dict):
            _start_temperature(config.model, encoder, loss)
        if rank == 0:
            write_json(out / MODEL, {"model_cfg": spec, "preprocess_cfg": config.data.preprocess.record()})
            with atomic_file(out / CONFIG) as temporary:
                temporary.write_text(to_yaml(config), encoding="utf-8")
            write_json(out / FACTS, facts)

        last = out / "checkpoints" / "last.ckpt"
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
            )
        }
        if config.trainer.val_every:
            streams["val"] = _validation_stream(config, tokenizer, rank, world_size, quarantine_path)
        module = ContrastiveModule(
            encoder, loss, config.optim, steps, config.trainer.gradient_cache, config.trainer.log_every
        )
        trainer = _trainer(config, out, steps, val=streams.get("val"))
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
        weights = {name: value.detach().cpu().contiguous() for name, value in encoder.model.state_dict().items()}
        with atomic_file(out / WEIGHTS) as temporary:
            save_file(weights, temporary)
        seconds = round(time.monotonic() - begin, 1)
        done = {"steps": steps, "resumed_at": start, "seconds": seconds, "world_size": world_size}
        write_json(out / DONE, done | {"unusable": listed(quarantine_path)})
    return out


def _start_temperature(config: ModelConfig, encoder: DualEncoder, loss: torch.nn.Module) -> None:
    """Scale and bias as the config says, else as the loss wants them; a loss without bias trains none."""
    scale: Any = config.logit_scale or getattr(loss, "init_logit_scale", 1 / 0.07)
    bias = config.logit_bias if config.logit_bias is not None else getattr(loss, "init_logit_bias", None)
    encoder.start_temperature(scale, bias if getattr(loss, "uses_bias", True) else None)


def prepare_model(config: RunConfig, out: Path, rank: int) -> tuple[DualEncoder, Tokenizer, dict[str, Any]]:
    """Towers, tokenizer and the full open_clip model config of a run."""
    folder = out / "tokenizer"
    if config.model.tokenizer == "train":
        size = _trained_tokenizer(config, folder, rank)
        trained = {"vocab_size": size, "hf_tokenizer_name": "tokenizer", "pool_type": "eos", "eos_id": EOS_ID}
    else:
        trained = {}
    if isinstance(config.model.spec, str):
        if config.model.logit_scale is not None or config.model.logit_bias is not None:
            raise UserError("model.logit_scale, model.logit_bias: a model given by name brings its own")
        if trained:
            raise UserError(
                "model.tokenizer: a model given by name has its own tokenizer: set model.tokenizer to 'spec'"
            )
        import open_clip

        model = load_named(config.model.spec, config.model.pretrained)
        spec: dict[str, Any] = open_clip.get_model_config(config.model.spec)
        tokenizer: Tokenizer = open_clip.get_tokenizer(config.model.spec)
    else:
        if config.model.pretrained is not None:
            raise UserError("model.pretrained: only a model given by name has weights to load; model.spec is inline")
        spec = json.loads(json.dumps(config.model.spec))
        if "text_cfg" not in spec or "vision_cfg" not in spec:
            raise UserError("model.spec: an open_clip model config has embed_dim, vision_cfg and text_cfg")
        spec["text_cfg"] |= trained
        # A text tower of its own is the only one in open_clip that knows other end tokens than CLIP's.
        spec = {"custom_text": True, **spec}
        spec["vision_cfg"].setdefault("image_size", config.data.preprocess.size)
        if spec["vision_cfg"]["image_size"] != config.data.preprocess.size:
            raise UserError(
                f"model.spec.vision_cfg.image_size is {spec['vision_cfg']['image_size']} and "
                f"data.preprocess.size is {config.data.preprocess.size}: they must be equal"
            )
        model = build_spec(spec)
        length = int(spec["text_cfg"].get("context_length", 77))
        name = folder if trained else config.model.tokenizer
        tokenizer = load_tokenizer(spec["text_cfg"]["hf_tokenizer_name"] if name == "spec" else name, length)
        if not trained:
            spec["text_cfg"]["hf_tokenizer_name"] = "tokenizer"  # open_clip looks for its files in the bundle
    if rank == 0 and not trained and hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(str(folder))
    return DualEncoder(model, config.data.preprocess, config.model.channels_last), tokenizer, spec


def _trained_tokenizer(config: RunConfig, folder: Path, rank: int) -> int:
    """Train on the reports of all training sources, once; the other ranks wait for the files."""
    if rank == 0 and not (folder / FILES[0]).exists():
        texts: list[str] = []
        for source in config.data.sources.values():
            manifest = Manifest.load(source.shards)
            quarantine = Quarantine(manifest.count(source.split), config.data.max_bad)
            texts += [study.record.get("text") or "" for study in read_split(manifest, source.split, quarantine)]
        if not any(texts):
            raise UserError("model.tokenizer: no source has a single report to train a tokenizer on")
        with atomic_folder(folder) as temporary:
            train_tokenizer(texts, config.model.vocab_size, temporary)
    while not (folder / FILES[0]).exists():
        time.sleep(0.1)
    return len(read_json(folder / FILES[0], "tokenizer")["model"]["vocab"])


def _validation_stream(
    config: RunConfig, tokenizer: Tokenizer, rank: int, world_size: int, quarantine_path: Path
) -> BatchStream:
    if trained := [name for name, source in config.data.sources.items() if "val" in source.split.split("+")]:
        raise UserError(f"trainer.val_every: data.sources.{trained[0]} trains on the split 'val'; set val_every to 0")
    sources = {
        name: SourceConfig(source.shards, "val", source.weight)
        for name, source in config.data.sources.items()
        if any(shard.split == "val" for shard in Manifest.load(source.shards).shards)
    }
    if len(sources) < len(config.data.sources):
        raise UserError("trainer.val_every: a source has no split 'val'; set it to 0")
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


def _trainer(config: RunConfig, out: Path, steps: int, val: BatchStream | None) -> Trainer:
    checkpoint = ModelCheckpoint(
        dirpath=out / "checkpoints",
        filename="last",
        every_n_train_steps=min(config.trainer.checkpoint_every, steps),
        save_top_k=1,
        enable_version_counter=False,
        save_on_train_epoch_end=False,
    )
    callbacks: list[Callback] = [Console(), MetricsFile(out / METRICS, config.trainer.log_every), checkpoint]
    if config.trainer.ema:
        callbacks.append(EMAWeightAveraging(decay=config.trainer.ema))
    launched = distributed.launched_world()[1] > 1
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if launched else 1
    return Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator=config.trainer.accelerator,
        devices=local,
        num_nodes=distributed.launched_world()[1] // local if launched else 1,
        strategy="ddp" if launched else "auto",
        precision=resolve_precision(config.trainer),
        gradient_clip_val=config.optim.clip_norm or None,
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=None,
        val_check_interval=min(config.trainer.val_every, steps) if val else None,
        limit_val_batches=len(val) if val else 0,
        default_root_dir=out,
    )


def resolve_precision(config: TrainerConfig) -> Literal["32-true", "bf16-mixed", "16-mixed"]:
    """What "auto" means on this machine."""
    if config.precision != "auto":
        return config.precision
    if config.accelerator != "cpu" and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported() else "16-mixed"
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # torch before 2.11 cannot say
    fast = capabilities.get("amx_bf16") or capabilities.get("avx512_bf16")
    return "bf16-mixed" if fast else "32-true"


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


class _quiet_lightning:  # noqa: N801 - reads as the context manager it is
    """Hides Lightning's hints about this machine and this loader; its errors still come through."""

    def __enter__(self) -> None:
        self._level = logging.getLogger("lightning.pytorch").level
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        self._warnings = warnings.catch_warnings()
        self._warnings.__enter__()
        warnings.filterwarnings("ignore", module="lightning")

    def __exit__(self, *error: object) -> None:
        self._warnings.__exit__(*error)  # type: ignore[arg-type]
        logging.getLogger("lightning.pytorch").setLevel(self._level)


def diary(run: Path) -> Iterator[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    path = run / METRICS
    if path.exists():
        yield from (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
