"""Figures for Prometheus: requests, stages, batches, what waits. Labels are routes and stages, never content."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
SHARED = "PROMETHEUS_MULTIPROC_DIR"
"""Names the folder through which several processes of one service add up their figures."""


class Metrics:
    """The figures of one service.

    Args:
        inside: how many requests are being answered.
        waiting: how many inputs wait for the model.
    """

    def __init__(self, inside: Callable[[], int], waiting: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("medclip_requests_total", "Answered requests", ("route", "status"), **own)
        self.seconds = Histogram(
            "medclip_request_seconds", "From first byte to answer", ("route",), buckets=SECONDS, **own
        )
        self.stages = Histogram(
            "medclip_stage_seconds",
            "Of a request: receive, decode, queue, model, search",
            ("stage",),
            buckets=SECONDS,
            **own,
        )
        sizes = (1, 2, 4, 8, 16, 32, 64)
        self.batches = Histogram(
            "medclip_batch_size", "Inputs through a tower at once", ("kind",), buckets=sizes, **own
        )
        self.refused = Counter("medclip_refused_total", "Requests refused, by reason", ("reason",), **own)
        self.prompts = Counter("medclip_prompts_total", "Prompts of own labels", ("cache",), **own)
        # Set, not asked for: between processes a gauge's function is not heard.
        self._inside = Gauge("medclip_requests_inside", "Being answered now", multiprocess_mode="livesum", **own)
        self._waiting = Gauge("medclip_inputs_waiting", "Waiting for the model now", multiprocess_mode="livesum", **own)
        self._count_inside, self._count_waiting = inside, waiting

    def now(self) -> None:
        """Take down what is here at this moment."""
        self._inside.set(self._count_inside())
        self._waiting.set(self._count_waiting())

    def page(self) -> bytes:
        """All of it, as Prometheus reads it."""
        self.now()
        if SHARED not in os.environ:
            return generate_latest(self.registry)
        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry)


def forget_dead() -> None:
    """Leave out what processes that were killed had inside them; a process that takes the place of one says so."""
    for path in Path(os.environ[SHARED]).glob("gauge_live*_*.db"):
        number = int(path.stem.rpartition("_")[2])
        if not alive(number):
            mark_process_dead(number)  # type: ignore[no-untyped-call]


def alive(process: int) -> bool:
    """Whether there is a process of this number, and it is ours."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True
