"""Answers to studies with labels: what contradicts, what is written for a generator, which index is asked."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medclip_lab.errors import UserError
from medclip_lab.retrieval.build import build_index
from medclip_lab.retrieval.index import Index, open_index
from medclip_lab.retrieval.policies import Ratio
from medclip_lab.retrieval.rag import (
    Ask,
    ask,
    calibrate_index,
    contradicts,
    export,
    measures,
    overlap,
    supports,
)
from medclip_lab.retrieval.risk import load_calibration
from medclip_lab.retrieval.router import Domain, build_router, open_router
from medclip_lab.retrieval.update import remove_from_index
from tests.retrieval.synthetic import draw, unit

DIM = 24


def study(number: int, finding: bool, first: int) -> dict[str, Any]:
    return {
        "study_id": f"s{first + number}",
        "patient_id": f"p{(first + number) // 2}",
        "split": "test",
        "labels": [("Edema", int(finding)), ("Pneumonia", -1)],
    }


def cohort(folder: Path, count: int, seed: int, first: int = 0) -> Path:
    """Studies with and without edema lie apart, but for those in the middle."""
    rng = np.random.default_rng(seed)
    sides = rng.random(count) < 0.5
    vectors = rng.normal(size=(count, DIM)) * 0.4
    vectors[:, 0] += np.where(sides, 1, -1) * rng.uniform(0, 1.2, count)
    texts = ["Edema." if side else "No edema." for side in sides]
    rows = [study(number, bool(side), first) for number, side in enumerate(sides)]
    return draw(folder, vectors=unit(vectors), texts=texts, rows=rows, dim=DIM, seed=seed)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rag")
    cohort(folder / "train", 400, 0)
    cohort(folder / "val", 300, 1, 1000)
    cohort(folder / "test", 300, 2, 2000)
    build_index(folder / "train", folder / "index", "text", include_text=True, say=lambda _: None)
    return folder


@pytest.fixture(scope="module")
def reports(place: Path) -> Index:
    return open_index(place / "index")


@pytest.mark.parametrize(
    ("one", "other", "against", "for_it", "shared"),
    [
        ({"A": 1}, {"A": 0}, True, False, 0.0),
        ({"A": 0}, {"A": 1}, True, False, 0.0),
        ({"A": 1, "B": 0}, {"A": 1, "B": 1}, True, True, 0.5),
        ({"A": 1}, {"A": -1}, False, False, 0.0),
        ({"A": 1}, {"B": 0}, False, False, 0.0),
        ({"A": 0}, {"A": 0}, False, True, 1.0),
        ({}, {}, False, True, 1.0),
        ({"A": 1, "B": 1}, {"A": 1, "B": 1, "C": -1}, False, True, 1.0),
    ],
)
def test_two_sets_of_findings(
    one: dict[str, int], other: dict[str, int], against: bool, for_it: bool, shared: float
) -> None:
    assert contradicts(one, other) is against
    assert supports(one, other) is for_it
    assert overlap(one, other) == shared


def test_no_answer_is_of_the_queries_patient(reports: Index, place: Path) -> None:
    for query, hits in ask(reports, place / "train", Ask(k=5)):
        assert len(hits) == 5
        assert query.row["patient_id"] not in {hit.row["patient_id"] for hit in hits}


def test_a_calibration_asks_each_patient_once(reports: Index, place: Path) -> None:
    patients = [query.row["patient_id"] for query, _ in ask(reports, place / "val", Ask(one_a_patient=True))]
    assert len(patients) == len(set(patients)) == 150


def test_from_calibration_to_a_file_for_a_generator(reports: Index, place: Path, tmp_path: Path) -> None:
    given = Ask(k=8, labels=("Edema",))
    made = calibrate_index(reports, place / "val", given, "contradiction", 0.15, "score", tmp_path / "c.json")
    assert made["queries"] == 150
    assert made["measured"]["risk"] <= 0.15
    policy = load_calibration(tmp_path / "c.json", reports.fingerprint())
    found = export(reports, place / "test", given, policy, tmp_path / "out.jsonl")
    assert found["queries"] == 300
    assert found["contradiction"] < 0.15 + 0.08
    assert 0.5 < found["kept"] < 8
    all_kept = measures(list(ask(reports, place / "test", given)), ("Edema",))
    assert all_kept["contradiction"] > 2 * found["contradiction"]
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(lines) == 300
    assert set(lines[0]) == {"id", "report", "image", "reference_reports", "retrieve_k"}
    assert all(len(line["reference_reports"]) == line["retrieve_k"] for line in lines)
    assert np.mean([line["retrieve_k"] for line in lines]) == pytest.approx(found["kept"])
    assert {text for line in lines for text in line["reference_reports"]} == {"Edema.", "No edema."}
    assert lines[0]["id"].startswith("s2")
    assert lines[0]["image"] == f"{lines[0]['id']}/0"


def test_measures_are_what_they_say(reports: Index, place: Path) -> None:
    pairs = list(ask(reports, place / "test", Ask(k=4), Ratio(1.05)))
    found = measures(pairs)
    against = [[hit.row["labels"]["Edema"] != query.labels["Edema"] for hit in hits] for query, hits in pairs]
    assert found["contradiction"] == pytest.approx(np.mean([any(wrong) for wrong in against]))
    assert found["contradictions"] == pytest.approx(np.mean([wrong for each in against for wrong in each]))
    assert found["kept"] == pytest.approx(np.mean([len(hits) for _, hits in pairs]))
    assert found["empty"] == 0
    assert 0 < found["label_overlap"] < 1


def test_a_changed_index_wants_another_calibration(place: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(place / "index", tmp_path / "index"))
    calibrate_index(open_index(copy), place / "val", Ask(), "contradiction", 0.2, "score", tmp_path / "c.json")
    remove_from_index(copy, ["s1"])
    with pytest.raises(UserError, match="made with another index"):
        load_calibration(tmp_path / "c.json", open_index(copy).fingerprint())


def test_mistakes(reports: Index, place: Path, tmp_path: Path) -> None:
    rows = [study(number, True, 0) | {"patient_id": None, "labels": []} for number in range(30)]
    nameless = draw(
        tmp_path / "nameless", dim=DIM, vectors=unit(np.random.default_rng(0).normal(size=(30, DIM))), rows=rows
    )
    with pytest.raises(UserError, match="no query has a patient_id"):
        list(ask(reports, nameless, Ask()))
    given = Ask(other_patients=False)
    with pytest.raises(UserError, match="no query has a label to compare"):
        calibrate_index(reports, nameless, given, "contradiction", 0.2, "score", tmp_path / "c.json")
    build_index(place / "train", tmp_path / "private", "text", say=lambda _: None)
    with pytest.raises(UserError, match="holds no report text"):
        export(open_index(tmp_path / "private"), place / "test", Ask(), None, tmp_path / "o.jsonl")
    assert not (tmp_path / "o.jsonl").exists()
    manifest = json.loads((nameless / "manifest.json").read_text()) | {"bundle": "c" * 64}
    (nameless / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="another bundle"):
        list(ask(reports, nameless, given))


@pytest.fixture(scope="module")
def domains(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Chests point one way, slides another."""
    folder = tmp_path_factory.mktemp("domains")
    for number, name in enumerate(("chest", "slides")):
        vectors = np.random.default_rng(number).normal(size=(100, DIM)) * 0.5
        vectors[:, number] += 3
        rows = [study(place, True, 1000 * number) for place in range(100)]
        draw(folder / f"{name}-e", vectors=unit(vectors), rows=rows, dim=DIM)
        build_index(folder / f"{name}-e", folder / name, "image", say=lambda _: None)
    return folder


def test_a_query_is_asked_of_its_domain(domains: Path) -> None:
    parts = {name: Domain(domains / name, domains / f"{name}-e") for name in ("chest", "slides")}
    made = build_router(parts, domains / "router.json")
    assert made["accuracy"] == {"chest": 1.0, "slides": 1.0}
    others = np.delete(np.load(domains / "chest-e" / "test-00000" / "image.npy"), np.arange(0, 100, 10), axis=0).mean(0)
    np.testing.assert_allclose(made["domains"]["chest"]["centroid"], others / np.linalg.norm(others), atol=1e-6)
    router = open_router(domains / "router.json")
    queries = np.concatenate([router.indexes[name].vectors([7]) for name in ("slides", "chest", "slides")])
    assert router.domains(queries) == ["slides", "chest", "slides"]
    answers = router.search(queries, 3, not_patients=["p503", None, None])
    assert [hits[0].study_id for hits in answers[1:]] == ["s7", "s1007"]
    assert not {"s1006", "s1007"} & {hit.study_id for hit in answers[0]}
    assert all(int(hit.study_id[1:]) >= 1000 for hit in answers[0])
    named = router.search(queries, 3, domains=["chest"] * 3, direction="text")
    assert all(int(hit.study_id[1:]) < 1000 for hits in named for hit in hits)


def test_routers_can_move_with_their_indexes(domains: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(domains, tmp_path / "moved"))
    parts = {name: Domain(copy / name, copy / f"{name}-e") for name in ("chest", "slides")}
    build_router(parts, copy / "router.json")
    copy.rename(tmp_path / "again")
    assert set(open_router(tmp_path / "again" / "router.json").indexes) == {"chest", "slides"}


def test_mistakes_of_routers(domains: Path, place: Path, tmp_path: Path) -> None:
    parts = {name: Domain(domains / name, domains / f"{name}-e") for name in ("chest", "slides")}
    with pytest.raises(UserError, match="two domains or more"):
        build_router({"chest": parts["chest"]}, tmp_path / "r.json")
    build_router(parts, tmp_path / "r.json")
    router = open_router(tmp_path / "r.json")
    query = router.indexes["chest"].vectors([1])
    with pytest.raises(UserError, match="no domain 'heart'; there are chest, slides"):
        router.search(query, domains=["heart"])
    with pytest.raises(UserError, match="means of images say nothing about texts"):
        router.search(query, direction="text")
    with pytest.raises(UserError, match="1 queries, 2 domains"):
        router.search(query, domains=["chest", "chest"])
    with pytest.raises(UserError, match="built with bundle"):
        open_router(tmp_path / "r.json", "d" * 64)
    (tmp_path / "r.json").write_text("{}")
    with pytest.raises(UserError, match="format None"):
        open_router(tmp_path / "r.json")
