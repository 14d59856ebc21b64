"""Texts drawn from studies, and the labels they state. Every text here is made up."""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medclip_lab.config import load_config, to_yaml
from medclip_lab.data.findings import ABSENT, CHEXPERT14, NO_FINDING, PRESENT, UNCERTAIN
from medclip_lab.data.labeller import combine_labels, label_sentence, labelled_sentences
from medclip_lab.data.paraphrase import Paraphrases, load_paraphrases
from medclip_lab.data.prompts import PromptConfig
from medclip_lab.data.report import report_text, split_sentences
from medclip_lab.data.text import TextConfig, draw_text, draw_texts
from medclip_lab.errors import UserError

RECORD: dict[str, Any] = {
    "text": "Small left effusion. The heart is enlarged. No pneumothorax. Effusion and cardiomegaly.",
    "sections": {
        "findings": "Small left effusion. The heart is enlarged. No pneumothorax.",
        "impression": "Effusion and cardiomegaly.",
    },
    "labels": {"Pleural Effusion": 1, "Cardiomegaly": 1, "Pneumothorax": 0, "No Finding": 0, "Edema": None},
    "sentences": [
        {"text": "Small left effusion.", "labels": {"Pleural Effusion": 1}},
        {"text": "The heart is enlarged.", "labels": {"Cardiomegaly": 1}},
        {"text": "No pneumothorax.", "labels": {"Pneumothorax": 0}},
        {"text": "Effusion and cardiomegaly.", "labels": {"Pleural Effusion": 1, "Cardiomegaly": 1}},
    ],
}


def study(findings: str, impression: str = "") -> dict[str, Any]:
    """A record as a source makes it of a report."""
    sections = {name: text for name, text in (("findings", findings), ("impression", impression)) if text}
    sentences = labelled_sentences(sections)
    labels = combine_labels(sentence["labels"] for sentence in sentences)
    return {"text": report_text(sections), "sections": sections, "sentences": sentences, "labels": labels}


def drawn(record: dict[str, Any], policy: TextConfig, times: int = 200) -> Counter[str]:
    chance = random.Random(0)
    return Counter(draw_text(record, policy, chance)[0] for _ in range(times))


def only(kind: str, **options: Any) -> TextConfig:
    return TextConfig(**{"report": 0.0, kind: 1.0, **options})


def test_a_seed_draws_the_texts_it_always_drew() -> None:
    policy = TextConfig(report=0.3, impression=0.2, findings=0.2, sentence=1.0, sentences=3, denials=0.3)
    chance = random.Random("pin")
    texts = [draw_text(RECORD, policy, chance, {("Cardiomegaly", 1): 3.0})[0] for _ in range(12)]
    effusion, heart, denial, both = (sentence["text"] for sentence in RECORD["sentences"])
    assert texts == [
        RECORD["text"],
        RECORD["sections"]["findings"],
        RECORD["text"],
        f"{heart} {denial} {both}",
        f"{heart} {effusion} {both}",
        both,
        f"{heart} {effusion} {both}",
        f"{heart} {both}",
        RECORD["sections"]["findings"],
        effusion,
        f"{heart} {both} {denial}",
        f"{both} {heart} {denial}",
    ]
    assert chance.random() == 0.9630224971781768  # nor has it drawn more
    chance = random.Random("pin")
    assert draw_text(RECORD, TextConfig(), chance) == (RECORD["text"], RECORD["labels"])
    assert chance.random() == 0.4041236751516477


def test_a_section_has_the_labels_it_states() -> None:
    assert draw_text(RECORD, only("impression"), random.Random(0))[1] == {"Pleural Effusion": 1, "Cardiomegaly": 1}
    labels = draw_text(RECORD, only("findings"), random.Random(0))[1]
    assert labels == {"Pleural Effusion": 1, "Cardiomegaly": 1, "Pneumothorax": 0}
    whole = study("", "No effusion.")
    assert draw_text(whole, only("impression"), random.Random(0))[1] == whole["labels"], "all there is"
    assert draw_text(RECORD | {"sentences": []}, only("impression"), random.Random(0))[1] == RECORD["labels"]
    assert draw_text(RECORD | {"sections": {}}, only("impression"), random.Random(0))[0] == RECORD["text"]


@pytest.mark.parametrize(
    "findings, no_finding",
    [
        ("No acute disease. Sternotomy wires.", PRESENT),
        ("No acute disease. Cardiomegaly.", ABSENT),
        ("No acute disease. Possible effusion.", UNCERTAIN),
    ],
)
def test_a_finding_belies_no_finding(findings: str, no_finding: int) -> None:
    record = study(findings)
    policy = only("sentence", sentences=2)
    chance = random.Random(0)
    texts = [draw_text(record, policy, chance) for _ in range(40)]
    assert {labels[NO_FINDING] for text, labels in texts if len(split_sentences(text)) == 2} == {no_finding}


REPORT = study(
    "Compared to the prior study, there is a small left effusion. The heart is enlarged but stable. No pneumothorax. "
    "No new opacity. The right base opacity has resolved. Possible edema. Lungs are otherwise clear. PA view.",
    "1. Small effusion, unchanged. 2. Cardiomegaly. 3. No change.",
)


@given(
    seed=st.integers(0, 10**6),
    kinds=st.lists(st.sampled_from((0.0, 1.0)), min_size=4, max_size=4),
    sentences=st.integers(1, 4),
    priors=st.sampled_from(("keep", "drop")),
    max_words=st.integers(0, 30),
    part=st.sampled_from(("head", "window")),
)
def test_a_text_states_its_labels_and_no_others(
    seed: int, kinds: list[float], sentences: int, priors: Any, max_words: int, part: Any
) -> None:
    impression, findings, sentence, prompt = kinds
    policy = TextConfig(
        0.1, impression, findings, sentence, prompt, sentences, priors=priors, max_words=max_words, part=part
    )
    text, labels = draw_text(REPORT, policy, random.Random(seed))
    assert text
    read = combine_labels(map(label_sentence, split_sentences(text)))
    for name in CHEXPERT14[1:]:  # No Finding may follow from the others
        assert labels.get(name) == read[name], f"{name} of {text!r}"
    assert (text, labels) == draw_text(REPORT, policy, random.Random(seed))


@pytest.mark.parametrize("state", [PRESENT, ABSENT, UNCERTAIN])
@pytest.mark.parametrize("name", CHEXPERT14)
def test_prompts_state_their_label(name: str, state: int) -> None:
    record = {"text": "A report.", "labels": dict.fromkeys(CHEXPERT14) | {name: state}}
    prompts = PromptConfig()
    texts = drawn(record, only("prompt"))
    assert len(texts) == len(prompts.of(name, state))
    assert draw_text(record, only("prompt"), random.Random(0))[1] == {name: state}
    for text in texts:
        assert text[0].isupper()
        assert "no finding" not in text.lower(), "no No Finding"
        if name != NO_FINDING or state == PRESENT:
            assert label_sentence(text).get(name) == state, text


def test_prompts_are_drawn_as_sentences_are() -> None:
    record = {"labels": {"Edema": 1, "Pneumonia": 0, "Fracture": -1, "Cardiomegaly": None}}
    policy = only("prompt", sentences=2, prompts=PromptConfig(["{}!"], ["no {}"], []))
    assert set(drawn(record, policy)) == {"Edema!", "No pneumonia", "Edema! No pneumonia", "No pneumonia Edema!"}
    rarely = drawn(record, only("prompt", denials=0.01, prompts=policy.prompts))
    assert rarely["No pneumonia"] < 0.1 * rarely["Edema!"]
    custom = only("prompt", prompts=PromptConfig(["a chest with {}"], [], [], {"Edema": "wet lungs"}))
    assert set(drawn(record, custom)) == {"A chest with wet lungs"}
    assert drawn({"text": "A report.", "labels": {"Edema": None}}, custom) == {"A report.": 200}
    other = {"labels": {"Pleural_Thickening": 1}}
    assert "Pleural thickening!" in drawn(other, policy)


def test_marks_are_kept_dropped_or_mapped() -> None:
    record = {"text": f"Compared to {'_' * 3}, the XXXX is clear."}
    assert draw_text(record, TextConfig(), random.Random(0))[0] == record["text"]
    assert set(drawn(record, TextConfig(marks="drop"))) == {"Compared to, the is clear."}
    assert set(drawn(record, TextConfig(marks="mask", mask="?"))) == {"Compared to ?, the ? is clear."}
    assert set(drawn({"text": "XXXX"}, TextConfig(marks="drop"))) == {"XXXX"}, "no text would shift the pairs"


def test_priors_take_their_labels_with_them() -> None:
    record = study("The effusion has resolved. Stable cardiomegaly.")
    text, labels = draw_text(record, TextConfig(priors="drop"), random.Random(0))
    assert (text, labels) == ("Cardiomegaly.", {"Cardiomegaly": 1})
    assert set(drawn(record, only("sentence", priors="drop"))) == {"Cardiomegaly."}
    nothing = study("No change. Unchanged.")
    assert set(drawn(nothing, TextConfig(priors="drop"))) == {"No change. Unchanged."}
    untouched = study("No effusion.")
    assert draw_text(untouched, TextConfig(priors="drop"), random.Random(0)) == ("No effusion.", untouched["labels"])


LONG = [f"Rib {number} is broken {'very ' * (number % 3)}badly." for number in range(8)]


def test_long_reports_keep_their_head_or_a_window() -> None:
    record = study(" ".join(LONG))
    assert set(drawn(record, TextConfig(max_words=12))) == {" ".join(LONG[:2])}
    windows = drawn(record, TextConfig(max_words=12, part="window"), 400)
    assert len(windows) > 4
    assert {sentence for window in windows for sentence in split_sentences(window)} == set(LONG)
    for window in windows:
        inside = split_sentences(window)
        start = LONG.index(inside[0])
        assert inside == LONG[start : start + len(inside)]
        assert len(window.split()) <= 12
        following = LONG[start + len(inside) : start + len(inside) + 1]
        assert not following or len(" ".join([window, *following]).split()) > 12, "one more would have fitted"
    assert set(drawn(record, TextConfig(max_words=1))) == {LONG[0]}, "never less than a sentence"
    assert set(drawn(record, TextConfig(max_words=1000, part="window"))) == {record["text"]}


def test_two_views_are_two_draws() -> None:
    policy = only("sentence", views=2)
    chance = random.Random(0)
    pairs = [draw_texts(RECORD, policy, chance) for _ in range(50)]
    assert all(len(pair) == 2 for pair in pairs)
    assert 0 < sum(first == second for first, second in pairs) < 50
    again = random.Random(0)
    assert [draw_text(RECORD, policy, again) for _ in range(100)] == [text for pair in pairs for text in pair]
    assert len(draw_texts(RECORD, TextConfig(), chance)) == 1


PHRASES = {
    "pleural effusion": ["pleural fluid", "fluid in the pleural space"],
    "effusion": ["fluid"],
    "no": ["without"],
}


def test_paraphrases_replace_whole_phrases_at_random() -> None:
    apply = Paraphrases(PHRASES)
    chance = random.Random(0)
    texts = Counter(apply("No pleural effusion. Nodule, EFFUSIONS.", chance) for _ in range(600))
    starts = ("No", "Without")
    effusions = ("pleural effusion", "pleural fluid", "fluid in the pleural space")
    assert set(texts) == {f"{start} {effusion}. Nodule, EFFUSIONS." for start in starts for effusion in effusions}
    assert min(texts.values()) > 60, "all alike likely"
    longer = Paraphrases({"no": ["without"], "no definite": ["no clear"]})
    assert {longer("no definite", chance) for _ in range(50)} == {"no definite", "no clear"}
    assert apply("Clear lungs (a+b).", chance) == "Clear lungs (a+b)."


@pytest.mark.parametrize("name", ["phrases.yaml", "phrases.json"])
def test_paraphrases_come_from_a_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text(json.dumps({"left": ["left-sided"], "The heart": ["The cardiac silhouette"]}))
    policy = only("sentence", paraphrases=str(path))
    texts = drawn(RECORD, policy)
    assert {"Small left effusion.", "Small left-sided effusion.", "The cardiac silhouette is enlarged."} <= set(texts)
    labels = {draw_text(RECORD, policy, random.Random(seed))[1].get("Cardiomegaly") for seed in range(20)}
    assert labels == {1, None}


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "no such file"),
        ("- left", "must map phrases"),
        ("", "must map phrases"),
        ("left: right", "'left' needs a list of phrases, got 'right'"),
        ("left: []", "'left' needs a list"),
        ("left: [1]", "'left' needs a list"),
        ("no: [without]", "False needs a list"),
        ("left: [", "cannot read"),
    ],
)
def test_mistakes_in_a_file_of_paraphrases(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "phrases.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        load_paraphrases(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"prompt": -1}, "negative"),
        ({"report": 0}, "one of report, impression, findings, sentence, prompt must be above 0"),
        ({"max_words": -1}, "max_words"),
        ({"views": 3}, "views is 1 or 2"),
        ({"sentences": 0}, "sentences"),
        ({"denials": 0}, "denials"),
    ],
)
def test_values_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextConfig(**options)


def test_a_template_has_one_place_for_the_name() -> None:
    with pytest.raises(ValueError, match=r"must hold \{\} once"):
        PromptConfig(present=["Effusion."])


def test_a_config_file_says_it_all(tmp_path: Path) -> None:
    policy = only("prompt", marks="mask", priors="drop", part="window", max_words=40, views=2)
    policy.prompts.names["Edema"] = "wet lungs"
    path = tmp_path / "text.yaml"
    path.write_text(to_yaml(policy))
    assert load_config(TextConfig, path) == policy
    path.write_text("marks: hide")
    with pytest.raises(UserError, match=r"text\.yaml:1: marks"):
        load_config(TextConfig, path)
