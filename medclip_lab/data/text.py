"""Which words of a study the text tower sees, and which labels those words state."""

import random
from dataclasses import dataclass, field
from typing import Any, Literal

from medclip_lab.data.findings import ABSENT, NO_FINDING, PRESENT, SUPPORT_DEVICES, UNCERTAIN
from medclip_lab.data.paraphrase import load_paraphrases
from medclip_lab.data.priors import without_priors
from medclip_lab.data.prompts import PromptConfig
from medclip_lab.data.report import replace_marks, split_sentences

Labels = dict[str, int | None]
Rarity = dict[tuple[str, int], float]
"""How rare a label in a state is, relative to the commonest one: 1 or more."""

Sentence = dict[str, Any]
"""{"text": str, "labels": {name: state}}, as a shard holds it."""

KINDS = ("report", "impression", "findings", "sentence", "prompt")


@dataclass
class TextConfig:
    """Which words of a study the text tower sees, drawn anew each time.

    The first five are relative frequencies. A study that lacks what is drawn gives its report.
    """

    report: float = 1.0
    """Findings and impression together."""
    impression: float = 0.0
    findings: float = 0.0
    sentence: float = 0.0
    """Sentences of the report, at random."""
    prompt: float = 0.0
    """Sentences made from the study's labels."""
    sentences: int = 1
    """How many sentences or prompts make one text, at most."""
    denials: float = 1.0
    """How often a sentence that only denies findings is taken, relative to the others. "No pneumothorax" stands in most
    reports: below 1, what is there is read more often than what is not."""
    prompts: PromptConfig = field(default_factory=PromptConfig)
    marks: Literal["keep", "drop", "mask"] = "keep"
    """What becomes of marks of de-identification; "mask" maps those of all corpora to `mask`."""
    mask: str = "[MASK]"
    priors: Literal["keep", "drop"] = "keep"
    """"drop" takes out what is said of earlier studies, see `medclip_lab.data.priors`."""
    paraphrases: str = ""
    """YAML or JSON file of phrases and what may stand in their place, see `medclip_lab.data.paraphrase`."""
    max_words: int = 0
    """A longer report or section loses whole sentences; 0 leaves the cut to the tokenizer, which knows no sentences."""
    part: Literal["head", "window"] = "head"
    """What is kept of a longer one: the first sentences, or consecutive ones from a random start on."""
    views: int = 1
    """Texts of a study, drawn apart from each other; 2 for losses that compare them."""

    def __post_init__(self) -> None:
        if min(getattr(self, kind) for kind in KINDS) < 0 or self.sentences < 1:
            raise ValueError("text: frequencies cannot be negative, and sentences must be at least 1")
        if not 0 < self.denials <= 1:
            raise ValueError(f"text: denials must be in (0, 1], got {self.denials}")
        if sum(getattr(self, kind) for kind in KINDS) <= 0:
            raise ValueError(f"text: one of {', '.join(KINDS)} must be above 0")
        if self.max_words < 0 or self.views not in (1, 2):
            raise ValueError(
                f"text: max_words cannot be negative, and views is 1 or 2, got {self.max_words} and {self.views}"
            )


def draw_texts(
    record: dict[str, Any], policy: TextConfig, chance: random.Random, rarity: Rarity | None = None
) -> list[tuple[str, Labels]]:
    """`policy.views` texts of a study; arguments as for `draw_text`."""
    return [draw_text(record, policy, chance, rarity) for _ in range(policy.views)]


def whole_report(record: dict[str, Any], policy: TextConfig) -> tuple[str, Labels]:
    """The whole report and its labels: marks and references to priors are treated as in training, nothing is drawn."""
    whole = TextConfig(marks=policy.marks, mask=policy.mask, priors=policy.priors)
    return draw_text(record, whole, random.Random(0))


def draw_text(
    record: dict[str, Any], policy: TextConfig, chance: random.Random, rarity: Rarity | None = None
) -> tuple[str, Labels]:
    """One text of a study, and the labels that this text states.

    They are read off the sentences' labels; a study without any gives its own, which nothing ties to a part of it.

    Args:
        record: the study's JSON, as a shard holds it.
        rarity: favour sentences of rare labels.

    Raises:
        UserError: the file of paraphrases cannot be read.
    """
    kind = chance.choices(KINDS, [getattr(policy, kind) for kind in KINDS])[0]
    sentences: list[Sentence] = []
    if kind == "sentence":
        sentences = _choose(_without_priors(record.get("sentences") or [], policy), policy, chance, rarity)
    elif kind == "prompt":
        sentences = _prompts(record.get("labels") or {}, policy, chance, rarity)
    if sentences:
        text, labels = _joined(sentences), _merge(sentences)
    else:
        text, labels = _passage(record, kind, policy, chance)
    if policy.marks != "keep":
        text = replace_marks(text, policy.mask if policy.marks == "mask" else "") or text
    if policy.paraphrases:
        text = load_paraphrases(policy.paraphrases)(text, chance)
    return text, labels


def _passage(record: dict[str, Any], kind: str, policy: TextConfig, chance: random.Random) -> tuple[str, Labels]:
    """A section or the whole report, as it stands or without some of its sentences."""
    report, labels = record.get("text") or "", record.get("labels") or {}
    section = (record.get("sections") or {}).get(kind) or ""
    cut = policy.priors == "drop" or policy.max_words > 0
    if not section and not cut:
        return report, labels
    text = section or report
    stated = {sentence["text"]: sentence["labels"] for sentence in record.get("sentences") or []}
    sentences = [{"text": sentence, "labels": stated.get(sentence, {})} for sentence in split_sentences(text)]
    kept = _shortened(_without_priors(sentences, policy), policy, chance) if cut else sentences
    whole = kept == sentences
    if not whole:
        text = _joined(kept)
    return text, labels if not stated or (whole and " ".join(text.split()) == report) else _merge(kept)


def _without_priors(sentences: list[Sentence], policy: TextConfig) -> list[Sentence]:
    """The sentences without references to priors; as they are where nothing else would be left."""
    if policy.priors == "keep":
        return sentences
    left = [sentence | {"text": without_priors(sentence["text"])} for sentence in sentences]
    return [sentence for sentence in left if sentence["text"]] or sentences


def _shortened(sentences: list[Sentence], policy: TextConfig, chance: random.Random) -> list[Sentence]:
    """Consecutive sentences of at most `max_words` words together, at least one."""
    lengths = [len(sentence["text"].split()) for sentence in sentences]
    if not policy.max_words or sum(lengths) <= policy.max_words:
        return sentences
    start = 0
    if policy.part == "window":
        # Up to the first start whose window reaches the end: later ones would only be shorter.
        starts = [i for i in range(len(lengths)) if i == 0 or sum(lengths[i - 1 :]) > policy.max_words]
        start = chance.choice(starts)
    end = start + 1
    while sum(lengths[start : end + 1]) <= policy.max_words and end < len(lengths):
        end += 1
    return sentences[start:end]


def _prompts(labels: Labels, policy: TextConfig, chance: random.Random, rarity: Rarity | None) -> list[Sentence]:
    """A sentence for some of the labels that are stated and have a template."""
    spoken = [
        {"labels": {name: state}}
        for name, state in labels.items()
        if state is not None and policy.prompts.of(name, state)
    ]
    chosen = _choose(spoken, policy, chance, rarity)
    for sentence in chosen:
        ((name, state),) = sentence["labels"].items()
        sentence["text"] = policy.prompts.sentence(name, state, chance)
    return chosen


def _choose(
    sentences: list[Sentence], policy: TextConfig, chance: random.Random, rarity: Rarity | None
) -> list[Sentence]:
    """A random number of sentences in random order, without repetition; none if there are none."""
    if not sentences:
        return []

    def weight(stated: dict[str, int]) -> float:
        # A sentence that states nothing counts as the commonest one.
        rare = max((rarity.get(item, 1.0) for item in stated.items()), default=1.0) if rarity else 1.0
        denies = bool(stated) and not any(stated.values())
        return rare * policy.denials if denies else rare

    number = min(len(sentences), chance.randint(1, policy.sentences))
    # The largest of u^(1/w) are a weighted sample without replacement (Efraimidis and Spirakis, 2006).
    keys = [chance.random() ** (1 / weight(sentence["labels"])) for sentence in sentences]
    order = sorted(range(len(sentences)), key=lambda index: -keys[index])
    return [sentences[index] for index in order[:number]]


def _joined(sentences: list[Sentence]) -> str:
    return " ".join(sentence["text"] for sentence in sentences)


def _merge(sentences: list[Sentence]) -> Labels:
    """Labels of several sentences together: present over uncertain over absent; a finding belies No Finding."""
    merged: Labels = {}
    rank = {PRESENT: 2, UNCERTAIN: 1, ABSENT: 0}
    for sentence in sentences:
        for name, value in sentence["labels"].items():
            known = merged.get(name)
            if known is None or rank[value] > rank[known]:
                merged[name] = value
    if merged.get(NO_FINDING) == PRESENT:
        others = {value for name, value in merged.items() if name not in (NO_FINDING, SUPPORT_DEVICES)}
        merged[NO_FINDING] = ABSENT if PRESENT in others else UNCERTAIN if UNCERTAIN in others else PRESENT
    return merged
