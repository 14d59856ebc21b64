"""How much may be in the house at once: counted at the door, before a body is read."""

import math
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from medclip_lab.serving.problems import busy


class Gate:
    """Counts the requests that are being answered and the bytes of their bodies. Used by one event loop only.

    Whoever comes in waits for nothing but the model, so the longest wait is that of `most` requests; whoever is turned
    away is told how long these take.
    """

    def __init__(self, most: int, most_bytes: int) -> None:
        self.most, self.most_bytes = most, most_bytes
        self.inside = self.bytes = 0
        self._seconds: deque[float] = deque(maxlen=32)

    @contextmanager
    def enter(self, size: int) -> Iterator[None]:
        """Hold a place while the block runs.

        Args:
            size: of the body, in bytes; the most it may be where it is not told.

        Raises:
            Problem: 429, with the seconds to wait.
        """
        # One request always fits, however large a body is allowed.
        if self.inside >= self.most or (self.inside and self.bytes + size > self.most_bytes):
            raise busy(self.retry_after())
        self.inside += 1
        self.bytes += size
        try:
            yield
        finally:
            self.inside -= 1
            self.bytes -= size

    def took(self, seconds: float) -> None:
        """Note how long an accepted request took."""
        self._seconds.append(seconds)

    def retry_after(self) -> int:
        """Seconds, at least one: what those inside will take, by what the last ones took."""
        mean = sum(self._seconds) / len(self._seconds) if self._seconds else 1.0
        return max(1, math.ceil(mean))
