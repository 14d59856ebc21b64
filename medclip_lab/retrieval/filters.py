"""Conditions on the rows of an index: a column, an operator and a value. They are data and are never evaluated.

A row without a value meets no condition on it, `!=` included: an unknown sex is neither "F" nor "not F".
"""

import datetime
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from medclip_lab.errors import UserError

OPERATORS = ("<=", ">=", "!=", "=", "<", ">", " in ")
LABELS = "labels."
NAMES = ("study_id", "patient_id", "text")
"""Text that is neither number nor date, whatever it looks like."""
_WRITTEN = re.compile(r"\s*(labels\.[^=!<>]+?|\w+)\s*(<=|>=|!=|=|<|>|\sin\s)(?!=)\s*(.*\S)\s*", re.DOTALL)
_NUMBER = re.compile(r"[-+]?\d+(\.\d+)?")
_DATE = re.compile(r"(\d{4})-?(\d{2})-?(\d{2})([T ].*)?")
ORDER: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge
}  # fmt: skip


class FilterError(UserError):
    """A condition that cannot be.

    Args:
        message: with what was asked for.
        plain: the same without it, as that may be a patient: for who may not have it in a log.
    """

    def __init__(self, message: str, plain: str) -> None:
        super().__init__(f"filter: {message}")
        self.plain = plain


@dataclass(frozen=True)
class Condition:
    """What one column of a row has to be."""

    column: str
    """A column of the index's table, or "labels.NAME": 1 present, 0 absent, -1 uncertain."""
    operator: str
    """One of = != < <= > >= in."""
    values: tuple[str, ...]
    """One value, as it is written; of "in" one or more."""

    def __post_init__(self) -> None:
        if self.operator not in {name.strip() for name in OPERATORS}:
            way_out = "write column=value, !=, <, <=, >, >= or in"
            raise FilterError(f"{self.operator!r} is no operator: {way_out}", f"no operator: {way_out}")
        if not self.values or (self.operator != "in" and len(self.values) != 1):
            told = f"takes one value, got {len(self.values)}"
            raise FilterError(f"{self.column} {self.operator} {told}", f"{self.operator} {told}")
        if self.operator in ORDER:
            kind_of(self)

    @property
    def value(self) -> str:
        return self.values[0]

    @property
    def label(self) -> str | None:
        return self.column.removeprefix(LABELS) if self.column.startswith(LABELS) else None


Where = Sequence[Condition]


def parse(text: str) -> Condition:
    """A condition from how it is written: "view=PA", "study_date >= 2019-01-31", "labels.Edema = 1", "sex in F,M".

    Raises:
        UserError: it is not written so.
    """
    found = _WRITTEN.fullmatch(text)
    if found is None:
        way_out = "write column=value, with !=, <, <=, >, >= or in (a,b) too"
        raise FilterError(f"cannot read {text!r}: {way_out}", f"cannot be read: {way_out}")
    column, sign, value = found.group(1), found.group(2).strip(), found.group(3)
    values = tuple(part.strip() for part in value.split(",")) if sign == "in" else (value,)
    return Condition(column, sign, values)


def conditions(where: Sequence[str | Condition] | None) -> tuple[Condition, ...]:
    """Conditions that all have to be met, parsed where they are text."""
    assert not isinstance(where, str), "a sequence of conditions, not one text"
    return tuple(parse(given) if isinstance(given, str) else given for given in where or ())


def quantity(text: str) -> tuple[str, float] | None:
    """("date", year, month and day as one number) or ("number", the number); None for any other text.

    Eight digits that are a date are a date: DICOM writes it so.
    """
    found = _DATE.fullmatch(text)
    if found is not None:
        year, month, day = (int(part) for part in found.group(1, 2, 3))
        try:
            datetime.date(year, month, day)
        except ValueError:
            pass
        else:
            return "date", float(year * 10_000 + month * 100 + day)
    return ("number", float(text)) if _NUMBER.fullmatch(text) else None


def kind_of(condition: Condition) -> tuple[str, float]:
    """What `quantity` makes of the value of a condition of order.

    Raises:
        UserError: it is neither a number nor a date, and so is neither more nor less than anything.
    """
    found = quantity(condition.value)
    if found is None:
        told = "a number or a date such as 2019-01-31 is needed"
        raise FilterError(f"{condition.column} {condition.operator} {condition.value!r}: {told}", told)
    return found


def whole(condition: Condition, value: str) -> int:
    """
    Raises:
        UserError: the value is no whole number, though the column holds such.
    """
    if not re.fullmatch(r"[-+]?\d{1,18}", value):
        told = f"{condition.column} holds whole numbers of up to 18 digits"
        raise FilterError(f"{told}, {value!r} is none", f"{told}, the value is none")
    return int(value)


def refuse_kind(condition: Condition, kind: str) -> FilterError:
    """A date asked of a column of numbers, for example: no row at all would match, and nobody would know why."""
    told, way_out = f"{condition.column} holds no {kind}s", "write numbers as 60, dates as 2019-01-31"
    return FilterError(f"{told}, and {condition.value!r} is one: {way_out}", f"{told}, and the value is one: {way_out}")


def refuse_column(condition: Condition, names: Sequence[str]) -> FilterError:
    there = f"there are {', '.join(names)} and labels.NAME"
    return FilterError(f"no column {condition.column!r}; {there}", f"no such column; {there}")


def refuse_label(condition: Condition, names: Sequence[str] | None) -> FilterError:
    """No row has the label; `names` of those that rows have, where they are known."""
    there = "" if names is None else f"; there are {', '.join(names) or 'none'}"
    return FilterError(f"no row has a label {condition.label!r}{there}", f"no row has such a label{there}")


def mask(table: pa.Table, where: Where) -> NDArray[np.bool_]:
    """[N] whether a row meets all conditions.

    Raises:
        UserError: no such column or label, or a value that its column cannot have.
    """
    found = np.ones(table.num_rows, np.bool_)
    for condition in where:
        found &= _meets(_column(table, condition), condition)
    return found


def _column(table: pa.Table, condition: Condition) -> Any:
    if condition.label is not None and "labels" in table.column_names:
        labels = table["labels"]
        known = sorted({name for chunk in labels.chunks for name in pc.unique(chunk.keys).to_pylist()})
        if condition.label not in known:
            raise refuse_label(condition, known)
        values = [pc.map_lookup(chunk, condition.label, "first") for chunk in labels.chunks]
        return pa.chunked_array(values, pa.int8())
    if condition.column not in table.column_names or pa.types.is_nested(table.schema.field(condition.column).type):
        names = [name for name in table.column_names if not pa.types.is_nested(table.schema.field(name).type)]
        raise refuse_column(condition, names)
    return table[condition.column]


def _meets(column: Any, condition: Condition) -> NDArray[np.bool_]:
    numbers = pa.types.is_integer(column.type)
    if condition.operator in ORDER and not numbers:
        return _in_order(column, condition)
    # At 64 bits: a value that is too large for the column is in none of its rows, and no mistake.
    column = pc.cast(column, pa.int64()) if numbers else column
    values = [whole(condition, value) if numbers else value for value in condition.values]
    if not numbers and condition.column not in NAMES:
        return _alike(column, condition)
    wanted = pa.array(values, column.type)
    functions = {
        "=": pc.equal, "!=": pc.not_equal, "<": pc.less, "<=": pc.less_equal, ">": pc.greater, ">=": pc.greater_equal
    }  # fmt: skip
    compare = functions.get(condition.operator)
    return _bools(pc.fill_null(compare(column, wanted[0]) if compare else pc.is_in(column, wanted), False))


def _alike(column: Any, condition: Condition) -> NDArray[np.bool_]:
    """Text that is one of the values, or the same number or date written otherwise: 60.0, 20190131."""
    same = quantities(condition)
    distinct = [text for text in pc.unique(column).to_pylist() if text is not None]
    right = {text for text in distinct if text in condition.values or quantity(text) in same}
    if condition.operator == "!=":
        right = set(distinct) - right
    return _bools(pc.is_in(column, pa.array(sorted(right), column.type)))


def quantities(condition: Condition) -> set[tuple[str, float]]:
    """What those of its values are that are numbers or dates."""
    return {found for found in map(quantity, condition.values) if found is not None}


def _in_order(column: Any, condition: Condition) -> NDArray[np.bool_]:
    """Text compared as the numbers or the dates that it is; the others meet nothing."""
    kind, wanted = kind_of(condition)
    compare = ORDER[condition.operator]
    distinct = pc.unique(column).to_pylist()
    read = {text: quantity(text) for text in distinct if text is not None}
    if not any(found is not None and found[0] == kind for found in read.values()):
        raise refuse_kind(condition, kind)
    right = [text for text, found in read.items() if found and found[0] == kind and compare(found[1], wanted)]
    return _bools(pc.is_in(column, pa.array(right, column.type)))


def _bools(found: Any) -> NDArray[np.bool_]:
    return np.asarray(found.to_numpy(), np.bool_)
