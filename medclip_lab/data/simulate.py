"""What an order of samples costs and how well it mixes, for data and ranks that need not be there.

Nothing is estimated that the plan itself can tell: it is made as a run would make it, and asked for the rows of steps
drawn at random.
"""

import random
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from medclip_lab.data.order import Plan, SourceOrder

STEPS = 4
"""Global batches that are looked at."""


@dataclass(frozen=True)
class Case:
    """A run to be planned."""

    samples: int
    samples_per_shard: int = 1000
    ranks: int = 1
    batch_size: int = 256
    lanes: int = 1
    window: int = 10_000
    sample_bytes: int = 100_000
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("samples", "samples_per_shard", "ranks", "batch_size", "lanes", "window", "sample_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.batch_size < self.ranks:
            raise ValueError(f"a batch of {self.batch_size} has no row for each of {self.ranks} ranks")

    def counts(self) -> list[int]:
        """Samples of each shard."""
        whole, rest = divmod(self.samples, self.samples_per_shard)
        return [self.samples_per_shard] * whole + [rest] * bool(rest)


def simulate(case: Case) -> dict[str, Any]:
    """Figures of a plan; times are measured on this machine, everything else is counted.

    Returns:
        "samples_mixed": that can meet in one batch; "shards_in_a_batch" and "in_a_full_shuffle": different shards among
        its rows, on average, and what they would be if the whole epoch were shuffled at once; "samples_left_out": of an
        epoch, because they do not fill the lanes; "shards_opened_per_rank" in an epoch and "shards_open_at_once";
        "bytes_read_again_per_rank" after a resume, of shards that were open then: none where they can be read in place,
        the shards whole where they are fetched; "seconds_to_plan" and "seconds_to_first_rows": of a rank that starts in
        the middle of the tenth epoch.

    Raises:
        ValueError: lanes that do not divide the batch, or fewer samples than lanes.
    """
    counts = case.counts()
    start = time.perf_counter()
    order = SourceOrder(counts, "source", case.seed, case.lanes, case.window)
    plan = Plan({"source": order}, [1.0], case.batch_size, case.seed)
    planned = time.perf_counter()
    epoch = max(1, case.samples // case.batch_size)
    middle = 9 * epoch + epoch // 2
    plan.rows(middle, rank=0, world_size=case.ranks)
    ready = time.perf_counter()

    chance = random.Random(case.seed)
    met = []
    for _ in range(STEPS):
        rows = plan.rows(chance.randrange(10 * epoch))
        met.append(len({row.place.shard for row in rows}))
    lanes = plan.lanes_of(0, case.ranks)
    opened = [_opened(order, lane, 0) for lane in lanes]
    at_once = sum(max(len(window) for window in windows) for windows in opened)
    return {
        "samples_mixed": case.lanes * min(case.window, order.per_lane),
        "shards": len(counts),
        "shards_in_a_batch": float(np.mean(met)),
        "in_a_full_shuffle": len(counts) * (1 - (1 - 1 / len(counts)) ** case.batch_size),
        "samples_left_out": order.total - case.lanes * order.per_lane,
        "lanes_per_rank": len(lanes),
        "shards_opened_per_rank": len({int(shard) for windows in opened for window in windows for shard in window}),
        "shards_open_at_once": at_once,
        "bytes_read_again_per_rank": {
            "in place": 0,
            "fetched": at_once * case.samples_per_shard * case.sample_bytes,
        },
        "seconds_to_plan": round(planned - start, 3),
        "seconds_to_first_rows": round(ready - planned, 3),
    }


def _opened(order: SourceOrder, lane: int, epoch: int) -> list[np.ndarray[Any, Any]]:
    return [order.shards_of(epoch, lane, number) for number in range(len(order.borders) - 1)]


def table(case: Case, figures: dict[str, Any]) -> str:
    """The figures for people."""
    again = figures["bytes_read_again_per_rank"]["fetched"]
    lines = {
        "samples": f"{case.samples:,} in {figures['shards']:,} shards of {case.samples_per_shard:,}",
        "batch": f"{case.batch_size:,} rows over {case.ranks:,} ranks, {case.lanes:,} lanes, window {case.window:,}",
        "mixed at a time": f"{figures['samples_mixed']:,} samples ({figures['samples_mixed'] / case.samples:.2%})",
        "shards in a batch": f"{figures['shards_in_a_batch']:,.1f}; a full shuffle would have "
        f"{figures['in_a_full_shuffle']:,.1f}",
        "left out of an epoch": f"{figures['samples_left_out']:,} samples, others in each",
        "opened by a rank": f"{figures['shards_opened_per_rank']:,} shards an epoch, at most "
        f"{figures['shards_open_at_once']:,} at once",
        "read again on resume": f"nothing in place, {again / 2**20:,.0f} MiB a rank where shards are fetched",
        "start": f"{figures['seconds_to_plan']:.3f} s to plan, {figures['seconds_to_first_rows']:.3f} s to the rows",
    }
    return "\n".join(f"{name:<22}{value}" for name, value in lines.items())
