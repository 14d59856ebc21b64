"""The calibrated policy over many splits: is its risk what was stated, and which fixed k has the same risk."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medclip_lab.bench.index import environment
from medclip_lab.bench.vectors import Corpus
from medclip_lab.errors import UserError
from medclip_lab.retrieval.build import build_index
from medclip_lab.retrieval.choose import Goals
from medclip_lab.retrieval.index import open_index
from medclip_lab.retrieval.rag import Ask, Labels, answered, ask, contradicts, supports
from medclip_lab.retrieval.risk import Answered, Risk, Signal, calibrate, loss

K = 10
CASES: tuple[tuple[Risk, Signal, float], ...] = (
    ("contradiction", "chance", 0.1),
    ("contradiction", "chance", 0.3),
    ("contradictions", "chance", 0.05),
    ("miss", "chance", 0.1),
    ("miss", "chance", 0.2),
)
FINDINGS, PRESENT, ABSENT = 4, 0.85, 0.6
"""Findings, and the quantiles of a projection above which a study has one and below which it has not; what lies between
is not mentioned."""
CALIBRATION = 300
"""Queries of a split that calibrate, at most half of all; the others are measured."""
ASKING = 3000


def bench_risk(given: Corpus | Path, splits: int = 200, say: Callable[[str], None] | None = None) -> dict[str, Any]:
    """The calibrated policy over random splits of what images are answered with, exactly.

    Args:
        given: a corpus, whose findings are projections of what image and report share; or a folder of embeddings, of
            which one image of each patient asks for reports of the others.

    Raises:
        UserError: too few studies or splits.
    """
    if splits < 2 or (isinstance(given, Corpus) and given.size < 2 * ASKING):
        size = f"{given.size}" if isinstance(given, Corpus) else f"those of {given}"
        raise UserError(f"bench: at least {2 * ASKING} studies and 2 splits, got {size} and {splits}")
    answers = answers_of(given) if isinstance(given, Corpus) else answers_from(given)
    runs = []
    for risk, signal, alpha in CASES:
        run: dict[str, Any]
        try:
            run = over_splits(answers, risk, signal, alpha, splits)
        except UserError as error:  # more is missed than alpha, for example
            run = {"risk": risk, "alpha": alpha, "signal": signal, "reason": str(error)}
        runs.append(run)
        if say is not None:
            say(_line(run))
    of = {"size": given.size, "dim": given.dim} if isinstance(given, Corpus) else {}
    return {**of, "queries": len(answers), "k": K, "splits": splits, **environment(), "runs": runs}


def over_splits(
    answers: Sequence[Answered], risk: Risk, signal: Signal, alpha: float, splits: int, k: int = K
) -> dict[str, Any]:
    """Means over random splits, with the fixed k whose risk on the same queries is the same."""
    rng = np.random.default_rng(0)
    risks, kept, fixed = [], [], []
    held = min(CALIBRATION, len(answers) // 2)
    for _ in range(splits):
        order = rng.permutation(len(answers))
        policy = calibrate([answers[place] for place in order[:held]], risk, alpha, signal, k)
        asked = [answers[place] for place in order[held:]]
        sizes = [policy.keep(found.scores) for found in asked]
        risks.append(np.mean([loss(found, size, risk, k) for found, size in zip(asked, sizes, strict=True)]))
        kept.append(np.mean(sizes))
        fixed.append(equal_k(curve(asked, risk, k), float(risks[-1])))
    error = float(np.std(risks, ddof=1) / np.sqrt(splits))
    return {
        "risk": risk,
        "alpha": alpha,
        "signal": signal,
        "mean_risk": round(float(np.mean(risks)), 4),
        "two_standard_errors": round(2 * error, 4),
        "held": bool(np.mean(risks) <= alpha + 2 * error),
        "mean_kept": round(float(np.mean(kept)), 3),
        "fixed_k_of_equal_risk": round(float(np.mean(fixed)), 3),
    }


def curve(answers: Sequence[Answered], risk: Risk, k: int) -> NDArray[np.float64]:
    """[k + 1] the risk of keeping 0, 1, ... k reports of every query."""
    return np.array([np.mean([loss(found, kept, risk, k) for found in answers]) for kept in range(k + 1)])


def equal_k(risks: NDArray[np.float64], risk: float) -> float:
    """The fixed k of this risk, drawn between two whole numbers if it lies between theirs; K where none is so low."""
    places = np.arange(len(risks), dtype=np.float64)
    falls = risks[-1] < risks[0]
    return float(np.interp(risk, risks[::-1] if falls else risks, places[::-1] if falls else places))


def answers_from(folder: Path) -> list[Answered]:
    """What an image of each patient of a folder of embeddings is answered with, by all labels of its rows."""
    with tempfile.TemporaryDirectory(prefix="medclip-lab-bench-") as temporary:
        index = Path(temporary) / "index"
        build_index(folder, index, "text", goals=Goals(factory="Flat"), say=lambda _: None)
        store = open_index(index)
        return [answered(query, hits, None) for query, hits in ask(store, folder, Ask(k=K, one_a_patient=True))]


def answers_of(corpus: Corpus) -> list[Answered]:
    """What images of the first studies are answered with: the `K` nearest reports of all others."""
    blocks = list(corpus.blocks())
    images, texts = (np.concatenate([block[name] for block in blocks]) for name in ("image", "text"))
    directions = np.random.default_rng(corpus.seed).standard_normal((corpus.dim, FINDINGS))
    values = (images + texts) @ directions
    low, high = np.quantile(values, ABSENT, axis=0), np.quantile(values, PRESENT, axis=0)
    labels: list[Labels] = [
        {str(n): int(value > high[n]) for n, value in enumerate(row) if value > high[n] or value < low[n]}
        for row in values
    ]
    answers = []
    for query in range(ASKING):
        scores = texts[ASKING:] @ images[query]
        nearest = np.argpartition(-scores, K)[:K]
        nearest = nearest[np.argsort(-scores[nearest])]
        found = [labels[ASKING + row] for row in nearest]
        answers.append(
            Answered(
                scores[nearest].tolist(),
                [contradicts(labels[query], its) for its in found],
                [supports(labels[query], its) for its in found],
            )
        )
    return answers


def _line(run: dict[str, Any]) -> str:
    asked = f"{run['risk']} <= {run['alpha']:g} by {run['signal']}"
    if "reason" in run:
        return f"{asked}: {run['reason']}"
    return (
        f"{asked}: {run['mean_risk']:.4f} (two standard errors "
        f"{run['two_standard_errors']:.4f}), {run['mean_kept']:.2f} reports kept; a fixed k of "
        f"{run['fixed_k_of_equal_risk']:.2f} has the same risk"
    )


def told(result: dict[str, Any]) -> str:
    """A line for each risk."""
    return "\n".join(_line(run) for run in result["runs"])
