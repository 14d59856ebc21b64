from pathlib import Path

import pytest

from medclip_lab.config import shipped, to_yaml
from medclip_lab.data.findings import CHEXPERT14
from medclip_lab.errors import UserError
from medclip_lab.inference.labelset import (
    LabelPrompts,
    LabelSet,
    Templates,
    load_labelset,
    load_templates,
    means_nothing,
)

SHIPPED = ("chexpert14", "chexpert5", "ct_rate18", "nih14", "pneumonia", "rsna", "siim", "vindr")
SIZES = {"chexpert14": 14, "chexpert5": 5, "nih14": 14, "vindr": 26, "rsna": 1, "siim": 1, "ct_rate18": 18}


def label(name: str = "Edema", **more: list[str]) -> LabelPrompts:
    return LabelPrompts(name, more.pop("positive", ["Edema."]), more.pop("negative", ["No edema."]), **more)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_sets_are_whole(name: str) -> None:
    labelset = load_labelset(name)
    assert len(labelset.labels) == SIZES.get(name, 1)
    assert labelset.source
    assert labelset.license == "Apache-2.0"
    said = {}
    for found in labelset.labels:
        assert len(found.positive) >= 3
        assert len(found.negative) >= 3
        for prompt in found.positive:
            assert not prompt.casefold().startswith(("no ", "there is no ")) or means_nothing(found.name), prompt
            assert prompt not in said.get(found.name, []), "a prompt stands twice"
        for prompt in (*found.positive, *found.negative):
            assert prompt[0].isupper() or prompt[0].isdigit()
            assert prompt.endswith(".")
            assert "no no " not in prompt.casefold()
            assert "___" not in prompt
        assert not set(found.positive) & set(found.negative)


def test_there_are_no_other_sets() -> None:
    assert {path.stem for path in shipped("labelsets").glob("*.yaml")} == set(SHIPPED)
    assert {load_templates(path.stem).license for path in shipped("templates").glob("*.yaml")} == {"Apache-2.0"}
    assert load_labelset("chexpert14").names == list(CHEXPERT14)
    assert load_labelset("chexpert5").exclusive
    assert load_labelset("chexpert14").groups["competition"] == sorted(load_labelset("chexpert5").names)


def test_terms_fill_templates(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text('positive: ["{} is there."]\nnegative: ["No {}."]\n')
    (tmp_path / "set.yaml").write_text(
        f"name: own\ntemplates: {tmp_path / 'mine.yaml'}\nlabels:\n  - {{name: Edema, terms: [edema, wet lungs]}}\n"
    )
    labelset = load_labelset(tmp_path / "set.yaml")
    assert labelset.labels[0].positive == ["Edema is there.", "Wet lungs is there."]
    assert labelset.labels[0].negative == ["No edema.", "No wet lungs."]
    (tmp_path / "again.yaml").write_text(to_yaml(labelset))
    again = load_labelset(tmp_path / "again.yaml")
    assert again.hash == labelset.hash, "what is written says all, without the templates' file"
    assert not again.templates


def test_the_hash_is_of_what_decides_a_score() -> None:
    one = LabelSet("a", [label()])
    assert LabelSet("b", [label()], description="other", groups={"x": ["Edema"]}).hash == one.hash
    for other in (
        LabelSet("a", [label(name="Oedema")]),
        LabelSet("a", [label(positive=["Edema!"])]),
        LabelSet("a", [label(negative=["Dry."])]),
        LabelSet("a", [label()], exclusive=True),
        LabelSet("a", [label(), LabelPrompts("No Finding", none_of=["Edema"])]),
    ):
        assert other.hash != one.hash


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("labels: []", "it has no labels"),
        ("labels: [{name: A, positive: [x], negative: [y]}, {name: A, positive: [x], negative: [y]}]", "stands twice"),
        ("labels: [{name: A, positive: [x]}]", "A needs positive and negative prompts"),
        ("labels: [{name: A, terms: [x]}]", "A has terms, and the set names no templates"),
        ("templates: finding\nlabels: [{name: No Finding, terms: [no finding]}]", "would deny a denial"),
        ("labels: [{name: No Finding, positive: [Clear.], negative: [No no finding.]}]", "which says nothing"),
        ("labels: [{name: A, positive: [x], negative: ['']}]", "which says nothing"),
        ("templates: findings\nlabels: [{name: A, terms: [x]}]", "did you mean 'finding'"),
        ("groups: {g: [Edma]}\nlabels: [{name: Edema, positive: [x], negative: [y]}]", "did you mean 'Edema'"),
        ("labels: [{name: Edema, positive: [x], negative: [y]}, {name: N, none_of: [Edma]}]", "did you mean 'Edema'"),
        ("labels: [{name: A, positive: [x], negative: [y]}, {name: N, none_of: [A], positive: [z]}]", "and no prompts"),
        ("exclusive: true\nlabels: [{name: A, positive: [x]}, {name: N, none_of: [A]}]", "a set that is not exclusive"),
    ],
)
def test_sets_that_are_not_well_formed(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "set.yaml").write_text(f"name: own\n{text}\n")
    with pytest.raises(UserError, match=message) as error:
        load_labelset(tmp_path / "set.yaml")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("template", ["pneumonia.", "{} and {}.", "{name}.", "{}{."])
def test_templates_have_one_gap(template: str) -> None:
    with pytest.raises(ValueError, match=r"needs one \{\}"):
        Templates([template])


def test_the_nearest_name_is_told() -> None:
    with pytest.raises(UserError, match=r"'chexpert-14' \(there are .*\); did you mean 'chexpert14'"):
        load_labelset("chexpert-14")
    with pytest.raises(UserError, match=r"neither a \.yaml file nor the name of a shipped set"):
        load_labelset("sets/mine")
