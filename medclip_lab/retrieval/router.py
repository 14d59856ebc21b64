"""One index a domain, and which of them a query is for: named by the caller, or the nearest mean of images."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medclip_lab.errors import UserError
from medclip_lab.files import read_json, write_json
from medclip_lab.retrieval.build import open_all
from medclip_lab.retrieval.embeddings import Floats
from medclip_lab.retrieval.gallery import joined
from medclip_lab.retrieval.index import Index, open_index
from medclip_lab.retrieval.search import Hit

FORMAT = "medclip-lab-router/1"
HELD_OUT = 10
"""One image in so many makes no mean, and tells how often the means are right."""


@dataclass(frozen=True)
class Domain:
    """What a router is made of."""

    index: Path
    embeddings: Path
    """Of images of this domain; for their mean alone."""


def build_router(domains: Mapping[str, Domain], out: str | Path) -> dict[str, Any]:
    """Write a router; returns it. Its "accuracy" is that of held-out images of each domain.

    Paths of indexes are kept relative to the file, so that both can move together.

    Raises:
        UserError: fewer than two domains, different bundles, a domain with fewer than ten images.
    """
    if len(domains) < 2:
        raise UserError(f"router: two domains or more are needed to choose between, got {len(domains)}")
    out = Path(out).expanduser()
    means, held, bundles = [], [], set()
    for name, domain in domains.items():
        folders = open_all(domain.embeddings)
        vectors = joined(folders, "image")
        if len(vectors) < HELD_OUT:
            raise UserError(f"router: {name} has {len(vectors)} images, at least {HELD_OUT} are needed")
        total = np.zeros(vectors.dim)
        for start, block in vectors.blocks():
            total += block[(np.arange(len(block)) + start) % HELD_OUT != 0].sum(axis=0, dtype=np.float64)
        means.append(total / max(float(np.linalg.norm(total)), 1e-12))
        held.append(vectors.take(np.arange(0, len(vectors), HELD_OUT)))
        index = open_index(domain.index)
        bundles |= {folders[0].manifest["bundle"], index.manifest["bundle"]}
    if len(bundles) > 1:
        raise UserError("router: indexes and embeddings are of different bundles: embed and index with one")
    centroids = np.asarray(means, np.float32)
    right = {
        name: float(np.mean(nearest_domain(mine, centroids) == number))
        for number, (name, mine) in enumerate(zip(domains, held, strict=True))
    }
    value = {
        "format": FORMAT,
        "bundle": bundles.pop(),
        "accuracy": right,
        "domains": {
            name: {
                "index": os.path.relpath(domain.index.expanduser().resolve(), out.resolve().parent),
                "centroid": centroid.tolist(),
            }
            for (name, domain), centroid in zip(domains.items(), centroids, strict=True)
        },
    }
    write_json(out, value, indent=None)
    return value


def nearest_domain(vectors: Floats, centroids: Floats) -> NDArray[np.int64]:
    """[N] number of the centroid of the largest cosine."""
    return np.asarray(np.argmax(vectors @ centroids.T, axis=1), np.int64)


class Router:
    """Opened indexes by domain, with the mean image of each."""

    def __init__(self, indexes: Mapping[str, Index], centroids: Floats) -> None:
        assert len(indexes) == len(centroids)
        self.indexes, self.centroids = dict(indexes), centroids

    def index(self, domain: str) -> Index:
        """
        Raises:
            UserError: there is no such domain.
        """
        if domain not in self.indexes:
            raise UserError(f"router: no domain {domain!r}; there are {', '.join(self.indexes)}")
        return self.indexes[domain]

    def domains(self, images: Floats) -> list[str]:
        """The domain of each image vector."""
        names = list(self.indexes)
        return [names[number] for number in nearest_domain(np.atleast_2d(images), self.centroids)]

    def search(
        self, queries: Floats, k: int = 10, *, domains: Sequence[str] | None = None, **options: Any
    ) -> list[list[Hit]]:
        """As `Store.search`, each query in the index of its domain.

        Args:
            domains: one for each query, from its metadata for example; None takes that of the nearest mean of images.
                Texts lie elsewhere than images: for them it has to be given.

        Raises:
            UserError: a domain that there is not, texts without domains.
        """
        queries = np.atleast_2d(queries)
        if domains is None and options.get("direction") == "text":
            raise UserError("router: means of images say nothing about texts: name the domain of each")
        chosen = list(domains) if domains is not None else self.domains(queries)
        if len(chosen) != len(queries):
            raise UserError(f"router: {len(queries)} queries, {len(chosen)} domains")
        answers: list[list[Hit]] = [[] for _ in queries]
        for name in dict.fromkeys(chosen):
            index = self.index(name)
            rows = [row for row, given in enumerate(chosen) if given == name]
            # What is given for each query goes with it.
            mine: dict[str, Any] = {
                option: [value[row] for row in rows] if option in ("not_patients", "not_ids") and value else value
                for option, value in options.items()
            }
            for row, hits in zip(rows, index.search(queries[rows], k, **mine), strict=True):
                answers[row] = hits
        return answers


def open_router(path: str | Path, bundle_fingerprint: str | None = None) -> Router:
    """Open a router and the indexes it names.

    Raises:
        UserError: no such file or format; see `open_index`.
    """
    path = Path(path).expanduser()
    value = read_json(path, "router")
    if value.get("format") != FORMAT:
        raise UserError(f"router: {path} has format {value.get('format')!r}, not {FORMAT!r}: build it again")
    indexes = {
        name: open_index(path.parent / domain["index"], bundle_fingerprint or value["bundle"])
        for name, domain in value["domains"].items()
    }
    centroids = np.array([domain["centroid"] for domain in value["domains"].values()], np.float32)
    return Router(indexes, centroids)
