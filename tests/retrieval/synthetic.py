"""Folders of embeddings drawn at random, as `embed` would have written them."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from medclip_lab.files import write_json
from medclip_lab.retrieval.embeddings import FORMAT, MANIFEST, STATUS_SCHEMA, table_schema, write_part
from medclip_lab.retrieval.parts import text_key

BUNDLE = "b" * 64
LABELS = ("Edema", "Pneumonia", "Pleural Effusion")


def unit(vectors: NDArray[Any]) -> NDArray[np.float32]:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


def row(number: int, rng: np.random.Generator) -> dict[str, Any]:
    """A study; some facts are missing, as they are in life."""
    date = f"20{10 + number % 10:02d}-0{1 + number % 9}-15"
    return {
        "study_id": f"s{number}",
        "patient_id": f"p{number // 3}" if number % 11 else None,
        "split": "test",
        "sex": [None, "F", "M"][number % 3],
        "age": {0: None, 1: "unknown"}.get(number % 8, str(20 + number % 70)),
        "study_date": date if number % 2 else date.replace("-", ""),
        "labels": [(name, int(rng.integers(-1, 2))) for name in LABELS if rng.random() < 0.9],
    }


def draw(
    folder: Path,
    studies: int = 300,
    dim: int = 16,
    seed: int = 0,
    vectors: NDArray[np.float32] | None = None,
    texts: list[str] | None = None,
    rows: list[dict[str, Any]] | None = None,
    name: str = "test-00000",
    gap: float = 0.0,
) -> Path:
    """Image and text embeddings of studies, one of each; returns the folder."""
    rng = np.random.default_rng(seed)
    rows = rows or [row(number, rng) for number in range(studies)]
    images = unit(rng.normal(size=(len(rows), dim))) if vectors is None else vectors
    shift = np.zeros(dim)
    shift[0] = gap
    written = unit(images + 0.5 * rng.normal(size=images.shape) + shift)
    texts = texts or [f"Report {number}." for number in range(len(rows))]
    views = ["PA", "AP", "LATERAL"]
    image_rows = [
        {**facts, "image": 0, "view": views[place % 3], "text": text}
        for place, (facts, text) in enumerate(zip(rows, texts, strict=True))
    ]
    text_rows = [
        {**facts, "part": None, "text_key": text_key(text), "text": text}
        for facts, text in zip(rows, texts, strict=True)
    ]
    (folder / name).mkdir(parents=True)
    write_part(
        folder / name,
        {"image": images, "text": written},
        {
            "image": pa.Table.from_pylist(image_rows, table_schema("image", True)),
            "text": pa.Table.from_pylist(text_rows, table_schema("text", True)),
        },
        STATUS_SCHEMA.empty_table(),
    )
    manifest = {"format": FORMAT, "bundle": BUNDLE, "include_text": True, "source": {f"{name}.tar": ""}}
    write_json(folder / MANIFEST, manifest)
    return folder
