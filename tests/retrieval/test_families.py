"""Kinds of index: their memory as predicted, their filling without detours, their search parameters."""

import itertools
from typing import Any

import numpy as np
import pytest

from medclip_lab.bench.vectors import Corpus
from medclip_lab.errors import UserError
from medclip_lab.retrieval import families, memory
from medclip_lab.retrieval.memory import Meter, parse_size, show_size
from medclip_lab.retrieval.parameters import Parameters, ladders
from medclip_lab.retrieval.recall import search

faiss = families.import_faiss()
SIZE, DIM = 3000, 32
KEYS = [*families.EXACT, *families.approximate(SIZE, DIM), f"RR{DIM},IVF16,SQ8"]


@pytest.fixture(scope="module")
def vectors() -> Any:
    return next(Corpus(size=SIZE, dim=DIM, clusters=30).blocks())["image"]


def filled(key: str, vectors: Any, reserved: bool) -> Any:
    index = families.make(key, DIM)
    families.train(index, vectors[: families.training_rows(index, SIZE)])
    blocks = [vectors[first : first + 700] for first in range(0, SIZE, 700)]
    if reserved:
        families.add(index, lambda: blocks[:-1], lambda: blocks[-1:], SIZE, lambda: None)
        index.add(blocks[-1])
    else:
        for block in blocks:
            index.add(block)
    return index


@pytest.mark.parametrize("key", KEYS)
def test_room_made_beforehand_changes_nothing_and_its_size_was_predicted(key: str, vectors: Any) -> None:
    index = filled(key, vectors, True)
    written = faiss.serialize_index(index)
    plain = faiss.serialize_index(filled(key, vectors, False))
    if "HNSW" not in key:  # of a graph, the order of threads decides
        assert (written == plain).all()
    predicted = families.index_bytes(families.make(key, DIM), SIZE)
    extra = 60_000  # tables of the coder, which no number of vectors changes
    assert len(written) <= 1.1 * predicted + extra
    assert predicted <= (2.2 if "x4fs" in key or "fs" in key else 1.15) * len(written) + extra
    assert families.build_bytes(families.make(key, DIM), SIZE) > predicted


@pytest.mark.parametrize("key", KEYS)
def test_the_most_thorough_search_finds_what_is_nearest(key: str, vectors: Any) -> None:
    index = filled(key, vectors, True)
    steps = ladders(index, SIZE, 10)
    most = Parameters(**{name: values[-1] for name, values in steps.items()})
    least = Parameters(**{name: values[0] for name, values in steps.items()})
    exact = np.argsort(-(vectors[:50] @ vectors.T), axis=1)[:, :10]

    def share(parameters: Parameters) -> float:
        found = search(index, vectors[:50], 10, parameters)[1]
        return float(np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, exact, strict=True)]))

    assert share(most) > (0.75 if "SQ4" in key else 0.93)
    if {"nprobe", "k_factor"} & set(steps):
        assert share(least) < share(most)  # else the settings do not reach the index they are meant for
    for values in steps.values():
        assert values == sorted(set(values))


def test_room_is_taken_once() -> None:
    """The codes of a flat index stay where they are while it grows."""
    index = families.make("SQ8", DIM)
    rows = np.tile(np.eye(DIM, dtype=np.float32), (40, 1))
    index.train(rows)
    families.reserve(index, len(rows))
    places = set()
    for first in range(0, len(rows), 100):
        index.add(rows[first : first + 100])
        places.add(int(index.codes.data()))
    assert len(places) == 1


def test_factories_that_are_none() -> None:
    with pytest.raises(UserError, match="makes no index of 'Hexagon' for 32 dimensions"):
        families.make("Hexagon", DIM)
    with pytest.raises(UserError, match="makes no index of 'PQ5x4fs'"):
        families.make("PQ5x4fs", DIM)
    index = families.make("IVF64,Flat", DIM)
    with pytest.raises(UserError, match="3 vectors are too few to train"):
        families.train(index, np.eye(3, DIM, dtype=np.float32))


def test_candidates_fit_any_width() -> None:
    for size, dim in itertools.product((100, 10**4, 10**6), (1, 3, 64, 100, 1024)):
        for key in families.approximate(size, dim):
            assert families.make(key, dim).d == dim


@pytest.mark.parametrize(
    ("text", "size"),
    [("4GB", 4 * 10**9), ("512 MiB", 512 * 2**20), ("1.5g", 15 * 10**8), ("1000", 1000), ("2kb", 2000)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "much", "-1GB", "0", "4 XB", "4i"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(UserError, match="is no size: write it as 4GB"):
        parse_size(text)


def test_shown_sizes() -> None:
    assert [show_size(size) for size in (5, 2_000, 34_567_890, 1.2e9)] == ["5 B", "2 kB", "34.6 MB", "1.2 GB"]


def test_memory_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = Meter(10**15)
    kept = np.ones(30_000_000, np.uint8)
    assert meter.peak() - meter.start > 0.9 * len(kept)
    meter.check()
    monkeypatch.setattr(memory, "_status", lambda _: 2 * 10**15)
    with pytest.raises(UserError, match="more than 1e\\+06 GB were taken, nothing was written"):
        meter.check()
