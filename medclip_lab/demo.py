"""The main job on drawn phantoms, step by step through the same calls as any other run, and the page that shows it."""

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from medclip_lab.config import load_config, shipped
from medclip_lab.data.prepare import prepare
from medclip_lab.data.sources.phantom import Phantom
from medclip_lab.demo_page import Controls, at_k, write_page
from medclip_lab.errors import UserError
from medclip_lab.evaluation.protocol import HeldOut, blur, encode_split, report
from medclip_lab.files import digest, read_json, write_json
from medclip_lab.inference.encoder import Encoder, load
from medclip_lab.retrieval.build import build_index
from medclip_lab.retrieval.embed import embed
from medclip_lab.retrieval.index import open_index
from medclip_lab.retrieval.parts import EmbedConfig
from medclip_lab.training.export import export
from medclip_lab.training.run import RunConfig, train

STUDIES = 2400
IMAGE_SIZE = 128
BLUR = 0.06  # of the side: ribs, lines and small findings are gone, the outline of the heart is not
CONTROL_EPOCHS = 0.1  # of the main run's; the control has nothing to learn and only needs the chance to


class Steps:
    """Runs each step once: a step whose request and results are there already is reused."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "steps.json"
        self.done: dict[str, dict[str, Any]] = read_json(self.path, "demo") if self.path.exists() else {}
        self.timings: list[tuple[str, float, bool]] = []

    def run(self, name: str, request: Any, result: str, make: Callable[[Path], Any]) -> Path:
        """`make(folder / result)` unless it was done for the same `request`; returns that path."""
        path, wanted = self.folder / result, digest([request, name])
        recorded = self.done.get(name, {})
        if recorded.get("request") == wanted and path.exists():
            self.timings.append((name, recorded["seconds"], True))
            print(f"{name}: reused from {path}", file=sys.stderr)
            return path
        print(f"{name} ...", file=sys.stderr)
        start = time.monotonic()
        make(path)
        seconds = round(time.monotonic() - start, 1)
        self.done[name] = {"request": wanted, "seconds": seconds}
        write_json(self.path, self.done)
        self.timings.append((name, seconds, False))
        return path


def demo(out: Path, seed: int = 0, studies: int | None = None, command: str = "medclip-lab demo") -> dict[str, Any]:
    """Run the whole job into `out`; a second call reuses what is finished.

    Args:
        studies: number of drawn studies, at least 200 so that every split has some of everything.

    Returns:
        The figures, with "summary" for people and "page", the path of the HTML page.

    Raises:
        UserError: too few studies, or `out` holds a demo with another seed or number of studies.
    """
    studies = STUDIES if studies is None else studies
    if studies < 200:
        raise UserError(f"--studies must be at least 200 to train and to measure on, got {studies}")
    start = time.monotonic()
    out = out.expanduser()
    settings = {"seed": seed, "studies": studies, "size": IMAGE_SIZE}
    if (out / "settings.json").exists() and read_json(out / "settings.json", "demo") != settings:
        raise UserError(f"--out: {out} holds a demo with other settings: choose another folder, or remove it")
    if out.exists() and not (out / "settings.json").exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out: {out} exists and holds something else: choose another folder")
    write_json(out / "settings.json", settings)
    steps = Steps(out)

    shards = steps.run("draw phantoms and write shards", settings, "shards", lambda path: _shards(path, settings))
    run = steps.run("train", settings, "run", lambda path: train(_config(path, shards, seed)))
    control_run = steps.run(
        "train the control on shuffled pairs", settings, "control/run", lambda path: train(_control(path, shards, seed))
    )
    bundle = steps.run("export", settings, "bundle", lambda path: export(run, path, ["chexpert14"], command))
    control_bundle = steps.run(
        "export the control",
        settings,
        "control/bundle",
        lambda path: export(control_run, path, ["chexpert14"], command),
    )
    encoder = load(bundle)
    held_out: list[HeldOut] = []

    def evaluate_all(path: Path) -> None:
        held_out.append(encode_split(encoder, shards, "test", keep_images=True)[0])
        blurred = encode_split(encoder, shards, "test", blur(BLUR), texts=False)[0]
        blurred.text_features = held_out[0].text_features
        control = load(control_bundle)
        shuffled = encode_split(control, shards, "test")[0]
        results = {
            "model": _report(encoder, held_out[0], shards, seed),
            Controls.BLURRED: _report(encoder, blurred, shards, seed),
            Controls.SHUFFLED: _report(control, shuffled, shards, seed),
        }
        write_json(path, results)

    results_path = steps.run("evaluate on held-out patients, with controls", settings, "results.json", evaluate_all)
    embeddings = steps.run(
        "embed the held-out studies",
        settings,
        "embeddings",
        lambda path: embed(encoder, shards, path, "test", EmbedConfig(include_text=True)),
    )
    indexes = {
        modality: steps.run(
            f"index their {name}s",
            settings,
            f"index-{name}s",
            lambda path, modality=modality: build_index(embeddings, path, modality, include_text=True),  # type: ignore[misc]
        )
        for modality, name in (("image", "image"), ("text", "report"))
    }
    results = json.loads(results_path.read_text(encoding="utf-8"))
    if not held_out:
        held_out.append(encode_split(encoder, shards, "test", keep_images=True)[0])
    page_start = time.monotonic()
    facts = {
        "settings": settings,
        "command": command,
        "timings": steps.timings,
        "peak_memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "started": start,
    }
    page = write_page(
        out,
        results,
        held_out[0],
        encoder,
        {modality: open_index(path, encoder.fingerprint) for modality, path in indexes.items()},
        run,
        shards,
        facts,
    )
    steps.timings.append(("classify, search and write the page", round(time.monotonic() - page_start, 1), False))
    return _result(results, page, facts, start)


def _shards(path: Path, settings: dict[str, Any]) -> None:
    prepare(Phantom(**settings), path)


def _config(out: Path, shards: Path, seed: int, *more: str) -> RunConfig:
    overrides = [f"--out={out}", f"--seed={seed}", f"--data.sources.phantom.shards={shards}", *more]
    return load_config(RunConfig, shipped("phantom.yaml"), overrides)


def _control(out: Path, shards: Path, seed: int) -> RunConfig:
    config = _config(out, shards, seed, "--data.control=shuffled_pairs", "--trainer.val_every=0")
    assert config.trainer.epochs is not None
    config.trainer.epochs *= CONTROL_EPOCHS
    return config


def _report(encoder: Encoder, held_out: HeldOut, shards: Path, seed: int) -> dict[str, Any]:
    return report(encoder, held_out, shards, "test", "chexpert14", seed=seed)


def _result(results: dict[str, Any], page: Path, facts: dict[str, Any], start: float) -> dict[str, Any]:
    macro = {name: result["zero_shot"]["macro"]["auroc"] for name, result in results.items()}
    found = results["model"]["retrieval"]["text_to_image"]
    span = results["model"]["zero_shot"]["macro"]
    seconds = time.monotonic() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    lines = [
        f"macro AUROC over {span['labels']} findings, held-out patients: {span['auroc']:.3f} "
        f"({span['low']:.3f}-{span['high']:.3f}); {Controls.BLURRED} {macro[Controls.BLURRED]:.3f}, "
        f"{Controls.SHUFFLED} {macro[Controls.SHUFFLED]:.3f}",
        f"text to image R@10: {at_k(found['recall'], 10):.3f}, chance {at_k(found['chance'], 10):.3f}",
        f"{seconds:.0f} s, peak memory {peak:.1f} GiB",
        f"look at it: {page}",
        f"ask it: medclip-lab search {page.parent}/bundle {page.parent}/index-images --text 'left pleural effusion'",
    ]
    return {
        "macro_auroc": macro,
        "text_to_image": found,
        "image_to_text": results["model"]["retrieval"]["image_to_text"],
        "seconds": round(seconds, 1),
        "peak_memory_gib": round(peak, 2),
        "timings": facts["timings"],
        "page": str(page),
        "summary": "\n".join(lines),
    }
