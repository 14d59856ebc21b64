"""The door: keys, scopes, hosts, sizes, headers, and what may stand in a log."""

import io
import json
import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from medclip_lab.cli import main
from medclip_lab.errors import UserError
from medclip_lab.serving import Settings, keys, reading
from medclip_lab.serving.gate import Gate
from medclip_lab.serving.logs import LOGGER, JsonLines
from medclip_lab.serving.problems import invalid
from medclip_lab.serving.run import restored

from .conftest import Serve, encoded, png, problem


@pytest.fixture(scope="module")
def keyed(
    toy_settings: Settings, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[TestClient, dict[str, str]]]:
    from dataclasses import replace

    from medclip_lab.serving import create_app

    path = tmp_path_factory.mktemp("keys") / "keys.json"
    made = {scope: keys.new_key(path, [scope]) for scope in ("classify", "search")}
    made["text"] = keys.new_key(path, ["search", "text"])
    settings = replace(toy_settings, keys=path, host="0.0.0.0")
    with TestClient(create_app(settings), base_url="http://hospital.example") as client:
        yield client, made


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


IMAGES = {"images": [{"data": encoded(png())}]}


def test_without_a_key_there_is_health_and_the_page_only(keyed: Any) -> None:
    client, _ = keyed
    for path in ("/healthz", "/readyz", "/v2/health/live", "/v2/health/ready", "/", "/openapi.json"):
        assert client.get(path).status_code == 200, path
    for path in ("/v1/models", "/v1/labelsets", "/metrics", "/v2", "/nothing"):
        refused = client.get(path)
        assert "no key was sent" in problem(refused, 401, "key")
        assert refused.headers["www-authenticate"] == "Bearer"
    for path in ("/v1/classify", "/v1/embed", "/v1/search", "/v1/explain"):
        problem(client.post(path, json=IMAGES), 401, "key")


def test_wrong_keys(keyed: Any) -> None:
    client, made = keyed
    right = made["classify"]
    swapped = right[:13] + made["search"][13:]
    wrong = [
        right[:-1] + ("A" if right[-1] != "A" else "B"),
        right + "x",
        right[:-1],
        swapped,
        "",
        "mcl__",
        right.upper(),
    ]
    for key in (*wrong, "mcl_00000000_" + "A" * 43):
        problem(client.get("/v1/models", headers=bearer(key)), 401, "key")
        problem(client.get("/v1/models", headers={"x-api-key": key}), 401, "key")
    problem(client.get("/v1/models", headers={"authorization": f"Basic {right}"}), 401, "key")
    assert client.get("/v1/models", headers={"x-api-key": right}).status_code == 200


def test_scopes(keyed: Any) -> None:
    client, made = keyed
    search = {"text": "heart", "index": "reports"}
    allowed = {
        "classify": {"/v1/classify": IMAGES, "/v1/embed": {"texts": ["a"]}},
        "search": {"/v1/search": search},
        "text": {"/v1/search": search | {"include_text": True}},
    }
    for scope, requests in allowed.items():
        for path, body in requests.items():
            assert client.post(path, json=body, headers=bearer(made[scope])).status_code == 200
            for other in {"classify", "search"} - {scope} - ({"search"} if scope == "text" else set()):
                told = problem(client.post(path, json=body, headers=bearer(made[other])), 403, "scope")
                assert "needs the scope" in told
    told = problem(
        client.post("/v1/search", json=search | {"include_text": True}, headers=bearer(made["search"])), 403, "scope"
    )
    assert "`text`" in told
    assert client.get("/v1/models", headers=bearer(made["text"])).json()["scopes"] == ["search", "text"]


def test_keys_are_hashed_at_rest_and_compared_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "keys.json"
    key = keys.new_key(path, ["classify"])
    second = keys.new_key(path, ["search"])
    stored = path.read_text()
    assert key.split("_", 2)[2] not in stored
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    compared = []
    import hmac

    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((a, b)) or real(a, b))
    known = keys.Keys(path)
    assert known.caller(second).scopes == {"search"}  # type: ignore[union-attr]
    assert known.caller("mcl_00000000_" + "A" * 43) is None
    assert known.caller("nonsense") is None
    assert len(compared) == 3  # a key nobody has costs what a wrong one costs
    assert {len(a) for pair in compared for a in pair} == {64}


@pytest.mark.parametrize(
    "content", ["{}", '{"format": "medclip-lab-keys/1", "keys": [{"id": "a"}]}', "[", '{"format": 1}']
)
def test_a_broken_file_of_keys_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "keys.json"
    path.write_text(content)
    with pytest.raises(UserError, match="keys"):
        keys.Keys(path)


@pytest.mark.parametrize(
    "change", [{"id": [1]}, {"hash": None}, {"hash": "\u00e9" * 64}, {"scopes": None}, {"scopes": [[]]}, {"salt": 1}]
)
def test_a_broken_entry_is_refused_at_the_start(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "keys.json"
    keys.new_key(path, ["search"])
    record = json.loads(path.read_text())
    record["keys"][0] |= change
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"an entry of .* is broken: make the key again"):
        keys.Keys(path)


def test_the_verb_makes_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "keys.json")
    assert main(["serve", "--keys", path, "--new-key", "classify", "text"]) == 0
    key = capsys.readouterr().out.strip()
    assert keys.Keys(Path(path)).caller(key).scopes == {"classify", "text"}  # type: ignore[union-attr]
    for arguments, told in (
        (["--keys", path, "--new-key", "everything"], "classify, search, text"),
        (["--new-key", "classify"], "--keys"),
        ([], "bundle is missing"),
        (["nowhere"], "no such folder"),
        (["nowhere", "--host", "0.0.0.0"], "anyone could ask"),
        (["nowhere", "--dicomweb", "pacs=file:///etc"], "NAME=https://host/path"),
        (["nowhere", "--workers", "0"], "--workers"),
        (["nowhere", "--max-batch", "0"], "max_batch"),
        (["nowhere", "--deadline", "0"], "deadline"),
        (["nowhere", "--local-scopes", "all"], "'all'"),
    ):
        assert main(["serve", *arguments]) == 2
        assert told in capsys.readouterr().err


def test_without_keys_only_this_machine_is_served(client: TestClient) -> None:
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", ""):
        problem(client.get("/v1/models", headers={"host": host}), 421, "host")
    for host in ("127.0.0.1:8000", "localhost", "[::1]:8000"):
        assert client.get("/v1/models", headers={"host": host}).status_code == 200
    for site in ("cross-site", "same-site"):
        problem(client.post("/v1/embed", json={"texts": ["a"]}, headers={"sec-fetch-site": site}), 403, "cross-site")
    assert client.get("/v1/models", headers={"sec-fetch-site": "same-origin"}).status_code == 200


def test_headers_of_every_answer(client: TestClient) -> None:
    for response in (
        client.get("/"),
        client.get("/v1/models"),
        client.get("/nothing"),
        client.post("/v1/embed", json={}),
    ):
        assert response.headers["cache-control"] == "no-store"
        assert response.headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in response.headers["content-security-policy"]
        assert "unsafe" not in response.headers["content-security-policy"]
        assert len(response.headers["x-request-id"]) == 32
        assert "access-control-allow-origin" not in response.headers
    assert "script-src 'self'" in client.get("/").headers["content-security-policy"]
    assert "script-src" not in client.get("/v1/models").headers["content-security-policy"]
    asked = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    assert client.options("/v1/classify", headers=asked).status_code == 405


def test_a_body_above_the_limit_is_not_read(serve: Serve) -> None:
    client = serve(max_body=1000)
    read = []

    def stream() -> Iterator[bytes]:
        for number in range(1000):
            read.append(number)
            yield b" " * 100

    announced = client.post("/v1/embed", content=b" " * 1001, headers={"content-type": "application/json"})
    told = problem(announced, 413, "body-too-large")
    assert "1000 bytes" in told
    streamed = client.post("/v1/embed", content=stream(), headers={"content-type": "application/json"})
    problem(streamed, 413, "body-too-large")
    form = client.post("/v1/classify", files={"image": ("a.png", b"0" * 2000, "image/png")})
    problem(form, 413, "body-too-large")
    assert client.post("/v1/embed", json={"texts": ["a"]}).status_code == 200


@pytest.mark.parametrize(
    ("number", "status", "kind"), [(2**17 + 1, 413, "too-many-values"), (100_000, 422, "invalid-request")]
)
def test_many_wrong_values_are_refused_in_few_words(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, number: int, status: int, kind: str
) -> None:
    told: list[int] = []  # a million of them took a gigabyte and half a minute of the event loop
    monkeypatch.setattr(reading, "invalid", lambda errors: told.append(len(errors)) or invalid(errors))  # type: ignore[func-returns-value]
    labels = ",".join(["0"] * number)
    body = f'{{"images": [{{"data": ""}}], "candidate_labels": [{labels}]}}'
    problem(client.post("/v1/classify", content=body, headers={"content-type": "application/json"}), status, kind)
    assert sum(told) <= 2


def test_many_unknown_fields_are_not_written_down(client: TestClient) -> None:
    body = "{" + ",".join(f'"{number}": 0' for number in range(1000)) + "}"
    answer = client.post("/v1/classify", content=body, headers={"content-type": "application/json"})
    assert problem(answer, 422, "invalid-request") == "more than 100 values are not as /openapi.json says"


def test_beside_chunks_a_length_does_not_make_a_body_small(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    client = serve(max_body=1000)
    seen: list[int] = []
    enter = Gate.enter
    monkeypatch.setattr(Gate, "enter", lambda gate, size: seen.append(size) or enter(gate, size))  # type: ignore[func-returns-value]
    headers = {"content-type": "application/json", "content-length": "1", "transfer-encoding": "chunked"}
    client.post("/v1/embed", content=b'{"texts": ["a"]}', headers=headers)
    assert seen == [1000]


@pytest.mark.parametrize("length", ["-1", "abc", "1e3"])
def test_a_length_that_is_no_number(client: TestClient, length: str) -> None:
    headers = {"content-type": "application/json", "content-length": length}
    problem(client.post("/v1/embed", content=b"{}", headers=headers), 400, "content-length")


def test_compressed_bodies_are_not_inflated(client: TestClient) -> None:
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    problem(client.post("/v1/embed", content=b"x", headers=headers), 415, "content-encoding")


def test_uploads_are_never_written(client: TestClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Starlette's own parser would spool two megabytes to the disk."""
    import tempfile

    rolled = []
    real = tempfile.SpooledTemporaryFile.rollover
    monkeypatch.setattr(tempfile.SpooledTemporaryFile, "rollover", lambda self: rolled.append(1) or real(self))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    content = png(size=(1500, 1500))
    assert len(content) > 2 * 2**20
    assert client.post("/v1/classify", files={"image": ("a.png", content, "image/png")}).status_code == 200
    assert not rolled
    assert not list(tmp_path.iterdir())


SECRET = "Mustermann"


def hostile_requests(client: TestClient) -> None:
    """Whatever may hold a name, in every place it may stand."""
    name = {"content-type": "application/json"}
    client.post("/v1/embed", json={"texts": [SECRET]})
    client.post("/v1/embed", json={SECRET: 1, "texts": ["a"]})
    client.post("/v1/embed", content=f'{{"texts": "{SECRET}"'.encode(), headers=name)
    client.post("/v1/search", json={"text": SECRET, "index": SECRET})
    client.post("/v1/classify", json={"images": [{"data": SECRET}], "labelset": SECRET})
    client.post("/v1/classify", json={"images": [{"data": encoded(png())}], "candidate_labels": [SECRET * 20]})
    client.post("/v1/classify", files={"image": (f"{SECRET}.png", b"no image " + SECRET.encode(), f"image/{SECRET}")})
    client.post("/v1/classify", files={SECRET: (f"{SECRET}.png", png(), "image/png")})
    client.post(f"/v1/classify?{SECRET}={SECRET}", content=png(), headers={"content-type": "image/png"})
    client.get(f"/v1/{SECRET}?{SECRET}")
    client.get(f"/v2/models/{SECRET}")
    client.get("/v1/models", headers={"x-api-key": SECRET, "user-agent": SECRET, "referer": SECRET, "host": SECRET})


def test_nothing_of_the_content_is_logged_or_told(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines())
    monkeypatch.setattr(LOGGER, "handlers", [handler])
    monkeypatch.setattr(LOGGER, "level", logging.INFO)
    LOGGER.setLevel(logging.INFO)
    client = serve(audit=tmp_path / "audit.jsonl")
    answers = []
    send = client.send
    monkeypatch.setattr(client, "send", lambda *a, **k: answers.append(send(*a, **k)) or answers[-1])
    hostile_requests(client)

    def fail(*_: Any) -> Any:
        raise RuntimeError(f"cannot read {SECRET}")

    monkeypatch.setattr("medclip_lab.serving.indexes.Served.facts", fail)
    failed = client.get("/v1/models")
    assert failed.status_code == 500
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert len([line for line in lines if line["event"] == "request"]) == len(answers) == 13
    assert lines[0].keys() >= {"time", "request_id", "route", "status", "key", "ms", "images"}
    (failure,) = [line for line in lines if line["event"] == "failure"]
    assert failure["error"] == "RuntimeError"
    assert failure["trace"][-1].endswith("fail")
    told = [response.text for response in answers if response.status_code >= 400]
    everything = [stream.getvalue(), (tmp_path / "audit.jsonl").read_text(), *told, *capfd.readouterr()]
    assert not any(SECRET in text for text in everything)
    assert sum(response.status_code < 400 for response in answers) == 1
    audit = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert len(audit) == 9
    assert set(audit[0]) == {"time", "request_id", "key", "route", "status", "images", "model", "subject", "index"}


def test_no_address_of_a_request_is_fetched(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def connect(*_: Any) -> None:
        raise AssertionError("the service opened a connection")

    monkeypatch.setattr(socket.socket, "connect", connect)
    for data in ("http://127.0.0.1:1/a.png", "file:///etc/passwd", "data:image/png;base64,AAAA"):
        problem(client.post("/v1/classify", json={"images": [{"data": data}]}), 422, "bad-base64")
    place = {"server": "pacs", "study": "1.2", "series": "1.3", "instance": "1.4"}
    problem(client.post("/v1/classify", json={"images": [{"dicomweb": place}]}), 403, "archive")


def test_settings_survive_the_way_to_another_process(toy_settings: Settings) -> None:
    from dataclasses import asdict

    assert restored(json.loads(json.dumps(asdict(toy_settings), default=str))) == toy_settings
    assert os.environ.get("MEDCLIP_LAB_SERVICE") is None
