"""Our index beside plain faiss and autofaiss on the same vectors: each in a process of its own, with fresh queries."""

import importlib.util
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medclip_lab.bench.drawing import draw
from medclip_lab.bench.machine import facts
from medclip_lab.bench.processes import why_failed
from medclip_lab.bench.vectors import Corpus
from medclip_lab.errors import UserError
from medclip_lab.evaluation.charts import BarRow
from medclip_lab.files import read_json, write_json
from medclip_lab.retrieval.build import build_index
from medclip_lab.retrieval.choose import Goals
from medclip_lab.retrieval.embeddings import MODALITIES, Embeddings, Files, Floats, Rows
from medclip_lab.retrieval.families import import_faiss
from medclip_lab.retrieval.index import open_index
from medclip_lab.retrieval.memory import Meter
from medclip_lab.retrieval.recall import BATCH, Queries, find_truth, right

OURS = "medclip_lab"
EXACT = ("faiss Flat", "faiss SQfp16", "faiss SQ8")
CONTENDERS = (OURS, "faiss Flat", "faiss HNSW32", "autofaiss")
"""Those of a comparison; plain faiss by another factory string is one too, `EXACT` for example."""
PERCENTILES = (50, 95, 99)
TURNS = 100
"""Single queries that are timed, of each direction."""
Ask = Callable[[Floats, int, str], Rows]


def bench_index(
    corpus: Corpus,
    goals: Goals,
    queries: int = 500,
    only: Sequence[str] | None = None,
    say: Callable[[str], None] | None = None,
    modality: str = "image",
    in_turn: bool = False,
) -> dict[str, Any]:
    """Build and ask each contender: build seconds, memory of the whole process at its peak, bytes a vector, recall of
    each direction, milliseconds a query that comes alone and in batches.

    The vectors are written to a temporary folder first. Queries were seen by nobody. autofaiss takes part where it is
    installed.

    Args:
        modality: what is searched.
        in_turn: time single queries once more, each asked of all contenders before the next, in one process: what else
            the machine does then delays all of them alike.

    Raises:
        UserError: no such contender, or one that could not do it.
    """
    chosen = list(only or [name for name in CONTENDERS if name != "autofaiss" or importlib.util.find_spec(name)])
    there = (*CONTENDERS, *EXACT[1:])
    if unknown := [name for name in chosen if name not in there]:
        raise UserError(f"no contender is named {', '.join(unknown)}; there are {', '.join(there)}")
    if queries < 1:
        raise UserError(f"at least one query, got {queries}")
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        corpus.write(folder / "embeddings")
        gallery = Embeddings(folder / "embeddings").vectors(modality)
        asked = {name: Queries(name, values) for name, values in corpus.fresh(queries).items()}
        find_truth(asked, gallery.blocks(), len(gallery), goals.at)
        for name, given in asked.items():
            np.save(folder / f"{name}.npy", given.vectors)
        write_json(folder / "wanted.json", {"goals": asdict(goals), "modality": modality})
        for name in chosen:
            result = _run(name, folder)
            result["recall"] = {
                direction: round(float(_recall(given, folder / f"found-{direction}.npy", gallery)), 4)
                for direction, given in asked.items()
            }
            results[name] = result
            if say is not None:
                say(_line(name, result))
        if in_turn:
            _process("take_turns", str(folder), "bench: taking turns")
            for name, milliseconds in read_json(folder / "turns.json", "bench").items():
                results[name]["single_in_turn_p50_ms"] = milliseconds
    return {
        "size": corpus.size,
        "dim": corpus.dim,
        "gap": corpus.gap,
        "clusters": corpus.clusters,
        "queries": queries,
        **conditions(goals),
        "index": results,
    }


def conditions(goals: Goals) -> dict[str, Any]:
    """What was asked for, by which code and on which machine."""
    return {
        "at": goals.at,
        "target": goals.target_recall,
        "max_memory": goals.max_memory,
        **environment(),
    }


def environment() -> dict[str, Any]:
    """Of which code and machine the figures are."""
    return {
        **facts(),
        "threads": import_faiss().omp_get_max_threads(),
        "faiss": import_faiss().__version__,
    }


def _recall(given: Queries, found: Path, gallery: Files) -> float:
    rows = np.load(found, allow_pickle=False)
    return float(right(given, np.arange(len(given.vectors)), rows, gallery).mean())


def _run(name: str, folder: Path) -> dict[str, Any]:
    _process("contend", f"{name}\n{folder}", f"bench: {name}")
    return read_json(folder / "result.json", "bench")


def _process(function: str, given: str, what: str) -> None:
    """One of the functions below, in a process of its own."""
    code = f"from medclip_lab.bench.index import {function}; {function}(*{given.splitlines()!r})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)  # noqa: S603 - our own words
    if run.returncode:
        raise UserError(f"{what} failed: {why_failed(run)}")


def contend(name: str, folder: str) -> None:
    """One contender, in the process that is measured: writes `result.json` and what it found into the folder."""
    place = Path(folder)
    wanted = read_json(place / "wanted.json", "bench")
    meter = Meter(sys.maxsize)
    start = time.perf_counter()
    builders = {OURS: _ours, "autofaiss": _autofaiss}
    ask, size, about = builders[name](place, wanted) if name in builders else _plain(name, place, wanted)
    seconds = time.perf_counter() - start
    peak = about["memory"]["peak"] if "memory" in about else meter.peak()  # ours knows of processes beside it
    result: dict[str, Any] = {
        **about,
        "build_seconds": round(seconds, 2),
        "peak_mb": round(peak / 1e6, 1),
        "bytes_per_vector": round(size / len(_vectors(place, wanted)), 1),
    }
    at = wanted["goals"]["at"]
    for direction in MODALITIES:
        queries = np.load(place / f"{direction}.npy", allow_pickle=False)
        np.save(place / f"found-{direction}.npy", ask(queries, at, direction))
        alone = []
        for query in queries[:TURNS]:
            start = time.perf_counter()
            ask(query[None], at, direction)
            alone.append(1e3 * (time.perf_counter() - start))
        start = time.perf_counter()
        for first in range(0, len(queries), BATCH):
            ask(queries[first : first + BATCH], at, direction)
        batched = 1e3 * (time.perf_counter() - start) / len(queries)
        single = {f"p{share}": round(float(np.percentile(alone, share)), 4) for share in PERCENTILES}
        result[direction] = {"single_ms": single, "batched_ms": round(batched, 4)}
    write_json(place / "result.json", result)


def take_turns(folder: str) -> None:
    """Milliseconds of single queries (p50), by contender and direction, into `turns.json`: see `bench_index`."""
    place = Path(folder)
    wanted = read_json(place / "wanted.json", "bench")
    saved = {f"faiss {path.stem}": path for path in sorted(place.glob("*.faiss"))}
    asks = {name: _asking(import_faiss().read_index(str(path))) for name, path in saved.items()}
    if (place / "ours").exists():
        asks[OURS] = _asking_ours(place)
    seconds: dict[str, dict[str, list[float]]] = {name: {direction: [] for direction in MODALITIES} for name in asks}
    for direction in MODALITIES:
        queries = np.load(place / f"{direction}.npy", allow_pickle=False)[:TURNS]
        for number, query in enumerate(queries):
            order = list(asks)[number % len(asks) :] + list(asks)[: number % len(asks)]
            for name in order:
                start = time.perf_counter()
                asks[name](query[None], wanted["goals"]["at"], direction)
                seconds[name][direction].append(time.perf_counter() - start)
    told = {
        name: {direction: round(1e3 * float(np.median(found)), 4) for direction, found in given.items()}
        for name, given in seconds.items()
    }
    write_json(place / "turns.json", told)


Contender = tuple[Ask, int, dict[str, Any]]


def _ours(place: Path, wanted: dict[str, Any]) -> Contender:
    goals = Goals(**wanted["goals"])
    manifest = build_index(place / "embeddings", place / "ours", wanted["modality"], goals=goals, say=lambda _: None)
    size = sum(manifest["files"][role]["bytes"] for role in ("vectors", "lists") if role in manifest["files"])
    about = {name: manifest[name] for name in ("factory", "parameters", "memory", "tried")}
    return _asking_ours(place), size, about


def _asking_ours(place: Path) -> Ask:
    index = open_index(place / "ours")
    return lambda queries, k, direction: _padded(index.nearest(queries, k, index.parameters(direction))[1], k)


def _asking(index: Any) -> Ask:
    return lambda queries, k, _direction: np.asarray(index.search(queries, k)[1])


def _plain(name: str, place: Path, wanted: dict[str, Any]) -> Contender:
    key, vectors, faiss = name.removeprefix("faiss "), _vectors(place, wanted), import_faiss()
    index = faiss.index_factory(vectors.dim, key, faiss.METRIC_INNER_PRODUCT)
    for _start, block in vectors.blocks():
        if not index.is_trained:  # the range of each dimension
            index.train(block)
        index.add(block)
    path = place / f"{key}.faiss"
    faiss.write_index(index, str(path))
    return _asking(index), path.stat().st_size, {"factory": key}


def _autofaiss(place: Path, wanted: dict[str, Any]) -> Contender:
    from autofaiss import build_index as build  # not of ours, and not in our environment

    vectors = np.concatenate([block for _, block in _vectors(place, wanted).blocks()])
    memory = f"{(wanted['goals']['max_memory'] or Meter().limit) / 1e9:g}GB"
    index, about = build(
        vectors, save_on_disk=False, metric_type="ip", max_index_memory_usage=memory, current_memory_available=memory
    )
    size = int(import_faiss().serialize_index(index).nbytes)
    factory = {"factory": str(about.get("index_key", ""))}
    return _asking(index), size, factory


def _vectors(place: Path, wanted: dict[str, Any]) -> Files:
    return Embeddings(place / "embeddings").vectors(wanted["modality"])


def _padded(rows: list[list[int]], k: int) -> NDArray[np.int64]:
    return np.array([[*found, *[-1] * (k - len(found))] for found in rows], np.int64)


def _line(name: str, result: dict[str, Any]) -> str:
    found = "; ".join(
        f"{direction} {result['recall'][direction]:.4f}, {result[direction]['single_ms']['p50']:.3g} ms alone, "
        f"{result[direction]['batched_ms']:.3g} in batches"
        for direction in MODALITIES
    )
    return (
        f"{name} ({result['factory']}): {found}; {result['bytes_per_vector']:.0f} bytes a vector, built in "
        f"{result['build_seconds']:.1f} s and {result['peak_mb']:.0f} MB"
    )


def draw_index(result: dict[str, Any], path: Path) -> None:
    """Write a drawing of `bench_index`'s result, SVG."""
    title = f"{result['size']:,} x {result['dim']} vectors, modality gap {result['gap']:g}, {result['threads']} threads"
    views: list[tuple[str, str, Callable[[dict[str, Any]], float]]] = [
        (f"Recall@{result['at']} of fresh {name} queries", "{:.4f}", lambda entry, name=name: entry["recall"][name])  # type: ignore[misc]
        for name in MODALITIES
    ]
    views += [
        ("Milliseconds, a text query alone (p50)", "{:.3g} ms", lambda entry: entry["text"]["single_ms"]["p50"]),
        ("Milliseconds, a text query in a batch", "{:.3g} ms", lambda entry: entry["text"]["batched_ms"]),
        ("Memory at the peak of the build", "{:,.0f} MB", lambda entry: entry["peak_mb"]),
        ("Seconds to build", "{:.3g} s", lambda entry: entry["build_seconds"]),
    ]
    panels = []
    for head, form, value in views:
        rows = []
        for name, entry in result["index"].items():
            note, label = form.format(value(entry)), f"{name}: {entry['factory']}" if name == OURS else name
            rows.append(BarRow(name=label, parts=[("c1" if name == OURS else "c2", value(entry), note)], note=note))
        panels.append((head, rows))
    draw(title, panels, path)
