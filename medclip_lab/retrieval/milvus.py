"""The same search beyond one machine: Milvus, embedded in a file (Milvus Lite) or a cluster, by its URI.

A collection is searched exactly (FLAT, inner product); filters become its expressions, of checked columns and escaped
values. Beside each text column that may hold numbers or dates stand those, so that they compare as in a FAISS index.
"""

import json
import operator
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from medclip_lab.errors import UserError
from medclip_lab.progress import track
from medclip_lab.retrieval.build import Folders, open_all
from medclip_lab.retrieval.embeddings import MODALITIES, Embeddings, Floats, Rows
from medclip_lab.retrieval.fields import Field, fields_of_rows
from medclip_lab.retrieval.filters import (
    NAMES,
    ORDER,
    Condition,
    Where,
    kind_of,
    quantities,
    quantity,
    refuse_column,
    refuse_kind,
    refuse_label,
    whole,
)
from medclip_lab.retrieval.gallery import joined
from medclip_lab.retrieval.milvus_client import ask, connect, import_pymilvus, quoted
from medclip_lab.retrieval.parameters import Parameters
from medclip_lab.retrieval.search import Store
from medclip_lab.retrieval.update import PLACES, named_rows, refuse_again

FORMAT = "medclip-lab-milvus/1"
PROPERTY = "medclip_lab"
"""Of a collection: its manifest."""
LIMIT = 16_384
"""Rows that Milvus gives in one answer."""
BATCH = 1000
LONGEST = 65_535
"""Bytes of a text that Milvus holds."""
_SIGNS = {"=": "==", "!=": "!=", "<": "<", "<=": "<=", ">": ">", ">=": ">="}


def build_collection(
    embeddings: Folders, uri: str, collection: str, modality: str = "image", include_text: bool = False
) -> dict[str, Any]:
    """Make a collection of the embeddings of one modality; returns its manifest. It has its name once it is whole.

    Raises:
        UserError: no pymilvus, no server, a collection of this name, no usable embeddings, text asked for and not
            there.
    """
    if modality not in MODALITIES:
        raise UserError(f"index: modality {modality!r} is unknown, one of {', '.join(MODALITIES)} expected")
    folders = open_all(embeddings)
    _refuse_textless(folders, include_text)
    dim = joined(folders, modality).dim
    manifest = {
        "format": FORMAT,
        "modality": modality,
        "bundle": folders[0].manifest["bundle"],
        "text_included": include_text,
        "dim": dim,
        "build": uuid.uuid4().hex,
    }
    client = connect(uri)
    if ask(client.has_collection, collection):
        raise UserError(f"index: Milvus has a collection {collection!r} already: add to it, or choose another name")
    unfinished = f"{collection}_{manifest['build'][:8]}"
    schema, index = _schema(client, _fields(folders[0].table(modality).schema, include_text), manifest)
    try:
        ask(
            client.create_collection,
            unfinished,
            schema=schema,
            index_params=index,
            consistency_level="Strong",
            properties={PROPERTY: json.dumps(manifest)},
        )
        _insert(client, unfinished, folders, modality, include_text, 0)
        ask(client.rename_collection, unfinished, collection)
    finally:
        if ask(client.has_collection, unfinished):
            ask(client.drop_collection, unfinished)
    return MilvusIndex(client, collection).manifest


def open_collection(uri: str, collection: str, bundle_fingerprint: str | None = None) -> "MilvusIndex":
    """Open a collection that `build_collection` made.

    Raises:
        UserError: no pymilvus, no server, no such collection, another bundle.
    """
    if "://" not in uri and not Path(uri).exists():
        raise UserError(f"index: no such file of Milvus Lite: {uri}")
    client = connect(uri)
    if not ask(client.has_collection, collection):
        raise UserError(f"index: Milvus has no collection {collection!r}")
    index = MilvusIndex(client, collection)
    built = index.manifest["bundle"]
    if bundle_fingerprint is not None and built != bundle_fingerprint:
        raise UserError(
            f"index: {collection} was built with bundle {built[:12]}, not with {bundle_fingerprint[:12]}: embed and "
            "index again with this bundle"
        )
    return index


class MilvusIndex(Store):
    """An opened collection. `open_collection` makes one."""

    def __init__(self, client: Any, collection: str) -> None:
        self.client, self.collection = client, collection
        described = ask(client.describe_collection, collection)
        try:
            self.manifest: dict[str, Any] = json.loads(described["properties"][PROPERTY])
        except (ValueError, KeyError, TypeError):
            raise UserError(f"index: the collection {collection!r} was not made by medclip-lab index") from None
        if self.manifest.get("format") != FORMAT:
            raise UserError(f"index: the collection {collection!r} has another format than {FORMAT!r}: index again")
        self.dim = int(self.manifest["dim"])
        import_pymilvus()
        from pymilvus import DataType

        self._kinds = {field["name"]: field["type"] for field in described["fields"]}
        self._text = {name for name, kind in self._kinds.items() if kind == DataType.VARCHAR}
        self.columns = [name for name in self._kinds if name != "vector" and not name.endswith(("__number", "__date"))]
        ask(client.load_collection, collection)
        self.manifest |= {"size": len(self)}

    def __len__(self) -> int:
        return int(self._query("", ["count(*)"])[0]["count(*)"])

    def fingerprint(self) -> str:
        """As `Store.fingerprint`: which build, and how much was added."""
        return f"{self.manifest['build']}-{len(self)}"

    def near(
        self, vectors: Floats, k: int, where: Where, direction: str | None, parameters: Parameters | None
    ) -> tuple[list[list[float]], list[list[int]]]:
        """As `Store.near`.

        Raises:
            UserError: more answers than Milvus gives at once, or parameters: an exact search has none.
        """
        if parameters is not None and parameters.given():
            raise UserError(f"search: {self.collection} is searched exactly, it takes no parameters")
        del direction  # exact: all are as thorough
        k = min(k, len(self))
        if k > LIMIT:
            raise UserError(f"search: Milvus gives {LIMIT} answers at most, {k} were asked for")
        if not k:
            return [[] for _ in vectors], [[] for _ in vectors]
        condition = self.expression(where)
        scores: list[list[float]] = []
        ids: list[list[int]] = []
        for start in range(0, len(vectors), 64):
            found = ask(
                self.client.search,
                self.collection,
                vectors[start : start + 64].tolist(),
                filter=condition,
                limit=k,
                output_fields=["id"],
            )
            scores += [[float(hit["distance"]) for hit in hits] for hits in found]
            ids += [[int(hit["id"]) for hit in hits] for hits in found]
        return scores, ids

    def ids(self, where: Where) -> Rows:
        """As `Store.ids`."""
        rows = self._all(self.expression(where), ["id"])
        return np.array(sorted(int(row["id"]) for row in rows), np.int64)

    def _all(self, condition: str, fields: list[str]) -> Iterator[dict[str, Any]]:
        """However many rows there are."""
        pages = ask(
            self.client.query_iterator,
            self.collection,
            batch_size=LIMIT,
            filter=condition or "id >= 0",
            output_fields=fields,
        )
        while page := ask(pages.next):
            yield from page
        pages.close()

    def _refuse_known(self, folders: Sequence[Embeddings]) -> None:
        modality = self.manifest["modality"]
        new, place = named_rows(folders, modality), PLACES[modality]
        studies, known = sorted({study for study, _ in new}), set()
        for start in range(0, len(studies), BATCH):
            condition = f"study_id in [{', '.join(quoted(study) for study in studies[start : start + BATCH])}]"
            known |= {(row["study_id"], row.get(place)) for row in self._all(condition, ["study_id", place])}
        refuse_again(new, known, self.collection)

    def vectors(self, ids: Sequence[int]) -> Floats:
        """As `Store.vectors`."""
        return np.array([row["vector"] for row in self._get(ids, ["vector"])], np.float32).reshape(-1, self.dim)

    def rows(self, ids: Sequence[int], text: bool = False) -> list[dict[str, Any]]:
        """As `Store.rows`."""
        found = self._get(ids, [name for name in self.columns if text or name != "text"])
        return [{name: row.get(name) for name in row} | {"labels": dict(row.get("labels") or {})} for row in found]

    def fields(self) -> list[Field]:
        """As `Store.fields`, by the first rows: Milvus cannot say what values a column has."""
        return fields_of_rows(self._query("id >= 0", [name for name in self.columns if name != "text"], BATCH))

    def add(self, embeddings: Folders) -> dict[str, Any]:
        """Add embeddings; what was added goes again if it does not end. Ids go on after the largest.

        Raises:
            UserError: another bundle or width, rows that are there already, text that is there and not here.
        """
        folders = open_all(embeddings)
        if folders[0].manifest["bundle"] != self.manifest["bundle"]:
            raise UserError(f"index: {self.collection} was built with another bundle than the embeddings: embed again")
        text, modality = self.manifest["text_included"], self.manifest["modality"]
        _refuse_textless(folders, text)
        if joined(folders, modality).dim != self.dim:
            raise UserError(f"index: {self.collection} has {self.dim} dimensions, the embeddings have others")
        self._refuse_known(folders)
        first = int(self.ids(()).max(initial=-1)) + 1
        done = False
        try:
            _insert(self.client, self.collection, folders, modality, text, first)
            done = True
        finally:
            if not done:
                ask(self.client.delete, self.collection, filter=f"id >= {first}")
        self.manifest |= {"size": len(self)}
        return self.manifest

    def expression(self, where: Where) -> str:
        """Conditions in Milvus's language.

        Raises:
            UserError: no such column or label, or a value that its column cannot have.
        """
        return " and ".join(self._expression(condition) for condition in where)

    def _expression(self, condition: Condition) -> str:
        if condition.label is not None:
            return self._label(condition)
        name = condition.column
        if name not in self.columns or name == "labels":
            raise refuse_column(condition, [column for column in self.columns if column != "labels"])
        sign = _SIGNS.get(condition.operator)
        if name in self._text:
            if condition.operator in ORDER:
                kind, value = kind_of(condition)
                if name in NAMES or not self._query(f"{name}__{kind} is not null", ["id"], 1):
                    raise refuse_kind(condition, kind)
                return f"{name}__{kind} {sign} {value!r}"
            values = [quoted(value) for value in condition.values]
            if name not in NAMES:
                return _alike(name, values, condition)
        else:
            values = [str(whole(condition, value)) for value in condition.values]
        if sign is None:
            return f"{name} in [{', '.join(values)}]"
        return f"({name} is not null and {name} {sign} {values[0]})"

    def _label(self, condition: Condition) -> str:
        """A label is one of three values: those that meet the condition are asked for."""
        values = [whole(condition, value) for value in condition.values]
        table = {"=": operator.eq, "!=": operator.ne, **ORDER}
        compare = table.get(condition.operator, operator.eq)
        name = quoted(str(condition.label))
        if not self._query(_any(name, (-1, 0, 1)), ["id"], 1):
            raise refuse_label(condition, None)
        return _any(name, [has for has in (-1, 0, 1) if any(compare(has, value) for value in values)])

    def _query(self, condition: str, fields: list[str], limit: int | None = None) -> list[dict[str, Any]]:
        options = {} if limit is None else {"limit": limit}
        found = ask(self.client.query, self.collection, filter=condition, output_fields=fields, **options)
        return [dict(row) for row in found]

    def _get(self, ids: Sequence[int], fields: list[str]) -> list[dict[str, Any]]:
        numbers = [int(number) for number in ids]
        found: dict[int, dict[str, Any]] = {}
        for start in range(0, len(numbers), BATCH):
            rows = ask(self.client.get, self.collection, numbers[start : start + BATCH], output_fields=fields)
            found |= {int(row["id"]): dict(row) for row in rows}
        missing = [number for number in numbers if number not in found]
        if missing:
            raise UserError(f"index: {self.collection} holds no id {missing[0]}")
        return [found[number] for number in numbers]


def _alike(name: str, values: Sequence[str], condition: Condition) -> str:
    """As in `filters`: one of the texts, or the same number or date written otherwise."""
    derived = [(f"{name}__{kind}", value) for kind, value in sorted(quantities(condition))]
    texts = f"[{', '.join(values)}]"
    if condition.operator == "!=":
        others = [f"({column} is null or {column} != {value!r})" for column, value in derived]
        return " and ".join([f"({name} is not null", f"{name} not in {texts}", *others]) + ")"
    same = [f"({column} is not null and {column} == {value!r})" for column, value in derived]
    return f"({' or '.join([f'{name} in {texts}', *same])})"


def _any(label: str, values: Sequence[int]) -> str:
    return "(" + (" or ".join(f"labels[{label}] == {value}" for value in values) or "id < 0") + ")"


def _refuse_textless(folders: Sequence[Embeddings], include_text: bool) -> None:
    if include_text and not all(folder.manifest["include_text"] for folder in folders):
        raise UserError("index: the embeddings hold no report text: embed again with --include-text")


def _fields(schema: pa.Schema, include_text: bool) -> list[tuple[str, str]]:
    """(name, "text", "number" or "json") of what is kept of a table."""
    kept = [field for field in schema if field.name != "text" or include_text]
    kinds = []
    for field in kept:
        kind = "text" if pa.types.is_string(field.type) else "number" if pa.types.is_integer(field.type) else "json"
        kinds.append((field.name, kind))
    return kinds


def _schema(client: Any, fields: list[tuple[str, str]], manifest: dict[str, Any]) -> tuple[Any, Any]:
    DataType = import_pymilvus().DataType
    schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
    schema.add_field("id", DataType.INT64, is_primary=True)
    schema.add_field("vector", DataType.FLOAT_VECTOR, dim=manifest["dim"])
    for name, kind in fields:
        if kind == "text":
            schema.add_field(name, DataType.VARCHAR, max_length=LONGEST, nullable=True)
            for derived in () if name in NAMES else ("number", "date"):
                schema.add_field(f"{name}__{derived}", DataType.DOUBLE, nullable=True)
        else:
            schema.add_field(name, DataType.INT64 if kind == "number" else DataType.JSON, nullable=True)
    index = client.prepare_index_params()
    index.add_index("vector", index_type="FLAT", metric_type="IP")
    return schema, index


def _insert(client: Any, collection: str, folders: Sequence[Embeddings], modality: str, text: bool, first: int) -> None:
    vectors = joined(folders, modality)
    fields = _fields(folders[0].table(modality).schema, text)
    rows = _rows(folders, modality)
    total = len(vectors)
    blocks = (
        (start, block[at : at + BATCH], at) for start, block in vectors.blocks() for at in range(0, len(block), BATCH)
    )
    for start, block, at in track(blocks, "insert", total=total, weight=lambda given: len(given[1])):
        batch = []
        for number, vector in enumerate(block.tolist(), first + start + at):
            batch.append({"id": number, "vector": vector, **_kept(next(rows), fields)})
        ask(client.insert, collection, batch)


def _rows(folders: Sequence[Embeddings], modality: str) -> Iterator[dict[str, Any]]:
    for folder in folders:
        for batch in folder.table(modality).to_batches(max_chunksize=BATCH):
            yield from batch.to_pylist()


def _kept(row: dict[str, Any], fields: list[tuple[str, str]]) -> dict[str, Any]:
    """
    Raises:
        UserError: a text that is longer than Milvus holds.
    """
    kept: dict[str, Any] = {}
    for name, kind in fields:
        value = row[name]
        kept[name] = dict(value or ()) if kind == "json" else value
        if kind != "text":
            continue
        if value is not None and len(value.encode()) > LONGEST:
            raise UserError(f"index: a row's {name} is longer than the {LONGEST} bytes that Milvus holds")
        found = None if value is None or name in NAMES else quantity(value)
        if name not in NAMES:
            kept |= {f"{name}__number": None, f"{name}__date": None}
        if found is not None:
            kept[f"{name}__{found[0]}"] = found[1]
    return kept
