"""Tables of the user's own as Parquet: a file or a folder of them, images as paths or inside.

The place of a row is its number. pyarrow is imported when it is needed, as this file is for every command line.
"""

import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

from medclip_lab.data.sources.base import BadStudyError
from medclip_lab.data.sources.rows import RowSource, files_of
from medclip_lab.errors import UserError


@dataclass(frozen=True)
class Parquet(RowSource):
    __doc__ = RowSource.__doc__
    name = "parquet"

    def files(self) -> list[tuple[Path, str]]:
        return files_of(self.folder, ".parquet", self.name)

    def columns(self, file: Path) -> list[str]:
        return list(_open(file).schema_arrow.names)

    def scan(self, file: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
        from pyarrow import ArrowException

        opened = _open(file)
        cheap = cheap_columns(opened.schema_arrow, columns)
        number = 0
        try:
            for batch in opened.iter_batches(columns=cheap):
                for row in batch.to_pylist() if cheap else [{}] * batch.num_rows:
                    yield number, row
                    number += 1
        except (ArrowException, OSError) as error:
            raise UserError(f"{file}, after row {number}: cannot be read: {type(error).__name__}") from None

    def fetch(self, file: Path, place: int) -> dict[str, Any]:
        from pyarrow import ArrowException

        try:
            starts = _starts(file)
            group = bisect_right(starts, place) - 1
            table = _row_group(file, group, tuple(filter(None, (self.image, self.text))), os.getpid())
            row: dict[str, Any] = table.slice(place - starts[group], 1).to_pylist()[0]
        except (ArrowException, OSError) as error:
            raise BadStudyError("unreadable row", type(error).__name__) from None
        return row


def cheap_columns(schema: Any, columns: Sequence[str]) -> list[str]:
    """Those of the columns that hold neither bytes nor anything nested, so no image is read to list the studies."""
    from pyarrow import types

    kinds = {field.name: field.type for field in schema}
    dear = (types.is_nested, types.is_binary, types.is_large_binary, types.is_fixed_size_binary)
    return [column for column in columns if not any(is_dear(kinds[column]) for is_dear in dear)]


def _open(file: Path) -> Any:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        return ParquetFile(file)
    except (ArrowException, OSError) as error:
        raise UserError(f"{file}: no Parquet file: {type(error).__name__}") from None


@lru_cache(maxsize=8)
def _starts(file: Path) -> list[int]:
    """Number of the first row of each group of rows."""
    from pyarrow.parquet import ParquetFile

    facts = ParquetFile(file).metadata
    sizes = (facts.row_group(group).num_rows for group in range(facts.num_row_groups - 1))
    return list(accumulate(sizes, initial=0))


@lru_cache(maxsize=1)
def _row_group(file: Path, group: int, columns: tuple[str, ...], process: int) -> Any:  # noqa: ARG001 - see below
    """A group of rows is the least that Parquet can read: the last one is kept, by each process its own."""
    from pyarrow.parquet import ParquetFile

    return ParquetFile(file).read_row_group(group, columns=list(columns))
