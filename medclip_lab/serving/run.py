"""Start uvicorn: one process, or several that share a port."""

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
from medclip_lab.serving.metrics import SHARED
from medclip_lab.serving.settings import Settings

VARIABLE = "MEDCLIP_LAB_SERVICE"
"""Holds the settings for further processes: paths and limits, no key."""
OPTIONS: dict[str, Any] = {
    "log_config": None,
    "access_log": False,
    "server_header": False,
    "date_header": False,
    "timeout_graceful_shutdown": 20,
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
        uvicorn.run(app, host=settings.host, port=settings.port, **OPTIONS)
        return
    create_app(settings)  # what is wrong with it is told once, and not by every process
    with tempfile.TemporaryDirectory() as shared:
        os.environ[SHARED] = shared
        os.environ[VARIABLE] = json.dumps(asdict(settings), default=str)
        uvicorn.run(
            "medclip_lab.serving.run:further", factory=True, host=settings.host, port=settings.port, workers=workers,
            **OPTIONS,
        )  # fmt: skip


def further() -> FastAPI:
    """The application of one of several processes."""
    log_to()
    LOGGER.info("process started")
    return create_app(restored(json.loads(os.environ[VARIABLE])))


def restored(values: dict[str, Any]) -> Settings:
    """Settings from what JSON made of them."""
    paths = {name: None if values[name] is None else Path(values[name]) for name in ("bundle", "keys", "audit")}
    lists = {"indexes": tuple(Path(folder) for folder in values["indexes"])}
    lists |= {name: tuple(values[name]) for name in ("local_scopes", "dicomweb")}
    return Settings(**{**values, **paths, **lists})
