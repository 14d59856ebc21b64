"""Subgroups: what differs between groups is found, what cannot be told has a reason, and luck is not a gap."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from medclip_lab.errors import UserError
from medclip_lab.evaluation.gather import Labelled
from medclip_lab.evaluation.metrics import auroc
from medclip_lab.evaluation.subgroups import group_of, subgroups


def case(studies: int = 400, bad_group: bool = True) -> tuple[Labelled, Any, list[dict[str, Any]]]:
    """Scores follow the truth in group F; in group M only half as well, if asked to."""
    rng = np.random.default_rng(0)
    positive = rng.random((studies, 2)) < 0.5
    sex = rng.choice(["F", "M"], studies)
    noise = np.where(bad_group & (sex == "M"), 3.0, 0.7)[:, None]
    scores = positive + noise * rng.normal(size=(studies, 2))
    records = [{"sex": str(value), "age": int(rng.integers(1, 95)), "site": "a"} for value in sex]
    data = Labelled(
        ["a", "b"],
        np.zeros((studies, 4), np.float32),
        positive,
        np.ones((studies, 2), bool),
        [f"p{row // 2}" for row in range(studies)],
    )
    return data, scores, records


def test_the_worse_group_is_named_and_its_gap_is_no_luck() -> None:
    data, scores, records = case()
    table = subgroups(data, scores, records, ["sex"], draws=200)["columns"]["sex"]
    rows = {row["group"]: row for row in table["groups"]}
    member = np.array([record["sex"] == "M" for record in records])
    expected = np.mean([auroc(scores[member, column], data.positive[member, column]) for column in (0, 1)])
    assert rows["M"]["auroc"] == pytest.approx(expected)
    assert table["worst"] == "M"
    assert table["gap"]["value"] == pytest.approx(rows["F"]["auroc"] - rows["M"]["auroc"])
    assert table["gap"]["low"] > table["gap_expected"]
    assert rows["F"]["studies"] + rows["M"]["studies"] == 400


def test_a_gap_of_luck_is_about_the_expected_one() -> None:
    data, scores, records = case(bad_group=False)
    table = subgroups(data, scores, records, ["sex"], draws=200)["columns"]["sex"]
    assert table["gap"]["value"] < 4 * table["gap_expected"]


def test_groups_that_cannot_be_told_have_a_reason() -> None:
    data, scores, records = case()
    records[0]["sex"] = "X"
    for record in records[1:5]:
        record["sex"] = None
    result = subgroups(data, scores, records, ["sex", "site"], draws=20)
    rows = {row["group"]: row for row in result["columns"]["sex"]["groups"]}
    assert rows["X"]["auroc"] is None
    assert rows["X"]["reason"] == "no label has enough patients of both classes in this group"
    assert "are needed" in rows["X"]["labels"][0]["reason"]
    assert "unknown" not in rows
    assert result["columns"]["site"]["gap"] is None
    assert result["columns"]["site"]["reason"] == "fewer than two groups can be scored"
    assert "NaN" not in json.dumps(result)
    with pytest.raises(UserError, match="no record has 'hospital'; there are age, sex, site, and view"):
        subgroups(data, scores, records, ["hospital"])


def test_groups_are_compared_on_the_labels_that_all_of_them_have() -> None:
    data, scores, records = case()
    member = np.array([record["sex"] == "M" for record in records])
    used = data.used.copy()
    used[member, 1] = False
    table = subgroups(replace(data, used=used), scores, records, ["sex"], draws=20)["columns"]["sex"]
    assert table["compared_on"] == ["a"]
    rows = {row["group"]: row for row in table["groups"]}
    assert rows["F"]["auroc"] == pytest.approx(rows["F"]["labels"][0]["auroc"])
    assert rows["M"]["labels"][1] == {"name": "b", "auroc": None, "reason": "not labelled in this group"}


def test_a_poor_group_takes_no_labels_from_the_others() -> None:
    data, scores, records = case()
    more = np.c_[scores, scores[:, 0]]
    wide = replace(
        data,
        names=["a", "b", "c"],
        positive=np.c_[data.positive, data.positive[:, 0]],
        used=np.c_[data.used, data.used[:, 0]],
    )
    for row in range(60):
        records[row]["sex"] = "X"
    used = wide.used.copy()
    used[:60, :2] = False
    table = subgroups(replace(wide, used=used), more, records, ["sex"], draws=20)["columns"]["sex"]
    rows = {row["group"]: row for row in table["groups"]}
    assert table["compared_on"] == ["a", "b", "c"]
    assert rows["X"]["reason"] == "only 1 of 3 labels can be scored in this group: not compared"
    assert rows["X"]["labels"][2]["auroc"] is not None
    assert table["gap"] is not None


@pytest.mark.parametrize(
    ("record", "column", "group"),
    [
        ({"age": 17}, "age", "under 18"),
        ({"age": 18}, "age", "18-39"),
        ({"age": "79"}, "age", "60-79"),
        ({"age": 80}, "age", "80 and over"),
        ({"age": "old"}, "age", "unknown"),
        ({"view": ["PA", "LATERAL"], "image": 1}, "view", "LATERAL"),
        ({"view": []}, "view", "unknown"),
        ({"site": 3}, "site", "3"),
        ({}, "sex", "unknown"),
    ],
)
def test_group_of_a_record(record: dict[str, Any], column: str, group: str) -> None:
    assert group_of(record, column) == group
