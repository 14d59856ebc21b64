"""Tables of the user's own as JSON lines: an object a line, the keys of the first line of a file are its columns."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medclip_lab.data.sources.base import BadStudyError
from medclip_lab.data.sources.rows import RowSource, files_of
from medclip_lab.errors import UserError


@dataclass(frozen=True)
class Jsonl(RowSource):
    __doc__ = RowSource.__doc__
    name = "jsonl"

    def files(self) -> list[tuple[Path, str]]:
        return files_of(self.folder, ".jsonl", self.name)

    def columns(self, file: Path) -> list[str]:
        return list(next((row for _, row in _lines(file)), {}))

    def scan(self, file: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
        for place, row in _lines(file):
            yield place, {column: row.get(column) for column in columns}

    def fetch(self, file: Path, place: int) -> dict[str, Any]:
        try:
            with file.open("rb") as opened:
                opened.seek(place)
                row: dict[str, Any] = json.loads(opened.readline())
        except (OSError, ValueError) as error:
            raise BadStudyError("unreadable row", f"{type(error).__name__}: the file has changed") from None
        return row


def _lines(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(first byte, object) of each line that is not empty."""
    place = 0
    with file.open("rb") as opened:
        for line, data in enumerate(opened, 1):
            if data.strip():
                try:
                    row = json.loads(data)
                except (ValueError, RecursionError):
                    row = None
                if not isinstance(row, dict):
                    raise UserError(f"{file}, line {line}: no JSON object in UTF-8")
                yield place, row
            place += len(data)
