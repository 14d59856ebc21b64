"""The order of samples: the same for any number of ranks, from any step on, fresh in every epoch."""

import math
from collections import Counter
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medclip_lab.data.order import Mixture, Place, Plan, SourceOrder

counts = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(lambda found: sum(found) > 0)


def read(order: SourceOrder, lane: int, start: int, many: int) -> list[Place]:
    return [order.place(lane, index) for index in range(start, start + many)]


@settings(max_examples=200, deadline=None)
@given(counts=counts, seed=st.integers(0, 3), lanes=st.integers(1, 6), window=st.integers(0, 30))
def test_an_epoch_holds_every_sample_once_but_for_the_rest(
    counts: list[int], seed: int, lanes: int, window: int
) -> None:
    if sum(counts) < lanes:
        with pytest.raises(ValueError, match=f"do not fill {lanes} lanes"):
            SourceOrder(counts, "a", seed, lanes, window)
        return
    order = SourceOrder(counts, "a", seed, lanes, window)
    everything = {Place(shard, sample) for shard, many in enumerate(counts) for sample in range(many)}
    for epoch in range(3):
        stretches = [read(order, lane, epoch * order.per_lane, order.per_lane) for lane in range(lanes)]
        whole = list(chain(*stretches))
        assert len(set(whole)) == len(whole)
        assert set(whole) <= everything
        assert len(everything) - len(whole) < lanes
        for lane, stretch in enumerate(stretches):
            windows = [order.shards_of(epoch, lane, number) for number in range(len(order.borders) - 1)]
            assert {place.shard for place in stretch} == set(chain(*(window.tolist() for window in windows)))


def plan(weights: dict[str, float], batch: int, lanes: int = 1, window: int = 7, seed: int = 0) -> Plan:
    counts = {"a": [5, 0, 9, 3, 8, 7], "b": [11, 2, 40]}
    orders = {name: SourceOrder(counts[name], name, seed, lanes, window) for name in weights}
    return Plan(orders, list(weights.values()), batch, seed)


@settings(max_examples=100, deadline=None)
@given(
    weights=st.tuples(st.floats(0.1, 5), st.floats(0.1, 5)),
    lanes=st.integers(1, 8),
    per_lane=st.integers(1, 8),
    step=st.integers(0, 5000),
    world=st.sampled_from([1, 2, 3, 4, 64]),
)
def test_ranks_divide_the_same_batch(
    weights: tuple[float, float], lanes: int, per_lane: int, step: int, world: int
) -> None:
    shares, batch = dict(zip("ab", weights, strict=True)), lanes * per_lane
    whole = plan(shares, batch, lanes).rows(step)
    assert [row.number for row in whole] == list(range(batch))
    parts = [plan(shares, batch, lanes).rows(step, rank, world) for rank in range(world)]
    assert list(chain(*parts)) == whole
    sizes = {len(part) for part in parts}
    assert max(sizes) - min(sizes) <= 1
    assert len(sizes) == 1 or batch % world
    for rank in range(world):
        mine = {row.number // per_lane for row in parts[rank]}
        assert mine <= set(plan(shares, batch, lanes).lanes_of(rank, world))


@settings(max_examples=50, deadline=None)
@given(weights=st.tuples(st.floats(0.1, 5), st.floats(0.1, 5)), lanes=st.sampled_from([1, 3]))
def test_no_sample_is_lost_between_steps(weights: tuple[float, float], lanes: int) -> None:
    """The samples of each source follow each other in every lane, whatever the mixture makes of a step."""
    made = plan(dict(zip("ab", weights, strict=True)), 6 * lanes, lanes)
    given: dict[tuple[str, int], list[Place]] = {}
    for step in range(12):
        for row in made.rows(step):
            given.setdefault((row.source, row.number // 6), []).append(row.place)
    for (name, lane), places in given.items():
        assert Counter(places) == Counter(read(made.orders[name], lane, 0, len(places)))


def test_mixture_gives_every_source_its_weight() -> None:
    """Shares of 2.8, 0.7 and 0.5 rows of 4, over steps that cross a block of lots."""
    mixture = Mixture([5.6, 1.4, 1.0], 4, seed=3)
    steps = 20_000
    given = mixture.before(0, steps)
    assert given.sum() == 4 * steps
    for many, share in zip(given, (2.8, 0.7, 0.5), strict=True):
        chance = share % 1 / 2
        assert abs(many - share * steps) < 3 * math.sqrt(2 * steps * chance * (1 - chance))
    differences = np.diff([mixture.before(0, step) for step in range(4090, 4104)], axis=0)
    assert (differences.sum(1) == 4).all()
    assert (differences >= (2, 0, 0)).all()
    assert not np.array_equal(mixture.before(1, 100), mixture.before(2, 100))


def test_whole_shares_need_no_lots() -> None:
    mixture = Mixture([1, 3], 64, seed=0)
    assert mixture.left == 0
    assert mixture.before(0, 7).tolist() == [16 * 7, 48 * 7]


def test_a_batch_mixes_its_sources_for_every_rank() -> None:
    for rank in range(4):
        sources = Counter(row.source for row in plan({"a": 1, "b": 1}, 16).rows(0, rank, 4))
        assert sources == {"a": 2, "b": 2}


def test_rows_that_cannot_be_dealt() -> None:
    with pytest.raises(ValueError, match="a batch of 10 rows cannot be dealt to 4 lanes"):
        plan({"a": 1}, 10, 4)


def test_epochs_seeds_and_names_differ() -> None:
    def epoch(seed: int, name: str, number: int) -> tuple[Place, ...]:
        return tuple(read(SourceOrder([50] * 8, name, seed, 1, 100), 0, number * 400, 400))

    orders = {epoch(seed, name, number) for seed in range(3) for name in ("a", "b") for number in range(3)}
    assert len(orders) == 18
    assert epoch(0, "a", 1) == epoch(0, "a", 1)


def test_the_order_is_that_of_all_time() -> None:
    """Another version of NumPy or Python must not give a run that goes on other batches than it began with."""
    order = SourceOrder([5, 4, 6, 5], "a", 0, 2, 6)
    assert [tuple(place) for place in read(order, 1, 8, 6)] == [(1, 2), (1, 3), (0, 4), (0, 1), (0, 3), (0, 2)]
    assert [tuple(row.place) for row in plan({"a": 1, "b": 2}, 4).rows(4100)] == [(4, 4), (2, 35), (4, 3), (2, 37)]


def test_without_a_window_everything_comes_as_it_lies() -> None:
    order = SourceOrder([2, 0, 3], "a", 0)
    assert read(order, 0, 0, 6) == [Place(0, 0), Place(0, 1), Place(2, 0), Place(2, 1), Place(2, 2), Place(0, 0)]


def test_once_ends_with_the_epoch_and_deals_the_rest_evenly() -> None:
    made = Plan({"a": SourceOrder([5, 6], "a", 0)}, [1], 8, 0, once=True)
    parts = [[len(made.rows(step, rank, 2)) for step in range(3)] for rank in range(2)]
    assert parts == [[4, 1, 0], [4, 2, 0]]


def test_a_lane_opens_few_shards_and_each_once() -> None:
    order = SourceOrder([100] * 1000, "a", 0, lanes=10, window=400)
    windows = [order.shards_of(5, 3, number) for number in range(len(order.borders) - 1)]
    assert max(map(len, windows)) <= 5
    opened = Counter(chain(*(window.tolist() for window in windows)))
    assert max(opened.values()) <= 2  # where two windows meet
    assert len(opened) <= 102


def test_a_window_mixes_its_shards() -> None:
    """After a fair shuffle a sample is a third of the window away from where it lay, on average."""
    order = SourceOrder([100] * 40, "a", 0, lanes=1, window=1000)
    away = np.abs(order.window_of(0, 0, 0) - np.arange(1000)).mean()
    assert abs(away - 1000 / 3) < 3 * 1000 / math.sqrt(18 * 1000)


def test_replacement_draws_from_the_window_anew() -> None:
    order = SourceOrder([100] * 20, "a", 0, window=1000, replacement=True)
    drawn = read(order, 0, 0, 1000)
    shards = set(order.shards_of(0, 0, 0).tolist())
    assert {place.shard for place in drawn} <= shards
    assert len(set(drawn)) == pytest.approx(1000 * (1 - math.exp(-1)), abs=60)


def test_weights_are_how_often_samples_come() -> None:
    weights = [np.array([1.0, 2.5, 1.0]), np.array([]), np.array([4.2, 1.0])]
    order = SourceOrder([3, 0, 2], "a", 0, window=20, weights=weights)
    assert order.total == 5 + 6
    epochs = 400
    drawn = Counter(read(order, 0, 0, epochs * order.per_lane))
    for shard, rates in enumerate(weights):
        scale = math.ceil(rates.sum()) / rates.sum() if len(rates) else 0
        for sample, rate in enumerate(rates):
            assert drawn[Place(shard, sample)] / epochs == pytest.approx(rate * scale, abs=0.08)
            # Equal steps: never further than one from what is due.
            one = Counter(read(order, 0, 0, order.per_lane))[Place(shard, sample)]
            assert abs(one - rate * scale) < 1


def test_the_middle_of_a_long_run_is_near() -> None:
    """No way to go: what is worked out for a sample are its epoch's shards and its window."""
    order = SourceOrder([1000] * 1000, "a", 0, 1, 10_000)
    made: list[str] = []
    layout, window = order._layouts.get, order._windows.get
    order._layouts.get = lambda key, make: made.append("layout") or layout(key, make)  # type: ignore[func-returns-value, method-assign]
    order._windows.get = lambda key, make: made.append("window") or window(key, make)  # type: ignore[func-returns-value, method-assign]
    place = order.place(0, 3_765_432)
    assert made == ["window", "layout"]
    assert place in read(SourceOrder([1000] * 1000, "a", 0, 1, 10_000), 0, 3_760_000, 10_000)
