"""Lines of JSON about requests: which route, whose key, how long; never what was sent or answered."""

import json
import logging
import sys
import threading
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from medclip_lab.serving.lines import Behind

LOGGER = logging.getLogger("medclip_lab.serving")


class JsonLines(logging.Formatter):
    """One object a line. Of an exception only its kind and the places it passed: its message may quote the input."""

    def format(self, record: logging.LogRecord) -> str:
        facts: dict[str, Any] = {"time": now(), "level": record.levelname.lower(), "logger": record.name}
        facts["event"] = record.getMessage() if record.name == LOGGER.name else record.msg
        facts |= getattr(record, "facts", {})
        if record.exc_info and record.exc_info[1] is not None:
            facts["error"] = type(record.exc_info[1]).__name__
            facts["trace"] = places(record.exc_info[1])
        return json.dumps(facts, default=str)


def places(error: BaseException) -> list[str]:
    """File, line and function of every frame an exception passed."""
    return [
        f"{Path(frame.filename).name}:{frame.lineno} {frame.name}"
        for frame in traceback.extract_tb(error.__traceback__)
    ]


def log_to(stream: TextIO = sys.stderr) -> None:
    """Send the service's and uvicorn's own lines to a stream as JSON; uvicorn's access lines, which hold paths, go."""
    writer = logging.StreamHandler(stream)
    writer.setFormatter(JsonLines())
    handler = Behind(writer)
    for name in (LOGGER.name, "uvicorn", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler] if name != "uvicorn.error" else [], name == "uvicorn.error"
        logger.setLevel(logging.INFO)
    logging.getLogger("uvicorn.access").disabled = True


class Audit:
    """A file that only grows: a line for every answered request of a model."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab", buffering=0)  # a line is one write, so lines of several processes do not mix
        path.chmod(0o600)
        self._lock = threading.Lock()

    def add(self, facts: dict[str, Any]) -> None:
        """Add a line.

        Raises:
            OSError: the disk is full or gone.
        """
        line = json.dumps({"time": now(), **facts}, default=str)
        with self._lock:
            self._file.write(f"{line}\n".encode())

    def close(self) -> None:
        self._file.close()


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
