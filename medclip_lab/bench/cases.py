"""Cases of bench index with aims of their own: what was asked for stands beside what was measured."""

from collections.abc import Callable
from typing import Any

from medclip_lab.bench.index import EXACT, OURS, bench_index
from medclip_lab.bench.vectors import Corpus
from medclip_lab.retrieval.choose import Goals
from medclip_lab.retrieval.embeddings import MODALITIES

Say = Callable[[str], None]


def bench_exact(corpus: Corpus, goals: Goals, queries: int, say: Say | None = None) -> dict[str, Any]:
    """Our exact choice beside faiss's exact kinds: the same answers as float32 gives, and how long one query takes."""
    result = bench_index(corpus, goals, queries, [OURS, *EXACT], say, in_turn=True)
    found = result["index"]
    single = {name: entry["single_in_turn_p50_ms"] for name, entry in found.items()}
    aims = {
        f"{name} query alone, p50, of the best of {', '.join(EXACT)}": {
            "asked": "<= 1.2",
            "measured": round(single[OURS][name] / min(single[peer][name] for peer in EXACT), 3),
        }
        for name in MODALITIES
    }
    for name in MODALITIES:
        aims[f"recall@{goals.at} of {name} queries against float32"] = {
            "asked": "1, all answers exact",
            "measured": found[OURS]["recall"][name],
        }
    return {**result, "aims": aims | memory_aims(found[OURS]["memory"])}


def bench_million(corpus: Corpus, goals: Goals, queries: int, say: Say | None = None) -> dict[str, Any]:
    """A corpus whose exact search is slow, in little memory, beside that search: recall and queries a second."""
    result = bench_index(corpus, goals, queries, [OURS, EXACT[0]], say)
    ours, exact = (result["index"][name] for name in (OURS, EXACT[0]))
    aims: dict[str, Any] = {}
    for name in MODALITIES:
        aims[f"recall@{goals.at} of {name} queries"] = {
            "asked": f">= {goals.target_recall:g}",
            "measured": ours["recall"][name],
        }
        aims[f"{name} queries a second in batches, times {EXACT[0]}"] = {
            "asked": ">= 3",
            "measured": round(exact[name]["batched_ms"] / ours[name]["batched_ms"], 2),
        }
    return {**result, "aims": aims | memory_aims(ours["memory"])}


def memory_aims(memory: dict[str, int]) -> dict[str, Any]:
    """What building took at its peak."""
    return {
        "peak memory of the build, of the predicted": {
            "asked": "<= 1.2",
            "measured": round(memory["peak"] / memory["predicted"], 3),
        },
        "peak memory of the build, of --max-memory": {
            "asked": "<= 1",
            "measured": round(memory["peak"] / memory["limit"], 3),
        },
    }


def told(result: dict[str, Any]) -> str:
    """The aims, a line each."""
    return "\n".join(f"{name}: {aim['measured']} ({aim['asked']})" for name, aim in result["aims"].items())
