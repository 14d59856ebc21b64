"""Instances from an archive on the list, and from nowhere else."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from medclip_lab.errors import UserError
from medclip_lab.serving.dicomweb import Archives, first_part
from medclip_lab.serving.house import PULLS
from medclip_lab.serving.problems import Problem
from medclip_lab.serving.schemas import Instance

from .conftest import Serve, png, problem

UID = "1.2.840.1"
PLACE = {"server": "pacs", "study": UID, "series": UID, "instance": UID}


@pytest.fixture
def archive() -> Iterator[Any]:
    """An archive that answers what `answer` says, and notes what it was asked."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            server.asked.append((self.path, self.headers["Accept"]))
            status, headers, body = server.answer
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.answer = [], (404, {}, b"")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def base(archive: Any) -> str:
    return f"http://127.0.0.1:{archive.server_port}/dicom-web"


def multipart(body: bytes) -> tuple[int, dict[str, str], bytes]:
    whole = b"--b\r\nContent-Type: application/dicom\r\n\r\n" + body + b"\r\n--b--\r\n"
    return 200, {"Content-Type": 'multipart/related; type="application/dicom"; boundary=b'}, whole


def test_an_instance_is_pulled_and_classified(serve: Serve, archive: Any) -> None:
    content = png(1)
    archive.answer = multipart(content)
    client = serve(dicomweb=(f"pacs={base(archive)}/",))
    pulled = client.post("/v1/classify", json={"images": [{"dicomweb": PLACE}]})
    sent = client.post("/v1/classify", content=content, headers={"content-type": "image/png"})
    assert pulled.json()["results"] == sent.json()["results"]
    ((path, accept),) = archive.asked
    assert path == f"/dicom-web/studies/{UID}/series/{UID}/instances/{UID}"
    assert "application/dicom" in accept
    assert client.get("/v1/models").json()["dicomweb"] == ["pacs"]
    archive.answer = (200, {"Content-Type": "application/dicom"}, content)
    assert client.post("/v1/classify", json={"images": [{"dicomweb": PLACE}]}).status_code == 200
    other = client.post("/v1/classify", json={"images": [{"dicomweb": PLACE | {"server": "evil"}}]})
    assert "pacs" in problem(other, 403, "archive")


def test_an_archive_that_hangs_holds_up_nobody_else(serve: Serve) -> None:
    client = serve(dicomweb=("pacs=https://pacs.example",))
    go, asked, content = threading.Event(), [], png(1)
    house = client.app.state.house  # type: ignore[attr-defined]
    house.archives.fetch = lambda place: (asked.append(place), go.wait(20), content)[2]
    body = {"images": [{"dicomweb": PLACE}] * 16}
    with ThreadPoolExecutor(3) as pool:
        hanging = [pool.submit(client.post, "/v1/classify", json=body) for _ in range(3)]
        try:
            while house.gate.inside < 3 or len(asked) < PULLS:
                time.sleep(0.005)
            row = client.post("/v1/search", json={"id": 0, "index": "films"})
            assert row.status_code == 200
            assert len(asked) == PULLS  # the others' bytes are not in memory yet
        finally:
            go.set()
        assert {one.result().status_code for one in hanging} == {200}
    assert len(asked) == 48


def test_what_an_archive_does_wrong(archive: Any) -> None:
    archives = Archives((f"pacs={base(archive)}",), max_bytes=1000)
    place = Instance(**PLACE)
    elsewhere = {"Location": f"http://127.0.0.1:{archive.server_port}/secret"}
    for answer, status in (
        ((302, elsewhere, b""), 502),
        ((404, {}, b""), 502),
        ((200, {}, b"0" * 1001), 413),
        ((200, {"Content-Type": "multipart/related; boundary=b"}, b"--c\r\n\r\n"), 502),
        ((200, {"Content-Length": "500"}, b"cut"), 502),
    ):
        archive.answer = answer
        archive.asked.clear()
        with pytest.raises(Problem) as refused:
            archives.fetch(place)
        assert refused.value.status == status
        assert len(archive.asked) == 1  # nobody went where a redirect points


@pytest.mark.parametrize(
    "uid", ["../../../etc/passwd", "1.2/..", "1?x=1", "1.2#", "", "a", "1" * 65, "1.2\r\nHost: evil"]
)
def test_uids_are_numbers_and_dots(uid: str) -> None:
    with pytest.raises(ValueError, match="validation error"):
        Instance(**{**PLACE, "series": uid})


@pytest.mark.parametrize("entry", ["pacs", "pacs=", "=http://a", "pa cs=http://a", "pacs=ftp://a", "pacs=http://u:p@a"])
def test_entries_of_the_list(entry: str) -> None:
    with pytest.raises(UserError, match="NAME=https://host/path"):
        Archives((entry,), 1)


def test_pixels_that_look_like_a_boundary_are_kept() -> None:
    pixels = bytes(range(256)) * 4 + b"\r\n\r\n--x\r\n" + bytes(100)
    _, headers, body = multipart(pixels)
    assert first_part(body, headers["Content-Type"]) == pixels
