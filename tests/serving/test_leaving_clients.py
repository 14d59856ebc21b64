"""Clients that leave, or send so slowly that they never end: their place is another's."""

import json
import socket
import threading
import time
from dataclasses import replace

from medclip_lab.serving import Settings

from .conftest import Serving, encoded, png


def opened(address: str, body: bytes, length: int) -> socket.socket:
    """A connection on which a request was begun, with a body of which so much is promised."""
    host, port = address.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=20)
    head = (
        f"POST /v1/classify HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n"
    )
    connection.sendall(head.encode() + b"\r\n" + body)
    return connection


def test_who_leaves_frees_the_place_and_is_not_computed(toy_settings: Settings) -> None:
    body = json.dumps({"images": [{"data": encoded(png())}]}).encode()
    serving = Serving(replace(toy_settings, max_waiting=3, max_batch=1))
    house, go, seen = serving.server.config.app.state.house, threading.Event(), []  # type: ignore[union-attr]
    with serving as address:
        real = house.model.encode_images
        house.model.encode_images = lambda pixels: (seen.append(len(pixels)), go.wait(20)) and real(pixels)
        try:
            clients = [opened(address, body, len(body)) for _ in range(3)]
            while house.gate.inside < 3 or len(house.batcher) < 2 or not seen:
                time.sleep(0.005)
            for client in clients:
                client.close()
            until = time.monotonic() + 15  # far below the deadline of a request
            while house.gate.inside and time.monotonic() < until:
                time.sleep(0.005)
            assert (house.gate.inside, house.gate.bytes) == (0, 0)
        finally:
            go.set()
        with opened(address, body, len(body)) as client:
            assert client.recv(12) == b"HTTP/1.1 200"
        assert seen == [1, 1]  # that which was under way, and the last


def test_labels_of_who_left_are_not_made(toy_settings: Settings) -> None:
    """Else a client that asks and leaves, again and again, fills the queue without ever holding a place."""
    serving, go, seen = Serving(toy_settings), threading.Event(), []
    house = serving.server.config.app.state.house  # type: ignore[union-attr]

    def asking(label: str) -> bytes:
        asked = {"images": [{"data": encoded(png())}], "candidate_labels": [label], "templates": ["{}."]}
        return json.dumps(asked).encode()

    with serving as address:
        real = house.model.encode_texts
        house.model.encode_texts = lambda texts: (seen.extend(texts), go.wait(20)) and real(texts)
        try:
            body, *bodies = [asking("first"), asking("left"), asking("wanted"), asking("wanted")]
            first = opened(address, body, len(body))
            while not seen:  # else the others might go through the tower with it
                time.sleep(0.005)
            clients = [opened(address, body, len(body)) for body in bodies]
            while not (house.gate.inside == 4 and len(house.making) == 3 and len(house.batcher)):
                time.sleep(0.005)
            for client in clients[:2]:
                client.close()
            while house.gate.inside > 2:
                time.sleep(0.005)
            assert len(house.making) == 2  # one of two still waits for what both asked
        finally:
            go.set()
        for client in (first, clients[2]):
            assert client.recv(12) == b"HTTP/1.1 200"
            client.close()
        assert not house.making
    assert {"First.", "Wanted."} <= {*seen}
    assert "Left." not in seen


def test_a_body_that_drips_ends_at_the_deadline(toy_settings: Settings) -> None:
    serving = Serving(replace(toy_settings, deadline=0.5, max_waiting=2))
    house = serving.server.config.app.state.house  # type: ignore[union-attr]
    with serving as address, opened(address, b'{"images"', 10_000) as client:
        answer = b""
        while part := client.recv(4096):
            answer += part
        assert answer.startswith(b"HTTP/1.1 408")
        assert b"connection: close" in answer.lower()
        assert house.gate.inside == 0
