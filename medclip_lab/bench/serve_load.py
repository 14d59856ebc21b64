"""A load on a service: so many clients, each sending its next request when the last one is answered."""

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

PATIENCE = 60.0  # seconds after which a request counts as timed out


@dataclass
class Load:
    """What happened to the requests of one load."""

    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    """Seconds of each answered request."""
    sent: int = 0
    """Requests in all, those of the warm-up included."""
    statuses: Counter[int] = field(default_factory=Counter)
    """HTTP statuses; 0 is a request that got no answer."""
    stages: dict[str, list[float]] = field(default_factory=dict)
    """Milliseconds by stage, where the service tells them."""

    def summary(self) -> dict[str, Any]:
        """Milliseconds at percentiles, requests a second, and statuses."""
        done = len(self.latencies)
        result: dict[str, Any] = {"sent": self.sent, "answered": done, "per_second": round(done / self.seconds, 2)}
        for share in (50, 95, 99):
            result[f"p{share}_ms"] = round(1000 * float(np.percentile(self.latencies, share)), 2) if done else None
        result["statuses"] = {str(status): count for status, count in sorted(self.statuses.items())}
        if self.stages:
            result["stages_p50_ms"] = {name: round(float(np.median(ms)), 2) for name, ms in self.stages.items()}
        return result


def send(url: str, bodies: Sequence[bytes], clients: int, seconds: float, warm_up: float = 1.0) -> Load:
    """Load a service for a while; requests that started in the warm-up do not count.

    Args:
        bodies: JSON, sent in turn.
    """
    return asyncio.run(_send(url, bodies, clients, seconds, warm_up))


async def _send(url: str, bodies: Sequence[bytes], clients: int, seconds: float, warm_up: float) -> Load:
    import aiohttp

    load = Load()
    counted_from = time.perf_counter() + warm_up
    until = counted_from + seconds
    timeout = aiohttp.ClientTimeout(total=PATIENCE)
    connector = aiohttp.TCPConnector(limit=clients)
    headers = {"content-type": "application/json"}

    async with aiohttp.ClientSession(timeout=timeout, connector=connector, headers=headers) as session:

        async def client(number: int) -> None:
            while (start := time.perf_counter()) < until:
                number += 1
                load.sent += 1
                status, answer = 0, None
                try:
                    async with session.post(url, data=bodies[number % len(bodies)]) as response:
                        answer, status = await response.json(content_type=None), response.status
                except (aiohttp.ClientError, TimeoutError):
                    pass
                if start >= counted_from:
                    _note(load, status, time.perf_counter() - start, answer)
                if status == 429:
                    await asyncio.sleep(0.05)

        await asyncio.gather(*(client(number) for number in range(clients)))
    load.seconds = time.perf_counter() - counted_from
    return load


def _note(load: Load, status: int, seconds: float, answer: Any) -> None:
    load.statuses[status] += 1
    if status != 200:
        return
    load.latencies.append(seconds)
    if isinstance(answer, dict):
        for stage, ms in answer.get("timings_ms", {}).items():
            load.stages.setdefault(stage, []).append(ms)
