"""Micro-batches: right whatever they are made of, bounded, and nobody waits for nobody."""

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from medclip_lab.serving.batcher import Batcher
from medclip_lab.serving.gate import Gate
from medclip_lab.serving.house import Lru
from medclip_lab.serving.problems import Problem

from .conftest import Serve, encoded, png, problem

FAR = 1e12


@contextmanager
def running(run: dict[str, Callable[[list[Any]], Any]], **options: Any) -> Iterator[Batcher]:
    batcher = Batcher(run, options.pop("max_batch", 8), options.pop("max_delay", 0.0), **options)
    batcher.start()
    yield batcher
    if batcher.alive:
        batcher.stop()


def together(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(work)


async def all_of(batcher: Batcher, values: list[Any], kind: str = "x") -> list[Any]:
    return await asyncio.gather(*(batcher.submit(kind, value, FAR) for value in values), return_exceptions=True)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(), min_size=1, max_size=60), st.integers(1, 9))
def test_everybody_gets_their_own(values: list[int], size: int) -> None:
    sizes: list[int] = []
    told = lambda _kind, number: sizes.append(number)  # noqa: E731
    with running({"x": lambda batch: [-value for value in batch]}, max_batch=size, told=told) as batcher:
        found = together(all_of(batcher, values))
    assert [one.value for one in found] == [-value for value in values]
    assert max(sizes) <= size
    assert sum(sizes) == len(values)


def test_what_waits_while_a_batch_runs_goes_together_and_by_kind() -> None:
    go, batches = threading.Event(), []

    def run(kind: str) -> Callable[[list[int]], list[int]]:
        def work(values: list[int]) -> list[int]:
            batches.append((kind, values))
            go.wait()
            return values

        return work

    async def ask(batcher: Batcher) -> list[Any]:
        first = asyncio.ensure_future(batcher.submit("x", 0, FAR))
        while not batches:
            await asyncio.sleep(0.001)
        order = [("x", 1), ("y", 2), ("x", 3), ("y", 4)]
        rest = [asyncio.ensure_future(batcher.submit(kind, value, FAR)) for kind, value in order]
        await asyncio.sleep(0.01)
        assert len(batcher) == 4
        assert batcher.busy
        go.set()
        return [(await one).value for one in (first, *rest)]

    with running({"x": run("x"), "y": run("y")}) as batcher:
        assert not batcher.busy
        assert together(ask(batcher)) == [0, 1, 2, 3, 4]
        while batcher.busy:  # for a moment after its last answer
            time.sleep(0.001)
    assert batches == [("x", [0]), ("y", [2, 4]), ("x", [1, 3])]


def test_an_image_does_not_wait_for_all_prompts() -> None:
    batches: list[str] = []

    async def ask(batcher: Batcher) -> None:
        prompts = asyncio.ensure_future(all_of(batcher, list(range(400)), "text"))
        while not batches:
            await asyncio.sleep(0)
        await batcher.submit("image", 0, FAR)
        assert not prompts.done()
        await prompts

    def run(values: list[Any]) -> list[Any]:
        time.sleep(0.001)
        return values

    told = lambda kind, _number: batches.append(kind)  # noqa: E731
    with running({"text": run, "image": run}, told=told) as batcher:
        together(ask(batcher))
    assert batches.count("text") == 50


def test_a_batch_waits_for_those_that_come_and_for_no_others() -> None:
    sizes: list[int] = []
    told = lambda _kind, number: sizes.append(number)  # noqa: E731
    coming = 2

    async def two(batcher: Batcher) -> None:
        first = asyncio.ensure_future(batcher.submit("x", 1, FAR))
        await asyncio.sleep(0.05)
        assert not sizes  # the other is being decoded
        await asyncio.gather(first, batcher.submit("x", 2, FAR))

    with running({"x": list}, max_delay=60.0, coming=lambda: coming, told=told) as batcher:
        together(two(batcher))
        assert sizes == [2]
        coming = 1
        together(asyncio.wait_for(batcher.submit("x", 3, FAR), 10))  # alone: it does not wait a minute
    assert sizes == [2, 1]


def test_one_that_fails_fails_alone() -> None:
    def run(values: list[int]) -> list[float]:
        return [1 / value for value in values]

    with running({"x": run}, max_delay=0.05, coming=lambda: 99) as batcher:
        found = together(all_of(batcher, [1, 0, 2]))
        assert isinstance(found[1], ZeroDivisionError)
        assert [found[0].value, found[2].value] == [1, 0.5]
        assert together(all_of(batcher, [4]))[0].value == 0.25


def test_past_its_deadline_nothing_is_computed() -> None:
    seen: list[int] = []

    async def ask(batcher: Batcher) -> Any:
        late = batcher.submit("x", 1, time.monotonic() - 1)
        return await asyncio.gather(late, batcher.submit("x", 2, FAR), return_exceptions=True)

    with running({"x": lambda values: seen.extend(values) or values}) as batcher:
        late, found = together(ask(batcher))
    assert isinstance(late, Problem)
    assert (late.status, late.kind) == (503, "deadline")
    assert found.value == 2
    assert seen == [2]


def test_who_left_is_not_computed() -> None:
    go, seen = threading.Event(), []

    def run(values: list[int]) -> list[int]:
        seen.extend(values)
        go.wait()
        return values

    async def ask(batcher: Batcher) -> None:
        first = asyncio.ensure_future(batcher.submit("x", 1, FAR))
        while not seen:
            await asyncio.sleep(0.001)
        gone = asyncio.ensure_future(batcher.submit("x", 2, FAR))
        await asyncio.sleep(0.01)
        gone.cancel()
        await asyncio.sleep(0.01)
        go.set()
        await first

    with running({"x": run}) as batcher:
        together(ask(batcher))
    assert seen == [1]


def test_stopping_refuses_what_waits() -> None:
    go = threading.Event()

    async def ask(batcher: Batcher) -> list[Any]:
        waiting = [asyncio.ensure_future(batcher.submit("x", value, FAR)) for value in range(3)]
        await asyncio.sleep(0.05)
        threading.Timer(0.05, go.set).start()
        await asyncio.to_thread(batcher.stop)
        return await asyncio.gather(*waiting, batcher.submit("x", 9, FAR), return_exceptions=True)

    with running({"x": lambda values: go.wait() and values}, max_batch=1) as batcher:
        found = together(ask(batcher))
    assert found[0].value == 0
    assert {one.kind for one in found[1:]} == {"stopping"}


def test_the_gate_counts_requests_and_bytes() -> None:
    gate = Gate(2, 100)
    with gate.enter(90):
        with pytest.raises(Problem, match="busy"), gate.enter(11):
            pass
        with gate.enter(10):
            assert (gate.inside, gate.bytes) == (2, 100)
            with pytest.raises(Problem) as refused, gate.enter(0):
                pass
    assert refused.value.status == 429
    assert refused.value.headers == {"Retry-After": "1"}
    assert (gate.inside, gate.bytes) == (0, 0)
    with gate.enter(1000):  # a body that is allowed can always come in
        pass
    gate.took(2.5)
    assert gate.retry_after() == 3


def test_lru_forgets_what_was_used_longest_ago() -> None:
    cache: Lru[int] = Lru(2)
    cache.put("a", 1)
    cache.put("b", 2)
    assert cache.get("a") == 1
    cache.put("c", 3)
    assert (cache.get("b"), cache.get("a"), cache.get("c"), len(cache)) == (None, 1, 3, 2)


def test_results_do_not_depend_on_the_batch(client: TestClient) -> None:
    """Grey beside colour, alone or among others."""
    house = client.app.state.house  # type: ignore[attr-defined]
    generator = torch.Generator().manual_seed(0)
    pixels = [
        torch.randint(0, 256, (3 if number % 3 == 0 else 1, 32, 32), dtype=torch.uint8, generator=generator)
        for number in range(16)
    ]
    alone = np.concatenate([house.model.encode_images([one]) for one in pixels])
    for size in (2, 5, 16):
        for start in range(0, 16, size):
            rows = house.model.encode_images(pixels[start : start + size])
            assert np.abs(rows - alone[start : start + size]).max() < 1e-6


def test_figures_that_cannot_be_written_do_not_end_the_thread() -> None:
    def told(_kind: str, _size: int) -> None:
        raise FileNotFoundError  # the folder that processes share is gone

    with running({"x": lambda values: values}, told=told) as batcher:
        for _ in range(2):
            with pytest.raises(FileNotFoundError):
                together(batcher.submit("x", 1, FAR))
        assert batcher.alive


def test_many_at_once_get_what_they_would_alone(client: TestClient) -> None:
    from concurrent.futures import ThreadPoolExecutor

    bodies = []
    for number in range(24):
        labels = {} if number % 3 else {"candidate_labels": [f"label {number % 2}", "other"], "templates": ["{}."]}
        bodies.append({"images": [{"data": encoded(png(number, (30 + number, 40)))}], **labels})

    def scores(body: Any) -> list[float]:
        response = client.post("/v1/classify", json=body)
        assert response.status_code == 200, response.text
        assert response.json()["results"][0]["image"]["height"] == 30 + bodies.index(body)
        return [finding["score"] for finding in response.json()["results"][0]["labels"]]

    alone = [scores(body) for body in bodies]
    with ThreadPoolExecutor(12) as pool:
        crowded = list(pool.map(scores, bodies * 2))
    assert np.abs(np.concatenate(crowded) - np.concatenate(alone * 2)).max() < 1e-6


def test_labels_that_many_ask_for_at_once_are_made_once(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    from concurrent.futures import ThreadPoolExecutor

    client = serve()
    house, made = client.app.state.house, []  # type: ignore[attr-defined]
    real = house.model.encode_texts
    go = threading.Event()
    monkeypatch.setattr(house.model, "encode_texts", lambda texts: (go.wait(20) and made.extend(texts)) or real(texts))
    body = {"images": [{"data": encoded(png())}], "candidate_labels": ["a"], "templates": ["{}."]}
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(client.post, "/v1/classify", json=body) for _ in range(8)]
        while house.gate.inside < 8:
            time.sleep(0.001)
        time.sleep(0.05)
        go.set()
        assert {one.result().status_code for one in asked} == {200}
    assert sorted(made) == sorted(set(made))
    assert not house.making
    refused = {"images": body["images"], "candidate_labels": ["a b " * 40]}
    for _ in range(2):  # what cannot be made is not remembered
        problem(client.post("/v1/classify", json=refused), 422, "label-too-long")
    assert not house.making


@contextmanager
def held(client: TestClient) -> Iterator[threading.Event]:
    """A model that does nothing until the event is set."""
    house, go = client.app.state.house, threading.Event()  # type: ignore[attr-defined]
    real = house.model.encode_images
    house.model.encode_images = lambda pixels: go.wait(20) and real(pixels)
    yield go
    go.set()
    house.model.encode_images = real


def test_a_full_house_answers_429_at_once_and_serves_those_inside(serve: Serve) -> None:
    from concurrent.futures import ThreadPoolExecutor

    client = serve(max_waiting=3, max_batch=2)
    body = {"images": [{"data": encoded(png())}]}
    gate = client.app.state.house.gate  # type: ignore[attr-defined]
    with ThreadPoolExecutor(3) as pool, held(client) as go:
        inside = [pool.submit(client.post, "/v1/classify", json=body) for _ in range(3)]
        while gate.inside < 3:
            time.sleep(0.001)
        refused = client.post("/v1/classify", json=body)
        assert "send it again in" in problem(refused, 429, "busy")
        assert int(refused.headers["retry-after"]) >= 1
        assert client.get("/healthz").status_code == 200
        go.set()
        assert [one.result().status_code for one in inside] == [200] * 3
    assert client.post("/v1/classify", json=body).status_code == 200
    assert (gate.inside, gate.bytes) == (0, 0)


def test_who_asked_first_takes_nobody_along(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels that two ask for are made for the second when the time of the first is over."""
    from concurrent.futures import ThreadPoolExecutor

    client = serve(deadline=2.0)
    house = client.app.state.house  # type: ignore[attr-defined]
    real, go = house.model.encode_texts, threading.Event()
    monkeypatch.setattr(house.model, "encode_texts", lambda texts: (go.wait(20) and False) or real(texts))
    body = {"images": [{"data": encoded(png())}], "candidate_labels": ["a"], "templates": ["{}."]}
    with ThreadPoolExecutor(3) as pool:
        # The model is busy with a first text, so that the prompts of the label wait until a deadline has passed.
        busy = pool.submit(client.post, "/v1/embed", json={"texts": ["x"]})
        while not house.gate.inside:
            time.sleep(0.001)
        first = pool.submit(client.post, "/v1/classify", json=body)
        time.sleep(1.3)
        second = pool.submit(client.post, "/v1/classify", json=body)
        problem(first.result(), 503, "deadline")
        go.set()
        assert second.result().status_code == 200
        problem(busy.result(), 503, "deadline")


def test_a_request_ends_at_its_deadline(serve: Serve) -> None:
    client = serve(deadline=0.5)
    with held(client):
        refused = client.post("/v1/classify", json={"images": [{"data": encoded(png())}]})
    problem(refused, 503, "deadline")
    assert refused.headers["retry-after"] == "1"
    assert client.app.state.house.gate.inside == 0  # type: ignore[attr-defined]
