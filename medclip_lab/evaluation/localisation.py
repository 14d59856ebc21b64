"""Do maps of a similarity point at what is there? Measured where the regions of the findings are known, as on phantoms.

- Pointing game (Zhang et al., ECCV 2016): share of maps whose highest point lies in a region of the finding. Chance is
  the mean area of the regions, the hit rate of a point drawn anywhere; "fixed" is the hit rate of the one point that
  lies in the most regions, which a map must beat to have looked at its image.
- CNR, contrast to noise (Boecking et al., ECCV 2022): |mean inside - mean outside| / sqrt(variance inside + variance
  outside). As its absolute value praises a map that is dark exactly where it should be bright, the signed mean stands
  beside it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medclip_lab import progress
from medclip_lab.data.decode import DecodeError, decode_image
from medclip_lab.data.manifest import Manifest
from medclip_lab.data.preprocess import Box
from medclip_lab.data.quarantine import Quarantine
from medclip_lab.data.reader import Study, read_split
from medclip_lab.errors import UserError
from medclip_lab.inference.encoder import Encoder
from medclip_lab.inference.explain import Explanation, Method, explain
from medclip_lab.inference.labelset import load_labelset

FOCAL = ("Lung Lesion", "Lung Opacity", "Consolidation", "Pneumonia")
"""Findings of one place in the lungs, of the observations that phantoms draw."""
PLACED = (*FOCAL, "Atelectasis", "Pneumothorax", "Pleural Effusion")
"""These and others that have a box: bands, and what lies along a border."""


def region_mask(boxes: Sequence[Sequence[float]], frame: Box, side: int) -> NDArray[np.bool_]:
    """[side, side]: which cells of a square that lies at `frame` in the picture have their middle in one of the boxes.

    Args:
        boxes: left, top, right, bottom as shares of the picture.
    """
    middles = (np.arange(side) + 0.5) / side
    x, y = frame[0] + middles * (frame[2] - frame[0]), frame[1] + middles * (frame[3] - frame[1])
    mask = np.zeros((side, side), dtype=bool)
    for left, top, right, bottom in boxes:
        mask |= ((y >= top) & (y < bottom))[:, None] & ((x >= left) & (x < right))[None]
    return mask


def points_at(relevance: NDArray[np.floating[Any]], mask: NDArray[np.bool_]) -> float:
    """1 if the highest point lies in the mask, 0 if not; the share of them that does where several are highest."""
    return float(mask[relevance == relevance.max()].mean())


def contrast_to_noise(relevance: NDArray[np.floating[Any]], mask: NDArray[np.bool_]) -> float | None:
    """Signed: (mean inside - mean outside) / sqrt(variance inside + variance outside); None where it is undefined."""
    if mask.all() or not mask.any():
        return None
    inside, outside = relevance[mask].astype(np.float64), relevance[~mask].astype(np.float64)
    spread = float(np.sqrt(inside.var() + outside.var()))
    return float(inside.mean() - outside.mean()) / spread if spread > 0 else None


def localisation(
    encoder: Encoder,
    shards: str | Path,
    split: str = "test",
    labels: Sequence[str] = PLACED,
    *,
    labelset: str | Path = "chexpert14",
    method: Method = "auto",
    stage: int | None = None,
    limit: int = 500,
    max_bad: float = 0.01,
) -> dict[str, Any]:
    """Pointing game and CNR by finding, on studies whose records tell where it is ("regions", as phantoms have).

    The map is that of the label's positive prompts against its negative ones.

    Args:
        limit: studies that are looked at, the first of the split.

    Raises:
        UserError: no such label, or no study with a region.
    """
    prompts = {label.name: label for label in load_labelset(labelset).labels}
    if unknown := [name for name in labels if name not in prompts]:
        raise UserError(f"localisation: label set {labelset} has no {unknown[0]!r}: {', '.join(prompts)}")
    manifest = Manifest.load(shards)
    quarantine = Quarantine(manifest.count(split), max_bad)
    masks: dict[str, list[NDArray[np.bool_]]] = {name: [] for name in labels}
    found: dict[str, list[tuple[float, float | None]]] = {name: [] for name in labels}
    total = min(limit, manifest.count(split))
    used = ""
    for number, study in enumerate(progress.track(read_split(manifest, split, quarantine), "maps", total)):
        if number >= limit:
            break
        for name, boxes in _regions(study, labels).items():
            try:
                image = encoder.preprocess.window(decode_image(study.images[0][1], study.images[0][0]))
            except DecodeError as error:
                quarantine.add(study.shard, study.key, "unreadable image", str(error))
                break
            label = prompts[name]
            told: Explanation = explain(encoder, image, label.positive, label.negative, method=method, stage=stage)
            grown, used = told.enlarged(), told.method
            mask = region_mask(boxes, told.frame, grown.shape[0])
            if mask.any():
                masks[name].append(mask)
                found[name].append((points_at(grown, mask), contrast_to_noise(grown, mask)))
    rows = [_row(name, masks[name], found[name]) for name in labels]
    scored = [row for row in rows if row["pointing"] is not None]
    if not scored:
        raise UserError(f"localisation: no study of split {split!r} tells where {', '.join(labels)} lie")
    keys = ("pointing", "chance", "fixed", "cnr", "signed_cnr")
    mean = {key: _mean([row[key] for row in scored]) for key in keys}
    focal = {key: _mean([row[key] for row in scored if row["name"] in FOCAL]) for key in keys}
    facts = {"method": used, "stage": stage, "split": split, "bundle": encoder.fingerprint}
    return facts | {"labels": rows, "mean": mean, "mean_focal": focal, "focal": list(FOCAL)}


def _regions(study: Study, labels: Sequence[str]) -> dict[str, list[list[float]]]:
    """Boxes in the first image, of the findings that the record calls present."""
    regions, stated = study.record.get("regions"), study.record.get("labels") or {}
    if not isinstance(regions, dict) or not study.images:
        return {}
    boxes = {name: [entry["box"] for entry in regions.get(name, []) if entry.get("image") == 0] for name in labels}
    return {name: found for name, found in boxes.items() if found and stated.get(name) == 1}


def _row(name: str, masks: list[NDArray[np.bool_]], found: list[tuple[float, float | None]]) -> dict[str, Any]:
    row: dict[str, Any] = {"name": name, "images": len(found), "pointing": None, "chance": None, "fixed": None}
    row |= {"cnr": None, "signed_cnr": None}
    if not found:
        return row | {"reason": "no image with a region of it"}
    ratios = [ratio for _, ratio in found if ratio is not None]
    return row | {
        "pointing": float(np.mean([hit for hit, _ in found])),
        "chance": float(np.mean([mask.mean() for mask in masks])),
        "fixed": float(np.mean(masks, axis=0).max()),
        "cnr": _mean([abs(ratio) for ratio in ratios]),
        "signed_cnr": _mean(ratios),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def summary(result: dict[str, Any]) -> str:
    """The result as lines for people."""
    lines = [f"where maps point ({result['method']}; hit rate, chance, best fixed point, CNR):"]
    means = [{"name": name, "images": "", **result[key]} for name, key in (("mean", "mean"), ("focal", "mean_focal"))]
    for row in (*result["labels"], *means):
        if row["pointing"] is None:
            lines.append(f"  {row['name']:<20} -      ({row.get('reason', 'none of them')})")
        else:
            cnr = "-" if row["signed_cnr"] is None else f"{row['signed_cnr']:.2f}"
            count = f"  {row['images']} images" if row["images"] else ""
            values = f"{row['pointing']:.3f}  {row['chance']:.3f}  {row['fixed']:.3f}  {cnr}"
            lines.append(f"  {row['name']:<20} {values}{count}")
    return "\n".join(lines)
