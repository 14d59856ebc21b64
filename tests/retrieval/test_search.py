"""Filtered search against brute force, in every kind of index."""

import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medclip_lab.errors import UserError
from medclip_lab.retrieval import selection
from medclip_lab.retrieval.build import build_index
from medclip_lab.retrieval.choose import Goals
from medclip_lab.retrieval.filters import conditions, mask
from medclip_lab.retrieval.index import Index, open_index
from medclip_lab.retrieval.parameters import Parameters
from medclip_lab.retrieval.policies import FixedK, Ratio
from medclip_lab.retrieval.recall import search
from medclip_lab.retrieval.update import remove_from_index
from tests.retrieval.synthetic import draw, unit

FACTORIES = ("Flat", "SQ8", "HNSW16", "IVF8,SQ8", "PQ16x4fs,Refine(SQfp16)", "IVF8,PQ16x4fs,Refine(SQfp16)")
STUDIES, DIM = 700, 16


@pytest.fixture(scope="module")
def embeddings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One report in five is that of another study, to the letter and to the bit."""
    rng = np.random.default_rng(1)
    vectors = unit(rng.normal(size=(STUDIES, DIM)))
    vectors[::5] = vectors[0]
    return draw(tmp_path_factory.mktemp("search") / "e", STUDIES, DIM, vectors=vectors)


@pytest.fixture(scope="module")
def indexes(embeddings: Path) -> dict[str, Index]:
    """Of each kind one that holds copies once, and of which some rows were removed."""
    opened = {}
    for number, factory in enumerate(FACTORIES):
        out = embeddings.parent / f"index-{number}"
        goals = Goals(target_recall=0.5, factory=factory, dedup=True)
        build_index(embeddings, out, "image", include_text=True, goals=goals, say=lambda _: None)
        remove_from_index(out, [f"s{study}" for study in range(0, STUDIES, 13)])
        opened[factory] = open_index(out)
    return opened


def brute_force(index: Index, query: Any, where: list[str], patient: str | None, own: int | None) -> dict[int, float]:
    """Score of every row that may be an answer, by the vectors that the index holds."""
    table = index.table
    met = mask(table, conditions(where)) & ~np.isin(table["id"].to_numpy(), index.removed)
    if patient is not None:
        met &= np.array([known != patient for known in table["patient_id"].to_pylist()])
    ids = table["id"].to_numpy()[met]
    return {
        int(number): float(score)
        for number, score in zip(ids, index.vectors(ids) @ query, strict=True)
        if number != own
    }


def agree(hits: list[Any], right: dict[int, float], k: int) -> None:
    """The hits are k nearest, whichever of those that tie."""
    assert len(hits) == min(k, len(right))
    assert len({hit.id for hit in hits}) == len(hits)
    assert [hit.rank for hit in hits] == list(range(1, len(hits) + 1))
    np.testing.assert_allclose([hit.score for hit in hits], sorted(right.values(), reverse=True)[:k], atol=1e-5)
    for hit in hits:
        assert hit.score == pytest.approx(right[hit.id], abs=1e-5)


FILTERS = (
    [], ["view=PA"], ["sex=F", "age>=70"], ["labels.Edema=1", "study_date<2014-06-01"], ["study_id=s7"], ["view=none"]
)  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    factory=st.sampled_from(FACTORIES),
    where=st.sampled_from(FILTERS[1:]),
    k=st.sampled_from([1, 7, 40, 10_000]),
    own=st.sampled_from([None, 1, 7, 10]),
    other_patients=st.booleans(),
    seed=st.integers(0, 5),
)
def test_a_narrow_filter_is_exact(
    indexes: dict[str, Index], factory: str, where: list[str], k: int, own: int | None, other_patients: bool, seed: int
) -> None:
    index = indexes[factory]
    query = unit(np.random.default_rng(seed).normal(size=(1, DIM))) if own is None else index.vectors([own])
    patient = index.rows([own])[0]["patient_id"] if own is not None and other_patients else None
    hits = index.search(unit(query), k, where=where, not_patients=[patient], not_ids=[own])[0]
    agree(hits, brute_force(index, unit(query)[0], where, patient, own), k)


@pytest.mark.parametrize("factory", ["Flat", "SQ8"])
@pytest.mark.parametrize("where", FILTERS)
def test_a_wide_filter_is_exact_where_the_index_is(
    indexes: dict[str, Index], factory: str, where: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "NARROW", -1)
    index = indexes[factory]
    queries = unit(np.random.default_rng(3).normal(size=(4, DIM)))
    for query, hits in zip(queries, index.search(queries, 12, where=where), strict=True):
        agree(hits, brute_force(index, query, where, None, None), 12)


@pytest.mark.parametrize("factory", FACTORIES[2:])
def test_a_wide_filter_keeps_recall(indexes: dict[str, Index], factory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every answer meets the filter, none is missing, and as many are the nearest as without a filter."""
    monkeypatch.setattr(selection, "NARROW", -1)
    index = indexes[factory]
    queries = unit(np.random.default_rng(4).normal(size=(40, DIM)))
    recall = []
    for where in FILTERS[:-1]:
        answers = index.search(queries, 10, where=where, parameters=Parameters(nprobe=3, ef_search=16, k_factor=4))
        shares = []
        for query, hits in zip(queries, answers, strict=True):
            right = brute_force(index, query, where, None, None)
            assert len(hits) == min(10, len(right))
            assert {hit.id for hit in hits} <= set(right)
            worst = sorted(right.values(), reverse=True)[: len(hits)][-1]
            shares.append(np.mean([right[hit.id] >= worst - 1e-5 for hit in hits]))
        recall.append(np.mean(shares))
    assert min(recall[1:]) > recall[0] - 0.03, recall


@pytest.mark.parametrize("factory", FACTORIES)
def test_a_selector_is_obeyed_while_searching(indexes: dict[str, Index], factory: str) -> None:
    """Not afterwards: what it leaves out takes no place among the found."""
    index = indexes[factory].index
    allowed = np.arange(0, index.ntotal, 7)
    selector = selection.Selection(np.empty(0, np.bool_), allowed, index.ntotal).selector(index)
    assert (selector is None) == (factory == "PQ16x4fs,Refine(SQfp16)")
    if selector is not None:
        queries = unit(np.random.default_rng(8).normal(size=(5, DIM)))
        found = search(index, queries, 10, Parameters(nprobe=8, ef_search=200, k_factor=4), selector)[1]
        assert set(found.ravel().tolist()) <= set(allowed.tolist())
        assert (found >= 0).all()


@pytest.mark.parametrize("parameters", [Parameters(), Parameters(nprobe=1, ef_search=16, k_factor=1)])
@pytest.mark.parametrize("factory", FACTORIES)
def test_all_rows_can_be_had(indexes: dict[str, Index], factory: str, parameters: Parameters) -> None:
    """Few probes and dead vertices end a search early; what is left is then looked at one by one."""
    index = indexes[factory]
    query = unit(np.random.default_rng(5).normal(size=(1, DIM)))
    hits = index.search(query, 10_000, parameters=parameters)[0]
    assert len(hits) == len(index) == STUDIES - len(index.removed)
    assert len({hit.id for hit in hits}) == len(hits)


def test_threads_with_parameters_of_their_own(indexes: dict[str, Index]) -> None:
    """A setting made on the shared index instead would reach the other threads."""
    index = indexes["IVF8,SQ8"]
    queries = unit(np.random.default_rng(6).normal(size=(30, DIM)))
    thorough, quick = Parameters(nprobe=8), Parameters(nprobe=1)
    filters: list[list[str]] = [[], ["view=PA"]]
    asked = list(itertools.product((thorough, quick), filters)) * 12

    def ask(parameters: Parameters, where: list[str]) -> list[list[int]]:
        hits = index.search(queries, 5, where=where, parameters=parameters)
        return [[hit.id for hit in those] for those in hits]

    expected = {(parameters, tuple(where)): ask(parameters, where) for parameters, where in asked[:4]}
    assert expected[thorough, ()] != expected[quick, ()]
    with ThreadPoolExecutor(8) as pool:
        for (parameters, where), found in zip(asked, pool.map(lambda given: ask(*given), asked), strict=True):
            assert found == expected[parameters, tuple(where)]


def test_every_query_leaves_out_its_own_patient(indexes: dict[str, Index]) -> None:
    index = indexes["Flat"]
    own = [1, 2, 7, 23]
    patients = [row["patient_id"] for row in index.rows(own)]
    answers = index.search(index.vectors(own), 20, not_patients=patients, not_ids=own)
    for patient, hits in zip(patients, answers, strict=True):
        assert len(hits) == 20
        assert patient not in {hit.row["patient_id"] for hit in hits}
    same = index.search(index.vectors(own), 1)
    assert [hits[0].id for hits in same] == own


def test_vectors_come_out_as_they_went_in(indexes: dict[str, Index], embeddings: Path) -> None:
    written = np.load(embeddings / "test-00000" / "image.npy")
    for factory, index in indexes.items():
        found = index.vectors([501, 5, 7])
        np.testing.assert_allclose(found, written[[501, 5, 7]], atol=0.02, err_msg=factory)


def test_text_is_read_for_hits_that_ask_for_it(indexes: dict[str, Index]) -> None:
    index = indexes["Flat"]
    query = index.vectors([7])
    assert "text" not in index.search(query, 1)[0][0].row
    assert index.search(query, 1, with_text=True)[0][0].row["text"] == "Report 7."


def test_policies_shorten_answers(indexes: dict[str, Index]) -> None:
    index = indexes["Flat"]
    queries = unit(np.random.default_rng(7).normal(size=(5, DIM)))
    for hits in index.search(queries, 30, policy=Ratio(1.2)):
        assert hits[0].score / hits[-1].score < 1.2
        assert len(hits) < 30
    assert [len(hits) for hits in index.search(queries, 30, policy=FixedK(4))] == [4] * 5


def test_mistakes(indexes: dict[str, Index], embeddings: Path, tmp_path: Path) -> None:
    index = indexes["Flat"]
    query = index.vectors([7])
    with pytest.raises(UserError, match="k must be at least 1, got 0"):
        index.search(query, 0)
    with pytest.raises(UserError, match="17 dimensions, the index has 16"):
        index.search(np.ones((1, 17), np.float32))
    with pytest.raises(UserError, match="not finite with norm 1"):
        index.search(query * 2)
    with pytest.raises(UserError, match="not_patients must name one for each of 1 queries"):
        index.search(query, not_patients=["p1", "p2"])
    with pytest.raises(UserError, match="holds no id 0"):  # it was removed
        index.vectors([0])
    with pytest.raises(UserError, match="holds no id 9999"):
        index.rows([9999])
    build_index(embeddings, tmp_path / "private", "image", say=lambda _: None)
    with pytest.raises(UserError, match="holds no report text"):
        open_index(tmp_path / "private").search(query, with_text=True)
