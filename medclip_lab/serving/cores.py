"""How many cores the model takes: all while nothing is decoded, and beside decoders its share of the work."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch

T = TypeVar("T")
SMOOTHING = 0.1
"""Weight of the newest of the times that are kept."""


class Cores:
    """Seconds of a core that an image costs the decoders and the model, and what follows for the threads of both.

    A tower that spins at its barriers for a core that decodes costs both: a small one runs faster on fewer threads, and
    its decoders on those that are left. A large one, beside which decoding is nothing, takes them all.

    Args:
        decoders: images that are decoded at once, whatever the model costs; None leaves it to the work.
    """

    def __init__(self, number: int | None = None, decoders: int | None = None) -> None:
        self.number = number or torch.get_num_threads()
        self._decoders = decoders
        self._decode = self._model = 0.0
        self._lock = threading.Lock()

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """One image; counts the time of this thread alone."""
        start = time.thread_time()
        yield
        seconds = time.thread_time() - start
        with self._lock:
            self._decode = _smooth(self._decode, seconds)

    def room(self, crowded: bool) -> int:
        """How many images may be decoded at once: at least one.

        Args:
            crowded: whether the model has work meanwhile.
        """
        if self._decoders is not None:
            return self._decoders
        return max(1, round(self.number * (1 - self._part()))) if crowded else self.number

    @contextmanager
    def alone(self, images: int) -> Iterator[None]:
        """A batch while nobody else works, which tells what an image costs the model; the last one counts.

        Under load it could not be told: a thread that waits for others is as busy as one that computes.
        """
        start = time.perf_counter()
        yield
        self._model = self.number * (time.perf_counter() - start) / images

    def take(self, crowded: bool) -> None:
        """Give the model's thread, which calls this, the threads of its next batch.

        Args:
            crowded: whether others are being decoded.
        """
        threads = self.share() if crowded else self.number
        if threads != torch.get_num_threads():
            torch.set_num_threads(threads)

    def share(self) -> int:
        """Of the cores, as the model is of all work; at least one."""
        return max(1, round(self.number * self._part()))

    def _part(self) -> float:
        """The model's, of all work."""
        work = self._model + self._decode
        return self._model / work if work else 1.0


class Decoders(Executor):
    """Threads of which so many work as there is room for now, the same ones: what comes first is done first.

    A thread that took an image and then waited for a core would be overtaken, or have to be woken for each.

    Args:
        threads: at most.
        room: how many may work.
    """

    def __init__(self, threads: int, room: Callable[[], int]) -> None:
        self._room = room
        self._waiting: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._change = threading.Condition()
        self._stopped = False
        self._threads = [
            threading.Thread(target=self._work, args=(number,), name=f"decode_{number}", daemon=True)
            for number in range(threads)
        ]
        self._started = False

    def submit(self, function: Callable[..., T], /, *args: Any, **options: Any) -> "Future[T]":
        future: Future[T] = Future()
        with self._change:
            if self._stopped:
                raise RuntimeError("no decoding after the end")
            for thread in () if self._started else self._threads:
                thread.start()
            self._started = True
            self._waiting.append((future, partial(function, *args, **options)))
            self._change.notify_all()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        with self._change:
            self._stopped = True
            while cancel_futures and self._waiting:
                self._waiting.popleft()[0].cancel()
            self._change.notify_all()
        for thread in self._threads if wait and self._started else ():
            thread.join()

    def _work(self, number: int) -> None:
        while True:
            with self._change:
                # Nobody says when there is more room; the first thread always has some, so that nothing is left over.
                while not self._waiting or (number >= self._room() and not self._stopped):
                    if self._stopped:
                        return
                    self._change.wait()
                future, function = self._waiting.popleft()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except BaseException as error:
                    future.set_exception(error)
            del future, function  # an image and its pixels are not kept until the next one comes


def apart(function: Callable[[], T]) -> T:
    """What a function gives on a thread that ends with it, and with it the team of threads that computed for it.

    OpenMP keeps a team for each thread that ever computed. Where the teams together have more threads than the machine
    has cores, GNU's runtime sleeps at every barrier, and a small tower takes three times as long: the model's thread is
    to have the only one.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="apart") as passing:
        return passing.submit(function).result()


def _smooth(known: float, new: float) -> float:
    return new if not known else known + SMOOTHING * (new - known)
