"""What can be had of phantoms alone: patients without end for probabilities, and the true region for maps."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from medclip_lab.data.prepare import prepare
from medclip_lab.data.sources.base import Record
from medclip_lab.data.sources.phantom import Phantom
from medclip_lab.errors import UserError
from medclip_lab.evaluation.calibrate import calibrate
from medclip_lab.evaluation.held_out import encode_split
from medclip_lab.evaluation.localisation import localisation
from medclip_lab.evaluation.zero_shot import zero_shot
from medclip_lab.files import read_json
from medclip_lab.inference.calibration import Method
from medclip_lab.inference.encoder import load

LABELSET = "chexpert14"


def demo_folder(demo: Path | None) -> Path:
    """The folder of a demo that is finished.

    Raises:
        UserError: none is named, or there is no bundle and no shards in it.
    """
    if demo is None:
        raise UserError("bench evaluate: calibration and pointing need a demo's folder: --demo runs/demo")
    if not ((demo / "bundle" / "manifest.json").exists() and (demo / "shards" / "manifest.json").exists()):
        raise UserError(f"bench evaluate: --demo: {demo} holds no finished demo: medclip-lab demo --out {demo}")
    return demo


class Unseen(Phantom):
    """Phantoms without those that a training would take."""

    def records(self) -> list[Record]:
        return [record for record in super().records() if record.split != "train"]


def bench_calibration(demo: Path, studies: int = 20_000, method: Method = "platt", draws: int = 1000) -> dict[str, Any]:
    """Expected calibration error of every label on test patients, after a calibration on validation patients.

    Both are patients of another seed than the demo's, and more of them: with a few hundred images the error of a
    perfect calibration would be as large as what is looked for. "if_perfect" is the error that it would have.

    The demo's bundle stays as it is: a copy is calibrated.

    Args:
        studies: drawn; a tenth of the patients are for validation, a fifth for the test, the rest is not drawn.
    """
    settings = read_json(demo / "settings.json", "demo")
    with tempfile.TemporaryDirectory(prefix="medclip-lab-bench-") as folder:
        bundle, shards = Path(folder) / "bundle", Path(folder) / "shards"
        prepare(Unseen(studies, settings["seed"] + 1, settings["size"]), shards)
        shutil.copytree(demo / "bundle", bundle)
        calibration = calibrate(load(bundle), shards, LABELSET, "val", method=method)
        calibration.save(bundle)
        encoder = load(bundle)
        held_out, _ = encode_split(encoder, shards, "test", texts=False)
        table = zero_shot(encoder, held_out, LABELSET, draws=draws)
    labels = []
    for row in table["labels"]:
        told = {"name": row["name"], "positives": row["positives"], "negatives": row["negatives"]}
        told |= row["metrics"]["ece"]
        labels.append(told)
    by_chance = [row["if_perfect"] for row in labels if "if_perfect" in row]
    return {
        "bundle": encoder.fingerprint,
        "labelset": LABELSET,
        "rule": table["rule"],
        "method": calibration.facts["method"],
        "validation_images": calibration.facts["images"],
        "test_images": len(held_out.study_ids),
        "test_patients": len(set(held_out.patient_ids)),
        "mean": table["macro"]["metrics"]["ece"] | {"if_perfect": float(np.mean(by_chance))},
        "labels": labels,
    }


def bench_pointing(demo: Path) -> dict[str, Any]:
    """Pointing game of every finding that has a place, on the test patients."""
    return localisation(load(demo / "bundle"), demo / "shards", "test")
