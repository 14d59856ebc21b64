"""Ready when every process is; and at the end whoever is connected gets the answer under way, and no reset."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("fastapi")

from medclip_lab.serving import Settings
from medclip_lab.serving.metrics import SHARED
from medclip_lab.serving.workers import NUMBER, Workers

from .conftest import Serve, Serving, encoded, png, problem


def test_one_of_several_is_ready_when_all_have_been(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Workers().complete
    monkeypatch.setenv(NUMBER, "2")
    monkeypatch.setenv(SHARED, str(tmp_path))
    workers = Workers()
    assert not workers.complete
    workers.here()
    workers.here()
    assert not workers.complete
    ended = subprocess.Popen(["true"])
    ended.wait()
    (tmp_path / f"{ended.pid}.ready").touch()  # it was ready and died before the others were
    assert not workers.complete
    (tmp_path / f"{os.getppid()}.ready").touch()
    assert workers.complete
    (tmp_path / f"{os.getppid()}.ready").unlink()  # one that fails later takes no connection
    assert workers.complete


def test_not_ready_until_the_others_are_and_while_stopping(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    client = serve()
    house = client.app.state.house  # type: ignore[attr-defined]
    assert client.get("/readyz").status_code == 200
    monkeypatch.setattr(type(house.workers), "complete", False)
    problem(client.get("/readyz"), 503, "not-ready")
    monkeypatch.undo()
    house.leaving = True
    problem(client.get("/readyz"), 503, "not-ready")
    answer = client.post("/v1/embed", json={"texts": ["a"]})  # whoever is inside is answered, and told to go
    assert (answer.status_code, answer.headers["connection"]) == (200, "close")


def test_a_refused_body_does_not_lose_the_refusal(toy_settings: Settings) -> None:
    """A socket that is closed on unread bytes is reset, and a client that still sends sees no answer."""
    from dataclasses import replace

    with Serving(replace(toy_settings, max_body=1000)) as address:
        for _ in range(3):
            connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=20)
            connection.request("POST", "/v1/embed", b" " * 20_000_000, {"content-type": "application/json"})
            answer = connection.getresponse()
            assert answer.status == 413
            assert json.loads(answer.read())["type"] == "urn:medclip-lab:body-too-large"
            connection.close()


def test_at_the_end_nobody_who_is_connected_is_reset(toy_bundle: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = (tmp_path / "log").open("w+")
    command = [sys.executable, "-m", "medclip_lab", "serve", str(toy_bundle), "--port", str(port)]
    process = subprocess.Popen(command, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
    body = json.dumps({"images": [{"data": encoded(png())}]})
    ended: list[object] = []

    def ask() -> None:
        """On one connection until told that it was the last request."""
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        try:
            while True:
                connection.request("POST", "/v1/classify", body, {"content-type": "application/json"})
                answer = connection.getresponse()
                assert "results" in json.loads(answer.read())
                if answer.getheader("connection") == "close":
                    ended.append(answer.status)
                    return
        except Exception as error:
            ended.append(error)

    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=2).close()
                break
            except (urllib.error.URLError, OSError):
                assert process.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.1)
        clients = [threading.Thread(target=ask) for _ in range(6)]
        for client in clients:
            client.start()
        time.sleep(1)
        idle = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        idle.request("GET", "/healthz")
        idle.getresponse().read()
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)  # uvicorn by itself would have closed it by now
        idle.request("POST", "/v1/classify", body, {"content-type": "application/json"})
        answer = idle.getresponse()
        assert (answer.status, answer.getheader("connection")) == (200, "close")
        for client in clients:
            client.join(60)
        process.wait(30)
    finally:
        process.kill()
        log.close()
    assert ended == [200] * 6
    assert process.returncode in (0, -signal.SIGTERM)
