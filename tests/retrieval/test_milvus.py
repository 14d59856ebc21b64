"""Milvus Lite answers as FAISS does: the same rows under the same filters, and nothing of a filter is evaluated."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medclip_lab.errors import UserError
from medclip_lab.retrieval.build import build_index
from medclip_lab.retrieval.filters import Condition
from medclip_lab.retrieval.index import Index, open_index
from medclip_lab.retrieval.parameters import Parameters
from medclip_lab.retrieval.policies import Ratio
from tests.retrieval.synthetic import draw, row, unit

pytest.importorskip("pymilvus")
pytest.importorskip("milvus_lite")

from medclip_lab.retrieval import milvus
from medclip_lab.retrieval.milvus import MilvusIndex, build_collection, open_collection

DIM, STUDIES = 16, 300
NASTY = "o\"\\neil' or id >= 0 {x} \n"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("milvus")
    rng = np.random.default_rng(0)
    rows = [row(number, rng) for number in range(STUDIES)]
    rows[5]["patient_id"] = NASTY
    draw(folder / "e", dim=DIM, rows=rows)
    draw(folder / "more", dim=DIM, seed=1, rows=[row(number + 1000, rng) for number in range(30)], name="more-0")
    build_index(folder / "e", folder / "index", "image", include_text=True, say=lambda _: None)
    build_collection(folder / "e", str(folder / "m.db"), "studies", "image", include_text=True)
    return folder


@pytest.fixture(scope="module")
def flat(place: Path) -> Index:
    return open_index(place / "index")


@pytest.fixture(scope="module")
def lite(place: Path) -> MilvusIndex:
    return open_collection(str(place / "m.db"), "studies", "b" * 64)


WHERE = (
    [], ["view=PA"], ["view!=PA"], ["sex in F,M"], ["sex!=F", "age>=30"], ["age<45"], ["study_date>2014-06-01"],
    ["labels.Edema=1"], ["labels.Edema!=1"], ["labels.Pleural Effusion in 0,-1"], ["labels.Edema>=0", "image=0"],
    ["image>0"], ["study_id=s7"], ["age=28.0"], ["age!=28.0"], ["age in 28.0,unknown,44"],
    ["study_date=20110215"], ["study_date!=20110215"], ["study_date!=2012-03-15", "sex!=F"],
    ["patient_id=" + NASTY.strip()],
)  # fmt: skip


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.sampled_from(WHERE), k=st.sampled_from([1, 9, 10_000]), seed=st.integers(0, 3), own=st.integers(1, 299))
def test_both_stores_answer_alike(
    flat: Index, lite: MilvusIndex, where: list[str], k: int, seed: int, own: int
) -> None:
    query = unit(np.random.default_rng(seed).normal(size=(1, DIM)))
    patient = flat.rows([own])[0]["patient_id"]
    answers = [
        store.search(query, k, where=where, not_ids=[own], not_patients=[patient], with_text=True)[0]
        for store in (flat, lite)
    ]
    assert [hit.id for hit in answers[0]] == [hit.id for hit in answers[1]]
    assert [hit.row for hit in answers[0]] == [hit.row for hit in answers[1]]
    np.testing.assert_allclose(*([hit.score for hit in hits] for hits in answers), atol=1e-5)
    assert len(answers[0]) < k or k < 10


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20))
def test_a_value_never_becomes_part_of_the_expression(lite: MilvusIndex, text: str) -> None:
    """Whatever stands in it, it is compared as a whole, and matches nothing here."""
    assert not len(lite.ids([Condition("study_id", "=", (f"{text}'\"",))]))
    assert not len(lite.ids([Condition("study_id", "in", (text + '"] or id in [1, 2', "zz"))]))


def test_the_study_with_the_nasty_name_is_found(flat: Index, lite: MilvusIndex) -> None:
    patient = (Condition("patient_id", "=", (NASTY,)),)
    assert lite.ids(patient).tolist() == flat.ids(patient).tolist() == [5]


@pytest.mark.parametrize(
    "where",
    [
        *("colour=red", "labels=1", "labels.Oedema=1", "image=x", "age>=old", "study_date>=2015", 'id or "1"=1'),
        "age__number=1",
    ],
)  # fmt: skip
def test_both_stores_refuse_alike(flat: Index, lite: MilvusIndex, where: str) -> None:
    for store in (flat, lite):
        with pytest.raises(UserError, match="filter: "):
            store.search(unit(np.ones((1, DIM))), 3, where=[where])


def test_policies_and_vectors(flat: Index, lite: MilvusIndex) -> None:
    np.testing.assert_allclose(lite.vectors([7, 3]), flat.vectors([7, 3]), atol=1e-6)
    query = flat.vectors([9])
    both = [store.search(query, 20, policy=Ratio(2.0))[0] for store in (flat, lite)]
    assert [hit.id for hit in both[0]] == [hit.id for hit in both[1]]
    assert "text" not in both[1][0].row
    with pytest.raises(UserError, match="holds no id 999"):
        lite.rows([1, 999])


def test_additions_go_on_with_the_ids(place: Path, tmp_path: Path) -> None:
    uri = str(tmp_path / "m.db")
    build_collection(place / "e", uri, "grows")
    index = open_collection(uri, "grows")
    before = index.fingerprint()
    assert index.add(place / "more")["size"] == len(index) == STUDIES + 30
    assert index.fingerprint() != before
    assert index.rows([STUDIES])[0]["study_id"] == "s1000"
    assert "text" not in index.columns
    with pytest.raises(UserError, match="30 of 30 rows to add are in grows already, or twice among the new"):
        index.add(place / "more")
    new = draw(tmp_path / "new", dim=DIM, rows=[row(5000, np.random.default_rng(0))], name="new-0")
    with pytest.raises(UserError, match="30 of 31 rows to add"):
        index.add([new, place / "more"])
    assert len(index) == STUDIES + 30
    with pytest.raises(UserError, match="holds no report text"):
        index.search(unit(np.ones((1, DIM))), with_text=True)


def test_an_addition_that_breaks_off_leaves_nothing(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = str(tmp_path / "m.db")
    build_collection(place / "e", uri, "whole")
    index = open_collection(uri, "whole")
    monkeypatch.setattr(milvus, "BATCH", 10)
    sent, insert = [], index.client.insert

    def breaks(*arguments: Any) -> Any:
        sent.append(len(arguments[1]))
        if len(sent) == 3:
            raise KeyboardInterrupt
        return insert(*arguments)

    monkeypatch.setattr(index.client, "insert", breaks)
    with pytest.raises(KeyboardInterrupt):
        index.add(place / "more")
    assert sent == [10, 10, 10]
    assert len(index) == STUDIES
    monkeypatch.setattr(milvus, "_insert", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        build_collection(place / "e", uri, "half")
    assert index.client.list_collections() == ["whole"]


def test_mistakes(place: Path, lite: MilvusIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = str(place / "m.db")
    with pytest.raises(UserError, match="no such file of Milvus Lite"):
        open_collection(str(tmp_path / "none.db"), "studies")
    with pytest.raises(UserError, match="no collection 'other'"):
        open_collection(uri, "other")
    with pytest.raises(UserError, match="built with bundle bbbbbbbbbbbb, not with cccccccccccc"):
        open_collection(uri, "studies", "c" * 64)
    with pytest.raises(UserError, match="a collection 'studies' already"):
        build_collection(place / "e", uri, "studies")
    with pytest.raises(UserError, match="modality 'sound' is unknown"):
        build_collection(place / "e", uri, "x", "sound")
    with pytest.raises(UserError, match="takes no parameters"):
        lite.search(lite.vectors([1]), parameters=Parameters(nprobe=3))
    with pytest.raises(UserError, match="control characters"):
        lite.ids([Condition("study_id", "=", ("\b",))])
    monkeypatch.setattr(milvus, "LIMIT", 50)
    with pytest.raises(UserError, match="gives 50 answers at most, 100 were asked for"):
        lite.search(lite.vectors([1]), 100)
    lite.client.create_collection("foreign", dimension=4)
    with pytest.raises(UserError, match="'foreign' was not made by"):
        open_collection(uri, "foreign")
    with pytest.raises(UserError, match="longer than the 65535 bytes"):
        milvus._kept({"view": "x" * 70_000}, [("view", "text")])


def test_filters_are_not_logged(lite: MilvusIndex, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG), pytest.raises(UserError, match="refuses query") as refused:
        lite._query('patient_id == "secret', ["id"])
    assert "secret" not in caplog.text
    assert "secret" not in str(refused.value)
