"""Single sentences, each with what it states of which observation."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from medclip_lab.data.findings import ABSENT, PRESENT, UNCERTAIN
from medclip_lab.data.phantom.case import PARENCHYMAL, Case, Finding
from medclip_lab.data.phantom.phrases import DENIED, NOUNS, OPACITY, Phrase, lobe, pick

_CHANGE = {
    "new": ("new",),
    "unchanged": ("unchanged", "stable", "persistent"),
    "worse": ("increased", "worsening", "progressive"),
    "better": ("decreased", "improving", "improved"),
}


@dataclass(frozen=True)
class Sentence:
    """A sentence and what it states: finding name to 1, 0 or -1."""

    text: str
    labels: dict[str, int] = field(default_factory=dict)


def strongest(sentences: Iterable[Sentence]) -> dict[str, int]:
    rank = {PRESENT: 2, UNCERTAIN: 1, ABSENT: 0}
    labels: dict[str, int] = {}
    for sentence in sentences:
        for name, state in sentence.labels.items():
            if name not in labels or rank[state] > rank[labels[name]]:
                labels[name] = state
    return labels


def cap(text: str) -> str:
    return text[:1].upper() + text[1:]


def phrase_of(finding: Finding, rng: np.random.Generator, change: bool = True) -> Phrase:
    """A noun phrase, most often with what has changed since the last study."""
    phrase = NOUNS[finding.name](finding, rng)
    if change and finding.change in _CHANGE and rng.random() < 0.75:
        word = pick(rng, _CHANGE[finding.change])
        noun = f"{phrase.noun}, {word}" if finding.count > 1 else f"{word} {phrase.noun}"
        return Phrase(noun, phrase.number, phrase.states)
    return phrase


def present(finding: Finding, rng: np.random.Generator) -> Sentence:
    p = phrase_of(finding, rng)
    name = finding.name
    labels = {name: PRESENT, **p.states}
    a, be = p.with_article, p.verb
    frames = [
        f"There {be} {a}.",
        f"{cap(a)} {be} present.",
        f"{cap(a)} {be} seen.",
        f"{cap(a)} {be} noted.",
        f"{cap(p.noun)}.",
        f"Again seen {be} {a}." if finding.change in ("unchanged", "worse", "better") else f"Note is made of {a}.",
    ]
    if not finding.change or finding.change == "unchanged":
        word = ("mildly", "moderately", "severely")[finding.severity]
        if name == "Cardiomegaly":
            frames += [
                f"The heart is {word} enlarged.",
                f"The cardiac silhouette is {word} enlarged.",
                f"Heart size is {word} enlarged.",
            ]
        elif name == "Enlarged Cardiomediastinum":
            frames += [f"The mediastinum is {word} widened.", f"The mediastinal silhouette is {word} enlarged."]
    return Sentence(pick(rng, frames), labels)


def doubtful(finding: Finding, rng: np.random.Generator) -> Sentence:
    p = phrase_of(finding, rng, change=False)
    while p.states and finding.name != "Pneumonia":  # a hedge on "opacities consistent with" would be one too many
        p = phrase_of(finding, rng, change=False)
    labels = {finding.name: UNCERTAIN}
    a = p.with_article
    frames = [
        f"Possible {p.noun}.",
        f"{cap(a)} cannot be excluded.",
        f"There may be {a}.",
        f"Questionable {p.noun}.",
        f"Findings may represent {a} versus overlapping structures.",
        f"{cap(a)} {p.verb} suspected, but not certain.",
    ]
    if finding.name == "Pneumonia":
        frames = [
            f"Pneumonia in {lobe(finding)} cannot be excluded.",
            f"Possible early infection in {lobe(finding)}.",
            f"Findings in {lobe(finding)} may represent pneumonia versus aspiration.",
        ]
        if rng.random() < 0.4:
            return Sentence(
                f"Faint opacity in {lobe(finding)} may represent pneumonia.", {**OPACITY, finding.name: UNCERTAIN}
            )
    elif finding.name == "Cardiomegaly":
        frames += ["Heart size is borderline, possibly accentuated by technique.", "The heart may be mildly enlarged."]
    elif finding.name == "Enlarged Cardiomediastinum":
        frames += ["Mediastinal widening cannot be excluded in this rotated projection."]
    return Sentence(pick(rng, frames), labels)


def _listed(names: list[str], rng: np.random.Generator) -> Sentence:
    """One negation for one to three findings."""
    nouns = [pick(rng, DENIED[name]) for name in names]
    if len(nouns) > 1:
        comma = "," if len(nouns) > 2 and rng.random() < 0.5 else ""
        listed = ", ".join(nouns[:-1]) + f"{comma} or {nouns[-1]}"
    else:
        listed = nouns[0]
    frames = (
        f"No {listed}.",
        f"No {listed}.",
        f"There is no {listed}.",
        f"No {listed} is seen.",
        f"No {listed} is identified.",
    )
    return Sentence(pick(rng, frames), dict.fromkeys(names, ABSENT))


def denials(names: list[str], case: Case, rng: np.random.Generator) -> list[Sentence]:
    """Sentences for what is not there, a few findings to a sentence."""
    names, sentences = list(names), []
    if "Lung Opacity" in names:
        names.remove("Lung Opacity")
        # "Clear" would be wrong of lungs that show anything at all.
        clear = not any(case.findings[name].present or case.state(name) == UNCERTAIN for name in PARENCHYMAL)
        if clear and rng.random() < 0.8:
            texts = [
                "The lungs are clear.",
                "Lungs are clear.",
                "Both lungs are well expanded and clear.",
                "Clear lungs.",
            ]
            sentences.append(Sentence(pick(rng, texts), dict.fromkeys(("Lung Opacity", "Consolidation"), ABSENT)))
        elif clear:
            names.insert(0, "Lung Opacity")
    heart = [name for name in ("Enlarged Cardiomediastinum", "Cardiomegaly") if name in names]
    names = [name for name in names if name not in heart]
    if len(heart) == 2:
        texts = [
            "The cardiomediastinal silhouette is within normal limits.",
            "Cardiomediastinal contours are normal.",
            "The heart and mediastinum are unremarkable.",
            "Heart size and mediastinal contours are normal.",
        ]
        sentences.append(Sentence(pick(rng, texts), dict.fromkeys(heart, ABSENT)))
    elif heart == ["Cardiomegaly"]:
        texts = [
            "Heart size is normal.",
            "The heart is not enlarged.",
            "Heart size is within normal limits.",
            "No cardiomegaly.",
        ]
        sentences.append(Sentence(pick(rng, texts), {"Cardiomegaly": ABSENT}))
    elif heart:
        texts = ["The mediastinal contours are normal.", "No mediastinal widening.", "The mediastinum is not widened."]
        sentences.append(Sentence(pick(rng, texts), {"Enlarged Cardiomediastinum": ABSENT}))
    if "Fracture" in names and rng.random() < 0.7:
        names.remove("Fracture")
        texts = ["No acute osseous abnormality.", "The osseous structures are intact.", "No fracture is identified."]
        sentences.append(Sentence(pick(rng, texts), {"Fracture": ABSENT}))
    while names:
        take = int(rng.integers(1, 4))
        sentences.append(_listed(names[:take], rng))
        names = names[take:]
    return sentences
