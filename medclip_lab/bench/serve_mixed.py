"""The service under every kind of request for as long as asked: what it answers, and whether its memory grows."""

import asyncio
import base64
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medclip_lab.bench.processes import resident_mib
from medclip_lab.bench.serve_load import PATIENCE
from medclip_lab.bench.vectors import Corpus
from medclip_lab.retrieval.build import build_index

CLIENTS = 8
SAMPLES = 200  # readings of memory over the whole load
SHARE = 0.1  # of the readings: so many first ones are warm-up, and so many are averaged on either side
OWN_LABELS = 500  # sets of labels that no cache of scorers holds at once


@dataclass(frozen=True)
class Asked:
    """One request, and what may be answered."""

    path: str
    body: bytes
    content_type: str = "application/json"
    status: int = 200


def requests(images: Sequence[bytes], explain: bool) -> list[Asked]:
    """Every route, with the bundle's labels and the request's own, images in every form, and some that are broken."""
    made = []
    for number in range(OWN_LABELS):
        image = images[number % len(images)]
        sent = {"data": base64.b64encode(image).decode()}
        words = [f"finding {number}", f"finding {number + 1}"]
        kinds: list[tuple[str, Any]] = [
            ("/v1/classify", {"images": [sent]}),
            ("/v1/classify", {"images": [sent, sent], "candidate_labels": words}),
            ("/v1/embed", {"texts": words, "images": [sent]}),
            ("/v1/search", {"image": sent, "k": 10}),
            ("/v1/search", {"text": words[0], "k": 10}),
            ("/v1/zero-shot-image-classification", {"inputs": sent["data"], "parameters": {"candidate_labels": words}}),
        ]
        if explain and number % 5 == 0:
            kinds.append(("/v1/explain", {"image": sent, "positive": words[:1]}))
        made += [Asked(path, json.dumps(body).encode()) for path, body in kinds]
        made.append(Asked("/v1/classify", image, "image/jpeg"))
        made.append(Asked("/v1/classify", image[: len(image) // 3], "image/jpeg", 422))
        made.append(Asked("/v1/classify", b'{"images": []', status=422))
    return made


def make_index(out: Path, fingerprint: str, dim: int) -> Path:
    """A small index of images, as if the bundle had made it."""
    corpus = Corpus(size=2000, dim=dim, clusters=50)
    build_index(corpus.write(out.parent / "embeddings", fingerprint), out, "image")
    return out


def bear(
    base: str, process: int, images: Sequence[bytes], minutes: float, say: Callable[[str], None]
) -> dict[str, Any]:
    """Load a service with all of `requests`, in an order by lot, and watch its memory.

    Args:
        process: whose memory is read, with that of all it started.
    """
    return asyncio.run(_bear(base, process, images, 60 * minutes, say))


async def _bear(
    base: str, process: int, images: Sequence[bytes], seconds: float, say: Callable[[str], None]
) -> dict[str, Any]:
    import aiohttp

    statuses: Counter[str] = Counter()
    wrong: Counter[str] = Counter()
    memory: list[float] = []
    until = time.monotonic() + seconds

    async with aiohttp.ClientSession(base, timeout=aiohttp.ClientTimeout(total=PATIENCE)) as session:
        async with session.get("/v1/models") as answer:
            can_explain = (await answer.json())["can_explain"]
        asked = requests(images, can_explain)

        async def client(number: int) -> None:
            lot = np.random.default_rng(number)
            while time.monotonic() < until:
                one = asked[int(lot.integers(len(asked)))]
                try:
                    async with session.post(one.path, data=one.body, headers={"content-type": one.content_type}) as got:
                        await got.read()
                        status = got.status
                except (aiohttp.ClientError, TimeoutError):
                    status = 0
                statuses[str(status)] += 1
                if status != one.status:
                    wrong[f"{one.path} {status}"] += 1

        async def watch() -> None:
            while time.monotonic() < until:
                await asyncio.sleep(seconds / SAMPLES)
                memory.append(round(resident_mib(process), 1))
                if len(memory) % 20 == 0:
                    say(f"{100 * len(memory) / SAMPLES:.0f}%: {statuses.total()} requests, {memory[-1]} MiB")

        await asyncio.gather(watch(), *(client(number) for number in range(CLIENTS)))
    return {
        "minutes": seconds / 60,
        "clients": CLIENTS,
        "statuses": dict(sorted(statuses.items())),
        "not_as_expected": dict(wrong),
        "failures_5xx": sum(count for status, count in statuses.items() if status.startswith("5")),
        "unanswered": statuses["0"],
        "memory_mib": memory,
        **growth(memory),
    }


def growth(memory: Sequence[float]) -> dict[str, Any]:
    """Memory after the warm-up and at the end, each the mean of a tenth of the readings, and the growth between."""
    tenth = max(int(SHARE * len(memory)), 1)
    start, end = float(np.mean(memory[tenth : 2 * tenth])), float(np.mean(memory[-tenth:]))
    return {
        "memory_after_warm_up_mib": round(start, 1),
        "memory_at_end_mib": round(end, 1),
        "memory_growth": round(end / start - 1, 4),
    }
