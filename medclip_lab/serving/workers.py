"""Several processes of one service: one is ready when all have been, for any of them may get the next connection."""

import os
from pathlib import Path

from medclip_lab.serving.metrics import SHARED, alive

NUMBER = "MEDCLIP_LAB_WORKERS"
"""Holds how many processes there are; the folder that they share is that of their figures."""


class Workers:
    """The processes of this service, this one among them; alone where there is no more than one."""

    def __init__(self) -> None:
        self._number = int(os.environ.get(NUMBER, "1"))
        self._folder = Path(os.environ[SHARED]) if self._number > 1 else None
        self._complete = self._folder is None

    def here(self) -> None:
        """Say that this one is ready."""
        if self._folder is not None:
            (self._folder / f"{os.getpid()}.ready").touch()

    @property
    def complete(self) -> bool:
        """Whether all have been ready; one that fails later takes no connection, and the others go on without it."""
        if not self._complete and self._folder is not None:
            # What one said that has died since does not count: another says it that took its place.
            self._complete = sum(alive(int(path.stem)) for path in self._folder.glob("*.ready")) >= self._number
        return self._complete
