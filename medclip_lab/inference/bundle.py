"""The bundle: a folder with everything a model needs outside this library, and the hashes that prove it is whole."""

import json
import platform
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from medclip_lab.config import to_yaml
from medclip_lab.data.preprocess import PreprocessConfig
from medclip_lab.data.tokenizer import FILES as TOKENIZER_FILES
from medclip_lab.errors import UserError
from medclip_lab.files import digest, existing_folder, read_json, sha256, write_json
from medclip_lab.inference.labelset import load_labelset
from medclip_lab.models.spec import TEXT_MODEL, beyond_open_clip
from medclip_lab.version import __version__

FORMAT = "medclip-lab-bundle/1"
MANIFEST, CONFIG, WEIGHTS, PREPROCESS = (
    "manifest.json",
    "open_clip_config.json",
    "open_clip_model.safetensors",
    "preprocess.json",
)
TEXT_CONFIG = f"{TEXT_MODEL}/config.json"
IDENTITY = (WEIGHTS, CONFIG, TEXT_CONFIG, PREPROCESS, *TOKENIZER_FILES)
"""The files that decide what an embedding is; the fingerprint is made of their hashes."""


def write_bundle(
    out: Path,
    *,
    weights: dict[str, Tensor],
    model_cfg: dict[str, Any],
    preprocess: PreprocessConfig,
    tokenizer: Path | None,
    labelsets: list[Path],
    card: dict[str, Any],
    augment: dict[str, Any],
) -> None:
    """Write a bundle without classifiers; `finish_bundle` adds them and the manifest.

    Args:
        weights: state dict of the open_clip model.
        model_cfg: its open_clip model config.
        tokenizer: folder of the tokenizer's files; None if the config names one of open_clip's own.
        labelsets: YAML files to carry along.
        card: facts for MODEL_CARD.md.
        augment: how the training images were changed, for the record.
    """
    model_cfg = json.loads(json.dumps(model_cfg))
    (out / "MODEL_CARD.md").write_text(_card(card, model_cfg), encoding="utf-8")
    model_cfg["vision_cfg"].pop("patch_dropout", None)  # of training
    text = model_cfg["text_cfg"]
    if "hf_config" in text:
        # Where open_clip looks for it too, if it is started in the folder.
        write_json(out / TEXT_CONFIG, text.pop("hf_config"))
        text |= {"hf_model_name": TEXT_MODEL, "hf_model_pretrained": False}
    for name in ("logit_scale", "logit_bias"):
        # open_clip creates the bias only if the config names a start value; the weights then overwrite it.
        if name in weights:
            model_cfg[f"init_{name}"] = float(weights[name])
    write_json(out / CONFIG, {"model_cfg": model_cfg, "preprocess_cfg": preprocess.open_clip()})
    save_file(weights, out / WEIGHTS, metadata={"format": "pt"})
    write_json(
        out / PREPROCESS,
        {
            "steps": [
                "decode; DICOM: rescale",
                f"window more than 8 bits ({_window(preprocess)}); MONOCHROME1 is inverted",
                f"resize to {preprocess.size} ({preprocess.resize_mode}, {preprocess.interpolation})",
                f"scale to [0, 1], subtract mean, divide by std; {_channels(model_cfg)}",
            ],
            **preprocess.record(),
            "augment": augment,
        },
    )
    if tokenizer is not None:
        for name in TOKENIZER_FILES:
            shutil.copyfile(tokenizer / name, out / name)
    (out / "labelsets").mkdir()
    for labelset in labelsets:
        # As it is read, with every template filled: what stands elsewhere is not there where the bundle goes.
        text = to_yaml(load_labelset(labelset))
        (out / "labelsets" / labelset.name).write_text(text, encoding="utf-8")


def _window(preprocess: PreprocessConfig) -> str:
    if not isinstance(preprocess.window, str):
        return "center {:g}, width {:g}".format(*preprocess.window)
    stretched = "percentiles {:g} to {:g}".format(*preprocess.percentiles)
    return f"the file's VOI LUT or window, then {stretched}" if preprocess.window == "file" else stretched


def _channels(model_cfg: dict[str, Any]) -> str:
    if model_cfg["vision_cfg"].get("in_chans", 3) == 1:
        return "one channel, colour is made grey before"
    return "greyscale is repeated over three channels"


def finish_bundle(out: Path, command: str, facts: dict[str, Any]) -> dict[str, Any]:
    """Hash every file of a bundle folder and write its manifest; returns the manifest."""
    files = {
        str(path.relative_to(out)): sha256(path)
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    manifest = {
        "format": FORMAT,
        "fingerprint": fingerprint(files),
        "files": files,
        "versions": versions(),
        "command": command,
        **facts,
    }
    write_json(out / MANIFEST, manifest)
    return manifest


def fingerprint(files: dict[str, str]) -> str:
    """Identity of weights, preprocessing and tokenizer together: embeddings compare only if it is equal."""
    return digest({name: files[name] for name in IDENTITY if name in files})


def open_bundle(folder: str | Path) -> tuple[Path, dict[str, Any]]:
    """A bundle folder whose files are all there and unchanged, and its manifest.

    Raises:
        UserError: no bundle, another format, a file missing or changed after export.
    """
    path = existing_folder(folder, "bundle")
    manifest = read_json(path / MANIFEST, "bundle")
    if manifest.get("format") != FORMAT:
        raise UserError(f"bundle: {path / MANIFEST} has format {manifest.get('format')!r}, not {FORMAT!r}")
    for name, expected in manifest["files"].items():
        file = path / name
        if not file.is_file():
            raise UserError(f"bundle: {file} is missing: export again")
        if sha256(file) != expected:
            raise UserError(f"bundle: {file} was changed after export (sha256 differs from the manifest): export again")
    if manifest.get("fingerprint") != fingerprint(manifest["files"]):
        raise UserError(f"bundle: the fingerprint in {path / MANIFEST} is not that of its files: export again")
    return path, manifest


def versions() -> dict[str, str]:
    """Versions of what an embedding depends on."""
    from importlib.metadata import version

    names = ("torch", "torchvision", "open_clip_torch", "timm", "transformers", "pillow")
    return {"medclip_lab": __version__, "python": platform.python_version()} | {name: version(name) for name in names}


def _card(facts: dict[str, Any], model_cfg: dict[str, Any]) -> str:
    plain = 'or with plain open_clip:\n`open_clip.create_model_from_pretrained("local-dir:this folder")`'
    if beyond := beyond_open_clip(model_cfg):
        plain = f"only: plain open_clip does not know {' and '.join(beyond)}"
    elif "hf_config" in model_cfg["text_cfg"]:
        plain = 'or, started in this folder, plain\nopen_clip: `open_clip.create_model_from_pretrained("local-dir:.")`'
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return f"""---
license: other
library_name: open_clip
tags: [medical, radiology, contrastive, zero-shot-classification, retrieval]
---
# A contrastive image-report model

Not a medical device. Scores order images; they are no probabilities unless `calibration.json` is part of the bundle.
The embeddings are as private as the images and reports they were made of.

| | |
|---|---|
{rows}

Open it with `medclip_lab.load("this folder")` {plain}.
"""
