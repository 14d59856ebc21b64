"""What conditions an index can be asked with: its columns and labels, and the values they have where they are few."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from medclip_lab.retrieval.filters import LABELS, NAMES, quantity

Kind = Literal["text", "number", "date", "label"]
FEW = 24
"""Values of text that are listed."""
UNLISTED = ("id", "text_key")
"""Columns that nobody asks with by hand."""


@dataclass(frozen=True)
class Field:
    """A column of an index, or a label, as a condition names it."""

    name: str
    """Such as "view" or "labels.Edema"."""
    kind: Kind
    values: tuple[str, ...] | None = None
    """All values of text, if they are few and name nobody."""
    lowest: str | None = None
    highest: str | None = None
    """The range of numbers and dates."""


def fields_of(table: pa.Table) -> list[Field]:
    """Of a table of rows. A column without a value is left out: no row would meet a condition on it."""
    found: list[Field] = []
    for name in table.column_names:
        column = table[name]
        if name == "labels":
            names = {label for chunk in column.chunks for label in pc.unique(chunk.keys).to_pylist()}
            found += [Field(f"{LABELS}{label}", "label") for label in sorted(names)]
        elif name not in UNLISTED and not pa.types.is_nested(column.type) and column.null_count < len(column):
            # Ids and reports may be as many as rows, and are not listed anyway.
            found.append(Field(name, "text") if name in NAMES else field_of(name, pc.unique(column).to_pylist()))
    return found


def fields_of_rows(rows: Sequence[dict[str, Any]]) -> list[Field]:
    """Of some of the rows there are: kinds and labels as they are in these, without values or ranges."""
    names = dict.fromkeys(name for row in rows for name in row)
    found: list[Field] = []
    for name in names:
        values = [row[name] for row in rows if row.get(name) is not None]
        if name == "labels":
            labels = sorted({label for value in values for label in value})
            found += [Field(f"{LABELS}{label}", "label") for label in labels]
        elif name not in UNLISTED and values:
            found.append(Field(name, "text" if name in NAMES else field_of(name, values).kind))
    return found


def field_of(name: str, values: Iterable[Any]) -> Field:
    """Of a column's distinct values: numbers or dates if all are."""
    texts = sorted(str(value) for value in values if value is not None)
    read = {text: quantity(text) for text in texts}
    kinds = {found[0] if found else "text" for found in read.values()}
    kind = kinds.pop() if len(kinds) == 1 else "text"
    if kind == "text":
        return Field(name, "text", tuple(texts) if len(texts) <= FEW else None)
    ordered = sorted(texts, key=lambda text: read[text][1])  # type: ignore[index]
    return Field(name, "date" if kind == "date" else "number", None, ordered[0], ordered[-1])


def shared(several: Sequence[Sequence[Field]]) -> list[Field]:
    """What conditions all of several indexes take, with the values of any."""
    if len(several) == 1:
        return list(several[0])
    others = [{field.name: field for field in fields} for fields in several[1:]]
    found = []
    for field in several[0]:
        alike = [field, *(fields[field.name] for fields in others if field.name in fields)]
        if len(alike) < len(several):
            continue
        if len({one.kind for one in alike}) > 1:
            found.append(Field(field.name, "text"))
        elif field.kind == "text" and all(one.values is not None for one in alike):
            values = sorted({value for one in alike for value in one.values or ()})
            found.append(Field(field.name, "text", tuple(values)))
        else:
            found.append(Field(field.name, field.kind))
    return found
