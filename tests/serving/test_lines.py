"""A log that nobody reads holds up no request, and tells what it lost."""

import io
import logging
import threading
import time

from medclip_lab.serving.lines import Behind


class Stuck(logging.Handler):
    """Writes nothing until it may, as a full pipe does."""

    def __init__(self) -> None:
        super().__init__()
        self.go, self.written = threading.Event(), []

    def emit(self, record: logging.LogRecord) -> None:
        self.go.wait(20)
        self.written.append(record)


def test_lines_beyond_what_may_wait_are_dropped_and_counted() -> None:
    stuck = Stuck()
    handler = Behind(stuck, most=3)
    logger = logging.getLogger("medclip_lab.serving.stuck")
    logger.propagate, logger.handlers = False, [handler]
    logger.error("first")
    while handler._waiting.qsize():  # until it is being written, so that three more may wait
        time.sleep(0.001)
    for number in range(10):
        logger.error("line", extra={"number": number})
    stuck.go.set()
    while handler._waiting.qsize():
        time.sleep(0.001)
    logger.error("last")
    handler.close()
    assert [record.msg for record in stuck.written] == ["first", "line", "line", "line", "lines dropped", "last"]
    assert [record.number for record in stuck.written[1:4]] == [0, 1, 2]
    assert stuck.written[4].facts == {"lines": 7}


def test_what_waits_is_written_before_the_end() -> None:
    stream = io.StringIO()
    handler = Behind(logging.StreamHandler(stream))
    for number in range(50):
        handler.emit(logging.makeLogRecord({"msg": str(number)}))
    handler.close()
    assert stream.getvalue().split() == [str(number) for number in range(50)]


def test_a_reader_that_is_stuck_does_not_hold_up_the_end() -> None:
    stuck = Stuck()
    handler = Behind(stuck, most=1)
    for _ in range(5):
        handler.emit(logging.makeLogRecord({"msg": "x"}))
    ended = threading.Thread(target=handler.close)
    ended.start()
    ended.join(15)
    assert not ended.is_alive()
    assert not stuck.written
    stuck.go.set()
