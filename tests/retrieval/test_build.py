"""Goals: what is chosen fits, reaches the recall in both directions for fresh queries, and says how it was found."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medclip_lab.bench.vectors import Corpus
from medclip_lab.errors import UserError
from medclip_lab.retrieval import choose, gallery, tune
from medclip_lab.retrieval.build import build_index
from medclip_lab.retrieval.choose import Goals
from medclip_lab.retrieval.embeddings import Arrays, Embeddings
from medclip_lab.retrieval.families import import_faiss
from medclip_lab.retrieval.gallery import copies, make_gallery
from medclip_lab.retrieval.index import open_index
from medclip_lab.retrieval.parameters import Parameters
from medclip_lab.retrieval.recall import Queries, find_truth, measure, right

faiss = import_faiss()
CORPORA = {
    "gap": Corpus(size=1600, dim=32, clusters=40, gap=1.0),
    "no gap": Corpus(size=1600, dim=32, clusters=40, gap=0.0, seed=1),
    "repeated": Corpus(size=1600, dim=32, clusters=200, gap=0.7, repeated=0.4, seed=2),
    "one cloud": Corpus(size=1600, dim=32, clusters=1, gap=1.5, noise=1.5, seed=3),
}


def quiet(_: str) -> None:
    pass


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every corpus counts as one that is too large to search exactly."""
    monkeypatch.setattr(choose, "PLAIN_VALUES", 0)
    monkeypatch.setattr(choose, "EXACT_VALUES", 0)
    monkeypatch.setattr(choose, "SCREENED", 800)
    monkeypatch.setattr(gallery, "HELD_OUT", 300)


def vectors_of(folder: Path, modality: str) -> Any:
    found = Embeddings(folder).vectors(modality)
    return found.take(np.arange(len(found)))


@pytest.mark.parametrize(
    ("name", "modality"), [("gap", "image"), ("no gap", "text"), ("repeated", "text"), ("one cloud", "image")]
)
def test_fresh_queries_of_both_directions_reach_the_target(
    tmp_path: Path, large: None, name: str, modality: str
) -> None:
    corpus = CORPORA[name]
    folder = corpus.write(tmp_path / "e")
    manifest = build_index(folder, tmp_path / "i", modality, goals=Goals(target_recall=0.9, at=5), say=quiet)
    assert manifest["factory"] not in ("Flat", "SQfp16", "SQ8")
    index, vectors = open_index(tmp_path / "i"), vectors_of(folder, modality)
    for direction, queries in corpus.fresh(400).items():
        rows = index.nearest(queries, 5, index.parameters(direction))[1]
        scores = queries @ vectors.T
        worst = np.sort(scores, axis=1)[:, -5] - 1e-6
        # Copies share a vector: of a group that ties, any is right.
        share = np.mean([(scores[q, rows[q]] >= worst[q]).mean() for q in range(len(queries))])
        assert share >= 0.9, direction
        assert all(len(set(found)) == 5 for found in rows)
    tried = {trial["factory"]: trial["verdict"] for trial in manifest["tried"]}
    assert tried[manifest["factory"]] == "chosen"
    assert any(factory.startswith("HNSW") for factory in tried)
    assert any("IVF" in factory and "RaBitQ" in factory for factory in tried)


def test_the_harder_direction_is_searched_more_thoroughly(tmp_path: Path) -> None:
    folder = Corpus(size=3200, dim=32, clusters=200, spread=0.3, noise=0.3).write(tmp_path / "e")
    goals = Goals(target_recall=0.95, factory="IVF64,Flat")
    manifest = build_index(folder, tmp_path / "i", goals=goals, say=quiet)
    found = manifest["parameters"]
    assert found["text"]["nprobe"] > found["image"]["nprobe"]
    index = open_index(tmp_path / "i")
    assert index.parameters() == Parameters(nprobe=found["text"]["nprobe"])
    assert index.parameters("image") == Parameters(nprobe=found["image"]["nprobe"])
    only = build_index(folder, tmp_path / "j", goals=Goals(queries=("image",), factory="IVF64,Flat"), say=quiet)
    assert list(only["recall"]) == ["image"]
    with pytest.raises(UserError, match="was measured with image queries, not with text"):
        open_index(tmp_path / "j").parameters("text")


def test_the_recall_that_is_told_decided_nothing(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last third is asked once for each kind and direction, with what the other two had chosen."""
    asked: list[tuple[int, Parameters]] = []

    def spy(index: Any, queries: Queries, chosen: Any, parameters: Parameters, vectors: Any) -> Any:
        parts = [set(queries.part(number).tolist()) for number in range(3)]
        assert set.union(*parts) == set(queries.all.tolist())
        assert sum(map(len, parts)) == len(queries.all)
        asked.append((parts.index(set(chosen.tolist())), parameters))
        found = measure(index, queries, chosen, parameters, vectors)
        return replace(found, recall=0.1) if asked[-1][0] == 2 else found

    monkeypatch.setattr(tune, "measure", spy)
    goals = Goals(factory="IVF16,Flat", target_recall=0.9, queries=("image",))
    manifest = build_index(made, tmp_path / "i", goals=goals, say=quiet)
    assert [number for number, _ in asked].count(2) == 1
    assert asked[-1] == (2, Parameters(**manifest["parameters"]["image"]))
    assert manifest["recall"]["image"]["held_out"] == 0.1
    assert min(manifest["recall"]["image"][name] for name in ("tuned", "confirmed")) >= 0.9


def test_a_small_corpus_is_searched_exactly(made: Path, tmp_path: Path) -> None:
    manifest = build_index(made, tmp_path / "i", say=quiet)
    assert (manifest["factory"], manifest["size"], manifest["vectors"]) == ("Flat", 900, 900)
    assert manifest["recall"]["text"] == {"at": 10, "queries": 90, "tuned": 1.0, "confirmed": 1.0, "held_out": 1.0}
    assert manifest["recall"]["image"]["queries"] == 90
    vectors = vectors_of(made, "image")
    hits = open_index(tmp_path / "i").search(vectors, 1)
    assert [hit[0].id for hit in hits] == list(range(900))  # those that were held out too
    assert [hit[0].study_id for hit in hits] == [f"study-{row}" for row in range(900)]
    assert manifest["memory"]["peak"] <= 1.2 * manifest["memory"]["predicted"]


def test_the_quickest_exact_kind_that_reaches_the_target(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose, "PLAIN_VALUES", 0)
    milliseconds = {"IndexFlatIP": 3.0, "IndexFlat": 3.0, 8: 1.0, 16: 2.0, "IndexRefine": 4.0}

    def single(index: Any, *_: Any) -> float:
        kind = type(faiss.downcast_index(index)).__name__
        return milliseconds[kind if kind in milliseconds else 8 if index.code_size == 24 else 16]

    monkeypatch.setattr(tune, "single_seconds", single)
    built = [
        build_index(made, tmp_path / str(target), goals=Goals(target_recall=target), say=quiet)
        for target in (0.9, 0.995)
    ]
    assert [manifest["factory"] for manifest in built] == ["SQ8", "SQfp16"]
    assert {trial["factory"]: trial["verdict"] for trial in built[1]["tried"]} == {
        "Flat": "slower",
        "SQfp16": "chosen",
        "SQ8": "below the target",
        "SQ8,Refine(Flat)": "slower",
    }
    milliseconds |= {"IndexRefine": 1.1}
    whole = build_index(made, tmp_path / "whole", goals=Goals(target_recall=1), say=quiet)
    assert whole["factory"] == "SQ8,Refine(Flat)"
    assert {name: found["held_out"] for name, found in whole["recall"].items()} == {"image": 1.0, "text": 1.0}
    assert whole["parameters"]["text"] == {"k_factor": 16}
    milliseconds |= {"IndexRefine": 4.0, 8: 2.9, 16: 2.8}  # too little gained for the bits that are lost
    near = build_index(made, tmp_path / "near", goals=Goals(target_recall=0.9), say=quiet)
    assert near["factory"] == "Flat"


def test_a_budget_that_is_too_small_names_the_least(made: Path, tmp_path: Path, large: None) -> None:
    with pytest.raises(UserError, match=r"1 MB is too little for 900 vectors of 24 dimensions: at least \d+") as error:
        build_index(made, tmp_path / "i", goals=Goals(max_memory=10**6), say=quiet)
    assert not (tmp_path / "i").exists()
    assert "GB (" in str(error.value) or "MB (" in str(error.value)


def test_what_does_not_fit_is_not_built(
    made: Path, tmp_path: Path, large: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        choose._Search, "predicted", lambda self, key, size: self.meter.limit + (0 if key == "SQ8" else 1)
    )
    manifest = build_index(made, tmp_path / "i", goals=Goals(target_recall=0.9), say=quiet)
    assert manifest["factory"] == "SQ8"
    verdicts = {trial["factory"]: trial["verdict"] for trial in manifest["tried"]}
    assert set(verdicts.values()) == {"chosen", "more than max-memory"}
    with pytest.raises(UserError, match=r"nothing within .* surely reached 1 at 10 \(best: SQ8 .*raise max-memory to"):
        build_index(made, tmp_path / "j", goals=Goals(target_recall=1.0), say=quiet)
    assert not (tmp_path / "j").exists()


def test_the_same_embeddings_give_the_same_index(made: Path, tmp_path: Path) -> None:
    for goals in (Goals(), Goals(factory="IVF16,SQ8,Refine(SQfp16)", target_recall=0.9)):
        names = [
            {entry["name"] for entry in build_index(made, tmp_path / name, goals=goals, say=quiet)["files"].values()}
            for name in "ab"
        ]
        assert names[0] == names[1]
    other = build_index(made, tmp_path / "c", goals=Goals(seed=1), say=quiet)["files"]["starts"]["name"]
    assert other in names[0]


def test_recall_is_measured_with_ties_as_right() -> None:
    rng = np.random.default_rng(0)
    gallery = rng.normal(size=(400, 8)).astype(np.float32)
    gallery /= np.linalg.norm(gallery, axis=1, keepdims=True)
    gallery[200:300] = gallery[0]
    queries = Queries("image", gallery[:40])
    find_truth({"image": queries}, Arrays(gallery).blocks(), 400, 10)
    index = faiss.IndexFlatIP(8)
    index.add(gallery)
    assert measure(index, queries, queries.all, Parameters(), Arrays(gallery)).recall == 1.0
    # A hundred vectors are as near to the first query as its ten nearest: any of them is right.
    found = np.arange(250, 260)[None]
    assert right(queries, np.array([0]), found, Arrays(gallery)).tolist() == [1.0]
    assert right(queries, np.array([1]), found, Arrays(gallery))[0] < 0.5
    assert right(queries, np.array([0]), np.full((1, 10), -1), Arrays(gallery)).tolist() == [0.0]


def test_an_index_that_lacks_half_is_found_out() -> None:
    vectors = next(CORPORA["gap"].blocks(400))["image"]
    half = faiss.IndexFlatIP(32)
    half.add(vectors[:200])
    queries = Queries("image", vectors[:100])
    find_truth({"image": queries}, Arrays(vectors).blocks(), 400, 10)
    assert 0.2 < measure(half, queries, queries.all, Parameters(), Arrays(vectors)).recall < 0.8


def test_truth_does_not_depend_on_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = next(CORPORA["gap"].blocks(300))
    found = []
    for size in (3, 7, 1000):
        blocks = [(first, vectors["image"][first : first + size]) for first in range(0, 300, size)]
        queries = Queries("text", vectors["text"][:20])
        find_truth({"text": queries}, blocks, 300, 9)
        found.append(queries.worst_right)
    np.testing.assert_allclose(found[0], found[2], atol=1e-6)
    np.testing.assert_allclose(found[0], np.sort(vectors["text"][:20] @ vectors["image"].T)[:, -9], atol=1e-6)
    assert (found[1] == found[1]).all()


def test_who_asks_is_not_in_the_index_that_is_measured(made: Path) -> None:
    found = make_gallery([Embeddings(made)], "image", None, False, 0)
    assert len(found.held_out) == 90
    assert not set(found.held_out.rows) & set(found.main.rows)
    everything = vectors_of(made, "image")
    np.testing.assert_array_equal(found.queries["image"].vectors, everything[found.held_out.rows])
    # And what asks from the other modality are the reports of the same studies: none finds its own pair.
    np.testing.assert_array_equal(found.queries["text"].vectors, vectors_of(made, "text")[found.held_out.rows])
    np.testing.assert_array_equal(found.groups.members, np.concatenate([found.main.rows, found.held_out.rows]))
    blocks = np.concatenate([block for _, block in found.main.blocks()])
    np.testing.assert_array_equal(blocks, everything[found.main.rows])


def test_copies_of_a_report_are_one_vector_and_all_are_answered_with(made: Path, tmp_path: Path) -> None:
    manifest = build_index(made, tmp_path / "i", "text", say=quiet)
    vectors = vectors_of(made, "text")
    unique, counts = np.unique(vectors, axis=0, return_counts=True)
    assert manifest["vectors"] == len(unique) < manifest["size"] == 900
    most = unique[counts.argmax()]
    index = open_index(tmp_path / "i")
    hits = index.search(most, int(counts.max()))[0]
    assert {hit.id for hit in hits} == set(np.flatnonzero((vectors == most).all(1)))
    assert len({hit.score for hit in hits}) == 1
    assert len(index.search(most, 3)[0]) == 3
    apart = build_index(made, tmp_path / "j", "text", goals=Goals(dedup=False), say=quiet)
    assert apart["vectors"] == 900
    both = build_index(made, tmp_path / "k", "image", goals=Goals(dedup=True), say=quiet)
    assert both["vectors"] == 900  # no image is a copy


def test_equal_words_with_other_vectors_are_no_copies() -> None:
    vectors = np.eye(4, dtype=np.float32)
    vectors[1] = [1, 1e-3, 0, 0]
    assert copies(np.array([7, 7, 7, 9]), Arrays(vectors)).tolist() == [0, 0, 2, 3]


def test_several_folders_are_one_corpus(corpus: Corpus, made: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    other = replace(corpus, seed=5, size=50).write(tmp_path / "e")
    manifest = build_index([made, other], tmp_path / "i", say=quiet)
    assert manifest["size"] == 950
    hits = open_index(tmp_path / "i").search(vectors_of(other, "image"), 1)
    assert [hit[0].id for hit in hits] == list(range(900, 950))
    with pytest.raises(UserError, match="two of the folders hold the same shard: name each once"):
        build_index([made, other, made], tmp_path / "j", say=quiet)
    narrow = replace(corpus, dim=8, size=50).write(tmp_path / "narrow")
    with pytest.raises(UserError, match="narrow has 8 dimensions, not 24"):
        build_index([made, narrow], tmp_path / "j", say=quiet)


@pytest.mark.parametrize("size", [1, 2, 9])
def test_tiny_corpora(tmp_path: Path, size: int) -> None:
    folder = Corpus(size=size, dim=4).write(tmp_path / "e")
    manifest = build_index(folder, tmp_path / "i", say=quiet)
    assert manifest["recall"]["text"]["confirmed"] == 1.0
    hits = open_index(tmp_path / "i").search(vectors_of(folder, "image"), 20)
    assert [len(found) for found in hits] == [size] * size


@pytest.mark.parametrize(
    ("goals", "said"),
    [
        (Goals(queries=("sound",)), "'sound' is no modality"),
        (Goals(factory="Nothing"), "makes no index of 'Nothing'"),
    ],
)
def test_goals_that_are_none(made: Path, tmp_path: Path, goals: Goals, said: str) -> None:
    with pytest.raises(UserError, match=said):
        build_index(made, tmp_path / "i", goals=goals, say=quiet)
    assert not (tmp_path / "i").exists()


def test_numbers_that_cannot_be() -> None:
    with pytest.raises(UserError, match=r"a share above 0 and up to 1, got 1\.5"):
        Goals(target_recall=1.5)
    with pytest.raises(UserError, match="at least 1, got 0"):
        Goals(at=0)


def test_mistakes(embeddings: Path, made: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="modality 'sound' is unknown"):
        build_index(embeddings, tmp_path / "x", "sound")
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="choose another folder"):
        build_index(embeddings, tmp_path)
    with pytest.raises(UserError, match="hold no report text: embed again with --include-text"):
        build_index(made, tmp_path / "x", include_text=True)
    with pytest.raises(UserError, match="is of another bundle than"):
        build_index([made, embeddings], tmp_path / "x")
    with pytest.raises(UserError, match="at least one folder"):
        build_index([], tmp_path / "x")
