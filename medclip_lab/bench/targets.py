"""Whether queries that nobody has seen meet the recall that was asked for: corpora that differ, several seeds."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from medclip_lab.bench.index import OURS, bench_index, conditions
from medclip_lab.bench.vectors import Corpus
from medclip_lab.retrieval.choose import Goals

CORPORA: dict[str, dict[str, Any]] = {
    "gap": {"gap": 1.0},
    "no gap": {"gap": 0.0},
    "repeated reports": {"gap": 0.7, "clusters": 2000, "repeated": 0.4},
    "one cloud": {"gap": 1.5, "clusters": 1, "noise": 1.5},
}
"""Images and texts apart and together, two fifths of the reports copies, no clusters at all."""


def bench_targets(
    corpus: Corpus,
    goals: Goals,
    queries: int,
    seeds: int,
    only: Sequence[str] | None = None,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Build an index of each corpus with each seed, and ask it fresh queries of both directions.

    Exact kinds come last, as above `choose.EXACT_VALUES`, so that there is a recall to miss. Of repeated reports the
    reports are searched, of the others the images.

    Args:
        corpus: its size and width are taken; what else it is like, `CORPORA` say.
        only: names of `CORPORA`; None takes all.
    """
    runs = []
    for seed in range(seeds):
        for name in only or CORPORA:
            given = replace(corpus, seed=seed, **CORPORA[name])
            wanted = replace(goals, seed=seed, exact_values=0)
            modality = "text" if given.repeated else "image"
            found = bench_index(given, wanted, queries, [OURS], modality=modality)["index"][OURS]
            recall, memory = found["recall"], found["memory"]
            run = {
                "corpus": name,
                "seed": seed,
                "factory": found["factory"],
                "parameters": found["parameters"],
                "recall": recall,
                "met": min(recall.values()) >= goals.target_recall,
                "peak_of_predicted": round(memory["peak"] / memory["predicted"], 3),
                "peak_of_limit": round(memory["peak"] / memory["limit"], 3),
                "build_seconds": found["build_seconds"],
            }
            runs.append(run)
            if say is not None:
                say(_line(run))
    met = sum(run["met"] for run in runs)
    highest = max(run["peak_of_predicted"] for run in runs)
    aims = {
        "target recall met in both directions": {"asked": f"{len(runs)}/{len(runs)}", "measured": f"{met}/{len(runs)}"},
        "peak memory of a build, of the predicted": {"asked": "<= 1.2", "measured": highest},
        "peak memory of a build, of --max-memory": {
            "asked": "<= 1",
            "measured": max(run["peak_of_limit"] for run in runs),
        },
    }
    return {"size": corpus.size, "dim": corpus.dim, "queries": queries, **conditions(goals), "aims": aims, "runs": runs}


def _line(run: dict[str, Any]) -> str:
    recall = ", ".join(f"{name} {value:.4f}" for name, value in run["recall"].items())
    return (
        f"{run['corpus']}, seed {run['seed']}: {run['factory']}, recall {recall}, {'met' if run['met'] else 'MISSED'}, "
        f"peak {run['peak_of_predicted']} of the predicted, {run['build_seconds']:.0f} s"
    )
