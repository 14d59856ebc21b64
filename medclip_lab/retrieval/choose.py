"""From goals to an index: what fits the memory is built, tuned and measured; what reaches the recall is taken."""

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from medclip_lab.errors import UserError
from medclip_lab.retrieval import families
from medclip_lab.retrieval.embeddings import Arrays, Vectors
from medclip_lab.retrieval.gallery import Gallery
from medclip_lab.retrieval.mapped_lists import can_be_mapped
from medclip_lab.retrieval.memory import Meter, release, show_size
from medclip_lab.retrieval.on_disk import Workshop, open_lists, part_count, process_bytes
from medclip_lab.retrieval.parameters import Parameters
from medclip_lab.retrieval.recall import Queries, find_truth
from medclip_lab.retrieval.tune import MARGIN, Tuned, tune

PLAIN_VALUES = 2**23
"""Numbers (vectors times dimensions) that float32 compares in a few milliseconds: nothing else is tried."""
EXACT_VALUES = 250_000_000
"""Numbers that an exact search of 8 or 16 bits reads in about 50 ms: up to here exact indexes come first."""
SCREENED = 32_768
"""Vectors of the sample on which approximate kinds are compared."""
ASKED = 400
"""Queries of each direction that the sample is asked."""
ROW_BYTES, MORE_BYTES = 32, 150
"""Of each row: its order and its group while the index is built; before, also its study, its key and its copies."""
FEWEST_LISTS = 64
"""Below, an index on the disk is hardly more than a scan of all of it."""
QUICKER = 0.9
"""A kind of less precision has to take less than this share of the time of one with more."""


@dataclass(frozen=True)
class Goals:
    """What the caller wants of an index."""

    target_recall: float = 0.99
    """Share of the k truly nearest that a search returns, in every direction."""
    at: int = 10
    """That k."""
    max_memory: int | None = None
    """Bytes that building may take, the process and all; None takes three quarters of the machine's."""
    queries: tuple[str, ...] | None = None
    """Directions: modalities that will ask; None takes those that the embeddings hold."""
    factory: str | None = None
    """A FAISS factory string of one's own; it is tuned and measured like the others."""
    dedup: bool | None = None
    """One vector for copies; None means so for texts."""
    seed: int = 0
    exact_values: int | None = None
    """Numbers (vectors times dimensions) up to which exact kinds come first; None takes `EXACT_VALUES`."""
    on_disk: bool | None = None
    """Lists that stay on the disk and are read there; None means so where nothing fits into the memory."""
    processes: int | None = None
    """That fill such lists, as far as the memory goes; None takes one a core. They are spawned, so that a script needs
    the usual guard, `if __name__ == "__main__"`."""

    def __post_init__(self) -> None:
        if self.processes is not None and self.processes < 1:
            raise UserError(f"processes: at least 1, got {self.processes}")
        if not 0 < self.target_recall <= 1:
            raise UserError(f"target-recall: a share above 0 and up to 1, got {self.target_recall}")
        if self.at < 1:
            raise UserError(f"at: at least 1, got {self.at}")


@dataclass
class Trial:
    """A row of the table of what was tried."""

    factory: str
    vectors: int
    predicted_bytes: int
    verdict: str = ""
    build_seconds: float | None = None
    tuned: dict[str, Tuned] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        found = {
            name: {
                **{key: round(getattr(tuned, key), 4) for key in ("recall", "confirmed", "held_out")},
                **{f"{key}_ms": round(1e3 * getattr(tuned, key), 4) for key in ("single", "batched")},
                "parameters": tuned.parameters.given(),
            }
            for name, tuned in self.tuned.items()
        }
        return {**asdict(self), "build_seconds": self.build_seconds and round(self.build_seconds, 2), "tuned": found}

    @property
    def met(self) -> bool:
        return all(tuned.met for tuned in self.tuned.values())

    @property
    def single(self) -> float:
        """Seconds of a query alone, of the slower direction."""
        return max((tuned.single for tuned in self.tuned.values()), default=0.0)

    @property
    def worst(self) -> float:
        return min((min(tuned.recall, tuned.confirmed) for tuned in self.tuned.values()), default=1.0)


@dataclass
class Choice:
    """The index that was taken, without the held-out vectors, and what was tried on the way."""

    index: Any
    factory: str
    parameters: dict[str, Parameters]
    trial: Trial
    trials: list[Trial]
    shop: Workshop | None = None
    """Where the lists were made that lie on the disk."""


def choose(
    gallery: Gallery, goals: Goals, meter: Meter, say: Callable[[str], None], open_shop: Callable[[], Workshop]
) -> Choice:
    """Build an index that reaches the goals on the gallery's held-out queries.

    Args:
        open_shop: called once, if lists are to lie on the disk.

    Raises:
        UserError: nothing fits the memory, or nothing that fits reaches the recall.
    """
    return _Search(gallery, goals, meter, say, open_shop).run()


class _Search:
    def __init__(
        self,
        gallery: Gallery,
        goals: Goals,
        meter: Meter,
        say: Callable[[str], None],
        open_shop: Callable[[], Workshop],
    ) -> None:
        self.gallery, self.goals, self.meter, self.say = gallery, goals, meter, say
        self._open_shop = open_shop
        self.shop: Workshop | None = None
        self.on_disk = bool(goals.on_disk)
        self.trials: list[Trial] = []
        self.values = gallery.size * gallery.dim
        self.exact_values = EXACT_VALUES if goals.exact_values is None else goals.exact_values
        self._built: tuple[str, Any] | None = None

    def run(self) -> Choice:
        fitting = self._fitting()
        find_truth(self.gallery.queries, self.gallery.main.blocks(), len(self.gallery.main), self.goals.at)
        self.meter.check()
        exact = [key for key in fitting if key in families.EXACT]
        others = [key for key in fitting if key not in families.EXACT]
        if self.goals.factory is not None:
            choice = self._first_that_meets(fitting)
        elif self.on_disk:
            choice = self._first_that_meets(self._screened(others))
        elif self.values <= self.exact_values:
            choice = self._quickest_exact(exact) or self._first_that_meets(self._screened(others))
        else:
            choice = self._first_that_meets(self._screened(others)) or self._quickest_exact(exact)
        if choice is None:
            best = max((trial for trial in self.trials if trial.tuned), key=lambda trial: trial.worst)
            raise UserError(
                f"target-recall: nothing within {show_size(self.meter.limit)} surely reached "
                f"{self.goals.target_recall:g} at {self.goals.at} (best: {best.factory} "
                f"with {best.worst:.4f}); {self._way_out()}"
            )
        choice.trial.verdict = "chosen"
        return choice

    def _way_out(self) -> str:
        left = [trial for trial in self.trials if not trial.tuned]
        more = f"raise max-memory to {show_size(min(trial.predicted_bytes for trial in left))}, or " if left else ""
        disk = "" if self.on_disk or self.goals.factory else "leave the lists --on-disk, or "
        return f"{more}{disk}lower the target"

    def _fitting(self) -> list[str]:
        """Factory strings whose building fits, by prediction.

        Raises:
            UserError: none does.
        """
        size, dim = self.gallery.size, self.gallery.dim
        if self.goals.factory is not None:
            keys = [self.goals.factory]
            if self.on_disk and not can_be_mapped(families.make(keys[0], dim)):
                raise UserError(
                    f"factory: the lists of {keys[0]!r} cannot stay on the disk: IVF with SQ, PQ or Flat can"
                )
        elif self.on_disk:
            keys = self._kinds_on_disk()
        elif self.values <= min(PLAIN_VALUES, self.exact_values):
            keys = [*families.EXACT[:1]]
        else:
            keys = [*families.EXACT, *families.approximate(size, dim)]
        predicted = {key: self.predicted(key, size) for key in keys}
        for key, taken in predicted.items():
            if taken > self.meter.limit:
                self.trials.append(Trial(key, size, taken, "more than max-memory"))
        fitting = [key for key in keys if predicted[key] <= self.meter.limit]
        if fitting:
            return fitting
        least = min(predicted, key=lambda key: predicted[key])
        needed, where = predicted[least], ""
        if self.goals.factory is None and self.goals.on_disk is None:
            self.on_disk = True
            key = self._kinds_on_disk()[0]
            if self.predicted(key, size) <= self.meter.limit:
                self.say(f"  nothing fits into {show_size(self.meter.limit)}: lists stay on the disk")
                return self._kinds_on_disk()
            if self.predicted(key, size) < needed:
                least, needed, where = key, self.predicted(key, size), " on the disk"
        raise UserError(
            f"max-memory: {show_size(self.meter.limit)} is too little for {size} vectors of {dim} dimensions: "
            f"at least {show_size(needed)} ({least}{where})"
        )

    def _kinds_on_disk(self) -> list[str]:
        """Those with as many lists as can be trained in the memory; fewer are longer to read."""
        size = self.gallery.size
        lists = families.list_count(size)
        while lists > FEWEST_LISTS and self.predicted(families.on_disk(lists)[0], size) > self.meter.limit:
            lists //= 2
        return families.on_disk(lists)

    def predicted(self, key: str, size: int) -> int:
        """Bytes at the peak of a build, of all its processes."""
        index = families.make(key, self.gallery.dim)
        if self.on_disk:
            taken = max(
                families.WORKSPACE + families.training_bytes(index, size),
                self._processes(index) * process_bytes(index, size),
            )
        else:
            taken = families.build_bytes(index, size)
        return self.meter.start + max(taken + ROW_BYTES * size, MORE_BYTES * size)

    def _processes(self, index: Any) -> int:
        """As many as are asked for, have a part to fill, and fit into the memory."""
        size = self.gallery.size
        room = (self.meter.limit - self.meter.start - ROW_BYTES * size) // process_bytes(index, size)
        return max(1, min(self.goals.processes or os.cpu_count() or 1, part_count(index, size), room))

    def _quickest_exact(self, keys: list[str]) -> Choice | None:
        """Of the exact kinds that reach the target, the quickest for a query that comes alone."""
        best: Trial | None = None
        for key in keys:
            trial = self._whole(key)
            if not trial.met:
                continue
            if best is None or trial.single < QUICKER * best.single:
                if best is not None:
                    best.verdict = "slower"
                best = trial
            else:
                trial.verdict = "slower"
        return None if best is None else self._choice(best)

    def _first_that_meets(self, keys: list[str]) -> Choice | None:
        for key in keys:
            trial = self._whole(key)
            if trial.met:
                return self._choice(trial)
        return None

    def _whole(self, key: str) -> Trial:
        """Build on everything but the held-out, tune and confirm."""
        main = self.gallery.main
        trial = Trial(key, len(main), self.predicted(key, self.gallery.size))
        self._built = None
        self.meter.unmapped()
        release()
        start = time.perf_counter()
        index = self._make(key)
        trial.build_seconds = time.perf_counter() - start
        self._measure(trial, index, self.gallery.queries, main, MARGIN)
        self._built = (key, index)
        self.trials.append(trial)
        return trial

    def _make(self, key: str) -> Any:
        main, held = self.gallery.main, self.gallery.held_out
        index = families.make(key, main.dim)
        rows = families.training_rows(index, len(main))
        if rows:
            rng = np.random.default_rng(self.goals.seed)
            families.train(index, main.take(np.sort(rng.choice(len(main), rows, replace=False))))
            release()
        if self.on_disk:
            return self._fill_on_disk(index)
        main_rows, held_rows = ((lambda given=given: (block for _, block in given.blocks())) for given in (main, held))
        families.add(index, main_rows, held_rows, self.gallery.size, self.meter.check)
        return index

    def _fill_on_disk(self, index: Any) -> Any:
        self.shop = self.shop or self._open_shop()
        self.shop.start(index, self._processes(index))
        del index
        self.shop.add(self.gallery.main, 0)
        self.meter.beside(self.shop.taken)
        merged = self.shop.merge()
        self.meter.mapping()
        return open_lists(merged)

    def _choice(self, trial: Trial) -> Choice:
        if self._built is None or self._built[0] != trial.factory:
            self._built = None
            release()
            self._built = trial.factory, self._make(trial.factory)
        parameters = {name: tuned.parameters for name, tuned in trial.tuned.items()}
        return Choice(self._built[1], trial.factory, parameters, trial, self.trials, self.shop)

    def _screened(self, keys: list[str]) -> list[str]:
        """The approximate kinds that reach the target on a sample, the quickest first."""
        if len(keys) < 2:
            return keys
        main = self.gallery.main
        rng = np.random.default_rng(self.goals.seed)
        rows = np.sort(rng.choice(len(main), min(SCREENED, len(main)), replace=False))
        sample = Arrays(main.take(rows))
        queries = {name: Queries(name, given.vectors[:ASKED]) for name, given in self.gallery.queries.items()}
        find_truth(queries, sample.blocks(), len(sample), self.goals.at)
        reached: list[tuple[float, str]] = []
        for key in keys:
            small = _smaller(key, len(sample), main.dim)
            index = families.make(small, main.dim)
            trial = Trial(key, len(sample), self.predicted(key, self.gallery.size), "sample")
            start = time.perf_counter()
            families.train(index, sample.values[: families.training_rows(index, len(sample))])
            index.add(sample.values)
            trial.build_seconds = time.perf_counter() - start
            self._measure(trial, index, queries, sample, 0.0)
            self.trials.append(trial)
            if trial.met:
                reached.append((trial.single * _growth(key, len(main) / len(sample)), key))
            self.meter.check()
        return [key for _, key in sorted(reached)]

    def _measure(self, trial: Trial, index: Any, queries: dict[str, Queries], vectors: Vectors, margin: float) -> None:
        for name, given in queries.items():
            exact = trial.factory in families.EXACT
            trial.tuned[name] = tune(index, given, vectors, len(vectors), self.goals.target_recall, margin, exact)
            self.meter.check()
        if not trial.verdict and not trial.met:
            trial.verdict = "below the target"
        self.say(line(trial))


def _smaller(key: str, size: int, dim: int) -> str:
    """The same kind of index for a sample: as many lists as suit it."""
    kinds = [*families.approximate(size, dim), *families.on_disk(families.list_count(size))]
    return next((other for other in kinds if _kind(other) == _kind(key)), key)


def _kind(key: str) -> str:
    return ",".join(part for part in key.split(",") if not part.startswith("IVF")) + (",IVF" if "IVF" in key else "")


def _growth(key: str, ratio: float) -> float:
    """How much longer a query takes on a corpus this many times as large: graphs grow with its logarithm."""
    return 1 + np.log(ratio) if key.startswith("HNSW") else ratio


def line(trial: Trial) -> str:
    """A trial for people."""
    found = "; ".join(
        f"{name} {min(tuned.recall, tuned.confirmed):.4f}, {1e3 * tuned.single:.3g} ms"
        + "".join(f", {key} {value}" for key, value in tuned.parameters.given().items())
        for name, tuned in trial.tuned.items()
    )
    return (
        f"  {trial.factory:<34} {trial.vectors:>9} vectors  {show_size(trial.predicted_bytes):>8}  "
        f"{found or '-'}  {trial.verdict}".rstrip()
    )
