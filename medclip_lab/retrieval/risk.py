"""How many answers may be kept at a risk that is stated: conformal risk control.

Angelopoulos et al., "Conformal Risk Control" (ICLR 2024): for losses L_i of n exchangeable queries, bounded by B and
never growing with a parameter, take inf{lambda: n / (n + 1) * mean L_i(lambda) + B / (n + 1) <= alpha}; the expected
loss of the next query is then at most alpha. It is an average over calibrations and queries, no promise for each.

An answer is cut where its signal falls to a threshold, so that a stricter one keeps a part of what a laxer one kept,
and each loss here goes one way:

- contradiction: 1 if any kept report contradicts the query's study. A higher threshold keeps fewer: lambda is it.
- contradictions: how many do, over k. The same way. (Over those kept it would be no monotone loss, and no guarantee.)
- miss: 1 if no kept report supports the study. A lower threshold keeps more: lambda is minus it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np

from medclip_lab.errors import UserError
from medclip_lab.files import read_json, write_json
from medclip_lab.retrieval.chance import Chance, fit

FORMAT = "medclip-lab-risk/2"
Risk = Literal["contradiction", "contradictions", "miss"]
RISKS: tuple[Risk, ...] = ("contradiction", "contradictions", "miss")
Signal = Literal["chance", "score", "ratio", "rank"]
SIGNALS: tuple[Signal, ...] = ("chance", "score", "ratio", "rank")
FITTED = 3
"""One query in so many fits the model of "chance", and calibrates nothing."""


@dataclass(frozen=True)
class Answered:
    """The answer to one query whose study is known, best first."""

    scores: Sequence[float]
    contradicts: Sequence[bool]
    """Whether each report contradicts the query's study."""
    supports: Sequence[bool]
    """Whether each report says what the study shows."""


@dataclass(frozen=True)
class Calibrated:
    """The policy that keeps a stated risk under alpha."""

    risk: Risk
    alpha: float
    signal: Signal
    """"chance" cuts by the risk so far, as a model foretells it; "score" by cosine; "ratio" by score / best. "rank" is
    one k for all queries."""
    threshold: float
    k: int
    """Answers that were looked at; more are never kept."""
    queries: int
    """Of the calibration, one a patient."""
    chance: Chance | None = None
    """Of a report to do what the risk is about; for the signal of that name."""

    def keep(self, scores: Sequence[float]) -> int:
        """As `Policy.keep`."""
        signals = signals_of(scores[: self.k], self.signal, self.risk, self.chance)
        if self.risk == "miss":
            return sum(1 for signal in signals if -signal <= self.threshold)
        return sum(1 for signal in signals if signal > self.threshold)


def signals_of(scores: Sequence[float], signal: Signal, risk: Risk, chance: Chance | None = None) -> list[float]:
    """What is compared with the threshold; it falls along an answer.

    Of "chance" it is, against contradictions, how probably none of the reports up to this one contradicts. Against
    misses it is how probably this one is the first that supports: what is gained by it, which for the hard queries may
    be as little as for those that have their support.
    """
    if signal == "chance":
        assert chance is not None
        chances = chance.of(scores)
        none_yet = np.cumprod(1 - chances)
        if risk != "miss":
            return [float(value) for value in none_yet]
        return [float(value) for value in np.minimum.accumulate(chances * none_yet / (1 - chances))]
    if signal == "rank":
        return [-float(place) for place in range(1, len(scores) + 1)]
    if signal == "score" or not scores:
        return [float(score) for score in scores]
    if scores[0] <= 0:  # nothing points the query's way: the quotients mean nothing
        return [1.0, *[-math.inf] * (len(scores) - 1)]
    return [float(score) / float(scores[0]) for score in scores]


def loss(answered: Answered, kept: int, risk: Risk, k: int) -> float:
    """What a query costs, 0 to 1, if its first `kept` reports are kept of k that were looked at."""
    if risk == "miss":
        return float(not any(answered.supports[:kept]))
    wrong = sum(answered.contradicts[:kept])
    return float(wrong > 0) if risk == "contradiction" else wrong / k


def calibrate(answers: Sequence[Answered], risk: Risk, alpha: float, signal: Signal, k: int) -> Calibrated:
    """The laxest threshold whose risk stays under alpha, or for "miss" the strictest.

    Args:
        answers: exchangeable with what will be asked: one a patient, of a split that trained nothing.
        k: reports of an answer that are looked at.

    Raises:
        UserError: alpha out of range, too few queries for it, or a risk that no threshold brings under it.
    """
    if risk not in RISKS or signal not in SIGNALS:
        raise UserError(f"calibrate: risk is one of {', '.join(RISKS)} and signal one of {', '.join(SIGNALS)}")
    if not 0 < alpha < 1:
        raise UserError(f"calibrate: alpha must lie between 0 and 1, got {alpha}")
    if k < 1:
        raise UserError(f"calibrate: k must be at least 1, got {k}")
    model = None
    if signal == "chance":
        fitting = answers[::FITTED]
        having = [(given.supports if risk == "miss" else given.contradicts)[:k] for given in fitting]
        model = fit([given.scores[:k] for given in fitting], having)
        answers = [given for place, given in enumerate(answers) if place % FITTED]
    count = len(answers)
    budget = alpha * (count + 1) - 1
    if budget < 0:
        rest = f" beside the {len(fitting)} that fit a model" if model is not None else ""
        raise UserError(
            f"calibrate: {count} queries are too few for alpha {alpha}: at least {math.ceil(1 / alpha) - 1} are needed"
            f"{rest}"
        )
    signals = [signals_of(given.scores[:k], signal, risk, model) for given in answers]
    threshold = _smallest(*_steps(answers, signals, risk, k), budget)
    if threshold == math.inf:
        missed = sum(not any(given.supports[:k]) for given in answers) / count
        raise UserError(
            f"calibrate: {missed:.1%} of the queries have no supporting report among {k}, more than alpha {alpha} "
            "allows: raise k or alpha"
        )
    return Calibrated(risk, alpha, signal, threshold, k, count, model)


def _steps(
    answers: Sequence[Answered], signals_of_each: Sequence[Sequence[float]], risk: Risk, k: int
) -> tuple[list[float], list[float]]:
    """Values of lambda at which the sum of all losses falls, and by how much."""
    places: list[float] = []
    heights: list[float] = []
    for given, signals in zip(answers, signals_of_each, strict=True):
        if risk == "miss":
            right = [value for value, supports in zip(signals, given.supports, strict=False) if supports]
            places.append(-right[0] if right else math.inf)
            heights.append(1.0)
            continue
        wrong = [value for value, contradicts in zip(signals, given.contradicts, strict=False) if contradicts]
        if risk == "contradiction":
            wrong = wrong[:1]
        places += wrong
        heights += [1.0 if risk == "contradiction" else 1 / k] * len(wrong)
    return places, heights


def _smallest(places: Sequence[float], heights: Sequence[float], budget: float) -> float:
    """The smallest lambda with no more than the budget of steps above it: sums of losses are right-continuous."""
    order = np.argsort(-np.asarray(places, np.float64), kind="stable")
    above = np.cumsum(np.asarray(heights, np.float64)[order])
    over = np.flatnonzero(above > budget + 1e-9)
    return float(places[order[over[0]]]) if len(over) else -math.inf


def save_calibration(path: Path, calibrated: Calibrated, facts: dict[str, Any]) -> dict[str, Any]:
    """Write what the policy is and what it holds for; returns it."""
    threshold = None if calibrated.threshold == -math.inf else calibrated.threshold  # JSON has no infinity
    value = {"format": FORMAT, **asdict(calibrated), "threshold": threshold, **facts}
    write_json(path, value)
    return value


def load_calibration(path: Path, vectors: str | None = None, asked: Mapping[str, Any] | None = None) -> Calibrated:
    """The policy of a file.

    Args:
        vectors: what the index at hand says of its vectors; a calibration holds for those it was made with.
        asked: how it is asked at hand: see `Calibration.against`.

    Raises:
        UserError: no such file or format, another index, other answers than it was made with.
    """
    found = read_calibration(path)
    if vectors is not None and found.vectors != vectors:
        raise UserError(f"calibration: {path} was made with another index: calibrate again with this one")
    for held, wanted in found.against(asked or {}):
        why = ": calibrate again, or ask as it was"
        if held.startswith("-k"):
            miss = found.policy.risk == "miss"
            why = ": fewer reports miss more often" if miss else ": the scores of fewer reports tell other chances"
        raise UserError(f"calibration: {path} holds for {held}, not for {wanted}{why}")
    return found.policy


@dataclass(frozen=True)
class Calibration:
    """A policy with what it holds for."""

    policy: Calibrated
    vectors: str
    """What the index it was made with says of its vectors."""
    asked: Mapping[str, Any]
    """How it was asked: "where", "modality", "labels", "other_patients" (see `rag.Ask`)."""

    def against(self, asked: Mapping[str, Any]) -> list[tuple[str, str]]:
        """(what it holds for, what is asked) in words, of all that differs: answers of another kind have another risk.

        Args:
            asked: of what `asked` has whatever is known; and "k", which against misses must not be smaller, nor where
                chances are told by the scores of a whole answer.
        """
        pairs = [(_told(name, self.asked[name]), _told(name, asked[name])) for name in ASKED if name in asked]
        differ = [(held, wanted) for held, wanted in pairs if held != wanted]
        whole = self.policy.risk == "miss" or self.policy.signal == "chance"
        if whole and asked.get("k", self.policy.k) < self.policy.k:
            differ.append((f"-k {self.policy.k} or more", str(asked["k"])))
        return differ

    def told(self) -> str:
        """How to ask, in words."""
        return ", ".join(_told(name, self.asked[name]) for name in ASKED)


def read_calibration(path: Path) -> Calibration:
    """
    Raises:
        UserError: no such file or format.
    """
    value = read_json(path, "calibration")
    if value.get("format") != FORMAT:
        raise UserError(
            f"calibration: {path} has format {value.get('format')!r}, not {FORMAT!r}, which rag calibrate writes: "
            "calibrate again"
        )
    try:
        threshold = -math.inf if value["threshold"] is None else float(value["threshold"])
        risk, signal = RISKS[RISKS.index(value["risk"])], SIGNALS[SIGNALS.index(value["signal"])]
        model = None if value["chance"] is None else Chance(*(_floats(value["chance"][name]) for name in CHANCE))
        if (model is None) == (signal == "chance"):
            raise ValueError("a model belongs to chance, and to it alone")
        if (
            not 0 < float(value["alpha"]) < 1
            or int(value["k"]) < 1
            or int(value["queries"]) < 1
            or math.isnan(threshold)
        ):
            raise ValueError("no calibration writes that")
        made = Calibrated(risk, float(value["alpha"]), signal, threshold, int(value["k"]), int(value["queries"]), model)
        found = Calibration(made, str(value["vectors"]), {name: value[name] for name in ASKED})
        found.told()
    except (KeyError, TypeError, ValueError):
        raise UserError(f"calibration: {path} is damaged: calibrate again") from None
    return found


CHANCE = tuple(field.name for field in fields(Chance))


def _floats(values: Sequence[Any]) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


ASKED = ("where", "modality", "labels", "other_patients")


def _told(name: str, value: Any) -> str:
    """One way of asking in words; equal words are equal ways."""
    if name == "where":
        return f"answers with {' and '.join(sorted(value)) or 'no filter'}"
    if name == "modality":
        return f"{value} queries"
    if name == "labels":
        return "all labels" if value is None else f"the labels {', '.join(sorted(set(value)))}"
    return "answers of other patients alone" if value else "answers of the query's own patient too"
