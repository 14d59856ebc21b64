"""The bundle: a folder with everything a model needs outside this library, and the hashes that prove it is whole."""

import json
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from medclip_lab.config import to_yaml
from medclip_lab.data.preprocess import PreprocessConfig
from medclip_lab.data.tokenizer import FILES as TOKENIZER_FILES
from medclip_lab.errors import UserError
from medclip_lab.files import atomic_file, atomic_folder, digest, existing_folder, read_json, sha256, write_json
from medclip_lab.inference.card import CardFacts, Evaluation, card_text
from medclip_lab.inference.labelset import load_labelset
from medclip_lab.models.spec import TEXT_MODEL
from medclip_lab.version import __version__

FORMAT = "medclip-lab-bundle/1"
MANIFEST, CONFIG, WEIGHTS, PREPROCESS = (
    "manifest.json",
    "open_clip_config.json",
    "open_clip_model.safetensors",
    "preprocess.json",
)
CARD, FORMER_CARD = "README.md", "MODEL_CARD.md"
"""Where Hugging Face looks for a card, and where bundles had it before."""
CALIBRATION = "calibration.json"
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
        card: facts of the training for the model card, by name.
        augment: how the training images were changed, for the record.
    """
    model_cfg = json.loads(json.dumps(model_cfg))
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
    write_card(out, card, fingerprint({name: sha256(out / name) for name in IDENTITY if (out / name).is_file()}))


def write_card(
    folder: Path,
    run: dict[str, Any],
    mark: str,
    stated: CardFacts = CardFacts(),  # noqa: B008 - frozen
    evaluations: list[Evaluation] | None = None,
    name: str = "A contrastive image-report model",
) -> None:
    """Write the card of what lies in a bundle's folder.

    Args:
        run: facts of the training, by name.
        mark: the bundle's fingerprint.
    """
    model_cfg = read_json(folder / CONFIG, "bundle")["model_cfg"]
    if (folder / TEXT_CONFIG).exists():
        model_cfg["text_cfg"]["hf_config"] = read_json(folder / TEXT_CONFIG, "bundle")
    text = card_text(
        fingerprint=mark,
        model_cfg=model_cfg,
        preprocess=read_json(folder / PREPROCESS, "bundle"),
        labelsets=sorted(path.stem for path in (folder / "labelsets").iterdir()),
        run=run,
        calibrations=read_json(path, "calibration")["labelsets"] if (path := folder / CALIBRATION).exists() else {},
        stated=stated,
        name=name,
        evaluations=evaluations or [],
    )
    with atomic_file(folder / CARD) as temporary:
        temporary.write_text(text, encoding="utf-8")


def describe(
    bundle: str | Path,
    stated: CardFacts,
    evaluations: Mapping[Path, str | None],
) -> Path:
    """Write a bundle's card anew, with what people state and what was measured; returns the file.

    Args:
        evaluations: files of `medclip-lab evaluate --out`, and what their data are called, if not by themselves.

    Raises:
        UserError: no bundle, or results that are not this model's.
    """
    path, manifest = open_bundle(bundle)
    mark = manifest["fingerprint"]
    measured = [Evaluation.read(file, name, mark) for file, name in evaluations.items()]
    with changed(path) as folder:
        (folder / FORMER_CARD).unlink(missing_ok=True)
        manifest["files"].pop(FORMER_CARD, None)
        write_card(folder, manifest.get("run", {}), mark, stated, measured, name=path.resolve().name)
        manifest["files"][CARD] = sha256(folder / CARD)
        write_json(folder / MANIFEST, manifest)
    return path / CARD


@contextmanager
def changed(bundle: Path) -> Iterator[Path]:
    """A copy of a bundle to write in, which takes its place when the block ends: it changes whole or not.

    Files are shared with the old folder where the disk can, as weights are large: replace them, never write into them.
    """
    with atomic_folder(bundle) as folder:
        shutil.copytree(bundle, folder, copy_function=_link, dirs_exist_ok=True)
        yield folder


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


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
