import re
from itertools import product
from pathlib import Path

import open_clip
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

SHIPPED = (
    *("chexpert14", "chexpert5", "chexpert5_grid", "ct_rate18", "nih14", "pneumonia", "rsna", "rsna_pairs", "siim"),
    "vindr",
)
GRIDS = ("chexpert5_grid", "rsna_pairs")
SIZES = {
    "chexpert14": 14,
    "chexpert5": 5,
    "chexpert5_grid": 5,
    "nih14": 14,
    "vindr": 26,
    "rsna": 1,
    "siim": 1,
    "ct_rate18": 18,
}


def label(name: str = "Edema", **more: list[str]) -> LabelPrompts:
    return LabelPrompts(name, more.pop("positive", ["Edema."]), more.pop("negative", ["No edema."]), **more)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_sets_are_whole(name: str) -> None:
    labelset = load_labelset(name)
    assert len(labelset.labels) == SIZES.get(name, 1)
    assert "own words" in labelset.source.casefold() or "words our own" in labelset.source
    assert labelset.license == "Apache-2.0"
    if name in GRIDS:
        assert re.search(r"Method of \w+ \(\w+ 20\d\d; [\w-]+/[\w-]+, [\w.-]+\)", labelset.source), "whose method it is"
    said = {}
    for found in labelset.labels:
        assert len(found.positive) >= 3
        assert len(found.negative) >= 3 or labelset.exclusive
        for prompt in found.positive:
            assert not prompt.casefold().startswith(("no ", "there is no ")) or means_nothing(found.name), prompt
            assert prompt not in said.get(found.name, []), "a prompt stands twice"
        for prompt in (*found.positive, *found.negative):
            assert prompt[0].isupper() or prompt[0].isdigit()
            assert prompt.endswith(".")
            assert "no no " not in prompt.casefold()
            assert "___" not in prompt
        assert not set(found.positive) & set(found.negative)


@pytest.mark.parametrize("name", SHIPPED)
def test_no_prompt_serves_two_labels(name: str) -> None:
    owners: dict[str, str] = {}
    for found in load_labelset(name).labels:
        for prompt in (*found.positive, *found.negative):
            plain = prompt.casefold().rstrip(".")
            assert owners.setdefault(plain, found.name) == found.name, prompt


COUNTED = (
    "nodule|mass|effusion|hernia|fracture|opacity|infiltrate|pattern|pneumothorax|malignancy|plaque|tumor|cavity|cyst"
)


@pytest.mark.parametrize("name", SHIPPED)
def test_what_can_be_counted_has_its_article(name: str) -> None:
    """ "There is lung mass." is no English, though "No evidence of pneumothorax." is how reports say it."""
    bare = rf"^(There is|Findings are consistent with) (?!an? |no )([\w-]+ )*({COUNTED})\b"
    twice = r"\b(an?|no) an? |^No an? |\ban [^aeiou]|\ba [aeiou]"
    for found in load_labelset(name).labels:
        for prompt in (*found.positive, *found.negative):
            assert not re.search(bare, prompt), prompt
            assert not re.search(twice, prompt, re.IGNORECASE), prompt


@pytest.mark.parametrize("name", SHIPPED)
def test_every_prompt_fits_the_context_of_clip(name: str) -> None:
    tokenizer = open_clip.SimpleTokenizer(context_length=200)
    prompts = [text for found in load_labelset(name).labels for text in (*found.positive, *found.negative)]
    assert int((tokenizer(prompts) != 0).sum(1).max()) <= 77


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


def test_articles_stand_where_a_template_asks_for_them(tmp_path: Path) -> None:
    assert Templates(["There is {a}.", "{a} is seen."], ["No {}."]).fill(["a lung mass", "edema", "an opacity"]) == (
        ["There is a lung mass.", "A lung mass is seen.", "There is edema.", "Edema is seen.", "There is an opacity.",
         "An opacity is seen."],
        ["No lung mass.", "No edema.", "No opacity."],
    )  # fmt: skip


GRID = "[[slight, '', marked], [edema], [of both lungs., on the left.]]"


def grid_set(folder: Path, more: str = "", grid: str = GRID) -> LabelSet:
    text = f"name: own\n{more}\nlabels:\n  - {{name: Edema, negative: [Dry.], positive: [Wet.], grid: {grid}}}\n"
    (folder / "set.yaml").write_text(text)
    return load_labelset(folder / "set.yaml")


def test_a_grid_says_every_combination(tmp_path: Path) -> None:
    whole = grid_set(tmp_path)
    assert whole.labels[0].positive == [
        "Wet.", "Slight edema of both lungs.", "Slight edema on the left.", "Edema of both lungs.",
        "Edema on the left.", "Marked edema of both lungs.", "Marked edema on the left.",
    ]  # fmt: skip
    spelled = LabelSet("own", [LabelPrompts("Edema", whole.labels[0].positive, ["Dry."])])
    assert whole.hash == spelled.hash, "what is said counts, not how it was written"


def test_draws_of_a_grid_are_those_of_their_seed(tmp_path: Path) -> None:
    whole = grid_set(tmp_path).labels[0].positive
    draws = {}
    for draw, seed in product((2, 3), range(8)):
        labelset = grid_set(tmp_path, f"draw: {draw}\nseed: {seed}")
        found = labelset.labels[0].positive
        assert found == [text for text in whole if text in found], "in the order of the grid"
        assert len(found) == draw + 1
        assert (labelset.draw, labelset.seed) == (draw, seed)
        draws[draw, seed] = set(found)
        (tmp_path / "again.yaml").write_text(to_yaml(labelset))
        assert load_labelset(tmp_path / "again.yaml").hash == labelset.hash, "what was drawn is not drawn again"
    assert all(draws[2, seed] < draws[3, seed] for seed in range(8)), "a larger draw holds the smaller one"
    assert len({tuple(sorted(draws[2, seed])) for seed in range(8)}) > 3
    other = grid_set(tmp_path, "draw: 2", "[[marked, slight, ''], [edema], [on the left., of both lungs.]]")
    assert set(other.labels[0].positive) == draws[2, 0], "the order of the words does not matter"


def test_the_draw_of_a_shipped_grid_is_frozen() -> None:
    """The same prompts on every machine and in every version: figures rest on them."""
    heart = next(label for label in load_labelset("chexpert5_grid").labels if label.name == "Cardiomegaly")
    assert heart.positive == [
        "Slight enlargement of the left ventricle.",
        "Slight globular enlargement of the left ventricle.",
        "Marked widening of the cardiac shadow.",
        "Marked globular enlargement of the heart.",
        "Marked globular enlargement of the left ventricle.",
    ]


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
        (
            "draw: 3\nlabels: [{name: A, grid: [[x, y]], negative: [z]}]",
            "A: its grid has 2 sentences, 3 are to be drawn",
        ),
        ("draw: -1\nlabels: [{name: A, grid: [[x, y]], negative: [z]}]", "draw is a number of sentences, .* got -1"),
        ("labels: [{name: A, grid: [[x], []], negative: [z]}]", "a list of its grid is empty"),
        ("labels: [{name: No Finding, positive: [Clear.], negative_grid: [['no'], [no finding]]}]", "says nothing"),
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


@pytest.mark.parametrize("template", ["pneumonia.", "{} and {}.", "{} is {a}.", "{name}.", "{}{."])
def test_templates_have_one_gap(template: str) -> None:
    with pytest.raises(ValueError, match=r"needs one \{\} or \{a\}"):
        Templates([template])


def test_the_nearest_name_is_told() -> None:
    with pytest.raises(UserError, match=r"'chexpert-14' \(there are .*\); did you mean 'chexpert14'"):
        load_labelset("chexpert-14")
    with pytest.raises(UserError, match=r"neither a \.yaml file nor the name of a shipped set"):
        load_labelset("sets/mine")
