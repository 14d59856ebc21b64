"""A load on a service: so many clients, each sending its next request when the last one is answered."""

import asyncio
import json
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

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
    load = Load()
    counted_from = time.perf_counter() + warm_up
    until = counted_from + seconds

    async def client(number: int) -> None:
        connection = Connection(url)
        while (start := time.perf_counter()) < until:
            number += 1
            load.sent += 1
            status, answer = 0, b""
            try:
                async with asyncio.timeout(PATIENCE):
                    status, answer = await connection.post(bodies[number % len(bodies)])
            except (OSError, EOFError, ValueError, TimeoutError):
                connection.close()
            if start >= counted_from:
                _note(load, status, time.perf_counter() - start, answer)
            if status == 429:
                await asyncio.sleep(0.05)
        connection.close()

    await asyncio.gather(*(client(number) for number in range(clients)))
    load.seconds = time.perf_counter() - counted_from
    return load


class Connection:
    """JSON over one HTTP/1.1 connection that is kept, and no more of HTTP than that.

    A client shares the machine with the service it asks. What it takes brings all that is compared nearer to each
    other, and a library for all of HTTP takes twice as much.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "", parts.port or 80
        self._head = (
            f"POST {parts.path} HTTP/1.1\r\nhost: {parts.netloc}\r\ncontent-type: application/json\r\ncontent-length: "
        ).encode()
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def post(self, body: bytes) -> tuple[int, bytes]:
        """Status and body of the answer.

        Raises:
            OSError: no connection, or one that broke.
            EOFError: it ended within the answer.
            ValueError: an answer of another kind than services for JSON give.
        """
        if self._streams is None:
            self._streams = await asyncio.open_connection(self._host, self._port)
        reader, writer = self._streams
        writer.writelines((self._head, b"%d\r\n\r\n" % len(body), body))
        await writer.drain()
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = re.search(rb"\r\ncontent-length: *(\d+)", head)
        if length is None:
            raise ValueError("an answer without its length")
        answer = await reader.readexactly(int(length[1]))
        if b"\r\nconnection: close" in head:
            self.close()
        return int(head[9:12]), answer

    def close(self) -> None:
        """The next request gets a connection of its own."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


def _note(load: Load, status: int, seconds: float, answer: bytes) -> None:
    load.statuses[status] += 1
    if status != 200:
        return
    load.latencies.append(seconds)
    told = json.loads(answer)
    for stage, ms in (told.get("timings_ms", {}) if isinstance(told, dict) else {}).items():
        load.stages.setdefault(stage, []).append(ms)
