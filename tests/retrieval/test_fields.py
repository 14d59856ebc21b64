"""What conditions an index says it takes."""

import pyarrow as pa

from medclip_lab.retrieval.fields import FEW, Field, field_of, fields_of, fields_of_rows, shared

ROWS = [
    {"id": 0, "patient_id": "1", "sex": "F", "age": "60", "study_date": "2019-01-31", "image": 0, "nothing": None},
    {"id": 1, "patient_id": "2", "sex": "M", "age": "7.5", "study_date": "20180101", "image": 1, "nothing": None},
    {"id": 2, "patient_id": "3", "sex": None, "age": "101", "study_date": None, "image": 0, "nothing": None},
]


def table() -> pa.Table:
    made = pa.Table.from_pylist(ROWS)
    labels = pa.array([[("Edema", 1)], [("Edema", 0), ("Cyst", -1)], []], pa.map_(pa.string(), pa.int8()))
    return made.append_column("labels", labels)


def test_kinds_values_and_ranges() -> None:
    assert fields_of(table()) == [
        Field("patient_id", "text"),
        Field("sex", "text", ("F", "M")),
        Field("age", "number", None, "7.5", "101"),
        Field("study_date", "date", None, "20180101", "2019-01-31"),
        Field("image", "number", None, "0", "1"),
        Field("labels.Cyst", "label"),
        Field("labels.Edema", "label"),
    ]


def test_many_values_are_not_listed_and_mixed_ones_are_text() -> None:
    assert field_of("view", [f"v{number}" for number in range(FEW)]).values is not None
    assert field_of("view", [f"v{number}" for number in range(FEW + 1)]).values is None
    assert field_of("age", ["60", "unknown"]) == Field("age", "text", ("60", "unknown"))


def test_rows_tell_the_same_kinds() -> None:
    rows = [row | {"labels": dict(labels)} for row, labels in zip(ROWS, table()["labels"].to_pylist(), strict=True)]
    kinds = [(field.name, field.kind) for field in fields_of(table())]
    assert [(field.name, field.kind) for field in fields_of_rows(rows)] == kinds


def test_what_several_share() -> None:
    one = [Field("sex", "text", ("F",)), Field("age", "number", None, "1", "9"), Field("view", "text", ("PA",))]
    other = [Field("age", "text", ("old",)), Field("sex", "text", ("M",))]
    assert shared([one]) == one
    assert shared([one, other]) == [Field("sex", "text", ("F", "M")), Field("age", "text")]
