"""A FAISS index over embeddings, the table of what its ids mean, and its measured recall."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from medclip_lab.errors import UserError
from medclip_lab.files import atomic_folder, existing_folder, read_json, refuse_to_replace, sha256, write_json
from medclip_lab.retrieval.embed import MODALITIES, read_embeddings

FORMAT = "medclip-lab-index/1"
INDEX, IDS, MANIFEST = "index.faiss", "ids.parquet", "manifest.json"
RECALL_QUERIES = 500


def import_faiss() -> Any:
    """The faiss module.

    Raises:
        UserError: it is not installed.
    """
    try:
        import faiss
    except ImportError:
        raise UserError("faiss is not installed: pip install 'medclip_lab[cpu]', or [gpu] for CUDA 13") from None
    return faiss


@dataclass(frozen=True)
class Hit:
    """One answer of a search."""

    rank: int
    score: float
    """Cosine similarity."""
    id: int
    study_id: str
    row: dict[str, Any]
    """Everything the table knows of it; report text only if the index holds it."""


class Index:
    """An opened index folder. `open_index` makes one."""

    def __init__(self, folder: Path, index: Any, ids: pa.Table, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest
        self._index = index
        self._ids = ids

    def __len__(self) -> int:
        return int(self._index.ntotal)

    def search(self, queries: NDArray[np.float32], k: int = 10) -> list[list[Hit]]:
        """The k nearest of each query by cosine, best first; fewer if the index holds fewer.

        Args:
            queries: [Q, D] or [D], unit norm, of the bundle the index was built with.

        Raises:
            UserError: wrong width, vectors not finite or not unit norm, k below 1.
        """
        vectors = np.ascontiguousarray(np.atleast_2d(queries), dtype=np.float32)
        if vectors.shape[1] != self._index.d:
            raise UserError(f"search: queries have {vectors.shape[1]} dimensions, the index has {self._index.d}")
        if k < 1:
            raise UserError(f"search: k must be at least 1, got {k}")
        norms = np.linalg.norm(vectors, axis=1)
        if not np.isfinite(norms).all() or (len(norms) and np.abs(norms - 1).max() > 1e-3):
            raise UserError("search: queries must be finite vectors of norm 1")
        scores, ids = self._index.search(vectors, min(k, len(self)))
        return [
            [self._hit(rank, float(s), int(i)) for rank, (s, i) in enumerate(zip(*row, strict=True), 1) if i >= 0]
            for row in zip(scores, ids, strict=True)
        ]

    def _hit(self, rank: int, score: float, identifier: int) -> Hit:
        row = self._ids.slice(identifier, 1).to_pylist()[0]
        return Hit(rank, score, identifier, row["study_id"], row)


def build_index(
    embeddings: str | Path, out: str | Path, modality: str = "image", include_text: bool = False
) -> dict[str, Any]:
    """Build an exact index over one modality of an embeddings folder; returns its manifest.

    Recall is measured in both query directions against a plain matrix product, with the folder's own vectors of
    either modality as queries.

    Args:
        include_text: keep report text in the table; the embeddings must hold it.

    Raises:
        UserError: no usable embeddings, no faiss, text asked for and not there, `out` holds something else.
    """
    faiss = import_faiss()
    if modality not in MODALITIES:
        raise UserError(f"index: modality {modality!r} is unknown, one of {', '.join(MODALITIES)} expected")
    out = Path(out).expanduser()
    refuse_to_replace(out, MANIFEST, (FORMAT,), "index")
    gallery, table, facts = read_embeddings(embeddings, modality)
    if include_text and "text" not in table.column_names:
        raise UserError("index: the embeddings hold no report text: embed again with --include-text")
    if not include_text and "text" in table.column_names:
        table = table.drop_columns(["text"])
    table = table.add_column(0, "id", pa.array(range(len(gallery)), pa.int64()))

    index = faiss.IndexIDMap2(faiss.IndexFlatIP(gallery.shape[1]))
    index.add_with_ids(gallery, np.arange(len(gallery), dtype=np.int64))
    recall = {}
    for direction in MODALITIES:
        try:
            queries = read_embeddings(embeddings, direction)[0]
        except UserError:
            continue  # a corpus of one modality has one direction
        recall[direction] = measure_recall(index, queries, gallery)
    with atomic_folder(out) as folder:
        faiss.write_index(index, str(folder / INDEX))
        pq.write_table(table, folder / IDS)
        manifest = {
            "format": FORMAT,
            "modality": modality,
            "bundle": facts["bundle"],
            "size": len(gallery),
            "dim": int(gallery.shape[1]),
            "factory": "IDMap2,Flat",
            "metric": "inner product of unit vectors",
            "faiss": faiss.__version__,
            "text_included": include_text,
            "recall_at_10": recall,
            "sha256": {name: sha256(folder / name) for name in (INDEX, IDS)},
        }
        write_json(folder / MANIFEST, manifest)
    return manifest


def measure_recall(index: Any, queries: NDArray[np.float32], gallery: NDArray[np.float32], k: int = 10) -> float:
    """Share of the k truly nearest that the index returns, over evenly spaced queries."""
    chosen = queries[:: max(1, len(queries) // RECALL_QUERIES)][:RECALL_QUERIES]
    k = min(k, len(gallery))
    scores = chosen @ gallery.T
    # Vectors that tie with the k-th are as right as it is: identical reports have identical embeddings.
    threshold = np.partition(scores, -k, axis=1)[:, -k] - 1e-6
    found = index.search(np.ascontiguousarray(chosen), k)[1]
    return float((np.take_along_axis(scores, found, axis=1) >= threshold[:, None]).mean())


def open_index(folder: str | os.PathLike[str], bundle_fingerprint: str | None = None) -> Index:
    """Open an index folder after checking its hashes.

    Args:
        bundle_fingerprint: of the encoder that will ask; embeddings of another model do not compare.

    Raises:
        UserError: no index, files changed, a newer faiss wrote it, or another bundle built it.
    """
    path = existing_folder(folder, "index")
    manifest = read_json(path / MANIFEST, "index")
    if manifest.get("format") != FORMAT:
        raise UserError(f"index: {path / MANIFEST} has format {manifest.get('format')!r}, not {FORMAT!r}")
    if bundle_fingerprint is not None and manifest["bundle"] != bundle_fingerprint:
        raise UserError(
            f"index: {path} was built with bundle {manifest['bundle'][:12]}, not with {bundle_fingerprint[:12]}: "
            "embed and index again with this bundle"
        )
    for name, expected in manifest["sha256"].items():
        file = path / name
        if not file.is_file() or sha256(file) != expected:
            raise UserError(f"index: {file} is missing or was changed since it was built: index again")
    faiss = import_faiss()
    try:
        index = faiss.read_index(str(path / INDEX))
    except RuntimeError:
        raise UserError(
            f"index: faiss {faiss.__version__} cannot read {path / INDEX}, written by faiss {manifest['faiss']}"
        ) from None
    return Index(path, index, pq.read_table(path / IDS), manifest)
