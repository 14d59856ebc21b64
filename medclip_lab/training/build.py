"""Towers and tokenizer of a run, as its settings describe them."""

import json
import time
from pathlib import Path
from typing import Any

import torch

from medclip_lab.data.manifest import Manifest
from medclip_lab.data.pipeline import DataConfig
from medclip_lab.data.quarantine import Quarantine
from medclip_lab.data.reader import read_split
from medclip_lab.data.tokenizer import EOS_ID, FILES, Tokenizer, load_tokenizer, train_tokenizer
from medclip_lab.errors import UserError
from medclip_lab.files import atomic_folder, read_json
from medclip_lab.models.dual_encoder import DualEncoder, ModelConfig, build_spec, load_named


def start_temperature(config: ModelConfig, encoder: DualEncoder, loss: torch.nn.Module) -> None:
    """Scale and bias as the config says, else as the loss wants them; a loss without bias trains none."""
    scale: Any = config.logit_scale or getattr(loss, "init_logit_scale", 1 / 0.07)
    bias = config.logit_bias if config.logit_bias is not None else getattr(loss, "init_logit_bias", None)
    encoder.start_temperature(scale, bias if getattr(loss, "uses_bias", True) else None)


def prepare_model(
    config: ModelConfig, data: DataConfig, out: Path, rank: int
) -> tuple[DualEncoder, Tokenizer, dict[str, Any]]:
    """Towers, tokenizer and the full open_clip model config of a run."""
    folder = out / "tokenizer"
    if config.tokenizer == "train":
        size = _trained_tokenizer(config, data, folder, rank)
        trained = {"vocab_size": size, "hf_tokenizer_name": "tokenizer", "pool_type": "eos", "eos_id": EOS_ID}
    else:
        trained = {}
    if isinstance(config.spec, str):
        if config.logit_scale is not None or config.logit_bias is not None:
            raise UserError("model.logit_scale, model.logit_bias: a model given by name brings its own")
        if trained:
            raise UserError(
                "model.tokenizer: a model given by name has its own tokenizer: set model.tokenizer to 'spec'"
            )
        import open_clip

        model = load_named(config.spec, config.pretrained)
        spec: dict[str, Any] = open_clip.get_model_config(config.spec)
        tokenizer: Tokenizer = open_clip.get_tokenizer(config.spec)
    else:
        if config.pretrained is not None:
            raise UserError("model.pretrained: only a model given by name has weights to load; model.spec is inline")
        spec = json.loads(json.dumps(config.spec))
        if "text_cfg" not in spec or "vision_cfg" not in spec:
            raise UserError("model.spec: an open_clip model config has embed_dim, vision_cfg and text_cfg")
        spec["text_cfg"] |= trained
        # A text tower of its own is the only one in open_clip that knows other end tokens than CLIP's.
        spec = {"custom_text": True, **spec}
        spec["vision_cfg"].setdefault("image_size", data.preprocess.size)
        if spec["vision_cfg"]["image_size"] != data.preprocess.size:
            raise UserError(
                f"model.spec.vision_cfg.image_size is {spec['vision_cfg']['image_size']} and "
                f"data.preprocess.size is {data.preprocess.size}: they must be equal"
            )
        model = build_spec(spec)
        length = int(spec["text_cfg"].get("context_length", 77))
        name = folder if trained else config.tokenizer
        tokenizer = load_tokenizer(spec["text_cfg"]["hf_tokenizer_name"] if name == "spec" else name, length)
        if not trained:
            spec["text_cfg"]["hf_tokenizer_name"] = "tokenizer"  # open_clip looks for its files in the bundle
    if rank == 0 and not trained and hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(str(folder))
    return DualEncoder(model, data.preprocess, config.channels_last), tokenizer, spec


def _trained_tokenizer(config: ModelConfig, data: DataConfig, folder: Path, rank: int) -> int:
    """Train on the reports of all training sources, once; the other ranks wait for the files."""
    if rank == 0 and not (folder / FILES[0]).exists():
        texts: list[str] = []
        for source in data.sources.values():
            manifest = Manifest.load(source.shards)
            quarantine = Quarantine(manifest.count(source.split), data.max_bad)
            texts += [study.record.get("text") or "" for study in read_split(manifest, source.split, quarantine)]
        if not any(texts):
            raise UserError("model.tokenizer: no source has a single report to train a tokenizer on")
        with atomic_folder(folder) as temporary:
            train_tokenizer(texts, config.vocab_size, temporary)
    while not (folder / FILES[0]).exists():
        time.sleep(0.1)
    return len(read_json(folder / FILES[0], "tokenizer")["model"]["vocab"])
