"""Evaluation beside named peers: building a zero-shot classifier, ranking a full gallery, and bootstrap intervals."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from numpy.typing import NDArray
from torch import Tensor

from medclip_lab.bench.gallery import KS, bench_gallery, features
from medclip_lab.bench.machine import facts
from medclip_lab.bench.phantoms import bench_calibration, bench_pointing, demo_folder
from medclip_lab.errors import UserError
from medclip_lab.evaluation.metrics import patient_weights
from medclip_lab.evaluation.retrieval import retrieval
from medclip_lab.evaluation.scored import Scored, measure
from medclip_lab.inference.classifier import ZeroShotClassifier
from medclip_lab.inference.labelset import LabelPrompts, LabelSet, unknown
from medclip_lab.inference.prompts import encode_prompts
from medclip_lab.models.spec import build_spec

LARGEST_FOR_PEER = 20_000
"""Queries up to which the peer's whole matrices of scores, positives and one-hot rows fit an ordinary machine."""
OF_PHANTOMS = ("calibration", "pointing")
PACKAGES = ("torch", "numpy", "scikit-learn", "open_clip_torch")
TOWER = {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 4}
DEGREES = ["mild", "moderate", "severe", "focal", "diffuse", "patchy", "subtle", "dense", "new", "chronic"]
SIDES = ["left", "right", "bilateral", "apical", "basal", "perihilar", "central", "peripheral", "upper", "lower"]
FINDINGS = [
    "effusion",
    "opacity",
    "consolidation",
    "edema",
    "nodule",
    "mass",
    "atelectasis",
    "fibrosis",
    "emphysema",
    "scar",
]
OPENINGS = ("there is", "findings of", "evidence of", "consistent with", "this shows", "a film with", "we see", "note")
ENDINGS = (
    *("", " today", " on this film", " as before", " in the chest", " in this patient", " again", " here"),
    *(" on the frontal view", " of uncertain age"),
)


def bench_evaluate(
    samples: int = 20_000,
    dim: int = 512,
    classes: int = 1000,
    only: Sequence[str] | None = None,
    demo: Path | None = None,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measure each part, and its peer in the same run; results must agree.

    Args:
        samples: images, and texts, of the retrieval. The peer is left out above 20,000.
        dim: of their features.
        classes: of the classifier, at most 1,000, each with 80 templates.
        only: parts by name; None takes all for which there is what they need.
        demo: folder of a finished demo, which calibration and pointing are measured on.

    Raises:
        UserError: an unknown part, or sizes that measure nothing.
    """
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "bootstrap": bench_bootstrap,
        "retrieval": lambda: bench_retrieval(samples, dim),
        "gallery": lambda: bench_gallery(dim=dim),
        "classifier": lambda: bench_classifier(classes),
        "calibration": lambda: bench_calibration(demo_folder(demo)),
        "pointing": lambda: bench_pointing(demo_folder(demo)),
    }
    for name in only or ():
        if name not in parts:
            raise UserError(f"bench evaluate: no part is called {unknown(name, list(parts))}")
    if samples < 100 or not 2 <= classes <= 1000:
        raise UserError(f"bench evaluate: at least 100 samples and 2 to 1000 classes, got {samples} and {classes}")
    wanted = set(only or parts) - (set() if only or demo else set(OF_PHANTOMS))
    if wanted & set(OF_PHANTOMS):
        demo_folder(demo)  # before anything is measured
    result: dict[str, Any] = {**facts(PACKAGES), "threads": torch.get_num_threads()}
    for name, part in parts.items():
        if name in wanted:
            result[name] = part()
            if say is not None:
                say(f"{name}: {result[name]}")
    return result


def bench_bootstrap(samples: int = 10_000, labels: int = 14, draws: int = 1000) -> dict[str, Any]:
    """Intervals of four ranking metrics of every label."""
    rng = np.random.default_rng(0)
    positive = rng.random((samples, labels)) < np.linspace(0.02, 0.5, labels)
    scores = rng.normal(size=(samples, labels)) + positive
    patients = [str(number) for number in rng.integers(0, samples * 2 // 3, samples)]
    known = np.ones(samples, bool)
    start = time.perf_counter()
    weights = patient_weights(patients, draws, 0)
    told = [Scored(str(number), scores[:, number], positive[:, number], known) for number in range(labels)]
    rows = measure(told, weights, patients).rows
    seconds = time.perf_counter() - start
    assert all(row["low"] < row["auroc"] < row["high"] for row in rows)
    metrics = [name for name, value in rows[0]["metrics"].items() if value["value"] is not None]
    return {"samples": samples, "labels": labels, "draws": draws, "metrics": metrics, "seconds": round(seconds, 2)}


def bench_retrieval(samples: int, dim: int) -> dict[str, Any]:
    """R@1, 5, 10 both ways, by counting and by the method of CLIP_benchmark 1.6."""
    images, texts = features(samples, dim)
    groups = [str(number) for number in range(samples)]
    start = time.perf_counter()
    found = retrieval(images, texts, groups, groups, KS)
    seconds = time.perf_counter() - start
    result: dict[str, Any] = {
        "samples": samples,
        "dim": dim,
        "seconds": round(seconds, 2),
        "image_to_text": asdict(found[0]),
        "text_to_image": asdict(found[1]),
    }
    if samples > LARGEST_FOR_PEER:
        return result
    start = time.perf_counter()
    recalls = full_matrix_recall(torch.from_numpy(images), torch.from_numpy(texts))
    peer = time.perf_counter() - start
    for mine, other in zip(found, recalls, strict=True):
        assert all(abs(mine.recall[k] - other[k]) < 2 / samples for k in KS), "both methods find the same"
    return result | {"peer_seconds": round(peer, 2), "times_faster": round(peer / seconds, 2)}


def full_matrix_recall(images: Tensor, texts: Tensor, rows: int = 64) -> tuple[dict[int, float], dict[int, float]]:
    """R@K both ways as CLIP_benchmark has it: all scores, and a matrix of which pairs belong together.

    For each K anew, and some rows at a time, the K best of a row become one-hot rows as long as the gallery, which are
    multiplied with the row of pairs.
    """
    scores = texts @ images.T
    pairs = torch.zeros_like(scores, dtype=torch.bool)
    pairs[torch.arange(len(texts)), torch.arange(len(images))] = True

    def recall(scores: Tensor, pairs: Tensor, k: int) -> float:
        hits = 0
        for start in range(0, len(scores), rows):
            best = scores[start : start + rows].topk(k, dim=1).indices
            chosen = torch.nn.functional.one_hot(best, num_classes=scores.shape[1])
            hits += int(((chosen * pairs[start : start + rows, None]).sum((1, 2)) > 0).sum())
        return hits / len(scores)

    return {k: recall(scores.T, pairs.T, k) for k in KS}, {k: recall(scores, pairs, k) for k in KS}


def bench_classifier(classes: int) -> dict[str, Any]:
    """Classes times 80 templates through a small text tower, beside open_clip's builder."""
    spec = {"embed_dim": 64, "vision_cfg": {"timm_model_name": "test_resnet", "image_size": 32}, "text_cfg": TOWER}
    torch.manual_seed(0)
    model = build_spec(spec).eval()
    tokenizer = open_clip.SimpleTokenizer(context_length=TOWER["context_length"])
    names = [" ".join(words) for words in product(DEGREES, SIDES, FINDINGS)][:classes]
    templates = [f"{opening} {{}}{ending}." for opening, ending in product(OPENINGS, ENDINGS)]
    prompts = [LabelPrompts(name, [template.format(name) for template in templates]) for name in names]
    start = time.perf_counter()
    ours = ZeroShotClassifier.from_prompts(
        LabelSet("bench", prompts, exclusive=True),
        lambda texts: encode_prompts(model, tokenizer, texts, torch.device("cpu")),
        1.0,
    )
    seconds = time.perf_counter() - start
    tokenizer.cache.clear()  # of words: both begin without it
    start = time.perf_counter()
    theirs = open_clip.build_zero_shot_classifier(model, tokenizer, names, templates).T.numpy()
    peer = time.perf_counter() - start
    means = np.stack([_unit(rows.mean(0, keepdims=True))[0] for rows in ours.positive])
    return {
        "classes": len(names),
        "templates": len(templates),
        "tower": TOWER,
        "seconds": round(seconds, 2),
        "peer_seconds": round(peer, 2),
        "times_faster": round(peer / seconds, 2),
        "largest_difference": float(np.abs(means - theirs).max()),
    }


def table(result: dict[str, Any]) -> str:
    """The figures as lines for people."""
    lines = []
    for name in ("bootstrap", "retrieval", "gallery", "classifier"):
        if name in result:
            told = result[name]
            line = f"{name:<12}{told['seconds']:.2f} s"
            if "peer_seconds" in told:
                line += f"; peer {told['peer_seconds']:.2f} s, {told['times_faster']:.2f} times"
            if "peak_gib_beyond_features" in told:
                line += f"; {told['peak_gib_beyond_features']:.2f} GiB beyond the features"
            lines.append(line)
    if "calibration" in result:
        told = result["calibration"]
        mean, images = told["mean"], told["test_images"]
        lines.append(
            f"{'calibration':<12}error {mean['value']:.4f}, mean of {mean['labels']} labels, {images} test images; a "
            f"perfect one {mean['if_perfect']:.4f}"
        )
    if "pointing" in result:
        focal = result["pointing"]["mean_focal"]
        lines.append(
            f"{'pointing':<12}{focal['pointing']:.3f}, mean of focal findings; chance {focal['chance']:.3f}, best "
            f"fixed point {focal['fixed']:.3f}"
        )
    return "\n".join(lines)


def _unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    unit: NDArray[np.float32] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit
