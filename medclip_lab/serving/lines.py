"""A log whose reader may be stuck: lines are written on a thread of their own, and no request waits for them."""

import logging
import queue
import threading
from multiprocessing.util import Finalize

MOST = 10_000
"""Lines that wait at most; a reader that is so far behind loses the next ones."""
PATIENCE = 2.0
"""Seconds that a process which ends waits for its last lines to be written."""


class Behind(logging.Handler):
    """Hands records to another handler on a thread; those beyond `most` are dropped, and how many is told later.

    A pipe that nobody reads takes 64 KiB, and then a write blocks: on the event loop it would block every request.
    """

    def __init__(self, handler: logging.Handler, most: int = MOST) -> None:
        super().__init__()
        self._handler = handler
        self._waiting: queue.Queue[logging.LogRecord | None] = queue.Queue(most)
        self._dropped = 0
        self._thread = threading.Thread(target=self._write, name="log", daemon=True)
        self._thread.start()
        # Further processes end without what atexit knows.
        self._end = Finalize(self, _end, (self._waiting, self._thread), exitpriority=0)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if self._dropped:
                self._waiting.put_nowait(self._loss())
                self._dropped = 0
            self._waiting.put_nowait(record)
        except queue.Full:
            self._dropped += 1

    def close(self) -> None:
        """Wait a while for what is to be written; a reader that is stuck is not waited for longer."""
        self._end()
        super().close()

    def _loss(self) -> logging.LogRecord:
        facts = {"name": "medclip_lab.serving", "levelname": "WARNING", "msg": "lines dropped"}
        return logging.makeLogRecord(facts | {"facts": {"lines": self._dropped}})

    def _write(self) -> None:
        while (record := self._waiting.get()) is not None:
            self._handler.handle(record)


def _end(waiting: "queue.Queue[logging.LogRecord | None]", thread: threading.Thread) -> None:
    try:
        waiting.put(None, timeout=PATIENCE)
    except queue.Full:
        return
    thread.join(PATIENCE)
