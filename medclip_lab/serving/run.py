"""Start uvicorn: one process, or several that share a port."""

import gc
import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI

from medclip_lab.serving.app import create_app
from medclip_lab.serving.logs import LOGGER, log_to
from medclip_lab.serving.metrics import SHARED, forget_dead
from medclip_lab.serving.settings import Settings
from medclip_lab.serving.workers import NUMBER

VARIABLE = "MEDCLIP_LAB_SERVICE"
"""Holds the settings for further processes: paths and limits, no key."""
OPTIONS: dict[str, Any] = {
    "log_config": None,
    "access_log": False,
    "server_header": False,
    "date_header": False,
    "timeout_graceful_shutdown": 20,
    # Longer than clients and proxies keep a connection: where theirs is longer, a request meets a door that just shut.
    "timeout_keep_alive": 75,
    # A process that loads a model holds its interpreter for longer than uvicorn's 5 seconds: it is not to be killed.
    "timeout_worker_healthcheck": 60,
}


def run(settings: Settings, workers: int = 1) -> None:
    """Serve until interrupted.

    Args:
        workers: processes, each with a model of its own.

    Raises:
        UserError: a bundle, an index or a file of keys that cannot be used.
    """
    log_to()
    if workers == 1:
        app = create_app(settings)
        _spare_the_collector()
        uvicorn.run(app, host=settings.host, port=settings.port, **OPTIONS)
        return
    create_app(settings)  # what is wrong with it is told once, and not by every process
    with tempfile.TemporaryDirectory() as shared:
        os.environ[SHARED] = shared
        os.environ[NUMBER] = str(workers)
        os.environ[VARIABLE] = json.dumps(asdict(settings), default=str)
        uvicorn.run(
            "medclip_lab.serving.run:further", factory=True, host=settings.host, port=settings.port, workers=workers,
            **OPTIONS,
        )  # fmt: skip


def further() -> FastAPI:
    """The application of one of several processes."""
    log_to()
    LOGGER.info("process started")
    forget_dead()
    app = create_app(restored(json.loads(os.environ[VARIABLE])))
    _spare_the_collector()
    return app


def _spare_the_collector() -> None:
    """Leave out of collections what stays for good: looking through the libraries' objects stops all for 0.3 s."""
    gc.collect()
    gc.freeze()


def restored(values: dict[str, Any]) -> Settings:
    """Settings from what JSON made of them."""
    places = ("bundle", "keys", "audit", "onnx", "oidc_jwks")
    paths = {name: None if values[name] is None else Path(values[name]) for name in places}
    lists = {name: tuple(Path(path) for path in values[name]) for name in ("indexes", "calibrations")}
    lists |= {name: tuple(values[name]) for name in ("local_scopes", "dicomweb", "collections", "thumbnails")}
    return Settings(**{**values, **paths, **lists})
