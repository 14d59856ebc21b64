"""What all requests share: the model on its thread, the decoders' pool, the gate, caches, figures."""

import asyncio
import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from medclip_lab.serving.batcher import Batcher
from medclip_lab.serving.cores import Cores, Decoders, apart
from medclip_lab.serving.dicomweb import Archives
from medclip_lab.serving.gate import Gate
from medclip_lab.serving.images import Limits
from medclip_lab.serving.keys import Caller, Keys
from medclip_lab.serving.logs import Audit
from medclip_lab.serving.metrics import Metrics
from medclip_lab.serving.model import Model
from medclip_lab.serving.oidc import Tokens
from medclip_lab.serving.problems import Problem
from medclip_lab.serving.scoring import PerLabel, Scorer
from medclip_lab.serving.settings import Scope, Settings
from medclip_lab.serving.workers import Workers

V = TypeVar("V")
PULLS = 4
"""Instances of archives that are pulled or decoded at once: each may be as large as a body."""
STAGES = ("receive", "decode", "queue", "model", "search")


class Lru(Generic[V]):
    """The `most` values used last. Any number of threads may use it."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._values: OrderedDict[Hashable, V] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Hashable) -> V | None:
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
            return self._values.get(key)

    def put(self, key: Hashable, value: V) -> None:
        with self._lock:
            self._values[key] = value
            self._values.move_to_end(key)
            while len(self._values) > self._most:
                self._values.popitem(last=False)


@dataclass
class Visit:
    """One request on its way through the house."""

    request_id: str
    caller: Caller
    started: float
    deadline: float
    """By time.monotonic."""
    stages: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    """Seconds."""
    whole: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the body has been read."""
    images: int = 0
    index: str | None = None
    """Hash of the index that was searched."""

    def need(self, scope: Scope) -> None:
        """Refuse a caller without a scope.

        Raises:
            Problem: 403.
        """
        if scope not in self.caller.scopes:
            raise Problem(
                403, "scope", f"this needs the scope `{scope}`: use a key that has it, or leave out what needs it"
            )

    def timings(self) -> dict[str, float]:
        """Milliseconds by stage, and in all."""
        told = {name: round(1000 * seconds, 3) for name, seconds in self.stages.items()}
        return told | {"total": round(1000 * (time.monotonic() - self.started), 3)}


@dataclass
class Making:
    """A scorer that is being made, and how many wait for it."""

    task: "asyncio.Task[Scorer]"
    waiting: int = 0


class House:
    """Everything one process of the service has.

    Raises:
        UserError: a bundle, an index or a file of keys that cannot be used.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.archives = Archives(settings.dicomweb, settings.max_body)
        self.keys = None if settings.keys is None else Keys(settings.keys)
        self.tokens = None
        if settings.oidc_issuer is not None and settings.oidc_audience is not None:
            claim = settings.oidc_scope_claim
            self.tokens = Tokens(settings.oidc_issuer, settings.oidc_audience, settings.oidc_jwks, claim)
        self.model, self.dim = apart(lambda: _loaded(settings))
        self.limits = Limits(settings.max_pixels, settings.max_aspect)
        self.gate = Gate(settings.max_waiting, settings.max_waiting_bytes)
        self.metrics = Metrics(lambda: self.gate.inside, lambda: len(self.batcher))
        self.prompts: Lru[NDArray[np.float32]] = Lru(settings.cached_prompts)
        self.scorers: Lru[Scorer] = Lru(256)
        self.making: dict[Hashable, Making] = {}
        self.batcher = self._new_batcher()
        self._new_pools()
        self.audit: Audit | None = None
        self.workers = Workers()
        # Beside a GPU all cores decode, and the threads of ONNX Runtime sleep where they wait.
        in_torch = self.model.encoder.model.mean.device.type == "cpu" and settings.onnx is None
        self.cores = Cores(decoders=settings.decode_threads if in_torch else settings.threads)
        self.ready = self.leaving = False

    def open(self) -> None:
        """Start the threads and run both towers once, so that no request pays for the first time."""
        if not self.batcher.alive:
            self.batcher = self._new_batcher()
            self._new_pools()
        self.audit = None if self.settings.audit is None else Audit(self.settings.audit)
        apart(self._warm_up)
        for name, classifier in self.model.classifiers.items():
            self.scorers.put(("bundle", name, True), PerLabel(classifier))
        self.batcher.start()
        self.ready = True
        self.leaving = False
        self.workers.here()

    def close(self) -> None:
        self.ready = False
        self.batcher.stop()
        self.pool.shutdown(cancel_futures=True)
        self.pullers.shutdown(wait=False, cancel_futures=True)
        if self.audit is not None:
            self.audit.close()

    def _warm_up(self) -> None:
        size = self.model.preprocess.config.size
        image = torch.zeros(1, size, size, dtype=torch.uint8)
        for number in (1, 2, self.settings.max_batch, self.settings.max_batch):
            with self.cores.alone(number):
                self.model.encode_images([image] * number)

    def _new_pools(self) -> None:
        self.pool = Decoders(self.settings.threads, lambda: self.cores.room(crowded=self.batcher.busy))
        # Of their own: an archive that hangs must not take the threads that search.
        self.pullers = ThreadPoolExecutor(PULLS, thread_name_prefix="pull")
        self.pulls = asyncio.Semaphore(PULLS)

    def _new_batcher(self) -> Batcher:
        return Batcher(
            {"image": self._images, "text": self._texts, "call": lambda calls: [call() for call in calls]},
            self.settings.max_batch,
            self.settings.max_delay,
            coming=lambda: self.gate.inside,
            told=lambda kind, size: self.metrics.batches.labels(kind).observe(size),
        )

    def _images(self, values: list[tuple[torch.Tensor, Scorer | None]]) -> list[tuple[Any, Any]]:
        """For each image its features [D], and its answer if a scorer was asked for; one product for each scorer."""
        self.cores.take(crowded=self.gate.inside > len(values))
        features = self.model.encode_images([pixels for pixels, _ in values])
        answers: list[Any] = [None] * len(values)
        by_scorer: dict[int, list[int]] = {}
        for row, (_, scorer) in enumerate(values):
            if scorer is not None:
                by_scorer.setdefault(id(scorer), []).append(row)
        for rows in by_scorer.values():
            scorer = values[rows[0]][1]
            assert scorer is not None
            for row, answer in zip(rows, scorer.answers(features[rows]), strict=True):
                answers[row] = answer
        return list(zip(features, answers, strict=True))

    def _texts(self, values: list[str]) -> list[Any]:
        return list(self.model.encode_texts(values))


def _loaded(settings: Settings) -> tuple[Model, int]:
    """The model, and the length of its embeddings, which it has to compute."""
    model = Model(settings)
    return model, model.dim


def prompt_key(prompt: str) -> bytes:
    """What a prompt is remembered by: the text itself is not kept."""
    return hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).digest()
