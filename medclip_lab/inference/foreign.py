"""Others' models behind the interface of a bundle, so that baselines are measured by the same harness.

Nothing is fetched: weights, tokenizer and processor must lie on this machine. Nothing is executed: safetensors, or
open_clip's weights-only loader, and no code of a model's own.
"""

import os
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from medclip_lab.data.decode import Decoded
from medclip_lab.data.preprocess import Preprocess, PreprocessConfig
from medclip_lab.errors import UserError
from medclip_lab.files import digest, existing_folder, sha256
from medclip_lab.inference.encoder import Encoder, load
from medclip_lab.models.dual_encoder import DualEncoder
from medclip_lab.models.spec import load_named, quiet

HUGGING_FACE = ("clip", "siglip", "vision-text-dual-encoder")
"""Kinds of transformers models that are read."""


def open_encoder(name: str | os.PathLike[str], device: str = "auto") -> Encoder:
    """An encoder by what names it.

    - a folder: a bundle of ours;
    - "local-dir:FOLDER": a model saved for open_clip (`open_clip_config.json` with its weights);
    - "open_clip:NAME@FILE": a model that open_clip knows by name, with weights from a file;
    - "hf:FOLDER": CLIP, SigLIP or a dual encoder saved by transformers, with its own processor and tokenizer.

    Raises:
        UserError: nothing there, another kind of model, or a part of it missing.
    """
    text = os.fspath(name)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if text.startswith("hf:"):
        return _hugging_face(existing_folder(text.removeprefix("hf:"), "model"), device)
    if text.startswith("local-dir:"):
        folder = existing_folder(text.removeprefix("local-dir:"), "model")
        return _open_clip(f"local-dir:{folder}", None, _identity(folder), folder, device)
    if text.startswith("open_clip:"):
        model, _, file = text.removeprefix("open_clip:").partition("@")
        weights = Path(file).expanduser()
        if not file or not weights.is_file():
            raise UserError(f"model: {text!r} names no file of weights: write open_clip:NAME@FILE, nothing is fetched")
        return _open_clip(model, str(weights), digest([model, sha256(weights)]), weights.parent, device)
    if text.startswith("hf-hub:"):
        raise UserError(f"model: {text!r} would be fetched: save it to a folder and name that as hf:FOLDER")
    return load(text, device)


def _identity(folder: Path) -> str:
    """Changes with any file that decides what an embedding is."""
    kinds = (".json", ".safetensors", ".txt", ".model", ".bin", ".pt")
    return digest({path.name: sha256(path) for path in sorted(folder.iterdir()) if path.suffix in kinds})


def _open_clip(name: str, weights: str | None, identity: str, folder: Path, device: str) -> Encoder:
    model, _ = load_named(name, weights)
    preprocess = PreprocessConfig.from_record(open_clip.get_model_preprocess_cfg(model))
    try:
        with quiet():
            tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:  # of transformers, which has a kind of its own for every missing file
        raise UserError(f"model: the tokenizer of {name} is not on this machine ({type(error).__name__})") from None
    towers = DualEncoder(model, preprocess).to(device).eval()
    return Encoder(folder, {"fingerprint": identity, "files": {}}, towers, tokenizer, preprocess)


def _hugging_face(folder: Path, device: str) -> Encoder:
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer

    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        kind = AutoConfig.from_pretrained(folder, **local).model_type
        if kind not in HUGGING_FACE:
            raise UserError(f"model: {folder} holds a {kind!r}, one of {', '.join(HUGGING_FACE)} is needed")
        with quiet():
            model = AutoModel.from_pretrained(folder, use_safetensors=True, **local)
            processor = AutoImageProcessor.from_pretrained(folder, **local)
            tokenizer = AutoTokenizer.from_pretrained(folder, **local)
    except UserError:
        raise
    except Exception as error:  # transformers raises its own kinds for every part that is missing or broken
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"model: transformers cannot open {folder}: {first[:200]}") from None
    return ForeignEncoder(folder, _identity(folder), HuggingFace(model).to(device).eval(), tokenizer, processor)


class HuggingFace(nn.Module):
    """A transformers model with the names of a `DualEncoder`."""

    mean: Tensor

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.inner = model
        self.kind = str(model.config.model_type)
        self.register_buffer("mean", torch.zeros(1), persistent=False)  # tells the device

    @property
    def logit_scale(self) -> Tensor:
        """Scalar, exponentiated."""
        scale: Tensor = self.inner.logit_scale.exp().reshape(())
        return scale

    @property
    def logit_bias(self) -> Tensor | None:
        bias: Tensor | None = getattr(self.inner, "logit_bias", None)
        return None if bias is None else bias.reshape(())

    def encode_image(self, pixels: Tensor) -> Tensor:
        """[N, D] unit norm from what the model's own processor gave, [N, 3, H, W]."""
        return F.normalize(_pooled(self.inner.get_image_features(pixel_values=pixels)).float(), dim=-1)

    def encode_text(self, ids: Tensor) -> Tensor:
        """[M, D] unit norm from int64 [M, L], padded."""
        inputs = {"input_ids": ids}
        if self.kind == "vision-text-dual-encoder":  # CLIP looks back only, and SigLIP was trained to see its padding
            inputs["attention_mask"] = self._mask(ids)
        return F.normalize(_pooled(self.inner.get_text_features(**inputs)).float(), dim=-1)

    def _mask(self, ids: Tensor) -> Tensor:
        pad = self.inner.config.text_config.pad_token_id
        return (ids != pad).long() if pad is not None else torch.ones_like(ids)


def _pooled(output: Any) -> Tensor:
    """transformers 5 gives the projected features as `pooler_output`."""
    features: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return features


class ProcessorPreprocess(Preprocess):
    """Windows as we do, then the processor that came with the model."""

    def __init__(self, processor: Any) -> None:
        super().__init__(PreprocessConfig())
        self.processor = processor

    def __call__(self, image: Decoded | Image.Image, box: object = None) -> Tensor:
        """float32 [3, H, W], normalised as the model was trained."""
        assert box is None, "nothing is cropped when others' models are measured"
        made = self.processor(images=self.window(image).convert("RGB"), return_tensors="pt")
        pixels: Tensor = made["pixel_values"][0]
        return pixels


class ForeignEncoder(Encoder):
    """A transformers model with its own processor and tokenizer."""

    def __init__(self, folder: Path, identity: str, model: HuggingFace, tokenizer: Any, processor: Any) -> None:
        self.folder = folder
        self.manifest = {"fingerprint": identity, "files": {}}
        self.model: Any = model
        self.preprocess: Preprocess = ProcessorPreprocess(processor)
        text = getattr(model.inner.config, "text_config", model.inner.config)
        length = min(int(tokenizer.model_max_length), int(getattr(text, "max_position_embeddings", 77)))

        def ids(texts: list[str]) -> Tensor:
            made = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
            found: Tensor = made["input_ids"]
            return found

        self.tokenizer = ids
