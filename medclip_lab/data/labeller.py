"""draft"""
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from medclip_lab.data import label_rules as rules
from medclip_lab.data.findings import ABSENT, CHEXPERT14, NO_FINDING, PRESENT, SUPPORT_DEVICES, UNCERTAIN, Labels
from medclip_lab.data.report import parse_sections, split_sentences


@dataclass(slots=True)
class _Mention:
    start: int
    end: int
    labels: tuple[str, ...]
    state: str = ""  # "", "no", "unsure", "skip"


def label_sentence(sentence: str) -> dict[str, int]:
    text = " ".join(sentence.lower().split())
    cues = [(m.lastgroup or "", m.start(), m.end()) for m in rules.CUE.finditer(text)]
    mentions = [_Mention(m.start(), m.end(), rules.LABELS_OF[m.lastgroup or ""]) for m in rules.MENTION.finditer(text)]
    normal, states = _organ_states(text)
    mentions = sorted(mentions + states, key=lambda m: m.start)
    _apply_cues(text, mentions, cues)
    found: dict[str, set[int]] = {}
    for m in mentions:
        if m.state == "skip":
            continue
        for label in m.labels:
            value = ABSENT if m.state == "no" else UNCERTAIN if m.state == "unsure" or label.endswith(rules.HEDGED) else PRESENT
            found.setdefault(label.rstrip(rules.HEDGED), set()).add(value)
    for label in normal:
        found.setdefault(label, set()).add(ABSENT)
    labels = {label: combine(values) for label, values in found.items()}
    for label, value in _global(text).items():
        if label != NO_FINDING:
            labels.setdefault(label, value)
        elif not any(v != ABSENT for n, v in labels.items() if n != SUPPORT_DEVICES):
            labels[label] = value
    return {name: labels[name] for name in CHEXPERT14 if name in labels}


def combine(values):
    return PRESENT if PRESENT in values else UNCERTAIN if UNCERTAIN in values else ABSENT


def _global(text):
    out = {}
    for m in rules.NO_ABNORMALITY.finditer(text):
        site = m["site"]
        bone = rules.BONE_SITE.search(site)
        if bone:
            out["Fracture"] = ABSENT
        g = rules.GLOBAL_SITE.findall(site)
        if [s for s in g if s not in ("cardiac", "pleural")] or (not bone and not site and not _organ_before(text, m.start())) or len(set(g)) > 1:
            out[NO_FINDING] = PRESENT
    if rules.NORMAL_STUDY.search(text):
        out[NO_FINDING] = PRESENT
    return out


def _organ_before(text, pos):
    seg = text[:pos]
    seg = re.split(r"[;,]|\bbut\b|\bwith\b", seg)[-1]
    return bool(rules.ORGAN.search(seg))


_BOUNDARY = re.compile(r"[;:]|\. |\b(?:but|however|although|with|without|which|while|except)\b")


def _organ_states(text):
    events = [(m.start(), m.end(), "organ", m.lastgroup) for m in rules.ORGAN.finditer(text)]
    if not events:
        return [], []
    events += [(m.start(), m.end(), "state", m.lastgroup) for m in rules.STATE.finditer(text)]
    events += [(m.start(), m.end(), "end", "") for m in _BOUNDARY.finditer(text)]
    for m in rules.NO_ABNORMALITY.finditer(text):
        if not m["site"]:
            events.append((m.start(), m.end(), "state", "normal"))
    events.sort()
    normal, mentions = [], []
    waiting = []  # organs before
    attributive = None
    last_end = 0
    for start, end, kind, name in events:
        if start < last_end and kind == "state":
            continue
        if kind == "end":
            waiting, attributive = [], None
        elif kind == "organ":
            if attributive is not None:
                _say(attributive, [(start, end, name)], normal, mentions, text)
            else:
                waiting.append((start, end, name))
        else:
            comma = re.search(r"(?:^|,|\band) ?(?:the |a |an |mildly |mild |stable |grossly |otherwise )*$", text[:start])
            allowed = rules.ORGANS_OF_STATE.get(name)
            subject = waiting if not (comma and not re.search(r"(?:is|are|appears?|remains?|be) *$", text[:start]) and rules.ORGAN.match(text[end:].lstrip())) else []
            if subject:
                _say((start, end, name), subject, normal, mentions, text)
                waiting, attributive = [], None
            else:
                attributive = (start, end, name) if not re.search(r"\b(?:is|are|appears?|remains?)(?: \w+){0,2} $", text[:start]) else None
                waiting = []
        last_end = max(last_end, end)
    return normal, mentions


def _say(state, organs, normal, mentions, text):
    start, end, name = state
    allowed = rules.ORGANS_OF_STATE.get(name)
    for ostart, oend, organ in organs:
        if allowed is not None and organ not in allowed:
            continue
        if name in ("normal", "clear", "intact"):
            normal.extend(rules.ABSENT_IF_NORMAL[organ])
        elif name == "limit":
            if organ == "heart":
                mentions.append(_Mention(start, end, (rules.CM + "?",)))
        elif name == "enlarged":
            word = text[start:end]
            if organ in ("heart", "cardiomediastinum", "mediastinum") and word.startswith(("engorg", "congest", "indist", "accent", "increased", "dilat", "full")) and word != "increased in size":
                continue
            if organ == "vessels" and word.startswith(("large", "big", "full")):
                continue
            labels = rules.PRESENT_IF_ABNORMAL.get(organ, ())
            if labels:
                mentions.append(_Mention(start, end, labels))


def _apply_cues(text, mentions, cues):
    for m in mentions:
        m.state = _forward(text, m, cues)
    for i in range(len(mentions) - 1):
        a, b = mentions[i], mentions[i + 1]
        if a.labels == b.labels or not a.labels or not b.labels:
            continue
        gap = text[a.end:b.start]
        if rules.CHOICE.match(gap) and not rules.VERB.search(gap):
            for x in (a, b):
                if x.state == "" and not (SUPPORT_DEVICES in x.labels):
                    x.state = "unsure"
    for name, start, end in cues:
        if name not in ("no_post", "unsure_post") and not (name == "unsure" and text[start:end].startswith(("versus", "vs"))):
            continue
        before = [i for i, m in enumerate(mentions) if m.end <= start]
        if not before:
            continue
        i = before[-1]
        if any(n in ("end",) and mentions[i].end <= s and e <= start for n, s, e in cues):
            continue
        if "," in text[mentions[i].end:start].rstrip(", "):
            continue
        group = [i]
        if name != "unsure":
            while i > 0 and rules.LISTED.match(text[mentions[i-1].end:mentions[i].start]) and not rules.VERB.search(text[mentions[i-1].end:mentions[i].start]):
                i -= 1
                group.append(i)
        for j in group:
            if name == "no_post":
                if mentions[j].state != "skip":
                    mentions[j].state = "no"
            elif mentions[j].state != "skip" and (name == "unsure_post" or mentions[j].state != "no"):
                mentions[j].state = "unsure"


def _forward(text, mention, cues):
    state, at = "", 0
    for name, start, end in cues:
        if start >= mention.start or (end > mention.start and start < mention.start and name == "end"):
            break
        if name == "end":
            state = ""
        elif name in ("no", "unsure", "skip"):
            if state == "no" and name == "unsure" and not rules.CONNECTOR.search(text[at:start]):
                continue
            state, at = name, end
    if not state:
        return ""
    between = text[at:mention.start]
    last = None
    for last in re.finditer(r",|\band\b", between):
        seg = between[last.end():]
        listed = re.search(r"\bor\b", text[at:mention.start + 60].split(";")[0][last.end():])
        if last.group() == "and":
            if rules.FRESH_START.match(seg) or rules.VERB.search(seg.split(",")[0]):
                return ""
        else:
            if rules.VERB.search(seg):
                return ""
            if rules.FRESH_START.match(seg) and not listed:
                return ""
            if state in ("unsure", "skip") and not listed:
                return ""
    return state


def label_report(report):
    if isinstance(report, str):
        report = parse_sections(report)
    if isinstance(report, Mapping):
        sents = [s for sec in ("findings", "impression") for s in split_sentences(report.get(sec, ""))]
    else:
        sents = list(report)
    return aggregate(label_sentence(s) for s in sents)


def aggregate(sentences):
    found = {}
    for labels in sentences:
        for k, v in labels.items():
            found.setdefault(k, set()).add(v)
    stated = found.pop(NO_FINDING, None) is not None
    out = {name: combine(found[name]) if name in found else None for name in CHEXPERT14}
    vals = {v for n, v in out.items() if n not in (NO_FINDING, SUPPORT_DEVICES)}
    out[NO_FINDING] = 0 if 1 in vals else -1 if -1 in vals else 1 if stated or 0 in vals else None
    return out


def mesh_labels(terms):
    out = {}
    terms = [t.strip().lower() for t in terms]
    terms = [t for t in terms if t and not t.startswith(rules.MESH_SILENT)]
    for t in terms:
        for p, labels in rules.MESH:
            if p.match(t):
                for l in labels: out[l] = 1
    if terms and not set(out) - {SUPPORT_DEVICES}:
        out[NO_FINDING] = 1
    return out
