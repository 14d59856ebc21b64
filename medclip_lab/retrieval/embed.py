"""Shards to embeddings: one file a shard and modality, with the ids in the same order beside them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from medclip_lab import progress
from medclip_lab.data.decode import DecodeError, decode_image
from medclip_lab.data.manifest import Manifest, Shard, check_names
from medclip_lab.data.quarantine import Quarantine
from medclip_lab.data.reader import read_shard
from medclip_lab.errors import UserError
from medclip_lab.files import atomic_file, read_json, sha256, write_json
from medclip_lab.inference.encoder import Encoder

FORMAT = "medclip-lab-embeddings/1"
MANIFEST = "manifest.json"
MODALITIES = ("image", "text")
COLUMNS = ("study_id", "patient_id", "split", "image", "view")


def embed(
    encoder: Encoder,
    shards: str | Path,
    out: str | Path,
    split: str | None = None,
    include_text: bool = False,
    max_bad: float = 0.01,
) -> dict[str, Any]:
    """Embed every image and every report of the shards; returns the manifest.

    For each shard `NAME.image.npy` and `NAME.text.npy` (float32 [N, D], unit norm) with `NAME.image.parquet` and
    `NAME.text.parquet`. Finished shards of an earlier, interrupted call with the same bundle are kept.

    Args:
        split: one split only; None takes all.
        include_text: put the report text into the table. Embeddings and text are as private as the reports.

    Raises:
        UserError: `out` holds embeddings of another bundle or of other shards; two shards have one name.
    """
    manifest, out = Manifest.load(shards), Path(out).expanduser()
    wanted = manifest.shards if split is None else manifest.of_split(split)
    check_names(wanted)
    facts = {
        "format": FORMAT,
        "bundle": encoder.fingerprint,
        "source": {shard.name: shard.sha256 for shard in wanted},
        "text_included": include_text,
    }
    if (out / MANIFEST).exists():
        recorded = read_json(out / MANIFEST, "embeddings")
        if any(recorded.get(name) != value for name, value in facts.items()):
            raise UserError(f"out: {out} holds embeddings of another bundle or other shards: choose another folder")
    else:
        write_json(out / MANIFEST, facts | {"files": {}})
    quarantine = Quarantine(sum(shard.samples for shard in wanted), max_bad, out / "quarantine.jsonl")
    files: dict[str, dict[str, Any]] = read_json(out / MANIFEST, "embeddings")["files"]
    for shard in progress.track(wanted, "embed shards", len(wanted)):
        if Path(shard.name).stem not in files:
            files[Path(shard.name).stem] = _embed_shard(encoder, shard, out, include_text, quarantine)
            write_json(out / MANIFEST, facts | {"files": files})
    return facts | {"files": files}


def _embed_shard(
    encoder: Encoder, shard: Shard, out: Path, include_text: bool, quarantine: Quarantine
) -> dict[str, Any]:
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in MODALITIES}
    texts: list[str] = []

    def images() -> Iterator[Image.Image]:  # one at a time: a shard of decoded films may not fit in memory
        for study in read_shard(shard, quarantine):
            record = study.record
            text, views = record.get("text") or "", record.get("view") or []
            row = {name: record.get(name) for name in ("study_id", "patient_id", "split")} | {
                "image": None,
                "view": None,
            }
            if include_text:
                row["text"] = text
            for number, (suffix, data) in enumerate(study.images):
                try:
                    image = encoder.preprocess.window(decode_image(data, suffix))
                except DecodeError as error:
                    quarantine.add(shard.name, study.key, "unreadable image", str(error))
                    continue
                view = views[number] if number < len(views) else None
                rows["image"].append(row | {"image": number, "view": view})
                yield image
            if text:
                texts.append(text)
                rows["text"].append(row)

    features = {"image": encoder.encode_images(images())}
    features["text"] = encoder.encode_texts(texts)
    columns = (*COLUMNS, "text") if include_text else COLUMNS
    types = {"image": pa.int32()}
    schema = pa.schema([(name, types.get(name, pa.string())) for name in columns])
    files: dict[str, Any] = {}
    for modality in MODALITIES:
        stem = f"{Path(shard.name).stem}.{modality}"
        with atomic_file(out / f"{stem}.npy") as temporary, temporary.open("wb") as file:
            np.save(file, features[modality])
        with atomic_file(out / f"{stem}.parquet") as temporary:
            pq.write_table(pa.Table.from_pylist(rows[modality], schema), temporary)
        files[modality] = {
            "rows": len(rows[modality]),
            "sha256": {suffix: sha256(out / f"{stem}.{suffix}") for suffix in ("npy", "parquet")},
        }
    return files


def read_embeddings(folder: str | Path, modality: str) -> tuple[np.ndarray[Any, Any], pa.Table, dict[str, Any]]:
    """(float32 [N, D], table of N rows, manifest) of one modality, shards in order.

    Raises:
        UserError: no embeddings, an unfinished folder, a file changed since, or vectors that are not unit norm.
    """
    folder = Path(folder).expanduser()
    manifest = read_json(folder / MANIFEST, "embeddings")
    if manifest.get("format") != FORMAT:
        raise UserError(f"embeddings: {folder} has format {manifest.get('format')!r}, not {FORMAT!r}")
    missing = sorted({Path(name).stem for name in manifest["source"]} - set(manifest["files"]))
    if missing:
        raise UserError(f"embeddings: {folder} is not finished ({missing[0]} is missing): call embed again to go on")
    vectors, tables = [], []
    for stem, facts in sorted(manifest["files"].items()):
        for suffix, expected in facts[modality]["sha256"].items():
            file = folder / f"{stem}.{modality}.{suffix}"
            if not file.exists() or sha256(file) != expected:
                raise UserError(f"embeddings: {file} is missing or was changed since it was written: embed again")
        if facts[modality]["rows"]:
            vectors.append(np.load(folder / f"{stem}.{modality}.npy", allow_pickle=False))
            tables.append(pq.read_table(folder / f"{stem}.{modality}.parquet"))
    if not vectors:
        raise UserError(f"embeddings: {folder} has no {modality} embeddings")
    features = np.concatenate(vectors)
    norms = np.linalg.norm(features, axis=1)
    if not np.isfinite(norms).all() or np.abs(norms - 1).max() > 1e-3:
        raise UserError(f"embeddings: {folder} has {modality} vectors that are not finite with norm 1: embed again")
    return features, pa.concat_tables(tables), manifest
