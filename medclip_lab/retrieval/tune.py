"""The least thorough search that reaches a recall: tuned on one half of the queries, confirmed on the other."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from medclip_lab.retrieval.embeddings import Vectors
from medclip_lab.retrieval.parameters import Parameters, ladders
from medclip_lab.retrieval.recall import Measured, Queries, measure, single_seconds

MARGIN = 3.0
"""Standard errors by which the tuned recall must lie above the target, so that fresh queries meet it too."""


@dataclass(frozen=True)
class Tuned:
    """The parameters of one direction and what they give; `met` if the confirming half reached the target too."""

    parameters: Parameters
    recall: float
    """Of the tuning half."""
    confirmed: float
    """Of the other half."""
    met: bool
    single: float
    batched: float
    """Seconds a query, alone and in batches."""


def tune(index: Any, queries: Queries, vectors: Vectors, size: int, target: float, exact: bool) -> Tuned:
    """Search parameters for one direction.

    Recall is taken to grow with each setting. First the lists or the graph are set with everything reranked that may
    be, then as little is reranked as will do, for that setting and the next: what both cost is measured.

    Args:
        vectors: the rows the index holds, by its own numbers.
        exact: the index has nothing to tune, and its recall no luck: it is that of its codes, without a margin.
    """
    steps = ladders(index, size, queries.k)
    tuning = queries.half(0)
    seen: dict[Parameters, Measured] = {}

    def asked(parameters: Parameters) -> Measured:
        if parameters not in seen:
            seen[parameters] = measure(index, queries, tuning, parameters, vectors)
        return seen[parameters]

    def enough(parameters: Parameters) -> bool:
        found = asked(parameters)
        return found.recall - (0 if exact else MARGIN * found.error) >= target

    chosen = _cheapest(steps, enough, asked)
    confirmed = measure(index, queries, queries.half(1), chosen, vectors)
    while confirmed.recall < target and (more := _more(chosen, steps)) != chosen:
        chosen = more
        confirmed = measure(index, queries, queries.half(1), chosen, vectors)
    found = asked(chosen)
    return Tuned(
        chosen,
        found.recall,
        confirmed.recall,
        found.recall >= target and confirmed.recall >= target,
        single_seconds(index, queries, chosen),
        confirmed.seconds,
    )


def _cheapest(
    steps: dict[str, list[int]], enough: Callable[[Parameters], bool], asked: Callable[[Parameters], Measured]
) -> Parameters:
    """The quickest parameters that are enough, or the most thorough if none is."""
    most = Parameters(**{name: values[-1] for name, values in steps.items()})
    if not steps or not enough(most):
        return most
    wide = next((name for name in ("nprobe", "ef_search") if name in steps), None)
    candidates = [most]
    if wide is not None:
        place = _first(steps[wide], lambda value: enough(replace(most, **{wide: value})))
        candidates = [replace(most, **{wide: value}) for value in steps[wide][place : place + 2]]
    if "k_factor" in steps:
        values = steps["k_factor"]
        candidates = [
            replace(start, k_factor=values[_first(values, lambda value: enough(replace(start, k_factor=value)))])  # noqa: B023 - used at once
            for start in candidates
        ]
    return min(candidates, key=lambda parameters: asked(parameters).seconds)


def _first(values: list[int], enough: Callable[[int], bool]) -> int:
    """Place of the least value that is enough, the last being so."""
    low, high = 0, len(values) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(values[middle]) else (middle + 1, high)
    return low


def _more(parameters: Parameters, steps: dict[str, list[int]]) -> Parameters:
    """Every setting a step up."""
    given = parameters.given()
    higher = {name: next((v for v in values if v > given[name]), values[-1]) for name, values in steps.items()}
    return Parameters(**higher)
