"""The fourteen CheXpert observations read from report text by rules that know negation and doubt.

What the rules decide (the words are in `label_rules` and `label_cues`):

* A mention is present, absent after a negation ("no", "without", "free of", "is not seen", "no longer seen", "has
  resolved", "removal of") or uncertain after a doubt. Doubt is "possible", "may", "suggests", "thought to", "concerning
  for", "cannot exclude", "in the appropriate clinical setting", and also "likely", "probable", "unlikely", "rather
  than" and the members of "A or B", "A versus B", "A/B" and of a differential. "Consistent with" and "compatible with"
  are present. Within a sentence and over sentences present wins over uncertain, uncertain over absent.
* A cue holds over an enumeration, up to a semicolon, a "but", a verb or an adjective of what is there ("no effusion,
  stable cardiomegaly"). A cue after its mentions holds for the nearest one and those listed with it.
* "No large effusion", "no acute fracture", "no new opacity" are absent; "no change in", "not increased", "not
  resolved", "nearly resolved", "not without" negate nothing.
* What is past, asked for or only supposed mentions nothing: "history of", "treated pneumonia", "rule out", "evaluate
  for", "correlate for", "CT is more sensitive for", "if ...", "in case of". An old fracture is seen, a past pneumonia
  is not.
* What is elsewhere or is explained is no finding: a granuloma of the spleen, a mass of the chest wall, a nodule that is
  a nipple shadow, the thoracic cavity.
* Normal organs deny: lungs clear or normal -> Lung Opacity, Consolidation; heart -> Cardiomegaly; mediastinum ->
  Enlarged Cardiomediastinum; cardiomediastinum -> both; pulmonary vessels -> Edema (their congestion is Edema); pleural
  spaces -> Pleural Effusion, Pneumothorax; costophrenic sulci -> Pleural Effusion; bones intact -> Fracture. One clear
  lung denies nothing. At the upper limit of normal is normal; "borderline" is uncertain.
* Granuloma counts as Lung Lesion, scarring as Lung Opacity (of the pleura: Pleural Other), airspace disease and
  infiltrate as Lung Opacity only, congestion and heart failure as Edema, sternotomy as Support Devices. Blunting of a
  costophrenic angle is an uncertain Pleural Effusion. Nothing is inherited: Pneumonia does not set Lung Opacity.
* A sentence of global normality ("no acute cardiopulmonary abnormality", "normal chest", "no active disease") sets No
  Finding, "probably normal" to uncertain, unless it names something present or uncertain itself; it sets no absences.
  Clear lungs alone do not. "Abnormal chest" sets it to absent.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from medclip_lab.data import label_cues
from medclip_lab.data import label_rules as rules
from medclip_lab.data.findings import ABSENT, CHEXPERT14, NO_FINDING, PRESENT, SUPPORT_DEVICES, UNCERTAIN, Labels
from medclip_lab.data.report import parse_sections, split_sentences

READ_SECTIONS = ("findings", "impression")
"""The sections that speak of the image; the others ask, compare or recommend."""


@dataclass(slots=True)
class _Mention:
    start: int
    end: int
    labels: tuple[str, ...]
    state: str = ""
    """Empty for present, or the kind of the cue that holds: "no", "unsure", "skip"."""


class _Cue(NamedTuple):
    kind: str
    start: int
    end: int


class _Event(NamedTuple):
    """An organ, a state or a boundary, on the way through a sentence."""

    start: int
    end: int
    kind: str
    name: str


def label_sentence(sentence: str) -> dict[str, int]:
    """The observations that one sentence mentions: 1 present, 0 absent, -1 uncertain; the rest is left out."""
    text = " ".join(sentence.lower().split())
    mentions = [_Mention(m.start(), m.end(), rules.LABELS_OF[str(m.lastgroup)]) for m in rules.MENTION.finditer(text)]
    denied, states = _organ_states(text)
    if states:
        mentions = sorted([*mentions, *states], key=lambda mention: mention.start)
    if mentions:
        _apply_cues(text, mentions, [_Cue(str(m.lastgroup), m.start(), m.end()) for m in label_cues.CUE.finditer(text)])
    found: dict[str, set[int]] = {}
    for mention in mentions:
        for label in mention.labels if mention.state != "skip" else ():
            name = label.removesuffix(rules.HEDGED)
            doubt = mention.state == "unsure" or name != label
            value = ABSENT if mention.state == "no" else UNCERTAIN if doubt else PRESENT
            found.setdefault(name, set()).add(value)
    no_finding, bones_normal = _global_normality(text)
    for name in (*denied, *([rules.FRACTURE] if bones_normal else [])):
        found.setdefault(name, set()).add(ABSENT)
    labels = {name: _strongest(found[name]) for name in CHEXPERT14 if name in found}
    if no_finding is not None and all(value == ABSENT for name, value in labels.items() if name != SUPPORT_DEVICES):
        labels = {NO_FINDING: no_finding} | labels
    return labels


def label_report(report: str | Mapping[str, str] | Iterable[str]) -> dict[str, int | None]:
    """All fourteen observations of a report: 1, 0, -1, or None where it says nothing.

    Args:
        report: sections as `parse_sections` gives them, of which findings and impression are read; or the whole text;
            or sentences that are all to be read.
    """
    if isinstance(report, str):
        report = parse_sections(report)
    if isinstance(report, Mapping):
        return combine_labels(entry["labels"] for entry in labelled_sentences(report))
    return combine_labels(map(label_sentence, report))


def labelled_sentences(sections: Mapping[str, str]) -> list[dict[str, Any]]:
    """The sentences of findings and impression as {"text": str, "labels": {name: value}}, as a shard holds them."""
    sentences = (sentence for section in READ_SECTIONS for sentence in split_sentences(sections.get(section, "")))
    return [{"text": sentence, "labels": label_sentence(sentence)} for sentence in sentences]


def combine_labels(sentences: Iterable[Labels]) -> dict[str, int | None]:
    """Labels of a report from those of its sentences: present over uncertain over absent over None.

    No Finding is what follows from the other twelve pathologies (not Support Devices), as in CheXpert: 1 if none is
    present or uncertain and the report denies one or states normality. Where CheXpert leaves it blank we say more: 0 if
    one is present (or the study is called abnormal), -1 if one is uncertain and none present (or the study is called
    probably normal). None if the report says nothing of any. What is none of the twelve (emphysema) does not count.
    """
    found: dict[str, set[int]] = {}
    for labels in sentences:
        for name, value in labels.items():
            if value is not None:
                found.setdefault(name, set()).add(value)
    stated = found.pop(NO_FINDING, set())
    report = {name: _strongest(found[name]) if name in found else None for name in CHEXPERT14}
    values = {value for name, value in report.items() if name not in (NO_FINDING, SUPPORT_DEVICES)}
    if PRESENT in values or ABSENT in stated:
        report[NO_FINDING] = ABSENT
    elif UNCERTAIN in values or stated == {UNCERTAIN}:
        report[NO_FINDING] = UNCERTAIN
    elif stated or ABSENT in values:
        report[NO_FINDING] = PRESENT
    return report


def _strongest(values: set[int]) -> int:
    return next(value for value in (PRESENT, UNCERTAIN, ABSENT) if value in values)


# --------------------------------------------------------------------------------------------------------- normality
_COPULA = re.compile(r"(?<!there )\b(?:is|are|appears?|remains?|be)(?: \w+)? $")
_NEGATED = re.compile(r"\b(?:not|no|nor)(?: \w+)? $")
_ORGAN_BOUNDARY = re.compile(
    r"[;.] |\b(?:but|however|although|with|without|which|while|except|otherwise(?= \w+ \w+))\b"
)
_TO_ORGAN = re.compile(r"(?: of)?(?: the)?(?: (?!and |or |but |to )\w+){0,2} ")
_SAME_SUBJECT = re.compile(r"(?: in (?:size|contour|\w+ and \w+))?,? ?(?:to|or|and|but)(?: \w+){0,2} ")
_VERB_NEXT = re.compile(r"(?: \w+){0,3}? (?:is|are|was|were|has|have|appears?|remains?)\b")


def _global_normality(text: str) -> tuple[int | None, bool]:
    """What the sentence says of No Finding, and whether it calls the bones normal."""
    if rules.ABNORMAL_STUDY.search(text):
        return ABSENT, False
    says, bones = rules.NORMAL_STUDY.search(text), False
    for match in rules.NO_ABNORMALITY.finditer(text):
        sites = set(rules.CHEST_SITE.findall(match["site"]))
        bony = bool(rules.BONE_SITE.search(match.group()))
        bones |= bony
        if sites:  # one organ is not the chest, and "thoracic bony" is bony
            chest = len(sites) > 1 or not sites <= ({"thoracic", "chest"} if bony else {"cardiac", "pleural"})
        else:  # "the lungs show no abnormality" speaks of the lungs
            clause = re.split(r"[;,]|\bbut\b", text[: match.start()])[-1]
            chest = not bony and "soft" not in match["site"] and not rules.ORGAN.search(clause)
        says = match if chest else says
    if not says:
        return None, bones
    return UNCERTAIN if rules.DOUBT_BEFORE.search(text[: says.start()][-40:]) else PRESENT, bones


def _organ_states(text: str) -> tuple[list[str], list[_Mention]]:
    """What adjectives say of organs: the labels that normality denies, and mentions of what is enlarged or congested.

    An adjective takes the organs before it ("heart and mediastinum are normal"), or those that follow it at once
    ("normal heart size and mediastinum").
    """
    events = [_Event(m.start(), m.end(), "organ", str(m.lastgroup)) for m in rules.ORGAN.finditer(text)]
    if not events:
        return [], []
    events += [_Event(m.start(), m.end(), "state", str(m.lastgroup)) for m in rules.STATE.finditer(text)]
    events += [_Event(m.start(), m.end(), "end", "") for m in _ORGAN_BOUNDARY.finditer(text)]
    events += [
        _Event(m.start(), m.end(), "state", "normal") for m in rules.NO_ABNORMALITY.finditer(text) if not m["site"]
    ]
    events.sort()
    denied: list[str] = []
    mentions: list[_Mention] = []
    waiting: list[_Event] = []  # organs that no adjective has taken yet
    taken: list[_Event] = []  # the organs of the last adjective, for a second one: "normal or mildly enlarged"
    adjective: _Event | None = None  # one that stands before its organs
    last = 0  # where the last organ or state that counts ends

    def say(state: _Event, organs: list[_Event]) -> None:
        for organ in organs:
            if state.name in rules.NORMAL_STATES:
                if organ.name in rules.NORMAL_STATES[state.name] and not _NEGATED.search(
                    text[max(0, state.start - 40) : state.start]
                ):
                    denied.extend(rules.ABSENT_IF_NORMAL[organ.name])
            elif labels := rules.PRESENT_IF.get((state.name, organ.name)):
                mentions.append(_Mention(state.start, state.end, labels))

    for number, event in enumerate(events):
        if event.kind == "end":
            waiting, taken, adjective = [], [], None
        elif event.kind == "organ":
            gap = text[last : event.start]
            starts_clause = bool(adjective and last > adjective.end and _VERB_NEXT.match(text, event.end))
            if adjective and gap.count(" ") <= 5 and not starts_clause and not label_cues.VERB.search(gap):
                say(adjective, [event])
                taken.append(event)
            else:
                adjective = None
                waiting.append(event)
            last = event.end
        else:
            before = text[max(0, event.start - 40) : event.start]
            following = next((later for later in events[number + 1 :] if later.kind != "state"), None)
            organ_next = (
                following is not None
                and following.kind == "organ"
                and _TO_ORGAN.fullmatch(text, event.end, following.start)
            )
            if organ_next and (text.startswith(" of ", event.end) or not _COPULA.search(before)):
                if event.name == "neutral":
                    continue  # "stable cardiac enlargement"
                adjective, waiting, taken = event, [], []
            elif waiting and not (before.endswith(", ") and event.name not in rules.NORMAL_STATES):
                say(event, waiting)
                adjective, waiting, taken = None, [], waiting
            elif taken and adjective is None and _SAME_SUBJECT.fullmatch(text[last : event.start]):
                say(event, taken)
            last = event.end
    return denied, mentions


# --------------------------------------------------------------------------------------------------------------- cues
_ALTERNATIVE = re.compile(r"\bor\b")
_JOINT = re.compile(r",|\band\b")


def _apply_cues(text: str, mentions: list[_Mention], cues: list[_Cue]) -> None:
    """Set the state of every mention: cues before it, then alternatives, then cues after it, which know best."""
    for mention in mentions:
        mention.state = _state_from_before(text, mention, cues)
    for first, second in pairwise(mentions):
        gap = text[first.end : second.start]
        differ = first.labels and second.labels and first.labels != second.labels
        if differ and label_cues.CHOICE.fullmatch(gap) and not label_cues.VERB.search(gap):
            for mention in (first, second):
                if not mention.state and SUPPORT_DEVICES not in mention.labels:
                    mention.state = "unsure"
    for cue in cues:
        trailing = cue.kind == "unsure" and _looks_back(text, mentions, cue)
        if trailing or cue.kind == "versus" or cue.kind.endswith("_post"):
            _apply_backward(text, mentions, cues, cue)


def _looks_back(text: str, mentions: list[_Mention], cue: _Cue) -> bool:
    """Whether a doubt ends its clause ("small effusion suspected") and so speaks of what stands before it."""
    return not any(mention.end > cue.end for mention in mentions) and not re.match(r" \w+ \w", text[cue.end :])


def _state_from_before(text: str, mention: _Mention, cues: list[_Cue]) -> str:
    """The cue that reaches `mention` from the left, by kind; empty if none does."""
    active: _Cue | None = None
    for cue in cues:
        if cue.start >= mention.start:
            break
        if cue.kind == "end":
            active = None
        elif cue.kind in ("unsure", "unsure_list", "versus"):
            # "No opacity to suggest pneumonia" stays a negation, "no effusion, possible pneumonia" does not.
            negated = active is not None and active.kind in ("no", "skip") and _reaches(text, active, cue.start)
            if active is None or not negated or _leads(text, active, cue):
                active = cue
        elif cue.kind in ("no", "skip"):
            active = cue
    if active is None or not _reaches(text, active, mention.start):
        return ""
    return active.kind if active.kind in ("no", "skip") else "unsure"


def _leads(text: str, negation: _Cue, doubt: _Cue) -> bool:
    """Whether a doubt opens a new member of the enumeration after a negation."""
    joints = list(_JOINT.finditer(text, negation.end, doubt.start))
    lead = text[joints[-1].end() : doubt.start].split() if joints else None
    return lead is not None and len(lead) <= 2 and lead[:1] not in (["or"], ["nor"])


def _reaches(text: str, cue: _Cue, position: int) -> bool:
    """Whether the scope of `cue` goes on to `position`, over the commas and "and"s between."""
    for joint in _JOINT.finditer(text, cue.end, position):
        member = text[joint.end() : position]
        fresh = label_cues.FRESH_START.match(member) if cue.kind != "unsure_list" else None
        if joint.group() == "and":
            if (fresh and not fresh["side"]) or label_cues.VERB.search(member.partition(",")[0]):
                return False
        else:
            listed = _ALTERNATIVE.search(text[joint.end() : position + 60].partition(";")[0])
            if label_cues.VERB.search(member) or (fresh and not listed):
                return False
            if cue.kind not in ("no", "unsure_list") and not listed:
                return False
    return True


def _apply_backward(text: str, mentions: list[_Mention], cues: list[_Cue], cue: _Cue) -> None:
    """Give the mentions that `cue` looks back at their state: the nearest one, and those listed with it."""
    nearest = max((i for i, mention in enumerate(mentions) if mention.end <= cue.start), default=None)
    if nearest is None or "," in text[mentions[nearest].end : cue.start].rstrip(", "):
        return
    end = mentions[nearest].end
    if any(
        other.kind == "end" and end <= other.start < cue.start and text[other.start :][:4] != "with" for other in cues
    ):
        return
    group = [mentions[nearest]]
    closed = False  # a list ends in "and" or "or"; only then do the commas before it go on with it
    while cue.kind != "versus" and nearest > 0:
        gap = text[mentions[nearest - 1].end : mentions[nearest].start]
        joined = label_cues.LISTED.fullmatch(gap)
        closed |= bool(joined and joined["joint"])
        same = (
            mentions[nearest - 1].labels == mentions[nearest].labels and "," not in gap
        )  # "lines compatible with edema"
        if label_cues.VERB.search(gap) or not (same or (joined and closed)):
            break
        nearest -= 1
        group.append(mentions[nearest])
    for mention in group:
        if mention.state == "skip":
            continue
        if cue.kind in ("no_post", "skip_post"):
            mention.state = cue.kind.removesuffix("_post")
        elif cue.kind == "unsure_post" or mention.state != "no":
            mention.state = "unsure"
