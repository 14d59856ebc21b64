"""Which sample stands where in the stream of global batches: a pure function of manifest, seed and settings.

Every epoch puts the shards of a source in a fresh order and lays them end to end. Lane l of L takes the l-th of L equal
stretches of that and shuffles it a window at a time: it goes through each of its shards once an epoch, and a window
meets few of them. A lane also has rows of its own in every global batch, B / L, mixed of all sources by weight.

Ranks and loader processes only divide rows between them, and have no say in which sample a row holds. So the batches
are the same for any number of them, and the state of a run is the number of its next step.

The random numbers are those of NumPy's `RandomState`, whose streams are promised never to change: on another version
too a run goes on with the samples it would have had.
"""

import hashlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

Array = np.ndarray[Any, Any]
T = TypeVar("T")


class Place(NamedTuple):
    """Where a sample lies."""

    shard: int
    sample: int
    """Number within the shard."""


class Row(NamedTuple):
    """A row of a global batch."""

    number: int
    source: str
    place: Place


def random_state(*words: object) -> np.random.RandomState:
    """A generator of its own for anything that can be named."""
    seed = hashlib.sha256(" ".join(map(str, words)).encode()).digest()
    return np.random.RandomState(np.frombuffer(seed, dtype="<u4"))


class _Recent:
    """What was worked out lately, up to a number of things."""

    def __init__(self, many: int) -> None:
        self.many = many
        self._kept: OrderedDict[Hashable, Any] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        if key not in self._kept:
            self._kept[key] = make()
            if len(self._kept) > self.many:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        kept: T = self._kept[key]
        return kept


class SourceOrder:
    """The endless stream of one source, lane by lane.

    Args:
        counts: samples of each shard, in the order of the manifest; a shard may be empty.
        name, seed: another of either gives another order.
        lanes: stretches that are read side by side.
        window: samples of a lane that are shuffled together; 0 keeps everything as it lies.
        replacement: draw the samples of a window anew for each place, so that some come twice and some not at all.
        weights: for each shard how often each of its samples comes in an epoch, on average, at least once; None for
            once each.

    Raises:
        ValueError: fewer samples than lanes.
    """

    def __init__(
        self,
        counts: Sequence[int],
        name: str,
        seed: int,
        lanes: int = 1,
        window: int = 0,
        replacement: bool = False,
        weights: Sequence[Array] | None = None,
    ) -> None:
        self.name, self.seed, self.lanes, self.window, self.replacement = name, seed, lanes, window, replacement
        self.cumulated = None if weights is None else [np.cumsum(shard) for shard in weights]
        if self.cumulated is not None:
            # Rounded up, so that samples that weigh 1 come at least once.
            counts = [int(np.ceil(ends[-1])) if len(ends) else 0 for ends in self.cumulated]
        self.counts = np.asarray(counts, dtype=np.int64)
        self.total = int(self.counts.sum())
        """Samples of an epoch, with what comes several times."""
        self.per_lane = self.total // lanes
        """Samples of a lane in an epoch. What is left over, fewer than there are lanes, differs from epoch to epoch."""
        if self.per_lane < 1:
            raise ValueError(f"{self.total} samples do not fill {lanes} lanes")
        many = max(1, round(self.per_lane / window)) if window else 1
        # All but equal, so that none is a small rest.
        self.borders = [self.per_lane * number // many for number in range(many + 1)]
        self._layouts = _Recent(2)
        self._windows = _Recent(2 * lanes)

    def layout(self, epoch: int) -> tuple[Array, Array]:
        """The shards in the order of an epoch, and where each ends."""

        def make() -> tuple[Array, Array]:
            shards = np.arange(len(self.counts))
            if self.window:
                shards = random_state("shards", self.name, self.seed, epoch).permutation(shards)
            return shards, np.cumsum(self.counts[shards])

        return self._layouts.get(epoch, make)

    def window_of(self, epoch: int, lane: int, number: int) -> Array:
        """Positions in the layout of an epoch, in the order in which a window of a lane takes them."""

        def make() -> Array:
            first = self.total * lane // self.lanes
            order = np.arange(first + self.borders[number], first + self.borders[number + 1])
            chance = random_state("window", self.name, self.seed, epoch, lane, number)
            return chance.choice(order, len(order)) if self.replacement else chance.permutation(order)

        return self._windows.get((epoch, lane, number), make)

    def place(self, lane: int, index: int) -> Place:
        """The `index`-th sample of a lane since the run began: going there costs a window, not the way."""
        epoch, offset = divmod(index, self.per_lane)
        if self.window:
            number = bisect_right(self.borders, offset) - 1
            at = int(self.window_of(epoch, lane, number)[offset - self.borders[number]])
        else:
            at = self.total * lane // self.lanes + offset
        shards, ends = self.layout(epoch)
        turn = int(np.searchsorted(ends, at, side="right"))
        shard = int(shards[turn])
        return Place(shard, self._sample(epoch, shard, at - int(ends[turn] - self.counts[shard])))

    def _sample(self, epoch: int, shard: int, number: int) -> int:
        if self.cumulated is None:
            return number
        # Systematic sampling: equal steps over the weights laid end to end, from another start in each epoch.
        ends = self.cumulated[shard]
        start = random_state("copies", self.name, self.seed, epoch, shard).random_sample()
        return int(np.searchsorted(ends, (number + start) * ends[-1] / self.counts[shard], side="right"))

    def shards_of(self, epoch: int, lane: int, number: int) -> Array:
        """The shards that a window of a lane reads from."""
        first = self.total * lane // self.lanes
        shards, ends = self.layout(epoch)
        low, high = np.searchsorted(
            ends, (first + self.borders[number], first + self.borders[number + 1] - 1), side="right"
        )
        found: Array = shards[low : high + 1]
        return found[self.counts[found] > 0]


class Mixture:
    """How many rows of a lane each source has, step by step.

    Every source has the whole part of its share in every batch. The rows that are left over go to sources by lot, each
    with the chance of its fraction, so that over a run the shares are those of the weights.

    Args:
        weights: of the sources, all positive.
        rows: of a lane in a batch.
    """

    _BLOCK = 4096

    def __init__(self, weights: Sequence[float], rows: int, seed: int) -> None:
        shares = np.asarray(weights, dtype=np.float64) * rows / sum(weights)
        self.whole = np.floor(shares + 1e-9).astype(np.int64)
        self.left = rows - int(self.whole.sum())
        fractions = np.maximum(shares - self.whole, 0)
        self.ends = np.cumsum(fractions) / fractions.sum() if self.left else None
        self.seed = seed
        self._blocks = _Recent(256)
        self._totals: dict[int, list[Array]] = {}

    def _lots(self, lane: int, block: int) -> Array:
        """For each step of a block how many of the rows left over went to each source before it; one step more."""

        def make() -> Array:
            drawn = (self._drawn(lane, block)[:, :, None] == np.arange(len(self.whole))).sum(1)
            return np.concatenate([np.zeros((1, len(self.whole)), np.int64), np.cumsum(drawn, 0)])

        return self._blocks.get((lane, block), make)

    def before(self, lane: int, step: int) -> Array:
        """Rows that each source had in the batches before `step`: its counter."""
        counts: Array = self.whole * step
        if self.left:
            block, rest = divmod(step, self._BLOCK)
            counts = counts + self._until(lane, block) + self._lots(lane, block)[rest]
        return counts

    def _until(self, lane: int, block: int) -> Array:
        """Rows left over that each source had in the blocks before one; worked out once for each."""
        totals = self._totals.setdefault(lane, [np.zeros(len(self.whole), np.int64)])
        while len(totals) <= block:
            drawn = np.bincount(self._drawn(lane, len(totals) - 1).ravel(), minlength=len(self.whole))
            totals.append(totals[-1] + drawn)
        return totals[block]

    def _drawn(self, lane: int, block: int) -> Array:
        """The source of each row left over, [_BLOCK, left]."""
        assert self.ends is not None
        chance = random_state("mixture", self.seed, lane, block)
        return np.searchsorted(self.ends, chance.random_sample((self._BLOCK, self.left)), side="right")


class Plan:
    """The global batches of a run.

    Args:
        orders: of every source, by name, all with the same number of lanes.
        weights: of the sources in a batch.
        batch_size: rows of the global batch, a multiple of the lanes.
        seed: of the mixture.
        once: end with the epoch, with a last batch that may be short; else go round for ever.

    Raises:
        ValueError: rows that cannot be dealt to the lanes.
    """

    def __init__(
        self, orders: dict[str, SourceOrder], weights: Sequence[float], batch_size: int, seed: int, once: bool = False
    ) -> None:
        self.orders, self.batch_size, self.once = orders, batch_size, once
        self.names = list(orders)
        (self.lanes,) = {order.lanes for order in orders.values()}
        if batch_size % self.lanes:
            raise ValueError(f"a batch of {batch_size} rows cannot be dealt to {self.lanes} lanes")
        self.per_lane = batch_size // self.lanes
        self.mixture = Mixture(weights, self.per_lane, seed)
        self._counters = _Recent(2 * self.lanes)

    def of_rank(self, rank: int, world_size: int) -> range:
        """The rows that a rank takes, as many as any other, give or take one."""
        return range(self.batch_size * rank // world_size, self.batch_size * (rank + 1) // world_size)

    def lanes_of(self, rank: int, world_size: int) -> range:
        """The lanes that hold rows of a rank: it opens the shards of these and of no others."""
        rows = self.of_rank(rank, world_size)
        return range(rows.start // self.per_lane, -(-rows.stop // self.per_lane))

    def rows(self, step: int, rank: int = 0, world_size: int = 1) -> list[Row]:
        """What a rank reads for the batch of a step, in the order of the global batch."""
        if self.once:  # what is left for the last batch is dealt out evenly too
            every = [row for lane in range(self.lanes) for row in self._rows(lane, step)]
            return every[len(every) * rank // world_size : len(every) * (rank + 1) // world_size]
        wanted = self.of_rank(rank, world_size)
        lanes = self.lanes_of(rank, world_size)
        return [row for lane in lanes for row in self._rows(lane, step, wanted)]

    def _rows(self, lane: int, step: int, wanted: range | None = None) -> Iterator[Row]:
        for number, (source, index) in enumerate(self._dealt(lane, step), lane * self.per_lane):
            order = self.orders[self.names[source]]
            if (wanted is None or number in wanted) and not (self.once and index >= order.per_lane):
                yield Row(number, self.names[source], order.place(lane, index))

    def _dealt(self, lane: int, step: int) -> list[tuple[int, int]]:
        """(source, number in its lane) of every row of a lane; the sources evenly spread, so that any part is mixed."""
        first, after = (self.before(lane, at) for at in (step, step + 1))
        rows = [
            ((turn + 0.5) / many, source, int(first[source]) + turn)
            for source, many in enumerate((after - first).tolist())
            for turn in range(many)
        ]
        return [(source, index) for _, source, index in sorted(rows)]

    def before(self, lane: int, step: int) -> Array:
        """Samples of each source that a lane gave before `step`."""
        return self._counters.get((lane, step), lambda: self.mixture.before(lane, step))
