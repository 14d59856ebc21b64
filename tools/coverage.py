"""How often a 95 % bootstrap interval holds the truth, in simulation.

    python tools/coverage.py --repeats 1000 --patients 100 400

Prints a JSON line for each number of patients, studies of a patient and prevalence.
"""

import argparse
import json
from math import sqrt
from statistics import NormalDist

import numpy as np

from medclip_lab.evaluation.bootstrap import sample
from medclip_lab.evaluation.calibrate import wilson
from medclip_lab.evaluation.metrics import Ranked, average_precision, interval, patient_weights

SHIFT = 1.0
"""Mean of the positives' scores, in deviations."""
AUROC = NormalDist().cdf(SHIFT / sqrt(2))


def simulate(rng: np.random.Generator, patients: int, studies: int, prevalence: float) -> tuple[np.ndarray, np.ndarray]:
    """Scores and truth; studies of a patient share the class and half of their variance."""
    positive = np.repeat(np.arange(patients) < round(patients * prevalence), studies)
    shared, own = np.repeat(rng.normal(size=patients), studies), rng.normal(size=patients * studies)
    return SHIFT * positive + (shared + own) / sqrt(2), positive


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=1000)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--patients", type=int, nargs="+", default=[100, 400])
    parser.add_argument("--studies", type=int, nargs="+", default=[1, 4], help="of a patient")
    parser.add_argument("--prevalence", type=float, nargs="+", default=[0.4, 0.1])
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    for patients in args.patients:
        for studies in args.studies:
            for prevalence in args.prevalence:
                large = simulate(rng, 100_000, 1, prevalence)
                truth = {"auroc": AUROC, "auprc": average_precision(*large)}
                held = dict.fromkeys(truth, 0)
                names = [str(number) for number in np.repeat(np.arange(patients), studies)]
                for repeat in range(args.repeats):
                    scores, positive = simulate(rng, patients, studies, prevalence)
                    ranked = Ranked(scores, positive)
                    weights = patient_weights(names, args.draws, repeat)

                    def metrics(block: np.ndarray, ranked: Ranked = ranked) -> dict[str, np.ndarray]:
                        found = ranked.under(block)
                        return {"auroc": found.auroc(), "auprc": found.average_precision()}

                    for name, values in sample(metrics, weights, np.ones(len(scores), bool)).items():
                        low, high = interval(values)
                        held[name] += low <= truth[name] <= high
                row = {"patients": patients, "studies": studies, "prevalence": prevalence}
                for name, count in held.items():
                    low, high = wilson(count, args.repeats)
                    row[name] = {"coverage": count / args.repeats, "low": round(low, 4), "high": round(high, 4)}
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
