"""Hugging Face datasets as `save_to_disk` leaves them, read with pyarrow alone.

Layout: `dataset_info.json`, `state.json` (which names the Arrow files) and `data-00000-of-0000N.arrow`; of a dict of
splits, `dataset_dict.json` and a folder like that for each. Arrow files are streams of record batches, mapped into
memory, so a row is read where it lies. Class labels, audio and nested features are not read.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from medclip_lab.data.sources.base import BadStudyError
from medclip_lab.data.sources.parquet import cheap_columns
from medclip_lab.data.sources.rows import RowSource
from medclip_lab.data.sources.tables import SPLIT_OF, find_image
from medclip_lab.errors import UserError
from medclip_lab.files import existing_folder, read_json


@dataclass(frozen=True)
class HfDataset(RowSource):
    __doc__ = RowSource.__doc__
    name = "hf-dataset"

    def files(self) -> list[tuple[Path, str]]:
        folder = existing_folder(self.folder, self.name)
        if not (folder / "dataset_dict.json").is_file():
            return [(file, "") for file in _arrow_files(folder)]
        splits = read_json(folder / "dataset_dict.json", self.name).get("splits")
        if not isinstance(splits, list):
            raise UserError(f"{self.name}: {folder / 'dataset_dict.json'} names no splits")
        folders = {path.name: path for path in folder.iterdir() if path.is_dir()}
        missing = [split for split in splits if split not in folders]
        if missing:
            raise UserError(
                f"{self.name}: dataset_dict.json names the split {missing[0]!r}, but {folder} has no such folder"
            )
        return [(file, SPLIT_OF.get(split.lower(), "")) for split in splits for file in _arrow_files(folders[split])]

    def columns(self, file: Path) -> list[str]:
        return list(_open(file).schema.names)

    def scan(self, file: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
        table = _open(file)
        cheap = table.select(cheap_columns(table.schema, columns))
        number = 0
        for batch in cheap.to_batches():
            for row in batch.to_pylist():
                yield number, row
                number += 1

    def fetch(self, file: Path, place: int) -> dict[str, Any]:
        from pyarrow import ArrowException

        try:
            row: dict[str, Any] = _table(file, os.getpid()).slice(place, 1).to_pylist()[0]
        except (ArrowException, OSError) as error:
            raise BadStudyError("unreadable row", type(error).__name__) from None
        return row


def _arrow_files(folder: Path) -> list[Path]:
    """The files that `state.json` names, and which lie in the folder."""
    named = read_json(folder / "state.json", "hf-dataset").get("_data_files")
    names = [str(entry.get("filename")) for entry in named or [] if isinstance(entry, dict)]
    files = [find_image([folder], name) for name in names]
    if not names or None in files:
        raise UserError(f"hf-dataset: {folder / 'state.json'} names no files, or some that are not beside it")
    return [file for file in files if file]


def _open(file: Path) -> Any:
    from pyarrow import ArrowException

    try:
        return _table(file, os.getpid())
    except (ArrowException, OSError) as error:
        raise UserError(f"{file}: no stream of Arrow record batches: {type(error).__name__}") from None


@lru_cache(maxsize=8)
def _table(file: Path, process: int) -> Any:  # noqa: ARG001 - each process maps the file itself
    from pyarrow import ipc, memory_map

    return ipc.open_stream(memory_map(str(file))).read_all()
