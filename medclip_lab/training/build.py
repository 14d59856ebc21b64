"""Towers and tokenizer of a run, as its settings describe them."""

import random
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from medclip_lab.data.manifest import Manifest
from medclip_lab.data.pipeline import DataConfig
from medclip_lab.data.quarantine import Quarantine
from medclip_lab.data.reader import read_split
from medclip_lab.data.text import draw_text
from medclip_lab.data.tokenizer import (
    EOS_ID,
    FILES,
    PAD_ID,
    Tokenizer,
    load_tokenizer,
    token_counts,
    train_tokenizer,
)
from medclip_lab.errors import UserError
from medclip_lab.files import atomic_folder, read_json, write_json
from medclip_lab.models.dual_encoder import DualEncoder, ModelConfig
from medclip_lab.models.hub import HUB, find_folder
from medclip_lab.models.spec import LOCAL, Spec, build_spec, complete, fit_image_size, load_named
from medclip_lab.models.stems import Normalisation
from medclip_lab.models.warm_start import WarmStartConfig, warm_start

TRIED_STUDIES = 256
"""Of each source: their texts are tried against the context."""
WARM_START = "warm_start.json"


def start_temperature(config: ModelConfig, encoder: DualEncoder, loss: torch.nn.Module) -> None:
    """Scale and bias as the config says, else as the loss wants them; a loss without bias trains none."""
    scale: Any = config.logit_scale or getattr(loss, "init_logit_scale", 1 / 0.07)
    bias = config.logit_bias if config.logit_bias is not None else getattr(loss, "init_logit_bias", None)
    encoder.start_temperature(scale, bias if getattr(loss, "uses_bias", True) else None)


def prepare_model(config: ModelConfig, data: DataConfig, out: Path, rank: int) -> tuple[DualEncoder, Tokenizer, Spec]:
    """Towers, tokenizer and the full model config of a run.

    Raises:
        UserError: settings that cannot work.
    """
    folder = out / "tokenizer"
    if isinstance(config.spec, str):
        model, tokenizer, spec = _named(config)
    else:
        model, tokenizer, spec = _inline(config, data, folder, rank)
    _refuse_other_size(spec, data)
    if rank == 0 and config.truncation == "refuse":
        _refuse_long_texts(data, tokenizer)
    spec = fit_image_size(model, spec)
    if rank == 0 and config.tokenizer != "train" and hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(str(folder))
    sources = _weights_of_text_model(config) + config.warm_start
    if sources:
        pixels = Normalisation(tuple(data.preprocess.mean), tuple(data.preprocess.std))
        reports = warm_start(model, sources, pixels, speak=rank == 0)
        if rank == 0:
            write_json(out / WARM_START, {"sources": [report.record() for report in reports]})
    encoder = DualEncoder(model, data.preprocess, config.channels_last)
    encoder.adapt(config.lora)
    if config.gradient_checkpointing:
        encoder.checkpoint_activations()
    return encoder, tokenizer, spec


def _named(config: ModelConfig) -> tuple[torch.nn.Module, Any, Spec]:
    assert isinstance(config.spec, str)
    if config.logit_scale is not None or config.logit_bias is not None:
        raise UserError("model.logit_scale, model.logit_bias: a model given by name brings its own")
    if config.tokenizer == "train":
        raise UserError("model.tokenizer: a model given by name has its own tokenizer: set model.tokenizer to 'spec'")
    import open_clip

    name = config.spec
    if name.startswith(HUB):
        name = f"{LOCAL}{find_folder(name, 'model.spec')}"
    model, spec = load_named(name, config.pretrained)
    try:
        return model, open_clip.get_tokenizer(name), spec
    except (OSError, ValueError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"model.spec: {config.spec} comes without a tokenizer that can be read: {first}") from None


def _inline(config: ModelConfig, data: DataConfig, folder: Path, rank: int) -> tuple[torch.nn.Module, Any, Spec]:
    assert isinstance(config.spec, dict)
    if config.pretrained is not None:
        raise UserError("model.pretrained: only a model given by name takes it; model.spec is inline: see warm_start")
    spec = complete(config.spec) | {"custom_text": True}
    text = spec["text_cfg"]
    hugging = "hf_config" in text
    if config.tokenizer == "train":
        if _weights_of_text_model(config):
            raise UserError(
                f"model.tokenizer is 'train', and {text['hf_model_name']} was pretrained on words of its own: set "
                "model.tokenizer to 'spec', or text_cfg.hf_model_pretrained to false"
            )
        size = _trained_tokenizer(config, data, folder, rank)
        if hugging:
            text["hf_config"] |= {"vocab_size": size}
        else:
            # A text tower of its own is the only one in open_clip that knows other end tokens than CLIP's.
            text |= {"vocab_size": size, "pool_type": "eos", "eos_id": EOS_ID, "pad_id": PAD_ID}
        source = str(folder)
    elif config.tokenizer == "spec":
        source = text.get("hf_tokenizer_name") or text.get("hf_model_name") or ""
    else:
        source = config.tokenizer
    length = int(text.get("context_length", 77))
    if source:
        tokenizer = load_tokenizer(
            find_folder(source, "model.tokenizer"), length, **(text.get("tokenizer_kwargs") or {})
        )
        text["hf_tokenizer_name"] = "tokenizer"  # open_clip looks for its files in the bundle
        if hugging:
            text["hf_config"]["pad_token_id"] = tokenizer.tokenizer.pad_token_id
        size = text["hf_config"]["vocab_size"] if hugging else text.get("vocab_size", 49408)
        if len(tokenizer.tokenizer) > size:
            raise UserError(
                f"model.tokenizer: {source} has {len(tokenizer.tokenizer)} words, and the text tower {size}: set its "
                "vocab_size, or take the tokenizer that belongs to it"
            )
    elif hugging:
        raise UserError("model.tokenizer: the spec names none: set text_cfg.hf_tokenizer_name to a folder")
    else:
        from open_clip.tokenizer import SimpleTokenizer

        tokenizer = SimpleTokenizer(context_length=length)
    spec["vision_cfg"].setdefault("image_size", data.preprocess.size)
    _refuse_other_size(spec, data)
    return build_spec(spec), tokenizer, spec


def _weights_of_text_model(config: ModelConfig) -> list[WarmStartConfig]:
    """The folder of a text tower of transformers brings its weights, as in open_clip."""
    text = config.spec.get("text_cfg", {}) if isinstance(config.spec, dict) else {}
    if "hf_model_name" not in text or not text.get("hf_model_pretrained", True):
        return []
    return [WarmStartConfig(text["hf_model_name"], "text")]


def _refuse_other_size(spec: Spec, data: DataConfig) -> None:
    size = spec["vision_cfg"].get("image_size", 224)
    if size not in (data.preprocess.size, [data.preprocess.size] * 2):
        raise UserError(
            f"model.spec.vision_cfg.image_size is {size} and data.preprocess.size is {data.preprocess.size}: they must "
            "be equal"
        )


def _refuse_long_texts(data: DataConfig, tokenizer: Any) -> None:
    """A report that is cut in its middle is a choice, which nobody has made yet."""
    length = int(tokenizer.context_length)
    for name, source in data.sources.items():
        manifest = Manifest.load(source.shards)
        quarantine = Quarantine(manifest.count(source.split), 1.0)
        studies = islice(read_split(manifest, source.split, quarantine), TRIED_STUDIES)
        drawn = [draw_text(study.record, data.text, random.Random(number))[0] for number, study in enumerate(studies)]
        lengths = token_counts(tokenizer, drawn)
        longer = [count for count in lengths if count > length]
        if longer:
            raise UserError(
                f"model.spec.text_cfg.context_length is {length}, and {len(longer)} of {len(lengths)} texts of {name} "
                f"that were tried are longer, up to {max(longer)} tokens: raise it, set data.text.max_words, or let "
                "them be cut by model.truncation 'end'"
            )


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
