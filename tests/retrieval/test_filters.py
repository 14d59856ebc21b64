import datetime
import operator

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medclip_lab.errors import UserError
from medclip_lab.retrieval.embeddings import table_schema
from medclip_lab.retrieval.filters import Condition, conditions, mask, parse, quantity
from tests.retrieval.synthetic import row

ROWS = [row(number, np.random.default_rng(number)) | {"image": number % 3, "view": "PA"} for number in range(120)]
TABLE = pa.concat_tables(  # in pieces, as an index has it
    [pa.Table.from_pylist(ROWS[start : start + 50], table_schema("image", False)) for start in (0, 50, 100)]
)
COMPARE = {
    "=": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("view=PA", ("view", "=", ("PA",))),
        ("  age >=  60 ", ("age", ">=", ("60",))),
        ("labels.Pleural Effusion = 1", ("labels.Pleural Effusion", "=", ("1",))),
        ("labels.Lung Opacity in 0, 1", ("labels.Lung Opacity", "in", ("0", "1"))),
        ("sex in F,M", ("sex", "in", ("F", "M"))),
        ("patient_id!=a>=b = c", ("patient_id", "!=", ("a>=b = c",))),
        ('study_id=x" or "1"="1', ("study_id", "=", ('x" or "1"="1',))),
    ],
)
def test_a_condition_is_read(text: str, expected: tuple[str, str, tuple[str, ...]]) -> None:
    assert parse(text) == Condition(*expected)


@pytest.mark.parametrize(
    "text", ["view==PA", "view", "view=", "=PA", "__import__('os').remove('x')", "len(view)=2", "view in", ""]
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="cannot read"):
        parse(text)


@given(
    column=st.sampled_from(["image", "labels.Edema", "labels.Pleural Effusion"]),
    compare=st.sampled_from(sorted(COMPARE)),
    value=st.integers(-2, 3),
)
def test_whole_numbers_compare_as_numbers(column: str, compare: str, value: int) -> None:
    found = mask(TABLE, [parse(f"{column}{compare}{value}")])
    values = [row["image"] if column == "image" else dict(row["labels"]).get(column[7:]) for row in ROWS]
    assert found.tolist() == [has is not None and COMPARE[compare](has, value) for has in values]


@given(compare=st.sampled_from(["<", "<=", ">", ">="]), value=st.integers(15, 95))
def test_text_that_is_a_number_compares_as_one(compare: str, value: int) -> None:
    """Else 9 would come after 60; "unknown" is on neither side."""
    found = mask(TABLE, [parse(f"age{compare}{value}")])
    ages = [row["age"] for row in ROWS]
    assert found.tolist() == [age not in (None, "unknown") and COMPARE[compare](int(age), value) for age in ages]


@given(
    compare=st.sampled_from(["<", "<=", ">", ">="]),
    date=st.dates(datetime.date(2008, 1, 1), datetime.date(2022, 1, 1)),
    dashes=st.booleans(),
)
def test_dates_compare_however_they_are_written(compare: str, date: datetime.date, dashes: bool) -> None:
    written = date.isoformat() if dashes else date.strftime("%Y%m%d")
    found = mask(TABLE, [parse(f"study_date{compare}{written}")])
    dates = [datetime.date.fromisoformat(row["study_date"]) for row in ROWS]
    assert found.tolist() == [COMPARE[compare](has, date) for has in dates]


@given(age=st.integers(20, 90), written=st.sampled_from(["{}", "{}.0", "+{}", "0{}"]))
def test_a_number_equals_itself_however_it_is_written(age: int, written: str) -> None:
    text, has = written.format(age), [row["age"] for row in ROWS]
    assert mask(TABLE, [parse(f"age={text}")]).tolist() == [value == str(age) for value in has]
    assert mask(TABLE, [parse(f"age!={text}")]).tolist() == [value not in (None, str(age)) for value in has]
    found = mask(TABLE, [parse(f"age in {text},unknown")])
    assert found.tolist() == [value in (str(age), "unknown") for value in has]


def test_a_date_equals_itself_however_it_is_written() -> None:
    has = [row["study_date"].replace("-", "") for row in ROWS]
    for text in ("2013-04-15", "20130415"):
        assert 0 < mask(TABLE, [parse(f"study_date={text}")]).sum() < len(ROWS)
        assert mask(TABLE, [parse(f"study_date={text}")]).tolist() == [date == "20130415" for date in has]
        assert mask(TABLE, [parse(f"study_date!={text}")]).tolist() == [date != "20130415" for date in has]


def test_names_that_look_like_numbers_are_names() -> None:
    table = pa.table({"patient_id": ["7", "007", "7.0"], "age": ["7", "007", "7.0"]})
    assert mask(table, [parse("patient_id=7")]).tolist() == [True, False, False]
    assert mask(table, [parse("age=7")]).tolist() == [True, True, True]


def test_a_missing_value_meets_nothing() -> None:
    sexes = [row["sex"] for row in ROWS]
    assert None in sexes
    assert mask(TABLE, [parse("sex!=F")]).tolist() == [sex not in (None, "F") for sex in sexes]
    assert mask(TABLE, [parse("sex in F,M")]).tolist() == [sex is not None for sex in sexes]


def test_all_conditions_have_to_be_met() -> None:
    both = mask(TABLE, conditions(["sex=F", "age>=50"]))
    np.testing.assert_array_equal(both, mask(TABLE, [parse("sex=F")]) & mask(TABLE, [parse("age>=50")]))
    assert both.any()
    assert mask(TABLE, ()).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("colour=red", "no column 'colour'; there are study_id, patient_id"),
        ("labels=1", "no column 'labels'"),
        ("labels.Oedema=1", "no row has a label 'Oedema'; there are Edema, Pleural Effusion, Pneumonia"),
        ("image=first", "image holds whole numbers of up to 18 digits, 'first' is none"),
        ("image=99999999999999999999", "up to 18 digits"),
        ("age>=old", "a number or a date such as 2019-01-31 is needed"),
        ("study_date>=2019", "study_date holds no numbers, and '2019' is one"),
        ("age<2019-01-31", "age holds no dates"),
    ],
)
def test_what_cannot_be_is_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        mask(TABLE, [parse(text)])


def test_operators_and_values_are_checked() -> None:
    with pytest.raises(UserError, match="'like' is no operator"):
        Condition("view", "like", ("P%",))
    with pytest.raises(UserError, match="takes one value, got 2"):
        Condition("view", "=", ("PA", "AP"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [("20190131", ("date", 20190131)), ("2019-01-31 10:30:00", ("date", 20190131)), ("20199931", ("number", 20199931)),
     ("-1.5", ("number", -1.5)), ("nan", None), ("1_0", None), ("060Y", None)],
)  # fmt: skip
def test_quantities(text: str, expected: tuple[str, float] | None) -> None:
    assert quantity(text) == expected
