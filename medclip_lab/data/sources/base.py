"""What a source of studies is: a cheap list of what there is, and the reading of one study, apart.

The list is made once, in order; studies are then read by any number of processes, in any order, again after an
interruption, and every time the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from medclip_lab.data.shards import Sample


@dataclass(frozen=True, kw_only=True)
class Record:
    """A study that a source has, before any image or report of it is opened."""

    study_id: str
    patient_id: str
    split: str
    content: Any = None
    """What its source needs to read it: rows of a table, names of files. It is sent between processes by pickle."""


class BadStudyError(ValueError):
    """A study that cannot be used. `cause` is counted, `reason` is listed; neither holds a path, a name or a text."""

    def __init__(self, cause: str, reason: str) -> None:
        super().__init__(reason)
        self.cause, self.reason = cause, reason


class Source(Protocol):
    """A data set in its original layout. The object itself is sent between processes by pickle too."""

    @property
    def name(self) -> str:
        """As `medclip-lab prepare NAME` calls it."""

    @property
    def license(self) -> str: ...

    def records(self) -> Sequence[Record]:
        """All studies, always in the same order.

        Raises:
            UserError: a folder or table that is not there, lacks a column, or contradicts itself.
        """

    def read(self, record: Record, note: "Note") -> Sample:
        """One study, a pure function of the record and the files.

        Args:
            note: told of what is wrong with a study that can be used all the same, as (cause, reason).

        Raises:
            BadStudyError: nothing usable is left of it.
        """


class Note(Protocol):
    """Lists what is wrong with a part of a study.

    `counted` is for damage, an image of several that is broken: it counts against the ceiling as a bad study does. What
    was never there is only listed.
    """

    def __call__(self, cause: str, reason: str, counted: bool = False) -> None: ...
