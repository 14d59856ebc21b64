"""Additions to an index and removals from it; a change is seen as a whole or not at all."""

import os
from collections.abc import Callable, Collection, Iterator, Sequence, Set
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from medclip_lab.errors import UserError
from medclip_lab.retrieval.build import Folders, open_all, write_rows
from medclip_lab.retrieval.embeddings import Embeddings, Rows, Vectors
from medclip_lab.retrieval.families import import_faiss
from medclip_lab.retrieval.gallery import Groups, joined
from medclip_lab.retrieval.on_disk import Lists, workshop
from medclip_lab.retrieval.store import Opened, RowWriter, changing, commit, save_array, save_index
from medclip_lab.retrieval.withdrawn import Withdrawn

REBUILD = 0.2
"""Share of an index that may change before its measured recall says too little of it."""

PLACES = {"image": "image", "text": "part"}
"""The column that tells a study's rows apart."""


def add_to_index(index: str | Path, embeddings: Folders) -> dict[str, Any]:
    """Add embeddings to an index; returns the new manifest. Ids go on where they ended, and are never used again.

    Copies among them keep vectors of their own until the index is built anew.

    Raises:
        UserError: another bundle or width, rows that are there already, text that is there and not here.
    """
    folder, folders = Path(index).expanduser(), open_all(embeddings)
    with ExitStack() as stack:
        stack.enter_context(changing(_there(folder)))
        opened = Opened(folder, folders[0].manifest["bundle"])
        manifest = opened.manifest
        modality, text = manifest["modality"], manifest["text_included"]
        vectors = joined(folders, modality)
        if vectors.dim != opened.index.d:
            raise UserError(f"index: the embeddings have {vectors.dim} dimensions, {folder} has {opened.index.d}")
        if text and not all(given.manifest["include_text"] for given in folders):
            raise UserError(f"index: {folder} holds report text, the embeddings do not: embed with --include-text")
        _refuse_known(opened, folders)
        save = stack.enter_context(_grown(opened, vectors))

        def write(staging: Path) -> dict[str, Path]:
            with RowWriter(staging / "rows.arrow") as rows:
                rows.write(opened.rows)
                write_rows(rows, folders, modality, text, manifest["next_id"] - opened.rows.num_rows)
            more = Groups.each_alone(np.arange(opened.rows.num_rows, rows.count))
            starts = np.concatenate([opened.starts, more.starts[1:] + opened.starts[-1]])
            return {
                **save(staging),
                "rows": rows.path,
                "starts": save_array(staging / "starts.npy", starts),
                "members": save_array(staging / "members.npy", np.concatenate([opened.members, more.members])),
            }

        facts = _changed(manifest, added=len(vectors))
        facts |= {"vectors": opened.index.ntotal + len(vectors), "next_id": manifest["next_id"] + len(vectors)}
        back = {study for given in folders for study in given.table(modality)["study_id"].to_pylist()}
        gone = _gone(opened.rows, opened.removed)
        facts["withdrawn"] = Withdrawn(manifest).and_also(gone).without(back).record()
        return commit(folder, write, facts, [role for role in manifest["files"] if role == "removed"])


@contextmanager
def _grown(opened: Opened, vectors: Vectors) -> Iterator[Callable[[Path], dict[str, Path]]]:
    """The index with more vectors: what writes it into a folder and tells the files of its roles."""
    # Codes and lists that lie on the disk cannot grow there.
    index = import_faiss().read_index(str(opened.path("vectors")))
    if "lists" not in opened.manifest["files"]:
        for _, block in vectors.blocks():
            index.add(block)
        yield lambda folder: {"vectors": save_index(folder / "vectors.faiss", index)}
        return
    with workshop(opened.folder) as shop:
        shop.start(index, os.cpu_count() or 1)
        shop.add(vectors, opened.index.ntotal)
        lists = shop.merge(Lists(*(opened.path(role) for role in ("vectors", "lists", "lengths"))))
        yield lambda _: lists.roles()


def remove_from_index(index: str | Path, study_ids: Collection[str]) -> dict[str, Any]:
    """Answer no longer with any row of some studies; returns the new manifest.

    What the files hold of them goes when the index is built anew in its folder, from which they then stay away, until
    they are added again.

    Raises:
        UserError: a study that the index does not hold.
    """
    folder = Path(index).expanduser()
    with changing(_there(folder)):
        opened = Opened(folder)
        ids = opened.rows["id"].to_numpy()
        studies = np.array(opened.rows["study_id"].to_pylist())
        gone = ids[np.isin(studies, list(study_ids)) & ~np.isin(ids, opened.removed)]
        unknown = set(study_ids) - set(studies[np.isin(ids, gone)])
        if unknown:
            raise UserError(
                f"index: {len(unknown)} of {len(study_ids)} studies to remove are not in {folder}: none was"
            )
        removed = np.sort(np.concatenate([opened.removed, gone]))

        def write(staging: Path) -> dict[str, Path]:
            return {"removed": save_array(staging / "removed.npy", removed)}

        facts = _changed(opened.manifest, removed=len(gone))
        facts["withdrawn"] = Withdrawn(opened.manifest).and_also(_gone(opened.rows, removed)).record()
        keep = [role for role in opened.manifest["files"] if role != "removed"]
        return commit(folder, write, facts, keep)


def _there(folder: Path) -> Path:
    if not folder.is_dir():
        raise UserError(f"index: no such folder: {folder}")
    return folder


def _gone(rows: pa.Table, removed: Rows) -> set[str]:
    """Studies whose rows are all removed."""
    dead = np.isin(rows["id"].to_numpy(), removed)
    studies = np.array(rows["study_id"].to_pylist())
    return set(studies[dead].tolist()) - set(studies[~dead].tolist())


def _refuse_known(opened: Opened, folders: Sequence[Embeddings]) -> None:
    modality = opened.manifest["modality"]
    dead = np.isin(opened.rows["id"].to_numpy(), opened.removed)
    there = zip(opened.rows["study_id"].to_pylist(), opened.rows[PLACES[modality]].to_pylist(), dead, strict=True)
    known = {(study, part) for study, part, is_dead in there if not is_dead}
    refuse_again(named_rows(folders, modality), known, opened.folder)


def named_rows(folders: Sequence[Embeddings], modality: str) -> list[tuple[str, Any]]:
    """(study, which image or part of it) of each row."""
    columns = ("study_id", PLACES[modality])
    batches = [batch for given in folders for batch in given.table(modality).to_batches()]
    return [key for batch in batches for key in zip(*(batch[name].to_pylist() for name in columns), strict=True)]


def refuse_again(new: Sequence[tuple[str, Any]], known: Set[tuple[str, Any]], where: object) -> None:
    """A row that is there already would be found twice.

    Raises:
        UserError: there are such rows.
    """
    again = len(new) - len(set(new) - known)
    if again:
        raise UserError(
            f"index: {again} of {len(new)} rows to add are in {where} already, or twice among the new: remove their "
            "studies first"
        )


def _changed(manifest: dict[str, Any], added: int = 0, removed: int = 0) -> dict[str, Any]:
    """The facts of a manifest after a change. `rebuild` says that the measured recall is that of another index."""
    facts = {name: value for name, value in manifest.items() if name not in ("format", "files")}
    before = manifest["changed"]
    changed = {"added": before["added"] + added, "removed": before["removed"] + removed}
    built = manifest["size"] - before["added"] + before["removed"]
    facts |= {"changed": changed, "size": manifest["size"] + added - removed}
    return facts | {"rebuild": changed["added"] + changed["removed"] > REBUILD * built}
