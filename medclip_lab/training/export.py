"""From a finished run to a bundle."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from medclip_lab.config import load_config
from medclip_lab.data.preprocess import PreprocessConfig
from medclip_lab.errors import UserError
from medclip_lab.files import atomic_folder, existing_folder, read_json, refuse_to_replace
from medclip_lab.inference.bundle import FORMAT, MANIFEST, finish_bundle, write_bundle
from medclip_lab.inference.encoder import load
from medclip_lab.inference.labelset import find_labelset, load_labelset
from medclip_lab.models.spec import beyond_open_clip
from medclip_lab.training.resume import CONFIG, DONE, FACTS
from medclip_lab.training.run import MODEL, WEIGHTS, RunConfig


def export(
    run: str | Path,
    out: str | Path,
    labelsets: list[str] | None = None,
    command: str = "",
    truncate: bool = False,
) -> dict[str, Any]:
    """Write the bundle of a finished run to `out`, whole or not at all; returns its manifest.

    Args:
        command: what made the bundle, for its manifest.
        truncate: cut prompts that are longer than the model's context.
        labelsets: label sets (names of shipped ones, or YAML files) whose classifiers the bundle carries.

    Raises:
        UserError: the run is not finished, `out` holds something else, or a prompt is too long.
    """
    run, out = existing_folder(run, "run"), Path(out).expanduser()
    if not (run / WEIGHTS).exists() or not (run / DONE).exists():
        raise UserError(f"run: {run} is not finished (no {DONE}): call `medclip-lab train` again to go on")
    refuse_to_replace(out, MANIFEST, (FORMAT,), "bundle")
    config = load_config(RunConfig, run / CONFIG)
    model = read_json(run / MODEL, "run")
    done = read_json(run / DONE, "run")
    paths = [find_labelset(name) for name in labelsets or []]
    for path in paths:
        load_labelset(path)
    if beyond := beyond_open_clip(model["model_cfg"]):
        print(f"medclip_lab.load opens this bundle, plain open_clip does not: {', '.join(beyond)}", file=sys.stderr)
    card = {
        "loss": config.loss.name,
        "sources": ", ".join(config.data.sources),
        "steps": done["steps"],
        "batch": config.data.batch_size,
        "shards": read_json(run / FACTS, "run")["shards"],
    }
    with atomic_folder(out) as folder:
        write_bundle(
            folder,
            weights=load_file(run / WEIGHTS),
            model_cfg=model["model_cfg"],
            preprocess=PreprocessConfig.from_record(model["preprocess_cfg"]),
            tokenizer=run / "tokenizer" if (run / "tokenizer").exists() else None,
            labelsets=paths,
            card=card,
            augment=asdict(config.data.augment),
        )
        facts = {"run": card}
        finish_bundle(folder, command, facts)
        encoder = load(folder, device="cpu")
        (folder / "classifiers").mkdir()
        for path in paths:
            classifier = encoder.zero_shot_classifier(path, truncate=truncate)
            classifier.save(folder / "classifiers" / f"{classifier.labelset}.safetensors")
        return finish_bundle(folder, command, facts)
