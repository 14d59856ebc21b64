"""Micro-batches: what waits goes through a tower together, on one thread that owns the model."""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from medclip_lab.serving.problems import Problem

T = TypeVar("T")
R = TypeVar("R")


@dataclass(eq=False)
class _Item:
    kind: str
    value: Any
    deadline: float
    answer: "asyncio.Future[Any]"
    waiting_since: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class Timed(Generic[R]):
    """A result, and where its time went, in seconds."""

    value: R
    queue: float
    model: float


class Batcher:
    """Runs functions of lists, by kind, on batches of what waits; of a kind the first that came goes first.

    Kinds take turns, so that nobody's image waits for all of somebody else's two thousand prompts. A batch is of one
    kind. It starts when it is full, when nothing else is on its way, or after `max_delay`: a request that is alone
    waits for nobody.

    Args:
        run: kind -> function from a list of values to as many results, one for each and independent of the others.
        max_batch: values in a batch.
        max_delay: seconds the first of a batch waits for others.
        coming: how many more may come soon; none, and nobody waits.
        told: called with kind and size of every batch, on the model's thread.
    """

    def __init__(
        self,
        run: dict[str, Callable[[list[Any]], Sequence[Any]]],
        max_batch: int,
        max_delay: float,
        coming: Callable[[], int] = lambda: 0,
        told: Callable[[str, int], None] = lambda _kind, _size: None,
    ) -> None:
        self._run, self._max_batch, self._max_delay = run, max_batch, max_delay
        self._coming, self._told = coming, told
        self._waiting: deque[_Item] = deque()
        self._change = threading.Condition()
        self._stopped = False
        self._computing = False
        self._last = ""
        """Kind of the last batch."""
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Finish the batch at hand, refuse the rest, and end the thread."""
        with self._change:
            self._stopped = True
            left = list(self._waiting)
            self._waiting.clear()
            self._change.notify()
        _fail(left, stopping())
        self._thread.join()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._stopped

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def busy(self) -> bool:
        """Whether a batch computes, or waits to."""
        return self._computing or bool(self._waiting)

    async def submit(self, kind: str, value: Any, deadline: float) -> Timed[Any]:
        """The result for one value.

        Args:
            deadline: by time.monotonic; a value whose time is over when its turn comes is not computed.

        Raises:
            Problem: 503, past the deadline or while stopping; else what the function raised.
        """
        item = _Item(kind, value, deadline, asyncio.get_running_loop().create_future())
        with self._change:
            if self._stopped:
                raise stopping()
            self._waiting.append(item)
            self._change.notify()
        result: Timed[Any] = await item.answer
        return result

    def _work(self) -> None:
        while batch := self._next():
            now = time.monotonic()
            late = [item for item in batch if item.deadline <= now]
            _fail(late, past_deadline())
            batch = [item for item in batch if item.deadline > now and not item.answer.cancelled()]
            if batch:
                self._computing = True
                self._compute(batch, now)
                self._computing = False

    def _compute(self, batch: list[_Item], start: float) -> None:
        try:
            self._told(batch[0].kind, len(batch))
            results = self._run[batch[0].kind]([item.value for item in batch])
            assert len(results) == len(batch)
        except Exception as error:  # of one request or of all: those who wait are told, the thread goes on
            if len(batch) == 1:
                _fail(batch, error)
            else:
                # One value must not spoil the others' results: each is tried by itself.
                for item in batch:
                    self._compute([item], start)
            return
        took = time.monotonic() - start
        timed = [Timed(result, start - item.waiting_since, took) for item, result in zip(batch, results, strict=True)]
        _settle(batch, timed)

    def _next(self) -> list[_Item]:
        """A batch of what waits, in its order; empty when stopped."""
        with self._change:
            while not self._waiting:
                if self._stopped:
                    return []
                self._change.wait()
            while not self._stopped and self._waiting:
                first = self._turn()
                ready = sum(item.kind == first.kind for item in self._waiting)
                left = first.waiting_since + self._max_delay - time.monotonic()
                if ready >= self._max_batch or left <= 0 or self._coming() <= len(self._waiting):
                    break
                self._change.wait(left)
            if self._stopped:
                return []
            self._last = self._turn().kind
            batch = [item for item in self._waiting if item.kind == self._last][: self._max_batch]
            for item in batch:
                self._waiting.remove(item)
            return batch

    def _turn(self) -> _Item:
        """The first of another kind than the last batch's, else the first."""
        return next((item for item in self._waiting if item.kind != self._last), self._waiting[0])


def past_deadline() -> Problem:
    return Problem(503, "deadline", "the deadline passed before its turn came: send it again", {"Retry-After": "1"})


def stopping() -> Problem:
    return Problem(503, "stopping", "the service is about to stop: send it again", {"Retry-After": "5"})


def _settle(batch: list[_Item], results: list[Timed[Any]]) -> None:
    """Hand results over to the event loop, all at once: waking it for each would cost more than small batches do."""

    def hand_over() -> None:
        for item, result in zip(batch, results, strict=True):
            if not item.answer.done():
                item.answer.set_result(result)

    if batch:
        _call_soon(batch[0].answer.get_loop(), hand_over)


def _fail(batch: list[_Item], error: Exception) -> None:
    def hand_over() -> None:
        for item in batch:
            if not item.answer.done():
                item.answer.set_exception(error)

    if batch:
        _call_soon(batch[0].answer.get_loop(), hand_over)


def _call_soon(loop: asyncio.AbstractEventLoop, function: Callable[[], None]) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(function)
