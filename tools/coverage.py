"""How often the 95 % intervals of an evaluation hold the truth, in simulation.

    python tools/coverage.py --repeats 1000 --patients 100 400 --out benchmarks/coverage.json

Prints a JSON line for each AUROC, number of patients, studies of a patient and prevalence.
"""

import argparse
import json
from math import sqrt
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from medclip_lab import progress
from medclip_lab.bench.machine import facts
from medclip_lab.evaluation.bootstrap import wilson
from medclip_lab.evaluation.metrics import Ranked, patient_weights
from medclip_lab.evaluation.scored import RANKING, Scored, measure
from medclip_lab.files import write_json

LARGE = 200_000
"""Patients of one study whose metrics are taken for the truth."""


def simulate(
    rng: np.random.Generator, shift: float, patients: int, studies: int, prevalence: float
) -> tuple[np.ndarray, np.ndarray]:
    """Scores and truth; studies of a patient share the class and half of their variance."""
    positive = np.repeat(np.arange(patients) < round(patients * prevalence), studies)
    shared, own = np.repeat(rng.normal(size=patients), studies), rng.normal(size=patients * studies)
    return shift * positive + (shared + own) / sqrt(2), positive


def truths(rng: np.random.Generator, shift: float, prevalence: float) -> dict[str, float]:
    counts = Ranked(*simulate(rng, shift, LARGE, 1, prevalence)).plain()
    values = counts.auroc(), counts.average_precision(), counts.sensitivity_at(0.9), counts.specificity_at(0.9)
    return {name: float(value[0]) for name, value in zip(RANKING, values, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=1000)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--auroc", type=float, nargs="+", default=[0.76, 0.92], help="the true one")
    parser.add_argument("--patients", type=int, nargs="+", default=[100, 400])
    parser.add_argument("--studies", type=int, nargs="+", default=[1, 4], help="of a patient")
    parser.add_argument("--prevalence", type=float, nargs="+", default=[0.4, 0.1])
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    rng, rows = np.random.default_rng(0), []
    for auroc in args.auroc:
        shift = NormalDist().inv_cdf(auroc) * sqrt(2)
        for patients in args.patients:
            for studies in args.studies:
                for prevalence in args.prevalence:
                    truth = truths(rng, shift, prevalence)
                    held = dict.fromkeys(truth, 0)
                    names = [str(number) for number in np.repeat(np.arange(patients), studies)]
                    known = np.ones(len(names), bool)
                    for repeat in progress.track(range(args.repeats), "samples", args.repeats):
                        label = Scored("simulated", *simulate(rng, shift, patients, studies, prevalence), known)
                        told = measure([label], patient_weights(names, args.draws, repeat), names).rows[0]["metrics"]
                        for name, value in truth.items():
                            held[name] += told[name]["low"] <= value <= told[name]["high"]
                    row: dict[str, Any] = {
                        "true_auroc": auroc,
                        "patients": patients,
                        "studies": studies,
                        "prevalence": prevalence,
                    }
                    row["positive_patients"] = round(patients * prevalence)
                    for name, count in held.items():
                        low, high = wilson(count, args.repeats)
                        row[name] = {"coverage": count / args.repeats, "low": round(low, 4), "high": round(high, 4)}
                    rows.append(row)
                    print(json.dumps(row), flush=True)
    if args.out:
        command = f"python tools/coverage.py --repeats {args.repeats} --draws {args.draws}"
        write_json(args.out, {"command": command, **facts(("numpy",)), "repeats": args.repeats, "rows": rows})


if __name__ == "__main__":
    main()
