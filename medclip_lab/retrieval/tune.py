"""The least thorough search that reaches a recall: tuned on a third of the queries and confirmed on another.

Both decide what is taken, so that what they reach is no estimate for others: the recall that is told is of the last
third, which decides nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from medclip_lab.retrieval.embeddings import Vectors
from medclip_lab.retrieval.parameters import Parameters, ladders
from medclip_lab.retrieval.recall import Measured, Queries, measure, single_seconds

MARGIN = 3.0
"""Standard errors by which the tuned recall must lie above the target, so that fresh queries meet it too."""
GENEROUS = 64
"""Candidates reranked for each answer while lists or a graph are set, unless even all of those are not enough."""
EXACT_FACTOR = 16
"""Candidates reranked for each answer of a kind that reads all codes of 8 bits: many more than their error needs."""


@dataclass(frozen=True)
class Tuned:
    """The parameters of one direction and what they give; `met` if the confirming third reached the target too."""

    parameters: Parameters
    recall: float
    """Of the tuning third."""
    confirmed: float
    """Of the second third."""
    held_out: float
    """Of the last, which nothing was chosen by."""
    met: bool
    single: float
    batched: float
    """Seconds a query, alone and in batches."""


def tune(
    index: Any, queries: Queries, vectors: Vectors, size: int, target: float, margin: float, exact: bool = False
) -> Tuned:
    """Search parameters for one direction.

    Recall is taken to grow with each setting. First the lists or the graph are set with everything reranked that may
    be, then as little is reranked as will do, for that setting and the next: what both cost is measured.

    Args:
        vectors: the rows the index holds, by its own numbers.
        margin: standard errors by which the tuning third has to pass the target.
        exact: a kind that reads everything: nothing is tuned, `EXACT_FACTOR` is reranked.
    """
    steps = ladders(index, size, queries.k)
    tuning = queries.part(0)
    seen: dict[Parameters, Measured] = {}

    def asked(parameters: Parameters) -> Measured:
        if parameters not in seen:
            seen[parameters] = measure(index, queries, tuning, parameters, vectors)
        return seen[parameters]

    def enough(parameters: Parameters) -> bool:
        found = asked(parameters)
        return found.recall - margin * found.error >= target

    chosen = _generous(steps, EXACT_FACTOR)[0] if exact else _cheapest(steps, enough, asked)
    confirmed = measure(index, queries, queries.part(1), chosen, vectors)
    while confirmed.recall < target and (more := _more(chosen, steps)) != chosen:
        chosen = more
        confirmed = measure(index, queries, queries.part(1), chosen, vectors)
    found = asked(chosen)
    # What is tuned passed by the margin, or is as thorough as can be; where nothing is tuned, luck is not enough.
    sure = found.recall - (margin * found.error if exact else 0.0)
    return Tuned(
        chosen,
        found.recall,
        confirmed.recall,
        measure(index, queries, queries.part(2), chosen, vectors).recall,
        sure >= target and confirmed.recall >= target,
        single_seconds(index, queries, chosen),
        confirmed.seconds,
    )


def _cheapest(
    steps: dict[str, list[int]], enough: Callable[[Parameters], bool], asked: Callable[[Parameters], Measured]
) -> Parameters:
    """The quickest parameters that are enough, or the most thorough if none is."""
    *_, most = generous = _generous(steps, GENEROUS)
    wide = next((name for name in ("nprobe", "ef_search") if name in steps), None)
    factors = steps.get("k_factor", [])
    candidates: list[Parameters] = []
    for start in generous:
        if wide is None:
            candidates = [start]
        else:
            place = _first(steps[wide], _with(start, wide, enough))
            candidates = [replace(start, **{wide: value}) for value in steps[wide][place : place + 2]]
        if enough(candidates[0]):
            break
    else:
        return most
    if factors:
        candidates = [
            replace(start, k_factor=factors[_first(factors, _with(start, "k_factor", enough))]) for start in candidates
        ]
    return min(candidates, key=lambda parameters: asked(parameters).seconds)


def _generous(steps: dict[str, list[int]], factor: int) -> list[Parameters]:
    """Everything read, `factor` candidates reranked; then as many as may be."""
    most = Parameters(**{name: values[-1] for name, values in steps.items()})
    factors = steps.get("k_factor", [])
    return [replace(most, k_factor=factor), most] if factors and factors[-1] > factor else [most]


def _with(start: Parameters, name: str, enough: Callable[[Parameters], bool]) -> Callable[[int], bool]:
    return lambda value: enough(replace(start, **{name: value}))


def _first(values: list[int], enough: Callable[[int], bool]) -> int:
    """Place of the least value that is enough, or of the last; thorough values, which are slow, are tried last."""
    low, high, step = 0, 0, 1
    while high < len(values) - 1 and not enough(values[high]):
        low, high, step = high + 1, min(high + step, len(values) - 1), 2 * step
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(values[middle]) else (middle + 1, high)
    return low


def _more(parameters: Parameters, steps: dict[str, list[int]]) -> Parameters:
    """Every setting a step up."""
    given = parameters.given()
    higher = {name: next((v for v in values if v > given[name]), values[-1]) for name, values in steps.items()}
    return Parameters(**higher)
