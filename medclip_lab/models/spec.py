"""Models of open_clip's model configs, and of what such a config cannot say.

The keys of our own in a config, all of them unknown to open_clip, so that it refuses what it could only misread:
`vision_cfg.in_chans` (1 takes greyscale as a single channel), `vision_cfg.timm_input_size` (a timm tower with fixed
position embeddings, at another size than its own), `text_cfg.hf_config` (a transformers config in the place of the
folder `hf_model_name`), `text_cfg.hf_layers` (hidden states whose mean is pooled), and two names of
`text_cfg.hf_pooler_type`.
"""

import contextlib
import io
import json
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.hf_configs import arch_dict
from torch import nn

from medclip_lab.errors import UserError
from medclip_lab.files import read_json
from medclip_lab.models.hf_text import HuggingFaceText, positions, reserved, text_config
from medclip_lab.models.hub import HUB, find_folder, refuse_pointer
from medclip_lab.models.stems import channels_of, make_single_channel

Spec = dict[str, Any]
LOCAL = "local-dir:"
OPEN_CLIP_CONFIG = "open_clip_config.json"
TEXT_MODEL = "text_model"
"""Folder of a bundle with the transformers config of its text tower."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """open_clip logs every step of building a model to the root logger; nobody asked."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)


def build_spec(spec: Spec) -> nn.Module:
    """A randomly initialised model of a model config; a timm tower has timm's weights if it asks for them.

    Raises:
        UserError: keys nobody knows, an unknown tower, settings that do not fit each other.
    """
    spec = complete(spec) | {"custom_text": True}  # a text tower of its own: `model.text`
    vision, text = spec["vision_cfg"], spec["text_cfg"]
    channels, input_size = vision.pop("in_chans", 3), vision.pop("timm_input_size", None)
    if channels not in (1, 3):
        raise UserError(f"model.spec.vision_cfg.in_chans is 1 or 3, got {channels}")
    tower = _text_tower(text, spec["embed_dim"]) if "hf_config" in text else None
    if tower is not None:
        # open_clip would build its own, from a folder or a hub; a small one holds the place.
        spec["text_cfg"] = {"context_length": text.get("context_length", 77), "vocab_size": 8, "width": 8, "heads": 1}
        spec["text_cfg"]["layers"] = 1
    with tempfile.TemporaryDirectory() as folder:
        # The very path an exported bundle takes, so that what trains is what will be loaded.
        (Path(folder) / OPEN_CLIP_CONFIG).write_text(json.dumps({"model_cfg": spec, "preprocess_cfg": {}}))
        pretrained = bool(vision.get("timm_model_pretrained"))
        model: Any = _create(f"{LOCAL}{folder}", load_weights=False, pretrained_text=False, pretrained_image=pretrained)
    if tower is not None:
        model.text = tower
        model.context_length, model.vocab_size = int(text.get("context_length", 77)), tower.vocab_size
    if input_size is not None:
        _resize(model.visual, int(input_size))
    if channels == 1:
        make_single_channel(model.visual)
    assert isinstance(model, nn.Module)
    return model


def complete(spec: Spec, folder: Path | None = None) -> Spec:
    """A copy of a model config in which the transformers config of the text tower stands, long enough for its texts.

    Args:
        folder: where the model config was read; it may hold the text tower's own.

    Raises:
        UserError: parts are missing, or the text tower is nowhere to be found.
    """
    spec = json.loads(json.dumps(spec))
    if not isinstance(spec.get("text_cfg"), dict) or not isinstance(spec.get("vision_cfg"), dict):
        raise UserError("model.spec: an open_clip model config has embed_dim, vision_cfg and text_cfg")
    if not isinstance(spec.get("embed_dim"), int):
        raise UserError(f"model.spec.embed_dim must be a whole number, got {spec.get('embed_dim')!r}")
    text = spec["text_cfg"]
    if "hf_model_name" in text and "hf_config" not in text:
        own = folder / TEXT_MODEL if folder is not None else None
        source = (
            own if own and own.is_dir() else find_folder(text["hf_model_name"], "model.spec.text_cfg.hf_model_name")
        )
        text["hf_config"] = read_json(source / "config.json", "model.spec.text_cfg.hf_model_name")
    if "hf_config" in text:
        config = text_config(text["hf_config"])
        length = int(text.get("context_length", 77))
        if 0 < positions(config) < length:
            config.max_position_embeddings = length + reserved(config)
        values = json.loads(config.to_json_string(use_diff=False))
        for name in ("_name_or_path", "architectures", "auto_map", "torch_dtype"):
            values.pop(name, None)
        text["hf_config"] = values | {"dtype": "float32"}
        # As open_clip: mean_pooler where the key is absent, the family's own where it is null.
        usual = arch_dict.get(config.model_type, {}).get("pooler", "mean_pooler")
        text["hf_pooler_type"] = text.get("hf_pooler_type", "mean_pooler") or usual
    return spec


def fit_image_size(model: Any, spec: Spec) -> Spec:
    """Try an image of the config's size; a timm tower that refuses it is set to it, and the config says so.

    Raises:
        UserError: the tower cannot take it.
    """
    size, vision = spec["vision_cfg"].get("image_size", 224), spec["vision_cfg"]
    problem = _refusal(model.visual, size)
    if problem and hasattr(getattr(model.visual, "trunk", None), "set_input_size") and "timm_input_size" not in vision:
        _resize(model.visual, size)
        spec = spec | {"vision_cfg": vision | {"timm_input_size": size}}
        problem = _refusal(model.visual, size)
    if problem:
        tower = vision.get("timm_model_name", type(model.visual).__name__)
        raise UserError(f"model.spec.vision_cfg.image_size: {tower} cannot take images of {size} x {size}: {problem}")
    return spec


def load_named(name: str, pretrained: str | None) -> tuple[nn.Module, Spec]:
    """A model by open_clip name, `local-dir:` or `hf-hub:`, with its weights, and its complete model config.

    Raises:
        UserError: no such model, weights that do not fit, a file that is no weights.
    """
    if name.startswith((LOCAL, HUB)):
        if pretrained is not None:
            raise UserError(
                f"model.pretrained: {name} brings its own weights; only a model by open_clip name takes some"
            )
        return load_folder(find_folder(name.removeprefix(LOCAL), "model.spec"))
    model = _create(name, pretrained=pretrained, force_custom_text=True)
    return model, open_clip.get_model_config(name) | {"custom_text": True}


def load_folder(folder: Path) -> tuple[nn.Module, Spec]:
    """A model from a folder with `open_clip_config.json` and weights: a bundle, or one of open_clip's own."""
    record = read_json(folder / OPEN_CLIP_CONFIG, "model.spec")
    spec = complete(record.get("model_cfg", record), folder) | {"custom_text": True}
    spec["vision_cfg"].pop("timm_model_pretrained", None)
    model = build_spec(spec)
    with quiet():
        path = open_clip.factory._find_checkpoint_in_dir(folder)
        if path is None:
            raise UserError(f"model.spec: {folder} holds no weights (open_clip_model.safetensors)")
        refuse_pointer(Path(path), "model.spec")
        try:
            open_clip.load_checkpoint(model, path, strict=True, weights_only=True)
        except Exception as error:  # safetensors, pickle and torch each have their own
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"model.spec: {path} does not fit {OPEN_CLIP_CONFIG} beside it: {first}") from None
    known = open_clip.get_model_preprocess_cfg(model) | record.get("preprocess_cfg", {})
    open_clip.model.set_model_preprocess_cfg(model, known)
    return model, spec


def beyond_open_clip(spec: Spec) -> list[str]:
    """What of a model config plain open_clip cannot express, and hence refuses to load."""
    vision, text = spec["vision_cfg"], spec["text_cfg"]
    found = [f"vision_cfg.{name}" for name in ("in_chans", "timm_input_size") if vision.get(name, 3) != 3]
    if "hf_config" in text:
        if text["hf_config"]["model_type"] not in arch_dict:
            found.append(f"a text tower of the family {text['hf_config']['model_type']}")
        if text.get("hf_layers") is not None:
            found.append("text_cfg.hf_layers")
        if text["hf_pooler_type"] in ("max_pooler", "last_pooler"):
            found.append(f"text_cfg.hf_pooler_type {text['hf_pooler_type']}")
    return found


def _text_tower(text: Spec, embed_dim: int) -> HuggingFaceText:
    known = set(open_clip.model.CLIPTextCfg.__dataclass_fields__) | {"hf_config", "hf_layers"}
    if unknown := sorted(set(text) - known):
        raise UserError(f"model.spec.text_cfg: nobody knows {', '.join(unknown)}")
    return HuggingFaceText(
        text["hf_config"],
        embed_dim,
        pooler=text["hf_pooler_type"],
        proj=text.get("hf_proj_type", "mlp"),
        layers=text.get("hf_layers"),
    )


def _resize(visual: Any, size: int) -> None:
    if not hasattr(visual.trunk, "set_input_size"):
        raise UserError(f"model.spec.vision_cfg: {type(visual.trunk).__name__} has no input size to set to {size}")
    try:
        with quiet():
            visual.set_input_size(size)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"model.spec.vision_cfg: {type(visual.trunk).__name__} cannot be set to {size}: {first}"
        ) from None


@torch.no_grad()
def _refusal(visual: nn.Module, size: int) -> str:
    training = visual.training
    try:
        visual.eval()(torch.zeros(1, channels_of(visual), size, size))
    except (AssertionError, RuntimeError, ValueError) as error:
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    finally:
        visual.train(training)
    return ""


def _create(name: str, **options: Any) -> nn.Module:
    try:
        with quiet(), contextlib.redirect_stderr(io.StringIO()):
            model: nn.Module = open_clip.create_model(name, **options)
    except (RuntimeError, TypeError, ValueError, KeyError, AssertionError, OSError) as error:
        first = str(error).strip().splitlines()
        raise UserError(
            f"model.spec: open_clip cannot build it: {first[0] if first else type(error).__name__}"
        ) from None
    return model
