"""A service of the toy bundle and its index, asked in this process."""

import base64
import io
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from PIL import Image
from starlette.testclient import TestClient

from medclip_lab.data.manifest import Manifest
from medclip_lab.serving import Settings, create_app
from tests.conftest import TOY_CONFIG

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
Serve = Callable[..., TestClient]


def png(seed: int = 0, size: tuple[int, int] = (50, 70)) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray((np.random.default_rng(seed).random(size) * 255).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def problem(response: Any, status: int, kind: str) -> str:
    """The sentence of a refusal, after a look at its form."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body = response.json()
    assert body["type"] == f"urn:medclip-lab:{kind}", body
    assert body["status"] == status
    assert body["request_id"] == response.headers["x-request-id"]
    assert set(body) == {"type", "title", "status", "detail", "request_id"}
    return str(body["detail"])


@pytest.fixture(scope="session")
def toy_bundle(toy_shards: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the other tests have it, but hardly trained."""
    from medclip_lab.config import load_config
    from medclip_lab.training.export import export
    from medclip_lab.training.run import RunConfig, train

    folder = tmp_path_factory.mktemp("served")
    text = TOY_CONFIG.replace("SHARDS", str(toy_shards.folder))
    (folder / "toy.yaml").write_text(text)
    run = train(load_config(RunConfig, folder / "toy.yaml", [f"--out={folder / 'run'}", "--trainer.steps=3"]))
    export(run, folder / "bundle", ["chexpert14"], "pytest")
    return folder / "bundle"


@pytest.fixture(scope="session")
def toy_indexes(toy_bundle: Path, toy_shards: Manifest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One of images without text, one of reports with it."""
    from medclip_lab.inference.encoder import load
    from medclip_lab.retrieval.build import build_index
    from medclip_lab.retrieval.embed import embed
    from medclip_lab.retrieval.parts import EmbedConfig

    folder = tmp_path_factory.mktemp("serving")
    embed(load(toy_bundle), toy_shards.folder, folder / "e", "test", EmbedConfig(include_text=True))
    build_index(folder / "e", folder / "films", "image")
    build_index(folder / "e", folder / "reports", "text", include_text=True)
    return folder / "films", folder / "reports"


@pytest.fixture(scope="session")
def toy_settings(toy_bundle: Path, toy_indexes: tuple[Path, Path]) -> Settings:
    return Settings(bundle=toy_bundle, indexes=toy_indexes)


@pytest.fixture(scope="session")
def client(toy_settings: Settings) -> Iterator[TestClient]:
    """The service without keys, as it starts by default."""
    with TestClient(create_app(toy_settings), base_url="http://localhost") as client:
        yield client


@pytest.fixture
def serve(toy_settings: Settings) -> Iterator[Serve]:
    """A function from changed settings to a running service."""
    running = []

    def start(**changes: Any) -> TestClient:
        client = TestClient(create_app(replace(toy_settings, **changes)), base_url="http://localhost")
        running.append(client)
        return client.__enter__()

    yield start
    for client in running:
        client.__exit__(None, None, None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A real Chromium, until the module ends: its event loop would be in the way of others'; skipped without one."""
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium: CHROMIUM names none")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


class Serving:
    """A service on a port of its own."""

    def __init__(self, settings: Settings) -> None:
        self.app = create_app(settings)
        self.server = uvicorn.Server(uvicorn.Config(self.app, port=0, log_config=None))
        self.thread = threading.Thread(target=self.server.run, daemon=True)

    def __enter__(self) -> str:
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        return f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self.thread.join()
