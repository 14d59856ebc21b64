"""Search over HTTP beside the library: policies, exclusions, rows as queries, routers, Milvus, and what is offered."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

import medclip_lab
from medclip_lab.errors import UserError
from medclip_lab.inference.encoder import Encoder
from medclip_lab.retrieval.index import Index
from medclip_lab.retrieval.policies import AtLeast, Ratio
from medclip_lab.retrieval.rag import Ask, calibrate_index
from medclip_lab.retrieval.risk import load_calibration
from medclip_lab.retrieval.router import Domain, build_router, open_router
from medclip_lab.serving import Settings, answers

from .conftest import Serve, encoded, png, problem

TEXT = "The heart is enlarged."
Ids = Callable[..., list[int]]


@pytest.fixture(scope="module")
def encoder(toy_bundle: Path) -> Encoder:
    return medclip_lab.load(toy_bundle)


@pytest.fixture(scope="module")
def films(toy_indexes: tuple[Path, Path]) -> Index:
    return medclip_lab.open_index(toy_indexes[0])


def asked(client: TestClient, **body: Any) -> dict[str, Any]:
    response = client.post("/v1/search", json={"index": "films", "k": 30} | body)
    assert response.status_code == 200, response.text
    answers.SearchOut.model_validate(response.json())
    found: dict[str, Any] = response.json()
    return found


def ids(found: dict[str, Any]) -> list[int]:
    return [hit["id"] for hit in found["hits"]]


def test_policies_are_those_of_the_library(client: TestClient, encoder: Encoder, films: Index) -> None:
    query = encoder.encode_texts([TEXT])
    everything = films.search(query, 30)[0]
    least = everything[len(everything) // 2].score

    def expected(policy: Any) -> list[int]:
        return [hit.id for hit in films.search(query, 30, policy=policy)[0]]

    ratio = everything[0].score / everything[-3].score
    for body, policy in (
        ({}, None),
        ({"min_score": least}, AtLeast(least)),
        ({"policy": "ratio"}, Ratio(1.5)),
        ({"policy": "ratio", "ratio": ratio}, Ratio(ratio)),
        ({"ratio": ratio, "min_score": least}, AtLeast(least, Ratio(ratio))),
    ):
        assert ids(asked(client, text=TEXT, **body)) == expected(policy)
    assert len(expected(Ratio(ratio))) < len(everything)
    assert 0 < len(expected(AtLeast(least))) < len(everything)


def test_a_row_asks_for_others_of_other_patients(client: TestClient, films: Index) -> None:
    patient = films.rows([3])[0]["patient_id"]
    of_patient = {hit.id for hit in films.search(films.vectors([0]), 100, where=[f"patient_id={patient}"])[0]}
    assert len(of_patient) > 1
    near = asked(client, id=3)
    assert 3 not in ids(near)
    assert set(ids(near)) & of_patient
    assert not set(ids(asked(client, id=3, other_patients=True))) & of_patient
    expected = films.search(films.vectors([3]), 30, not_ids=[3], direction="image")[0]
    assert ids(near) == [hit.id for hit in expected]


@pytest.fixture(scope="module")
def calibration(toy_indexes: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    reports, path = toy_indexes[1], tmp_path_factory.mktemp("risk") / "careful.json"
    given = Ask(k=5, where=("split=test",))
    calibrate_index(medclip_lab.open_index(reports), reports.parent / "e", given, "contradiction", 0.3, "score", path)
    return path


def test_a_calibration_decides_where_it_holds(
    serve: Serve, encoder: Encoder, toy_indexes: tuple[Path, Path], calibration: Path
) -> None:
    client = serve(calibrations=(calibration,))
    (offers,) = [one for one in client.get("/v1/indexes").json() if one["name"] == "reports"]
    assert offers["policies"] == ["fixed-k", "ratio", "calibrated"]
    (told,) = offers["calibrations"]
    assert (told["name"], told["risk"], told["alpha"], told["where"]) == (
        "careful", "contradiction", 0.3, ["split=test"]
    )  # fmt: skip
    body = {"index": "reports", "k": 5, "policy": "calibrated", "where": told["where"], "not_patient": "nobody"}
    image = {"image": {"data": encoded(png(3))}}
    features = np.asarray(client.post("/v1/embed", json={"images": [image["image"]]}).json()["images"], np.float32)
    index = medclip_lab.open_index(toy_indexes[1])
    policy = load_calibration(calibration)
    expected = index.search(features, 5, where=["split=test"], policy=policy, direction="image")[0]
    assert ids(asked(client, **body, **image)) == [hit.id for hit in expected]
    for other, held in (
        ({"where": []}, "split=test"),
        ({"not_patient": None}, "other patients alone"),
    ):
        refused = client.post("/v1/search", json=body | image | other)
        assert held in problem(refused, 422, "calibration")
    refused = client.post("/v1/search", json=body | {"text": TEXT})
    assert "image queries" in problem(refused, 422, "calibration")
    refused = client.post("/v1/search", json=body | image | {"calibration": "other"})
    assert "careful" in problem(refused, 404, "unknown-calibration")
    problem(
        client.post("/v1/search", json={"text": "a", "index": "films", "policy": "calibrated"}), 422, "no-calibration"
    )


def test_a_calibration_of_another_index_stops_the_start(
    serve: Serve, toy_indexes: tuple[Path, Path], calibration: Path
) -> None:
    with pytest.raises(UserError, match=r"made with none of the indexes \(films\)"):
        serve(indexes=toy_indexes[:1], calibrations=(calibration,))


def test_what_an_index_offers_is_told(client: TestClient, serve: Serve) -> None:
    found = client.get("/v1/indexes").json()
    for one in found:
        answers.OffersOut.model_validate(one)
    films, reports = found
    fields = {field["name"]: field for field in films["fields"]}
    assert fields["view"]["values"] == ["PA"]
    assert fields["split"]["values"] == ["test"]
    assert fields["labels.Cardiomegaly"]["kind"] == "label"
    assert fields["patient_id"]["values"] is None  # nobody is named
    assert "sex" not in fields  # no row has one
    assert (films["text_included"], reports["text_included"]) == (False, True)
    assert not {"text", "text_key"} & {field["name"] for field in reports["fields"]}
    problem(serve(local_scopes=("classify",)).get("/v1/indexes"), 403, "scope")


@pytest.fixture(scope="module")
def router(toy_indexes: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("router")
    domains = {path.name: Domain(path, path.parent / "e") for path in toy_indexes}
    build_router(domains, folder / "body.json")
    return folder / "body.json"


def test_a_router_is_asked_by_its_name(serve: Serve, encoder: Encoder, router: Path, calibration: Path) -> None:
    client = serve(indexes=(router,), calibrations=(calibration,))
    (offers,) = client.get("/v1/indexes").json()
    assert (offers["name"], offers["domains"], offers["modality"]) == ("body", ["films", "reports"], "both")
    assert {field["name"] for field in offers["fields"]} >= {"patient_id", "labels.Cardiomegaly"}
    assert "view" not in {field["name"] for field in offers["fields"]}  # reports have none
    opened = open_router(router)
    query = encoder.encode_texts([TEXT])
    named = asked(client, index="body", text=TEXT, domain="reports")
    assert ids(named) == [hit.id for hit in opened.search(query, 30, domains=["reports"], direction="text")[0]]
    assert named["index"]["domain"] == "reports"
    own = asked(client, index=None, vector=query[0].tolist())
    assert own["index"]["domain"] == opened.domains(query)[0]
    assert "films, reports" in problem(client.post("/v1/search", json={"text": "a"}), 422, "domain")
    assert "films, reports" in problem(
        client.post("/v1/search", json={"text": "a", "domain": "Edelweiss"}), 404, "unknown-domain"
    )
    body = {"text": "a", "domain": "films", "policy": "calibrated"}
    problem(client.post("/v1/search", json=body), 422, "no-calibration")  # it is that of the reports


@pytest.fixture(scope="module")
def uri(toy_indexes: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    pytest.importorskip("milvus_lite")
    from medclip_lab.retrieval.milvus import build_collection

    uri = str(tmp_path_factory.mktemp("milvus") / "m.db")
    build_collection(toy_indexes[0].parent / "e", uri, "studies", "image")
    return uri


def test_an_index_in_milvus_answers_alike(
    serve: Serve, toy_settings: Settings, uri: str, films: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = serve(collections=("studies",), uri=uri)
    patient = films.rows([3])[0]["patient_id"]
    for body in (
        {"text": TEXT},
        {"text": TEXT, "where": ["labels.Cardiomegaly=1", "view in PA,AP"], "ratio": 1.2},
        {"id": 3, "other_patients": True},
        {"text": TEXT, "not_patient": patient, "min_score": 0.0},
    ):
        one, other = (asked(client, **body | {"index": name}) for name in ("films", "studies"))
        assert [hit["study_id"] for hit in one["hits"]] == [hit["study_id"] for hit in other["hits"]]
        assert one["hits"]
    offers = client.get("/v1/indexes").json()[-1]
    assert {field["name"]: field["kind"] for field in offers["fields"]}["labels.Cardiomegaly"] == "label"
    for where, told in (("viev=PA", "no such column; there are"), ("labels.Edelweiss=1", "no row has such a label")):
        refused = client.post("/v1/search", json={"text": "a", "index": "studies", "where": [where]})
        assert told in problem(refused, 422, "filter")
        assert "Edelweiss" not in refused.text

    from pymilvus import MilvusException

    def gone(*_: Any, **__: Any) -> None:
        raise MilvusException(message="Edelweiss is unreachable")

    store = client.app.state.house.model.indexes["studies"].stores[""]  # type: ignore[attr-defined]
    monkeypatch.setattr(store.client, "search", gone)
    refused = client.post("/v1/search", json={"text": "a", "index": "studies"})
    assert "does not answer" in problem(refused, 503, "index-away")
    assert "Edelweiss" not in refused.text


def test_settings_that_cannot_be(toy_settings: Settings, serve: Serve, uri: str) -> None:
    for changes, message in (
        ({"collections": ("studies",)}, "go together"),
        ({"thumbnails": ("films",)}, "INDEX=FOLDER"),
        ({"thumbnails": ("none=x",)}, "the indexes are films, reports"),
        ({"indexes": (toy_settings.indexes[0],), "collections": ("films",), "uri": uri}, "no collection 'films'"),
    ):
        with pytest.raises(UserError, match=message):
            serve(**changes)
