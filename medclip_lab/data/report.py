"""Free-text radiology reports cut into sections and sentences.

Nothing here knows what a finding is; the labels come from `medclip_lab.data.labeller`.
"""

import re
from collections.abc import Mapping

# Canonical section -> the headers that open it. Longer headers are tried first, so "CLINICAL HISTORY" is not "HISTORY".
SECTION_HEADERS: dict[str, tuple[str, ...]] = {
    "findings": (
        "FINDINGS AND IMPRESSION",
        "FINDINGS/IMPRESSION",
        "FINDINGS",
        "FINDING",
        "RADIOGRAPHIC FINDINGS",
        "DESCRIPTION",
        "OBSERVATIONS",
        "RESULTS",
        "RESULT",
    ),
    "impression": (
        "IMPRESSION",
        "IMPRESSIONS",
        "FINAL IMPRESSION",
        "CONCLUSION",
        "CONCLUSIONS",
        "OPINION",
        "ASSESSMENT",
        "SUMMARY",
    ),
    "indication": (
        "INDICATION",
        "INDICATIONS",
        "CLINICAL INDICATION",
        "HISTORY",
        "CLINICAL HISTORY",
        "CLINICAL INFORMATION",
        "CLINICAL DATA",
        "CLINICAL DETAILS",
        "PATIENT HISTORY",
        "REASON FOR EXAM",
        "REASON FOR EXAMINATION",
        "REASON FOR STUDY",
        "REASON FOR THIS EXAMINATION",
    ),
    "comparison": ("COMPARISON", "COMPARISONS", "COMPARISON STUDY", "PRIOR STUDIES", "PRIOR STUDY"),
    "technique": ("TECHNIQUE", "PROCEDURE", "METHOD", "VIEWS"),
    "examination": ("EXAMINATION", "EXAM", "STUDY", "TYPE OF EXAMINATION"),
    "recommendation": ("RECOMMENDATION", "RECOMMENDATIONS"),
    "notification": ("NOTIFICATION", "NOTIFICATIONS"),
}
PREAMBLE = "preamble"

# What stands in a section that was left empty; some corpora write it out, and a model would learn it by heart.
_PLACEHOLDERS = frozenset(
    {"none", "n/a", "na", "as above", "see above", "see below", "see findings", "see impression"}
    | {"no findings", "no impression", "not available"}
)

_SECTION_OF = {header: section for section, headers in SECTION_HEADERS.items() for header in headers}
_ANY_HEADER = "|".join(
    re.escape(header).replace(r"\ ", r"[ \t]+") for header in sorted(_SECTION_OF, key=len, reverse=True)
)
_AT_START = r"(?:^|(?<=\n)|(?<=[.!?;]))[ \t*#]*"
# A header ends in a colon (any case where a line or sentence starts, capitalised elsewhere) or fills its own line.
_HEADER = re.compile(
    rf"{_AT_START}(?P<colon>(?i:{_ANY_HEADER}))[ \t*]*:[ \t*]*"
    rf"|(?:^|(?<=\n))[ \t*#]*(?P<line>(?i:{_ANY_HEADER}))[ \t*]*(?=\r?\n)"
    rf"|(?<![\w/-])(?=[A-Z])(?P<inner>{_ANY_HEADER}|(?i:(?<=[ \t])(?:{_ANY_HEADER})))[ \t]*:[ \t]*"
)


def parse_sections(text: str) -> dict[str, str]:
    """Cut a report at its headers; the keys are those of `SECTION_HEADERS`, in the order they appear.

    Headers are known in any case and under their aliases (HISTORY is "indication", CONCLUSION is "impression").
    Text before the first header is "preamble". A text without any header is all "findings": it was given to be read.
    A header that comes twice adds to its section. Empty sections and placeholders ("NO IMPRESSION") are left out.
    Words that head no section ("LUNGS:", "HEART:") stay where they are.
    """
    matches = list(_HEADER.finditer(text))
    if not matches:
        whole = _tidy(text)
        return {"findings": whole} if _says_something(whole) else {}
    parts = [(PREAMBLE, text[: matches[0].start()])]
    for match, following in zip(matches, [*matches[1:], None], strict=True):
        header = match["colon"] or match["line"] or match["inner"]
        section = _SECTION_OF[re.sub(r"[ \t]+", " ", header).upper()]
        parts.append((section, text[match.end() : following.start() if following else len(text)]))
    sections: dict[str, str] = {}
    for section, part in parts:
        part = _tidy(part)
        if _says_something(part):
            sections[section] = f"{sections[section]}\n{part}" if section in sections else part
    return sections


def _tidy(text: str) -> str:
    """Lines without the spaces around them, and no empty lines around the text."""
    return "\n".join(line.strip() for line in text.strip().splitlines())


def _says_something(text: str) -> bool:
    return any(map(str.isalnum, text)) and text.strip(" \t\n.:-").lower() not in _PLACEHOLDERS


def report_text(sections: Mapping[str, str]) -> str:
    """The text to train on: findings, then impression; once if they say the same."""
    parts = [" ".join(sections.get(section, "").split()) for section in ("findings", "impression")]
    return " ".join(dict.fromkeys(part for part in parts if part))


MARK = r"(?:_{2,}|\[\*\*.*?\*\*\]|(?-i:X{3,}))"
"""What de-identification leaves in the place of a name or a date: underscores in MIMIC-CXR, `[** ... **]` in MIMIC-III,
capital X in Open-i."""
_MARKS = re.compile(rf"(?:\b\w-)?{MARK}(?:'s\b)?(?:[ ,/-]*{MARK}(?:'s\b)?)*")  # "x-XXXX" is one mark


def replace_marks(text: str, instead: str = "") -> str:
    """The text with every mark of de-identification, or row of marks, replaced; one blank where nothing replaces it."""
    if instead:
        return _MARKS.sub(lambda _: instead, text)
    return re.sub(r" +(?=[.,;:)]|$)|(?<=\() +", "", " ".join(_MARKS.sub(" ", text).split()))


# No sentence ends after these, whatever follows.
_NEVER_LAST = frozenset(
    {"dr", "mr", "mrs", "ms", "prof", "vs", "cf", "approx", "e.g", "i.e", "eg", "ie", "fig", "viz", "incl", "resp"}
)
# No sentence ends after these if a lower-case letter or a digit follows.
_SELDOM_LAST = frozenset(
    {"etc", "a.m", "p.m", "m.d", "no", "nos", "yr", "yrs", "hr", "hrs", "wk", "wks", "mo", "mos", "min", "max"}
    | {"ext", "lat", "ant", "post", "inf", "sup", "rt", "lt", "bilat", "ca", "pt", "hx", "dx", "tx", "rx", "dept"}
)
_NUMBER = r"\(?(\d{1,2})(?:\.\)?|\))"  # of a list: "1.", "1)", "(1)", "1.)"
_LIST_NUMBER = re.compile(rf"{_NUMBER}(?:\s+|(?=[^\W\d_]))(?!$)")
_BULLET = re.compile(r"(?:[-*•–]|[.,;:!]+)\s+")  # also stops that were left over: "clear. . Normal"
# Where a sentence may end: closing punctuation, the end of a line, or the blank before a number that goes on a list.
_CANDIDATE = re.compile(
    rf"(?<=\S)[.?!]+[\"')\]]*(?=\s|$)|(?<=[a-z]{{2}})\.(?=[A-Z][a-z])|\n|(?<=\S)\s+(?={_NUMBER}\s*[^\W\d_])"
)
_LAST_WORD = re.compile(r"([^\W\d_](?:\.?[^\W\d_])*)$")


def split_sentences(text: str) -> list[str]:
    """Sentences of a report, in order, without list numbers and without fragments that hold no letter.

    A sentence ends at `.`, `?` or `!` before a blank, before a number that starts or goes on a list ("1. ... 2. ...",
    "1) ..."), and at an empty line or a bullet. It does not end inside a decimal ("2.5 cm", "2. 5 cm"), after an
    abbreviation ("Dr.", "e.g.", "approx."), or inside a mark of de-identification ("XXXX", underscores). A line break
    alone is a blank: reports are wrapped. Apart from list numbers, blanks and letterless fragments nothing is lost.
    """
    sentences: list[str] = []
    start = last = 0  # last: the list number of the last item; inside a sentence a list goes on only in sequence

    def flush(end: int) -> None:
        nonlocal start, last
        sentence, number = _without_number(" ".join(text[start:end].split()))
        last = number or last
        if any(map(str.isalpha, sentence)):
            sentences.append(sentence)
        start = end

    for match in _CANDIDATE.finditer(text):
        mark = match.group()
        if mark == "\n":
            rest = text[match.end() : match.end() + 80].lstrip(" \t")
            if rest.startswith(("\n", "\r")) or _BULLET.match(rest) or _LIST_NUMBER.match(rest):
                flush(match.end())
        elif mark.isspace():
            number, head = int(match[1]), text[start : match.start()]
            if (
                number == (_without_number(head.lstrip())[1] or last) + 1
                and head.strip()
                and (number > 1 or head.rstrip().endswith((":", ";")))
            ):
                flush(match.end())
        elif _ends_sentence(text, start, match):
            flush(match.end())
    flush(len(text))
    return sentences


def _without_number(sentence: str) -> tuple[str, int]:
    """The sentence without the list numbers, bullets and stops before it, and the last of those numbers (0 if none)."""
    number = 0
    while match := _LIST_NUMBER.match(sentence) or _BULLET.match(sentence):
        if match.re is _LIST_NUMBER:
            number = int(match[1])
        sentence = sentence[match.end() :]
    return sentence, number


def _ends_sentence(text: str, start: int, match: re.Match[str]) -> bool:
    before, after = text[start : match.start()], text[match.end() : match.end() + 80].lstrip()
    if re.fullmatch(r"\s*\(?\d{1,2}", before) and after:
        return False  # a list number on its own: it belongs to what follows
    if before[-1:].isdigit() and re.search(r"(?<!\S)\d+$", before[-40:]) and re.match(r"\d+\s*(?:cm|mm|x)\b", after):
        return False  # "2. 5 cm"
    if match.group() != ".":
        return True
    word = _LAST_WORD.search(before, max(before.rfind(" ") + 1, len(before) - 40))
    if word is None:
        return True
    last, following = word[1].lower(), after[:1]
    if last in _NEVER_LAST:
        return not following
    if last in _SELDOM_LAST or (len(last) == 1 and not before[: word.start()].rstrip().endswith(".")):
        return not (following.islower() or following.isdigit())
    return True
