"""The audit log: who asked what, when, of which model and index, and how it ended; never the content."""

import json
import stat
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from medclip_lab.serving import Settings, create_app, keys
from medclip_lab.serving.logs import Audit

from .conftest import Serve, encoded, png, problem

NAME = "Mustermann"


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_request_of_the_model_leaves_a_line(toy_settings: Settings, tmp_path: Path) -> None:
    path = tmp_path / "log" / "audit.jsonl"
    key = keys.new_key(tmp_path / "keys.json", ["classify", "search"])
    settings = replace(toy_settings, keys=tmp_path / "keys.json", audit=path, host="0.0.0.0")
    headers = {"authorization": f"Bearer {key}", "x-request-id": NAME}
    begun = datetime.now().astimezone()
    with TestClient(create_app(settings), base_url="http://hospital.example") as client:
        image = {"data": encoded(png())}
        answers = [
            client.post("/v1/classify", json={"images": [image, image]}, headers=headers),
            client.post("/v1/search", json={"text": NAME, "index": "reports"}, headers=headers),
            client.post("/v1/search", json={"text": NAME, "index": "films"}, headers=headers),
            client.post("/v1/search", json={"text": NAME, "index": NAME}, headers=headers),
            client.post("/v1/search", json={"text": "a", "index": "reports", "include_text": True}, headers=headers),
            client.post("/v1/embed", json={"texts": [NAME]}),
            client.post(f"/v1/{NAME}", json={}, headers=headers),
        ]
        client.get("/healthz")
        model = client.get("/v1/models", headers=headers).json()
    assert [answer.status_code for answer in answers] == [200, 200, 200, 404, 403, 401, 404]
    lines = lines_of(path)
    assert [line["status"] for line in lines] == [answer.status_code for answer in answers]
    assert [line["request_id"] for line in lines] == [answer.headers["x-request-id"] for answer in answers]
    assert [line["route"] for line in lines] == ["/v1/classify", *["/v1/search"] * 4, "/v1/embed", "unknown"]
    assert [line["images"] for line in lines] == [2, 0, 0, 0, 0, 0, 0]
    assert {line["model"] for line in lines} == {model["model"]["fingerprint"]}
    hashes = {index["name"]: index["hash"] for index in model["indexes"]}
    assert [line["index"] for line in lines] == [None, hashes["reports"], hashes["films"], None, None, None, None]
    identifier = key.split("_")[1]
    assert [line["key"] for line in lines] == [*[identifier] * 5, "none", identifier]
    assert all(begun <= datetime.fromisoformat(line["time"]) <= datetime.now().astimezone() for line in lines)
    text = path.read_text()
    assert NAME not in text
    assert key.split("_", 2)[2] not in text
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_second_start_goes_on_with_the_log(tmp_path: Path) -> None:
    for number in range(2):
        audit = Audit(tmp_path / "audit.jsonl")
        audit.add({"status": number})
        audit.close()
    assert [line["status"] for line in lines_of(tmp_path / "audit.jsonl")] == [0, 1]


def test_who_cannot_be_accounted_for_is_not_served(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = serve(audit=tmp_path / "audit.jsonl")

    def full(_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(client.app.state.house.audit, "add", full)  # type: ignore[attr-defined]
    assert client.post("/v1/embed", json={"texts": ["a"]}).status_code == 200, "the disk was full only afterwards"
    problem(client.post("/v1/embed", json={"texts": ["a"]}), 503, "not-ready")
    problem(client.get("/readyz"), 503, "not-ready")
    assert client.get("/healthz").status_code == 200
