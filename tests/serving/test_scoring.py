"""A calibrated bundle: probabilities, decisions, what is out of domain, and labels that are the absence of others."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from medclip_lab.inference.calibration import Calibration
from medclip_lab.inference.encoder import load
from medclip_lab.serving import answers

from .conftest import Serve, encoded, png, problem

OWN = """
name: own
labels:
  - {name: large, positive: [The heart is enlarged.], negative: [Heart size is normal.]}
  - {name: nothing, none_of: [large]}
"""
SLOPE, INTERCEPT = 2.0, 1.0


@pytest.fixture(scope="module")
def bundle(toy_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Edema is calibrated by hand; image 1 is what its images were like."""
    from medclip_lab.training.export import export

    folder = tmp_path_factory.mktemp("calibrated")
    (folder / "own.yaml").write_text(OWN)
    (folder / "1.png").write_bytes(png(1))
    export(toy_bundle.parent / "run", folder / "bundle", ["chexpert14", str(folder / "own.yaml")], "pytest")
    encoder = load(folder / "bundle", device="cpu")
    classifier = encoder.zero_shot_classifier("chexpert14")
    (usual,) = classifier.features([folder / "1.png"])
    nothing = {"parameters": None, "threshold": None, "reason": "not labelled in the validation data"}
    rows: list[dict[str, Any]] = [{"name": name, **nothing} for name in classifier.names]
    rows[classifier.names.index("Edema")] = {
        "name": "Edema", "parameters": {"slope": SLOPE, "intercept": INTERCEPT}, "threshold": 1e-9, "reason": None
    }  # fmt: skip
    facts = {
        "bundle": encoder.fingerprint,
        "labelset": "chexpert14",
        "labelset_hash": classifier.labelset_hash,
        "rule": classifier.rule,
        "of_logit": True,
        "method": "platt",
        "labels": rows,
        "out_of_domain": {"threshold": 0.001},
        "patients": {"salt": "", "hashes": []},
    }
    Calibration(facts, {"mean": usual, "whitening": np.eye(len(usual), dtype=np.float32)}).save(folder / "bundle")
    return folder / "bundle"


def classified(client: TestClient, **body: Any) -> Any:
    response = client.post("/v1/classify", json=body)
    assert response.status_code == 200, response.text
    answers.ClassifyOut.model_validate(response.json())
    return response.json()


def test_answers_are_those_of_the_calibrated_classifier(serve: Serve, bundle: Path, tmp_path: Path) -> None:
    client = serve(bundle=bundle, indexes=())
    paths = [tmp_path / f"{number}.png" for number in (1, 2)]
    for number, path in enumerate(paths, 1):
        path.write_bytes(png(number))
    classifier = load(bundle, device="cpu").zero_shot_classifier("chexpert14")
    assert classifier.calibration is not None
    images = [{"data": encoded(path.read_bytes())} for path in paths]
    found = classified(client, images=images, labelset="chexpert14")
    assert found["calibration"] == classifier.calibration.hash
    for result, expected in zip(found["results"], classifier.classify(paths), strict=True):
        for said in result["labels"]:
            wanted = expected["labels"][said["label"]]
            for fact in ("score", "probability", "threshold", "operating"):
                given = wanted.get(fact)
                assert said[fact] == (None if given is None else pytest.approx(given, rel=1e-3)), fact
            assert (said["decision"], said["reason"]) == (wanted["decision"], wanted.get("reason"))
        edema = next(said for said in result["labels"] if said["label"] == "Edema")
        odds = (edema["score"] / (1 - edema["score"])) ** SLOPE * np.exp(INTERCEPT)
        assert edema["probability"] == pytest.approx(odds / (1 + odds))
        assert edema["decision"] is (edema["probability"] >= 1e-9)
        assert sum(said["reason"] == "not labelled in the validation data" for said in result["labels"]) == 13
    assert [result["out_of_domain"]["flag"] for result in found["results"]] == [False, True]
    told = {one["name"]: one["calibration"] for one in client.get("/v1/labelsets").json()}
    assert told == {"chexpert14": found["calibration"], "own": None}
    tensor = {"name": "image", "shape": [1], "datatype": "BYTES", "data": [images[0]["data"]]}
    inferred = client.post("/v2/models/bundle/infer", json={"inputs": [tensor]}).json()
    assert inferred["parameters"]["calibration"] == found["calibration"]


def test_what_is_not_calibrated_stays_null(serve: Serve, bundle: Path) -> None:
    client = serve(bundle=bundle, indexes=())
    image = [{"data": encoded(png(1))}]
    for body in (
        {"labelset": "own"},
        {"labelset": "chexpert14", "multi_label": False},
        {"candidate_labels": ["Edema"]},
    ):
        found = classified(client, images=image, **body)
        assert found["calibration"] is found["results"][0]["out_of_domain"] is None
        for said in found["results"][0]["labels"]:
            assert {said[fact] for fact in ("probability", "threshold", "decision", "operating", "reason")} == {None}


def test_the_absence_of_others_has_a_score_and_no_prompts(serve: Serve, bundle: Path) -> None:
    client = serve(bundle=bundle, indexes=(), labelset="own")
    image = {"data": encoded(png(1))}
    large, nothing = classified(client, images=[image])["results"][0]["labels"]
    assert nothing["score"] == pytest.approx(1 - large["score"], abs=1e-9)
    refused = client.post("/v1/classify", json={"images": [image], "multi_label": False})
    assert "nothing has no prompts" in problem(refused, 422, "no-prompts")
    refused = client.post("/v1/explain", json={"image": image, "label": "nothing"})
    assert "ask for one of large" in problem(refused, 422, "no-prompts")


def test_which_one_needs_nothing_against_a_label(serve: Serve, bundle: Path) -> None:
    body = {"images": [{"data": encoded(png(1))}], "candidate_labels": ["no finding", "edema"], "multi_label": False}
    found = classified(serve(bundle=bundle, indexes=()), **body)["results"][0]["labels"]
    assert sum(said["score"] for said in found) == pytest.approx(1)
