"""Embeddings to an index folder whose recall is known."""

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from medclip_lab.doctor import cpu_name
from medclip_lab.errors import UserError
from medclip_lab.files import read_json, refuse_to_replace
from medclip_lab.retrieval.choose import Choice, Goals, choose
from medclip_lab.retrieval.embeddings import MODALITIES, Embeddings
from medclip_lab.retrieval.families import import_faiss
from medclip_lab.retrieval.gallery import Gallery, make_gallery
from medclip_lab.retrieval.memory import Meter, release
from medclip_lab.retrieval.on_disk import workshop
from medclip_lab.retrieval.parameters import Parameters
from medclip_lab.retrieval.store import FORMATS, MANIFEST, RowWriter, changing, commit, save_array, save_index
from medclip_lab.retrieval.withdrawn import Withdrawn, withdrawn_from

Folders = str | Path | Sequence[str | Path]


def build_index(
    embeddings: Folders,
    out: str | Path,
    modality: str = "image",
    include_text: bool = False,
    goals: Goals | None = None,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Build the index of one modality that reaches the goals; returns its manifest.

    Args:
        embeddings: one or more folders of one bundle.
        out: a new folder, or an index that is replaced as soon as the new one is whole: it takes no changes meanwhile,
            what was removed from it stays out, and ids go on where its own ended.
        include_text: keep report text in the table; the embeddings must hold it.
        say: told of each kind of index that is tried; None tells standard error.

    Raises:
        UserError: no usable embeddings, no faiss, text asked for and not there, `out` holds something else or is being
            changed; too little memory, or a recall that nothing reaches.
    """
    goals = goals or Goals()
    if modality not in MODALITIES:
        raise UserError(f"index: modality {modality!r} is unknown, one of {', '.join(MODALITIES)} expected")
    out = Path(out).expanduser()
    refuse_to_replace(out, MANIFEST, FORMATS, "index")
    old: dict[str, Any] = {}
    with ExitStack() as stack:
        if (out / MANIFEST).exists():
            stack.enter_context(changing(out))  # all the while: a removal in between would be forgotten
            old = read_json(out / MANIFEST, "index")
        return _build(embeddings, out, modality, include_text, goals, say or _to_stderr, old, stack)


def _build(
    embeddings: Folders,
    out: Path,
    modality: str,
    include_text: bool,
    goals: Goals,
    say: Callable[[str], None],
    old: dict[str, Any],
    stack: ExitStack,
) -> dict[str, Any]:
    """`old` is the manifest of the index that is replaced; what `stack` holds ends with the build."""
    faiss = import_faiss()
    withdrawn, first_id = withdrawn_from(old, out), int(old.get("next_id", 0))
    meter = Meter(goals.max_memory)
    folders = open_all(embeddings)
    for folder in folders:
        if include_text and not folder.manifest["include_text"]:
            raise UserError("index: the embeddings hold no report text: embed again with --include-text")
    dedup = modality == "text" if goals.dedup is None else goals.dedup
    gallery = make_gallery(folders, modality, goals.queries, dedup, goals.seed, withdrawn)
    release()
    choice = choose(gallery, goals, meter, say, lambda: stack.enter_context(workshop(out)))
    meter.check()
    save = _with_held_out(choice, gallery)

    def write(folder: Path) -> dict[str, Path]:
        with RowWriter(folder / "rows.arrow") as rows:
            write_rows(rows, folders, modality, include_text, first_id, withdrawn)
        return {
            **save(folder),
            "rows": rows.path,
            "starts": save_array(folder / "starts.npy", gallery.groups.starts),
            "members": save_array(folder / "members.npy", gallery.groups.members),
        }

    facts = {
        "modality": modality,
        "bundle": folders[0].manifest["bundle"],
        "size": len(gallery.groups.members),
        "vectors": gallery.size,
        "dim": gallery.dim,
        "metric": "inner product of unit vectors",
        "factory": choice.factory,
        "on_disk": choice.shop is not None,
        "parameters": {name: given.given() for name, given in choice.parameters.items()},
        "text_included": include_text,
        "faiss": faiss.__version__,
        "made_on": {"threads": faiss.omp_get_max_threads(), "cpu": cpu_name(), "cores": os.cpu_count()},
        "next_id": first_id + len(gallery.groups.members),
        "changed": {"added": 0, "removed": 0},
        "withdrawn": withdrawn.record(),
        **_measured(choice, goals, gallery, meter),
    }
    return commit(out, write, facts)


def open_all(embeddings: Folders) -> list[Embeddings]:
    """
    Raises:
        UserError: none are named, or one cannot be used.
    """
    named = [embeddings] if isinstance(embeddings, str | Path) else list(embeddings)
    if not named:
        raise UserError("index: name at least one folder of embeddings")
    return [Embeddings(folder) for folder in named]


def _with_held_out(choice: Choice, gallery: Gallery) -> Callable[[Path], dict[str, Path]]:
    """Add the held-out; returns what writes the index into a folder and tells the files of its roles."""
    if choice.shop is not None:
        choice.index = None  # or its lists would keep their room on the disk
        choice.shop.add(gallery.held_out, len(gallery.main))
        lists = choice.shop.merge()
        return lambda _: lists.roles()
    for _, block in gallery.held_out.blocks():
        choice.index.add(block)
    assert choice.index.ntotal == gallery.size
    release()
    return lambda folder: {"vectors": save_index(folder / "vectors.faiss", choice.index)}


def _measured(choice: Choice, goals: Goals, gallery: Gallery, meter: Meter) -> dict[str, Any]:
    tuned = choice.trial.tuned
    return {
        "goals": {"target_recall": goals.target_recall, "at": goals.at, "seed": goals.seed},
        "recall": {
            name: {
                "at": gallery.queries[name].k,
                "queries": len(gallery.queries[name].vectors),
                "tuned": round(found.recall, 4),
                "confirmed": round(found.confirmed, 4),
                "held_out": round(found.held_out, 4),
            }
            for name, found in tuned.items()
        },
        "tried": [trial.record() for trial in choice.trials],
        "memory": {
            "limit": meter.limit,
            "process": meter.start,
            "predicted": choice.trial.predicted_bytes,
            "peak": meter.peak(),
        },
    }


def write_rows(
    rows: RowWriter,
    folders: Sequence[Embeddings],
    modality: str,
    text: bool,
    first_id: int,
    withdrawn: Withdrawn | None = None,
) -> None:
    """The tables of embeddings as they stand but for withdrawn studies, with ids from `first_id`."""
    for folder in folders:
        for path in folder.paths(modality, "parquet"):
            table = pq.read_table(path)
            table = table.drop_columns([name for name in table.column_names if name == "text" and not text])
            if withdrawn:
                table = table.filter(pa.array(withdrawn.stays(table["study_id"].to_pylist())))
            numbers = np.arange(table.num_rows, dtype=np.int64) + first_id + rows.count
            rows.write(table.add_column(0, "id", pa.array(numbers)))


def strictest(parameters: dict[str, dict[str, int]]) -> Parameters:
    """The most thorough of all directions."""
    found: dict[str, int] = {}
    for given in parameters.values():
        for name, value in given.items():
            found[name] = max(value, found.get(name, 0))
    return Parameters(**found)


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)
