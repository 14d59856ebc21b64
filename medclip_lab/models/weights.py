"""Files and folders of weights as other tools and this one leave them, read without executing anything."""

import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from medclip_lab.errors import UserError
from medclip_lab.files import read_json
from medclip_lab.models.from_transformers import CLIP, SIGLIP, as_open_clip
from medclip_lab.models.hf_text import takes_pooling_layer, text_config
from medclip_lab.models.hub import HUB, find_folder, refuse_pointer
from medclip_lab.models.spec import OPEN_CLIP_CONFIG
from medclip_lab.models.stems import Normalisation

SETTING = "model.warm_start"
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")


@dataclass
class Weights:
    """Tensors by name, and what is known of them."""

    state: dict[str, Tensor]
    kind: Literal["open_clip", "timm", "transformers"]
    """Whose names they have."""
    path: Path
    normalisation: Normalisation | None = None
    """How pixels were normalised for them."""
    activations: dict[str, str] = field(default_factory=dict)
    """Tower to the activation that they were trained with, as transformers calls it, where that is known."""


def read_weights(source: str) -> Weights:
    """Weights of a file (safetensors, or torch's without other objects), or of a folder: a bundle or a run of ours, a
    model of open_clip, timm or transformers.

    Args:
        source: a path, the name of a repository in Hugging Face's cache, or "hf-hub:NAME".

    Raises:
        UserError: there is none, or it cannot be used.
    """
    path = Path(source).expanduser()
    if not source.startswith(HUB) and path.is_file():
        return _of_file(path)
    folder = find_folder(source, f"{SETTING}.source")
    if (folder / OPEN_CLIP_CONFIG).exists():
        record = read_json(folder / OPEN_CLIP_CONFIG, SETTING)
        file = _one_of(folder, "open_clip_model", "open_clip_pytorch_model", "model", "pytorch_model")
        return Weights(load_tensors(file), "open_clip", file, _normalisation(record.get("preprocess_cfg", {})))
    if (folder / "model.json").exists():
        record = read_json(folder / "model.json", SETTING)
        file = _one_of(folder, "model")
        return Weights(load_tensors(file), "open_clip", file, _normalisation(record.get("preprocess_cfg", {})))
    if (folder / "config.json").exists():
        record = read_json(folder / "config.json", SETTING)
        if "architecture" in record:
            file = _one_of(folder, "model", "pytorch_model")
            return Weights(load_tensors(file), "timm", file, _normalisation(record.get("pretrained_cfg", record)))
        if "model_type" in record:
            return _of_transformers(folder, record)
    return _of_file(_one_of(folder))


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, by name, without the prefixes that wrappers leave.

    Raises:
        UserError: it is no such file.
    """
    refuse_pointer(path, SETTING)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            loaded: Any = load_file(path)
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{SETTING}: {path} holds more than tensors, and would be executed to be read: save its state_dict as "
            "safetensors, in the tool that made it"
        ) from None
    except Exception as error:  # safetensors, zip files and torch each have their own
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{SETTING}: cannot read {path}: {first}") from None
    for name in ("state_dict", "model_state_dict", "model", "module"):
        if isinstance(loaded, dict) and isinstance(loaded.get(name), dict):
            loaded = loaded[name]
            break
    state = {name: value for name, value in loaded.items() if isinstance(value, Tensor)}
    for wrapper in ("module.", "_orig_mod."):
        state = {name.removeprefix(wrapper): value for name, value in state.items()}
    ours = "encoder.model."  # a checkpoint of a training run holds the loss too
    if any(name.startswith(ours) for name in state):
        state = {name.removeprefix(ours): value for name, value in state.items() if name.startswith(ours)}
    if not state:
        raise UserError(f"{SETTING}: {path} holds no tensors by name")
    return state


def _of_file(path: Path) -> Weights:
    if path.suffix not in SUFFIXES:
        raise UserError(f"{SETTING}: {path} is none of {', '.join(SUFFIXES)}")
    state = load_tensors(path)
    if any(name.startswith("visual.") for name in state):
        return Weights(state, "open_clip", path)
    if any("word_embeddings" in name or name.startswith(("model.layers.", "encoder.layer.")) for name in state):
        raise UserError(f"{SETTING}: {path} holds a text model: name its folder, with the config.json")
    return Weights(state, "timm", path)


def _of_transformers(folder: Path, record: dict[str, Any]) -> Weights:
    """By transformers itself, which knows the names that its models had in other years."""
    from transformers import AutoModel

    kind = record["model_type"]
    if kind in ("siglip2", "vision-text-dual-encoder"):
        raise UserError(
            f"{SETTING}: {folder} holds a {kind} model as transformers names its parts: take open_clip's version of it"
        )
    files = [file for file in folder.iterdir() if file.suffix in (".safetensors", ".bin")]
    for file in files:
        refuse_pointer(file, SETTING)
    config = text_config(record)
    options = {"add_pooling_layer": True} if takes_pooling_layer(config) else {}
    try:
        model, found = AutoModel.from_pretrained(
            folder, config=config, dtype=torch.float32, local_files_only=True, output_loading_info=True, **options
        )
    except Exception as error:  # every way a folder can be wrong has a class of its own there
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{SETTING}: transformers cannot read {folder}: {first}") from None
    state = {name: value for name, value in model.state_dict().items() if name not in found["missing_keys"]}
    if kind in (*CLIP, *SIGLIP):
        return Weights(as_open_clip(state, kind), "open_clip", folder, _of_processor(folder), _activations(config))
    if config.is_encoder_decoder:
        part = "encoder."
        state = {name.removeprefix(part): value for name, value in state.items() if name.startswith(part)}
    return Weights(state, "transformers", folder)


def _activations(config: Any) -> dict[str, str]:
    """Of a config of both towers, or of one."""
    if not hasattr(config, "vision_config"):
        return {"image" if "vision" in config.model_type else "text": config.hidden_act}
    return {"image": config.vision_config.hidden_act, "text": config.text_config.hidden_act}


def _of_processor(folder: Path) -> Normalisation | None:
    """What the image processor beside a model does, alone or with the tokenizer's."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).exists():
            record = read_json(folder / name, SETTING)
            record = record.get("image_processor", record)
            return _normalisation({"mean": record.get("image_mean"), "std": record.get("image_std")})
    return None


def _one_of(folder: Path, *stems: str) -> Path:
    """The weights of a folder: by one of these names, or the only ones there are."""
    for stem in stems:
        for suffix in SUFFIXES:
            if (folder / f"{stem}{suffix}").is_file():
                return folder / f"{stem}{suffix}"
    files = [file for file in sorted(folder.iterdir()) if file.suffix in SUFFIXES]
    if len(files) != 1:
        raise UserError(f"{SETTING}: {folder} holds {len(files)} files of weights: name the file")
    return files[0]


def _normalisation(values: dict[str, Any]) -> Normalisation | None:
    if not values.get("mean") or not values.get("std"):
        return None
    return Normalisation(tuple(values["mean"]), tuple(values["std"]))
