"""What makes a score a probability and a decision: fitted on validation patients, kept in the bundle, applied here."""

import hashlib
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from medclip_lab.errors import UserError
from medclip_lab.files import atomic_file, digest, read_json, sha256, write_json
from medclip_lab.inference.bundle import CALIBRATION, MANIFEST, changed

FORMAT = "medclip-lab-calibration/1"
JSON, TENSORS = CALIBRATION, "calibration.safetensors"
Method = Literal["platt", "isotonic", "temperature"]
Floats = NDArray[np.floating[Any]]
LEAST, MOST = 1e-300, 1 - 2.0**-53
"""Scores held just inside (0, 1), where a logit is finite."""


@dataclass(frozen=True)
class Curve:
    """From a score to a probability.

    - "platt": sigmoid(slope * f + intercept) (Platt, 1999).
    - "temperature": sigmoid(f / temperature) (Guo et al., ICML 2017), for scores in (0, 1).
    - "isotonic": linear between knots (score, probability), constant beyond them.

    f is the logit of a score in (0, 1), and a cosine as it is.
    """

    method: Method
    parameters: dict[str, Any]
    of_logit: bool

    def feature(self, scores: Floats) -> Floats:
        """f of the formulas."""
        return logit(scores) if self.of_logit else scores

    def probability(self, scores: Floats) -> Floats:
        """[N] probabilities of [N] scores; never falls as the score rises."""
        found = self.parameters
        if self.method == "isotonic":
            values: Floats = np.interp(scores, found["scores"], found["probabilities"])
            return values
        slope, intercept = (
            (1 / found["temperature"], 0.0) if self.method == "temperature" else (found["slope"], found["intercept"])
        )
        probabilities: Floats = np.exp(-np.logaddexp(0, -(slope * self.feature(scores) + intercept)))
        return probabilities


def logit(scores: Floats) -> Floats:
    """log(p / (1 - p)), held where it would be infinite."""
    held = np.clip(scores, LEAST, MOST)
    value: Floats = np.log(held) - np.log1p(-held)
    return value


def operating(probabilities: Floats, threshold: float) -> Floats:
    """Probabilities on a scale where the threshold is 0.5: linear below it and above it, torchxrayvision's op_norm."""
    below = probabilities / (2 * max(threshold, LEAST))
    above = 1 - (1 - probabilities) / (2 * max(1 - threshold, LEAST))
    value: Floats = np.select([probabilities < threshold, probabilities > threshold], [below, above], 0.5)
    return value


class Calibration:
    """One label set's calibration of one bundle, or of several that answer together, as `calibrate` writes it.

    Args:
        facts: what `calibration.json` holds for it.
        domain: {"mean" [D], "whitening" [D, D]} of the images it was made with.
    """

    def __init__(self, facts: dict[str, Any], domain: dict[str, NDArray[np.float32]]) -> None:
        self.facts = facts
        self._domain = domain
        self.labels: dict[str, dict[str, Any]] = {row["name"]: row for row in facts["labels"]}
        self._curves = {
            name: Curve(facts["method"], row["parameters"], facts["of_logit"])
            for name, row in self.labels.items()
            if row["parameters"] is not None
        }

    @property
    def hash(self) -> str:
        """Identity of everything it holds but the patients' hashes."""
        return digest({name: value for name, value in self.facts.items() if name != "patients"})

    def fits(self, rule: str, labelset_hash: str) -> bool:
        """Whether it was made for scores of this rule and label set."""
        return bool(self.facts["rule"] == rule and self.facts["labelset_hash"] == labelset_hash)

    def probabilities(self, name: str, scores: Floats) -> Floats | None:
        """[N] probabilities of one label's scores; None if it could not be calibrated."""
        curve = self._curves.get(name)
        return None if curve is None else curve.probability(scores)

    def threshold(self, name: str) -> float | None:
        """The probability from which on a finding is called present."""
        value = self.labels[name]["threshold"]
        return None if value is None else float(value)

    def answer(self, name: str, score: float) -> dict[str, Any]:
        """{"probability", "threshold", "decision", "operating"}, or {"reason"} for a label without calibration."""
        found, threshold = self.probabilities(name, np.array([score])), self.threshold(name)
        if found is None or threshold is None:
            return {"reason": self.labels[name]["reason"]}
        return {
            "probability": float(found[0]),
            "threshold": threshold,
            "decision": bool(found[0] >= threshold),
            "operating": float(operating(found, threshold)[0]),
        }

    def distances(self, features: Floats) -> Floats:
        """[N] Mahalanobis distances of features [N, D] from the images it was made with."""
        return mahalanobis(features, self._domain["mean"], self._domain["whitening"])

    def out_of_domain(self, features: Floats) -> list[dict[str, Any]]:
        """For each of [N, D] whether it is farther off than a stated share of the validation images was."""
        limit = self.facts["out_of_domain"]["threshold"]
        return [
            {"distance": float(distance), "threshold": limit, "flag": bool(distance > limit)}
            for distance in self.distances(features)
        ]

    def overlap(self, patients: Iterable[str]) -> int:
        """How many of these patients it was made with."""
        known = set(self.facts["patients"]["hashes"])
        salt = self.facts["patients"]["salt"]
        return sum(patient_hash(patient, salt) in known for patient in set(patients))

    def save(self, bundle: Path) -> None:
        """Add to a bundle, in place of an earlier one for the same label set and members; it changes whole or not."""
        # Files of a first version tell no members: they are those of one bundle.
        name = _place(self.facts["labelset"], self.facts.get("members", ()))
        sets, tensors = _read(bundle) if (bundle / JSON).exists() else ({}, {})
        sets[name] = self.facts
        tensors |= {f"{name}.{part}": value for part, value in self._domain.items()}
        manifest = read_json(bundle / MANIFEST, "bundle")
        with changed(bundle) as folder:
            write_json(folder / JSON, {"format": FORMAT, "labelsets": sets})
            with atomic_file(folder / TENSORS) as temporary:
                save_file(tensors, temporary)
            manifest["files"] |= {part: sha256(folder / part) for part in (JSON, TENSORS)}
            write_json(folder / MANIFEST, manifest)

    @classmethod
    def load(cls, bundle: Path, labelset: str, members: Sequence[str] = ()) -> Self | None:
        """A bundle's calibration for a label set; None if it has none.

        Args:
            members: fingerprints of all models of an ensemble, the bundle's first; empty for the bundle alone.

        Raises:
            UserError: the files are damaged, or were made for another model.
        """
        if not (bundle / JSON).exists():
            return None
        sets, tensors = _read(bundle)
        name = _place(labelset, members)
        if name not in sets:
            return None
        if sets[name]["bundle"] != read_json(bundle / MANIFEST, "bundle")["fingerprint"]:
            raise UserError(
                f"calibration: {bundle / JSON} was made for another model: call `medclip-lab calibrate` again"
            )
        return cls(sets[name], {part: tensors[f"{name}.{part}"] for part in ("mean", "whitening")})


def _place(labelset: str, members: Sequence[str]) -> str:
    """Under which name a bundle keeps a calibration: that of an ensemble is lost with any change of any member."""
    return labelset if len(members) < 2 else f"{labelset} of {len(members)} models {digest(list(members))[:32]}"


def _read(bundle: Path) -> tuple[dict[str, Any], dict[str, NDArray[np.float32]]]:
    facts = read_json(bundle / JSON, "calibration")
    if facts.get("format") != FORMAT:
        raise UserError(f"calibration: {bundle / JSON} has format {facts.get('format')!r}, not {FORMAT!r}")
    try:
        return facts["labelsets"], load_file(bundle / TENSORS)
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(
            f"calibration: cannot read {bundle / TENSORS}: {type(error).__name__}: calibrate again"
        ) from None


def mahalanobis(features: Floats, mean: Floats, whitening: Floats) -> Floats:
    """[N] distances; whitening is the transpose of a square root of the inverse covariance."""
    distance: Floats = np.linalg.norm((features.astype(np.float64) - mean) @ whitening.astype(np.float64), axis=1)
    return distance


def hash_patients(patients: Iterable[str]) -> dict[str, Any]:
    """What is kept of the patients: enough to notice them again, and no list of names.

    The salt keeps the hashes of two files from being joined. Who has the file and can guess an id can still test the
    guess, as in any list that can be asked: it is as private as the ids' form makes it.
    """
    salt = secrets.token_hex(16)
    return {
        "algorithm": "sha256 of salt and id",
        "salt": salt,
        "hashes": sorted(patient_hash(p, salt) for p in set(patients)),
    }


def patient_hash(patient: str, salt: str) -> str:
    """16 bytes, as hex."""
    return hashlib.sha256(f"{salt}\n{patient}".encode()).hexdigest()[:32]
