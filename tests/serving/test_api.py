"""Every route: what it answers, in every form it may be asked."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import TypeAdapter
from starlette.testclient import TestClient

from medclip_lab.errors import UserError
from medclip_lab.inference.encoder import Encoder, load
from medclip_lab.inference.explain import explain
from medclip_lab.inference.labelset import LabelPrompts, LabelSet
from medclip_lab.serving import answers
from medclip_lab.version import __version__

from .conftest import Serve, encoded, png, problem


@pytest.fixture(scope="module")
def encoder(toy_bundle: Path) -> Encoder:
    return load(toy_bundle)


def classified(client: TestClient, **body: Any) -> Any:
    response = client.post("/v1/classify", json=body)
    assert response.status_code == 200, response.text
    answers.ClassifyOut.model_validate(response.json())
    return response.json()


def scores(result: Any) -> list[float]:
    return [finding["score"] for finding in result["labels"]]


def test_classify_gives_what_the_classifier_gives(client: TestClient, encoder: Encoder, tmp_path: Path) -> None:
    contents = [png(1), png(2)]
    paths = []
    for number, content in enumerate(contents):
        paths.append(tmp_path / f"{number}.png")
        paths[-1].write_bytes(content)
    expected = encoder.zero_shot_classifier("chexpert14").predict(paths)
    found = classified(client, images=[{"data": encoded(content)} for content in contents])
    for result, labels in zip(found["results"], expected, strict=True):
        assert [finding["label"] for finding in result["labels"]] == list(labels)
        assert scores(result) == pytest.approx([values["score"] for values in labels.values()], abs=1e-6)
        assert {finding["probability"] for finding in result["labels"]} == {None}
        assert {finding["decision"] for finding in result["labels"]} == {None}
        assert result["image"]["width"] == 70
        assert result["image"]["resize_mode"] == "squash"
    assert (found["score_type"], found["rule"], found["calibration"]) == ("sigmoid", "sigmoid", None)
    assert found["model"]["fingerprint"] == encoder.fingerprint
    assert found["labelset"]["hash"] == encoder.zero_shot_classifier("chexpert14").labelset_hash
    assert found["timings_ms"]["total"] >= found["timings_ms"]["model"] > 0


def test_all_ways_to_send_an_image_are_one(client: TestClient) -> None:
    content = png(3)
    by_json = classified(client, images=[{"data": encoded(content)}])["results"]
    upload = client.post("/v1/classify", files=[("image", ("a.png", content, "image/png"))] * 2)
    raw = client.post("/v1/classify", content=content, headers={"content-type": "image/png"})
    assert raw.json()["results"] == by_json
    assert len(upload.json()["results"]) == 2
    for result in upload.json()["results"]:
        assert scores(result) == pytest.approx(scores(by_json[0]), abs=1e-6)
        assert result["image"] == by_json[0]["image"]


def test_dicom_as_it_is(client: TestClient) -> None:
    pytest.importorskip("pydicom")
    from tests.data.test_dicom import RAMP, dicom

    content = dicom(RAMP, WindowCenter=30, WindowWidth=20)
    response = client.post("/v1/classify", content=content, headers={"content-type": "application/dicom"})
    facts = response.json()["results"][0]["image"]
    assert facts["format"] == "dcm"
    assert facts["deep"]
    assert facts["window"] == "file"


def test_own_labels_are_those_prompts(client: TestClient, encoder: Encoder, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png(4))
    labelset = LabelSet(
        "own",
        [
            LabelPrompts("edema", ["See edema."], ["No edema."]),
            LabelPrompts("mass", ["Mass here."], ["Clear lungs."]),
        ],
    )
    expected = encoder.zero_shot_classifier(labelset).predict([path])[0]
    body = {
        "candidate_labels": ["edema", {"name": "mass", "positive": ["Mass here."], "negative": ["Clear lungs."]}],
        "templates": ["see {}."],
        "negative_templates": ["no {}."],
    }
    for _ in range(2):  # encoded, then remembered
        found = classified(client, images=[{"data": encoded(path.read_bytes())}], **body)
        assert scores(found["results"][0]) == pytest.approx([v["score"] for v in expected.values()], abs=1e-6)
        assert found["labelset"] == {"name": "request", "hash": labelset.hash}
    others = classified(client, images=[{"data": encoded(path.read_bytes())}], **body | {"templates": ["{} is there."]})
    assert scores(others["results"][0])[0] != scores(found["results"][0])[0]
    assert scores(others["results"][0])[1] == pytest.approx(scores(found["results"][0])[1], abs=1e-6)


def test_one_of_all_is_softmax(client: TestClient, encoder: Encoder, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png(5))
    image, texts = encoder.encode_images([path]), encoder.encode_texts(["One.", "Two.", "Three."])
    odds = np.exp(encoder.logit_scale * (image @ texts.T)[0])
    body = {"candidate_labels": ["one", "two", "three"], "templates": ["{}."], "multi_label": False}
    found = classified(client, images=[{"data": encoded(png(5))}], **body)
    assert found["score_type"] == "softmax"
    assert scores(found["results"][0]) == pytest.approx((odds / odds.sum()).tolist(), abs=1e-6)


def test_hugging_face(client: TestClient) -> None:
    body = {"inputs": encoded(png(5)), "parameters": {"candidate_labels": ["one", "two"], "hypothesis_template": "{}."}}
    response = client.post("/v1/zero-shot-image-classification", json=body)
    found = TypeAdapter(list[answers.HuggingFaceLabel]).validate_python(response.json())
    assert found[0].score >= found[1].score
    assert sum(one.score for one in found) == pytest.approx(1)
    own = classified(
        client,
        images=[{"data": encoded(png(5))}],
        candidate_labels=["one", "two"],
        templates=["{}."],
        multi_label=False,
    )
    assert {one.label: one.score for one in found} == pytest.approx(
        {finding["label"]: finding["score"] for finding in own["results"][0]["labels"]}
    )


def test_a_bad_image_among_good_ones_is_told_in_its_place(client: TestClient) -> None:
    good, bad = {"data": encoded(png(1))}, {"data": encoded(png(1)[:60])}
    results = classified(client, images=[good, bad, good])["results"]
    assert scores(results[0]) == pytest.approx(scores(results[2]), abs=1e-6)
    assert results[1]["error"]["status"] == 422
    assert "labels" not in results[1]
    refused = client.post("/v1/embed", json={"images": [good, bad]})
    assert problem(refused, 422, "broken-image").startswith("images.1: ")


def test_the_preview_is_what_the_tower_saw(client: TestClient, encoder: Encoder) -> None:
    found = classified(client, images=[{"data": encoded(png(1))}], preview=True)
    seen = np.asarray(Image.open(io.BytesIO(base64.b64decode(found["results"][0]["preview"]))))
    pixels = encoder.preprocess(Image.open(io.BytesIO(png(1))))
    assert (seen == pixels[0].numpy()).all()


def test_embed(client: TestClient, encoder: Encoder) -> None:
    texts = ["The heart is enlarged.", "Normal."]
    body = {"texts": texts, "images": [{"data": encoded(png(1))}]}
    found = client.post("/v1/embed", json=body).json()
    answers.EmbedOut.model_validate(found)
    assert np.allclose(found["texts"], encoder.encode_texts(texts), atol=1e-6)
    packed = client.post("/v1/embed", json=body | {"encoding": "base64"}).json()
    rows = np.frombuffer(base64.b64decode(packed["images"]), "<f4").reshape(1, -1)
    assert np.allclose(rows, found["images"], atol=1e-7)
    assert np.linalg.norm(rows) == pytest.approx(1, abs=1e-5)


def test_search_by_text_image_and_vector(client: TestClient, encoder: Encoder, toy_indexes: tuple[Path, Path]) -> None:
    import medclip_lab

    index = medclip_lab.open_index(toy_indexes[0])
    query = encoder.encode_texts(["The heart is enlarged."])
    expected = [(hit.study_id, hit.row["image"]) for hit in index.search(query, 4)[0]]
    for asked in ({"text": "The heart is enlarged."}, {"vector": (query[0] * 3).tolist()}):
        found = client.post("/v1/search", json={**asked, "index": "films", "k": 4}).json()
        answers.SearchOut.model_validate(found)
        assert [(hit["study_id"], hit["fields"]["image"]) for hit in found["hits"]] == expected
        assert found["index"]["size"] == len(index)
    upload = client.post(
        "/v1/search", files={"image": ("a.png", png(), "image/png")}, data={"index": "films", "k": "3"}
    )
    answers.SearchOut.model_validate(upload.json())
    assert len(upload.json()["hits"]) == 3


def test_report_text_needs_its_scope(client: TestClient, serve: Serve) -> None:
    body = {"text": "heart", "index": "reports"}
    plain = client.post("/v1/search", json=body)
    assert "Heart" not in plain.text
    assert "Case" not in plain.text
    problem(client.post("/v1/search", json=body | {"include_text": True}), 403, "scope")
    allowed = serve(local_scopes=("search", "text"))
    found = allowed.post("/v1/search", json=body | {"include_text": True}).json()
    assert "Case" in found["hits"][0]["text"]
    refused = allowed.post("/v1/search", json={"text": "heart", "index": "films", "include_text": True})
    assert "holds no report text" in problem(refused, 422, "no-text")


def test_search_meets_what_is_asked_of_its_answers(
    client: TestClient, encoder: Encoder, toy_indexes: tuple[Path, Path]
) -> None:
    import medclip_lab
    from medclip_lab.retrieval.policies import Ratio

    index = medclip_lab.open_index(toy_indexes[0])
    query = encoder.encode_texts(["The heart is enlarged."])
    body = {"text": "The heart is enlarged.", "index": "films", "k": 30}

    def ids(**asked: Any) -> list[int]:
        found = client.post("/v1/search", json=body | asked).json()
        answers.SearchOut.model_validate(found)
        return [hit["id"] for hit in found["hits"]]

    def expected(**asked: Any) -> list[int]:
        return [hit.id for hit in index.search(query, 30, **asked)[0]]

    everything, patient = ids(), str(index.rows([0])[0]["patient_id"])
    where = ["labels.Cardiomegaly=1", "view in PA,AP"]
    assert ids(where=where) == expected(where=where)
    assert ids(not_patient=patient) == expected(not_patients=[patient])
    assert ids(ratio=1.01) == expected(policy=Ratio(1.01))
    for fewer in (ids(where=where), ids(not_patient=patient)):
        assert 0 < len(fewer) < len(everything)
    image = ("a.png", png(), "image/png")
    upload = client.post("/v1/search", files={"image": image}, data={"index": "films", "k": 30, "where": where})
    assert sorted(hit["id"] for hit in upload.json()["hits"]) == sorted(ids(where=where))


def test_reports_cannot_be_guessed_without_the_scope(client: TestClient, serve: Serve) -> None:
    body = {"text": "heart", "index": "reports", "k": 1}
    (hit,) = client.post("/v1/search", json=body).json()["hits"]
    assert not {"text", "text_key"} & set(hit["fields"])
    for column in ("text", "text_key"):
        problem(client.post("/v1/search", json=body | {"where": [f"{column}!=1"]}), 403, "scope")
    allowed = serve(local_scopes=("search", "text"))
    text = allowed.post("/v1/search", json=body | {"include_text": True}).json()["hits"][0]["text"]
    found = allowed.post("/v1/search", json=body | {"where": [f"text={text}"]}).json()
    assert found["hits"][0]["id"] == hit["id"]


def test_explain_gives_what_the_library_gives(client: TestClient, encoder: Encoder, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png())
    body = {"image": {"data": encoded(png())}, "label": "Edema"}
    found = client.post("/v1/explain", json=body).json()
    answers.ExplainOut.model_validate(found)
    edema = next(label for label in encoder.labelset("chexpert14").labels if label.name == "Edema")
    expected = explain(encoder, path, edema.positive, edema.negative)
    relevance = expected.enlarged()
    low, high = float(relevance.min()), float(relevance.max())
    assert high > low
    assert found["similarity"] == pytest.approx(expected.similarity, abs=1e-6)
    assert (found["method"], found["lowest"], found["highest"]) == (
        expected.method, pytest.approx(low, abs=1e-6), pytest.approx(high, abs=1e-6)
    )  # fmt: skip
    drawn, seen = (np.asarray(Image.open(io.BytesIO(base64.b64decode(found[name])))) for name in ("map", "seen"))
    assert np.abs(drawn - 255 * (relevance - low) / (high - low)).max() < 1
    assert (seen == expected.seen).all()
    own = client.post(
        "/v1/explain", json={"image": body["image"], "positive": edema.positive, "negative": edema.negative}
    )
    assert own.json()["map"] == found["map"]
    refused = client.post("/v1/explain", json=body | {"label": "Edelweiss"})
    assert "Pneumothorax" in problem(refused, 404, "unknown-label")


def test_a_tower_without_maps_says_so(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise UserError("explain: this tower has 0 stages, no stage None")

    monkeypatch.setattr("medclip_lab.serving.model.explain", refuse)
    client = serve(indexes=())
    assert not client.get("/v1/models").json()["can_explain"]
    refused = client.post("/v1/explain", json={"image": {"data": encoded(png())}, "label": "Edema"})
    problem(refused, 501, "no-explanation")


def test_what_is_served(client: TestClient, toy_bundle: Path) -> None:
    found = client.get("/v1/models").json()
    answers.ModelsOut.model_validate(found)
    assert found["model"]["name"] == toy_bundle.name
    assert found["version"] == __version__
    assert [index["name"] for index in found["indexes"]] == ["films", "reports"]
    assert "Not a medical device" in found["card"]
    TypeAdapter(list[answers.LabelsOf]).validate_python(client.get("/v1/labelsets").json())


def test_health(client: TestClient) -> None:
    for path in ("/healthz", "/readyz", "/v2/health/live", "/v2/health/ready"):
        assert client.get(path).status_code == 200


def test_not_ready_while_the_model_does_not_run(serve: Serve) -> None:
    client = serve()
    client.app.state.house.batcher.stop()  # type: ignore[attr-defined]
    assert client.get("/healthz").status_code == 200
    problem(client.get("/readyz"), 503, "not-ready")
    problem(client.get("/v2/health/ready"), 503, "not-ready")
    problem(client.post("/v1/embed", json={"texts": ["a"]}), 503, "stopping")


def test_open_inference_protocol(client: TestClient) -> None:
    about = client.get("/v2/models/bundle").json()
    assert client.get(f"/v2/models/bundle/versions/{about['versions'][0]}/ready").json()["ready"]
    tensor = {"name": "image", "shape": [2], "datatype": "BYTES", "data": [encoded(png(1)), encoded(png(2))]}
    outputs = [{"name": name} for name in ("scores", "labels", "features")]
    response = client.post("/v2/models/bundle/infer", json={"id": "7", "inputs": [tensor], "outputs": outputs})
    found = answers.InferOut.model_validate(response.json())
    assert found.id == "7"
    by_name = {output.name: output for output in found.outputs}
    own = classified(client, images=[{"data": text} for text in tensor["data"]])  # type: ignore[attr-defined]
    assert by_name["scores"].data == pytest.approx([s for one in own["results"] for s in scores(one)], abs=1e-6)
    assert by_name["scores"].shape == [2, 14]
    assert by_name["features"].shape == [2, 16]
    refused = client.post("/v2/models/other/infer", json={"inputs": [tensor]})
    assert "bundle" in problem(refused, 404, "unknown-model")


def test_metrics_count_what_happened(serve: Serve) -> None:
    client = serve()
    body = {"images": [{"data": encoded(png(n))} for n in range(3)], "candidate_labels": ["a"], "templates": ["{}."]}
    for _ in range(2):
        client.post("/v1/classify", json=body)
    client.post("/v1/classify", json={})
    page = client.get("/metrics").text
    assert 'medclip_requests_total{route="/v1/classify",status="200"} 2.0' in page
    assert 'medclip_requests_total{route="/v1/classify",status="422"} 1.0' in page
    assert 'medclip_refused_total{reason="invalid-request"} 1.0' in page
    assert 'medclip_batch_size_sum{kind="image"} 6.0' in page
    assert 'medclip_stage_seconds_count{stage="decode"} 2.0' in page
    assert "medclip_requests_inside 0.0" in page
    assert 'medclip_prompts_total{cache="hit"} 4.0' in page  # one for the label, three against it


def test_the_document_names_every_route_and_example(client: TestClient) -> None:
    found = client.get("/openapi.json").json()
    for path in ("/v1/classify", "/v1/embed", "/v1/search", "/v1/explain", "/v1/zero-shot-image-classification"):
        content = found["paths"][path]["post"]["requestBody"]["content"]
        examples = content["application/json"]["examples"].values()
        assert examples
        for example in examples:
            body = example["value"] | ({"index": "films"} if path == "/v1/search" else {})
            assert client.post(path, json=body).status_code == 200
    text = json.dumps(found)
    names = {part.partition('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert names <= set(found["components"]["schemas"])
