"""What the image tower costs and loses on the CPU in each precision: float32, bfloat16, compiled, ONNX Runtime, int8.

Prompts are encoded once, in float32, as the service does for its label sets: what differs is the image tower alone.
"""

import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medclip_lab.bench.serve import image, make_bundle
from medclip_lab.data.decode import DecodeError, decode_image
from medclip_lab.data.manifest import Manifest
from medclip_lab.data.preprocess import stack
from medclip_lab.data.quarantine import Quarantine
from medclip_lab.data.reader import read_split
from medclip_lab.doctor import commit, cpu_name, memory_gib
from medclip_lab.errors import UserError
from medclip_lab.evaluation.metrics import auroc
from medclip_lab.evaluation.protocol import label_truth
from medclip_lab.inference.encoder import Encoder, load
from medclip_lab.inference.onnx_towers import with_onnx
from medclip_lab.inference.to_onnx import Precision, to_onnx

Floats = NDArray[np.float32]
Side = Callable[[Tensor], Tensor]
"""uint8 pixels [N, C, H, W] to features [N, D], unit norm."""
SIDES = ("float32", "bfloat16", "compiled", "onnx", "onnx-int8")
SECONDS = 0.3
"""Of a timed turn, at least."""


def bench_precision(
    bundle: Path | None = None,
    shards: Path | None = None,
    only: Sequence[str] = (),
    samples: int = 256,
    batch: int = 16,
    repeats: int = 5,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Images a second alone and in batches, and how far features and AUROC are from those in float32.

    The sides take turns, `repeats` times; a rate is the median over turns.

    Args:
        bundle: None makes a small one of random weights, whose features mean nothing.
        shards: labelled images of the split "test" for the AUROC; without them, images are drawn and there is none.
        only: names of SIDES; all if empty. float32 is always among them.
        samples: images that features are compared on.
        batch: images at once.

    Raises:
        UserError: an unknown side, numbers below 1, no bundle, shards without a test split.
    """
    if unknown := [side for side in only if side not in SIDES]:
        raise UserError(f"bench precision: no side is named {unknown[0]!r} (there are {', '.join(SIDES)})")
    for name, value in (("samples", samples), ("batch", batch), ("repeats", repeats)):
        if value < 1:
            raise UserError(f"bench precision: {name} must be at least 1, got {value}")
    tell = say or (lambda _line: None)
    names = [side for side in SIDES if not only or side in only or side == SIDES[0]]
    with tempfile.TemporaryDirectory() as temporary, torch.inference_mode():
        encoder = load(bundle or make_bundle(Path(temporary) / "bundle"), device="cpu")
        pixels, labels = _images(encoder, shards, samples)
        sides: dict[str, Side] = {}
        found: dict[str, dict[str, Any]] = {}
        for name in names:
            try:
                sides[name] = _side(name, encoder, Path(temporary))
            except UserError as error:  # convolutions in int8, ONNX not installed: the others are measured
                found[name] = {"refused": str(error)}
                tell(f"{name}: {error}")
        features = {name: _features(side, pixels, batch) for name, side in sides.items()}
        aurocs = {name: _aurocs(encoder, rows, labels) for name, rows in features.items()}
        for name in sides:
            found[name] = _losses(features[name], features[SIDES[0]], aurocs[name], aurocs[SIDES[0]])
            alone = _features(sides[name], pixels[:batch], 1)
            found[name]["alone_difference"] = float(np.abs(alone - features[name][:batch]).max())
            tell(f"{name}: least cosine {found[name]['cosine_least']:.6f}")
        rates = _rates(sides, pixels, batch, repeats)
    for name, side_rates in rates.items():
        found[name] |= {f"per_second_{size}": round(rate, 1) for size, rate in side_rates.items()}
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": memory_gib(),
        "versions": {name: version(name) for name in ("torch", "onnxruntime") if find_spec(name)},
        "bundle": encoder.fingerprint,
        "images": len(pixels),
        "batch": batch,
        "sides": {name: found[name] for name in names},
    }


def table(result: dict[str, Any]) -> str:
    """Markdown, a line for each side."""
    batch = result["batch"]
    lines = [
        f"| side | images/s alone | in {batch} | least cosine | macro AUROC | largest change | alone and in batch |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, side in result["sides"].items():
        if "refused" in side:
            lines.append(f"| {name} | {side['refused']} | | | | | |")
            continue
        scored = ["-", "-"]
        if side["macro_auroc"] is not None:
            scored = [f"{side['macro_auroc']:.4f}", f"{side['auroc_largest_change']:.4f}"]
        lines.append(
            f"| {name} | {side['per_second_1']} | {side[f'per_second_{batch}']} | {side['cosine_least']:.5f} | "
            f"{scored[0]} | {scored[1]} | {side['alone_difference']:.0e} |"
        )
    return "\n".join(lines)


def _images(encoder: Encoder, shards: Path | None, samples: int) -> tuple[Tensor, list[dict[str, Any]]]:
    """uint8 [N, C, H, W], and the labels of each, none for drawn ones."""
    if shards is None:
        drawn = [decode_image(image(seed), "jpg") for seed in range(min(samples, 64))]
        return stack([encoder.preprocess(one) for one in drawn]), []
    manifest, split = Manifest.load(shards), "test"
    prepared: list[Tensor] = []
    labels: list[dict[str, Any]] = []
    for study in read_split(manifest, split, Quarantine(manifest.count(split), 0.01)):
        if not study.images or len(prepared) == samples:
            continue
        suffix, data = study.images[0]
        with contextlib.suppress(DecodeError):
            prepared.append(encoder.preprocess(decode_image(data, suffix)))
            labels.append(study.record.get("labels") or {})
    if not prepared:
        raise UserError(f"bench precision: split {split!r} of {manifest.folder} has no images")
    return stack(prepared), labels


def _side(name: str, encoder: Encoder, folder: Path) -> Side:
    """The image tower as the service would run it."""
    dual = encoder.model
    if name == "bfloat16":

        def autocast(pixels: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return dual.encode_image(pixels)

        return autocast
    if name == "compiled":
        other = load(encoder.folder, device="cpu").model
        other.model.visual = torch.compile(other.model.visual, dynamic=True)
        return other.encode_image
    if name.startswith("onnx"):
        precision: Precision = "int8" if name == "onnx-int8" else "float32"
        to_onnx(encoder.folder, folder / name, precision=precision)
        return with_onnx(encoder, folder / name).model.encode_image
    return dual.encode_image


def _features(side: Side, pixels: Tensor, batch: int) -> Floats:
    return np.concatenate([side(part).float().numpy() for part in torch.split(pixels, batch)])


def _aurocs(encoder: Encoder, features: Floats, labels: list[dict[str, Any]]) -> dict[str, float]:
    """Of each label of the bundle's first set that has both classes here."""
    carried = sorted(name for name in encoder.manifest["files"] if name.startswith("labelsets/"))
    if not labels or not carried:
        return {}
    classifier = encoder.zero_shot_classifier(Path(carried[0]).stem)
    scores = classifier.scores(features)
    found = {}
    for column, name in enumerate(classifier.names):
        positive, used = label_truth(labels, name)
        if len(set(positive[used].tolist())) == 2:
            found[name] = auroc(scores[used, column], positive[used])
    return found


def _losses(features: Floats, whole: Floats, scored: dict[str, float], known: dict[str, float]) -> dict[str, Any]:
    cosines = (features * whole).sum(1) / np.linalg.norm(features, axis=1) / np.linalg.norm(whole, axis=1)
    changes = [abs(scored[name] - known[name]) for name in known]
    return {
        "cosine_least": float(cosines.min()),
        "cosine_mean": float(cosines.mean()),
        "macro_auroc": round(statistics.fmean(scored.values()), 5) if scored else None,
        "auroc_largest_change": round(max(changes), 5) if changes else None,
        "auroc_labels": len(scored),
    }


def _rates(sides: dict[str, Side], pixels: Tensor, batch: int, repeats: int) -> dict[str, dict[int, float]]:
    """Side -> images at once -> images a second, the median over turns."""
    sizes = sorted({1, batch})
    inputs = {size: pixels[torch.arange(size) % len(pixels)] for size in sizes}
    turns: dict[str, dict[int, list[float]]] = {name: {size: [] for size in sizes} for name in sides}
    for side in sides.values():
        for size in sizes:
            side(inputs[size])  # compiled and warm
    for _ in range(repeats):
        for size in sizes:
            for name, side in sides.items():
                calls, start = 0, time.perf_counter()
                while (took := time.perf_counter() - start) < SECONDS or calls == 0:
                    side(inputs[size])
                    calls += 1
                turns[name][size].append(calls * size / took)
    return {name: {size: statistics.median(rates) for size, rates in by.items()} for name, by in turns.items()}
