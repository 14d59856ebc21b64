"""Which words of a study the text tower sees, and which labels those words state."""

import random
from dataclasses import dataclass
from typing import Any

Labels = dict[str, int | None]
Rarity = dict[tuple[str, int], float]
"""How rare a label in a state is, relative to the commonest one: 1 or more."""


@dataclass
class TextConfig:
    """Which words of a study the text tower sees, drawn anew each time: relative frequencies."""

    report: float = 1.0
    """Findings and impression together."""
    impression: float = 0.0
    findings: float = 0.0
    sentence: float = 0.0
    """Sentences of the report, at random."""
    sentences: int = 1
    """How many sentences make one text, at most."""
    denials: float = 1.0
    """How often a sentence that only denies findings is taken, relative to the others. "No pneumothorax" stands in most
    reports: below 1, what is there is read more often than what is not."""

    def __post_init__(self) -> None:
        if min(self.report, self.impression, self.findings, self.sentence) < 0 or self.sentences < 1:
            raise ValueError("text: frequencies cannot be negative, and sentences must be at least 1")
        if not 0 < self.denials <= 1:
            raise ValueError(f"text: denials must be in (0, 1], got {self.denials}")
        if self.report + self.impression + self.findings + self.sentence <= 0:
            raise ValueError("text: one of report, impression, findings, sentence must be above 0")


def draw_text(
    record: dict[str, Any], policy: TextConfig, chance: random.Random, rarity: Rarity | None = None
) -> tuple[str, Labels]:
    """One text of a study, and the labels that this text states.

    Args:
        record: the study's JSON, as a shard holds it.
        rarity: favour sentences of rare labels.
    """
    report, labels = record.get("text") or "", record.get("labels") or {}
    kinds = ("report", "impression", "findings", "sentence")
    kind = chance.choices(kinds, [policy.report, policy.impression, policy.findings, policy.sentence])[0]
    sentences = record.get("sentences") or []
    if kind == "sentence" and sentences:
        chosen = _sentences(sentences, policy, chance, rarity)
        return " ".join(sentence["text"] for sentence in chosen), _merge(chosen)
    if kind in ("impression", "findings"):
        return (record.get("sections") or {}).get(kind) or report, labels
    return report, labels


def _sentences(
    sentences: list[dict[str, Any]], policy: TextConfig, chance: random.Random, rarity: Rarity | None
) -> list[dict[str, Any]]:
    """A random number of sentences in random order, without repetition."""

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


def _merge(sentences: list[dict[str, Any]]) -> Labels:
    """Labels of several sentences together: present over uncertain over absent."""
    merged: Labels = {}
    rank = {1: 2, -1: 1, 0: 0}
    for sentence in sentences:
        for name, value in sentence["labels"].items():
            known = merged.get(name)
            if known is None or rank[value] > rank[known]:
                merged[name] = value
    return merged
