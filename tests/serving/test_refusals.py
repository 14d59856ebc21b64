"""Bad requests: each answer is a problem that says what to change."""

import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from .conftest import Serve, encoded, png, problem

GOOD = {"data": encoded(png())}
FILMS = {"text": "a", "index": "films"}
LABELS = {"images": [GOOD], "candidate_labels": ["a"]}


@pytest.mark.parametrize(
    ("path", "body", "status", "kind", "told"),
    [
        ("classify", {}, 422, "invalid-request", "images: field required"),
        ("classify", {"images": []}, 422, "invalid-request", "images: list should have at least 1 item"),
        ("classify", {"images": [{}]}, 422, "invalid-request", "images.0: give either data or dicomweb"),
        ("classify", {"images": [GOOD], "labels": 1}, 422, "invalid-request", "unknown field"),
        ("classify", {"images": [GOOD], "labelset": "none"}, 404, "unknown-labelset", "it has chexpert14"),
        ("classify", {"images": [GOOD], "candidate_labels": []}, 422, "invalid-request", "at least 1 item"),
        ("classify", {"images": [GOOD], "candidate_labels": [" "]}, 422, "invalid-request", "candidate_labels.0"),
        ("classify", {"images": [GOOD], "candidate_labels": ["a", "a "]}, 422, "label-twice", "stands twice"),
        ("classify", {"images": [GOOD], "candidate_labels": ["a b " * 40]}, 422, "label-too-long", "reads 80"),
        ("classify", {"images": [GOOD], "candidate_labels": ["a" * 201]}, 422, "invalid-request", "200 characters"),
        ("classify", {"images": [GOOD], "candidate_labels": [str(n) for n in range(65)]}, 422, "too-many-labels", "64"),
        ("classify", LABELS | {"templates": ["no place"]}, 422, "invalid-request", "templates.0"),
        ("classify", LABELS | {"templates": ["{} {}"]}, 422, "invalid-request", "templates.0"),
        ("classify", LABELS | {"templates": ["{0.__class__}"]}, 422, "invalid-request", "templates.0"),
        ("classify", LABELS | {"templates": ["{}."] * 17}, 422, "too-many-prompts", "16 prompts"),
        (
            "classify",
            LABELS | {"labelset": "chexpert14"},
            422,
            "invalid-request",
            "either labelset or candidate_labels",
        ),
        ("classify", {"images": [GOOD], "templates": ["{}."]}, 422, "invalid-request", "templates are for candidate"),
        ("classify", {"images": [GOOD] * 17}, 413, "too-many-images", "16 images"),
        ("classify", {"images": [{"data": "no base64!"}]}, 422, "bad-base64", "encode the file's bytes"),
        ("classify", {"images": [{"data": ""}]}, 415, "no-image", "send PNG, JPEG"),
        ("classify", {"images": [GOOD | {"frame": -1}]}, 422, "invalid-request", "images.0.frame"),
        ("classify", {"images": [GOOD | {"frame": 3}]}, 422, "no-such-frame", "smaller `frame`"),
        ("embed", {}, 422, "invalid-request", "give images, texts or both"),
        ("embed", {"texts": ["a"] * 65}, 413, "too-many-texts", "64 texts"),
        ("embed", {"texts": [""]}, 422, "invalid-request", "texts.0"),
        ("search", {"text": "a", "image": GOOD}, 422, "invalid-request", "give one of image, text, vector and id"),
        ("search", {"text": "a"}, 404, "unknown-index", "films, reports"),
        ("search", {"text": "a", "index": "none"}, 404, "unknown-index", "films, reports"),
        ("search", {"text": "a", "index": "films", "k": 0}, 422, "invalid-request", "k: "),
        ("search", {"text": "a", "index": "films", "k": 1001}, 422, "k", "1000"),
        ("search", {"vector": [1.0], "index": "films"}, 422, "vector", "16 numbers"),
        ("search", {"vector": [0.0] * 16, "index": "films"}, 422, "vector", "not all 0"),
        ("search", {"vector": [1e308] * 16, "index": "films"}, 422, "vector", "below 1e+100"),
        (
            "search",
            FILMS | {"where": ["view=PA", "view"]},
            422,
            "filter",
            "where.1: cannot be read: write column=value",
        ),
        ("search", FILMS | {"where": ["age < old"]}, 422, "filter", "a number or a date"),
        ("search", FILMS | {"where": ["viev=PA"]}, 422, "filter", "there are id, study_id, patient_id"),
        (
            "search",
            FILMS | {"where": ["labels.Edelweiss=1"]},
            422,
            "filter",
            "no row has such a label; there are Cardiomegaly",
        ),
        (
            "search",
            FILMS | {"where": ["labels.Cardiomegaly=yes"]},
            422,
            "filter",
            "labels.Cardiomegaly holds whole numbers",
        ),
        ("search", FILMS | {"where": "view=PA"}, 422, "invalid-request", "where: "),
        ("search", FILMS | {"where": ["a=" + 500 * "b"]}, 422, "invalid-request", "500 characters"),
        ("search", FILMS | {"ratio": 1}, 422, "invalid-request", "ratio: "),
        ("search", FILMS | {"min_score": 2}, 422, "invalid-request", "min_score: "),
        ("search", FILMS | {"policy": "best"}, 422, "invalid-request", "policy: "),
        ("search", FILMS | {"policy": "calibrated"}, 422, "no-calibration", "fixed-k or ratio"),
        ("search", FILMS | {"policy": "calibrated", "min_score": 0}, 422, "invalid-request", "leave ratio and min"),
        ("search", FILMS | {"calibration": "c"}, 422, "invalid-request", "for the policy calibrated"),
        ("search", FILMS | {"domain": "chest"}, 422, "domain", "no router"),
        ("search", FILMS | {"other_patients": True}, 422, "invalid-request", "other_patients is for id"),
        ("search", {"id": 10**6, "index": "films"}, 404, "unknown-id", "hits of a search"),
        ("search", {"id": -1, "index": "films"}, 422, "invalid-request", "id: "),
        ("search", {"id": 2**63, "index": "films"}, 422, "invalid-request", "id: "),
        ("thumbnails", {"ids": [0], "index": "films"}, 403, "scope", "`thumbnails`"),
        ("classify", LABELS | {"candidate_labels": ["No finding"]}, 422, "says-nothing", "sentences of its own"),
        ("explain", {"image": GOOD}, 422, "invalid-request", "give either label or positive"),
        ("zero-shot-image-classification", {"inputs": "AA"}, 422, "invalid-request", "parameters: field required"),
    ],
)
def test_refusals(client: TestClient, path: str, body: dict[str, Any], status: int, kind: str, told: str) -> None:
    detail = problem(client.post(f"/v1/{path}", json=body), status, kind)
    assert told in detail
    assert "Edelweiss" not in detail  # of what was sent nothing is said again


@pytest.mark.parametrize(
    ("content", "kind", "status", "told"),
    [
        (b"{", "application/json", 422, "no valid JSON"),
        (b"\xff\xfe", "application/json", 422, ""),
        (b"[" * 100_000, "application/json", 422, "no valid JSON"),
        (b'{"images": NaN}', "application/json", 422, ""),
        (b"{}", "text/html", 415, "application/dicom"),
        (b"{}", "", 415, "application/json"),
        (png(), "application/pdf", 415, "image/png"),
        (png(), "multipart/form-data", 400, "boundary"),
        (b"--x\r\n", "multipart/form-data; boundary=x", 422, "no file"),
        (b"--x\r\nbroken", "multipart/form-data; boundary=x", 422, "no file"),
        (b"broken", "multipart/form-data; boundary=x", 400, "broken"),
        (b"", "application/dicom", 415, "no image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/png", 415, "no image"),
    ],
)
def test_bodies_that_cannot_be_read(client: TestClient, content: bytes, kind: str, status: int, told: str) -> None:
    response = client.post("/v1/classify", content=content, headers={"content-type": kind})
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert told in response.json()["detail"]


def test_uploads_go_by_their_rules(client: TestClient) -> None:
    image = ("a.png", png(), "image/png")
    problem(client.post("/v1/classify", files={"film": image}), 422, "invalid-request")
    problem(client.post("/v1/classify", files=[("image", image)] * 17), 400, "multipart")
    told = problem(client.post("/v1/classify", files={"image": image}, data={"labels": "x"}), 422, "invalid-request")
    assert "unknown field" in told
    problem(client.post("/v1/search", files=[("image", image)] * 2, data={"index": "films"}), 422, "invalid-request")
    embed = client.post("/v1/embed", files={"image": image}, data={"vector": "1"})
    assert "go into JSON" in problem(embed, 422, "invalid-request")


def test_a_method_or_an_address_that_is_not_there(client: TestClient) -> None:
    refused = client.get("/v1/classify")
    problem(refused, 405, "http")
    assert refused.headers["allow"] == "POST"
    problem(client.get("/v1/nothing"), 404, "http")
    problem(client.get("/page/../settings.py"), 404, "http")
    problem(client.get("/page/settings.py"), 404, "http")


def test_a_service_without_an_index_says_so(serve: Serve) -> None:
    assert "--index" in problem(serve(indexes=()).post("/v1/search", json={"text": "a"}), 404, "no-index")


def test_limits_of_pixels_and_sides(serve: Serve) -> None:
    client = serve(max_pixels=1000, max_aspect=3.0)
    told = problem(client.post("/v1/classify", json={"images": [GOOD]}), 413, "too-many-pixels")
    assert "1000 pixels" in told
    narrow = {"data": encoded(png(size=(5, 30)))}
    assert "more than 3 times" in problem(client.post("/v1/classify", json={"images": [narrow]}), 422, "aspect")
    assert client.post("/v1/classify", json={"images": [{"data": encoded(png(size=(30, 30)))}]}).status_code == 200


def test_several_frames_and_none_named(client: TestClient) -> None:
    pytest.importorskip("pydicom")
    import numpy as np

    from tests.data.test_dicom import RAMP, dicom

    data = dicom(np.stack([RAMP, RAMP[::-1]]), NumberOfFrames=2)
    raw = {"content-type": "application/dicom"}
    refused = client.post("/v1/classify", content=data, headers=raw)
    assert "name one as `frame`" in problem(refused, 422, "frame-missing")
    assert client.post("/v1/classify?frame=1", content=data, headers=raw).json()["results"][0]["image"]["frame"] == 1
    problem(client.post("/v1/classify?frame=2", content=data, headers=raw), 422, "no-such-frame")


def test_big_json_is_parsed_off_the_loop_and_refused_alike(client: TestClient) -> None:
    body = json.dumps({"images": [GOOD], "padding": "x" * 100_000})
    refused = client.post("/v1/classify", content=body, headers={"content-type": "application/json"})
    assert "unknown field" in problem(refused, 422, "invalid-request")
