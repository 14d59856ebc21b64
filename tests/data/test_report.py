"""Sections and sentences. Every text here is made up."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medclip_lab.data.report import SECTION_HEADERS, parse_sections, replace_marks, report_text, split_sentences

REMOVED = "_" * 3  # a mark of de-identification

# Pieces that meet in reports, so that hypothesis finds the places where they touch.
PIECES = st.sampled_from(
    ("1.", "2)", "(3)", "4.) ", "2.5 cm", "7", "T12.", "Dr.", "e.g.", "vs.", "FINDINGS:", "Impression:", "LUNGS:", "a",
     "Z", "é", "No effusion", "XXXX", REMOVED, ".", "..", "...", "?", ":", ";", "- ", " ", "\t", "\n", "\n\n", "\r\n")
)  # fmt: skip
TEXTS = st.one_of(
    st.text(max_size=80), st.lists(PIECES, max_size=25).map("".join), st.lists(PIECES, max_size=25).map(" ".join)
)


@pytest.mark.parametrize(
    "text, sections",
    [
        (
            "INDICATION: Cough. FINDINGS: Clear lungs. IMPRESSION: No disease.",
            {"indication": "Cough.", "findings": "Clear lungs.", "impression": "No disease."},
        ),
        (
            "history: cough\nfindings:\nClear lungs.\nNormal heart.\n\nConclusion: 1. Normal.",
            {"indication": "cough", "findings": "Clear lungs.\nNormal heart.", "impression": "1. Normal."},
        ),
        ("Clear lungs.", {"findings": "Clear lungs."}),
        ("", {}),
        (" \n ", {}),
        (
            "CHEST, TWO VIEWS\nTechnique: PA and lateral.\nOPINION: Normal.",
            {"preamble": "CHEST, TWO VIEWS", "technique": "PA and lateral.", "impression": "Normal."},
        ),
        ("IMPRESSION\nNormal chest.", {"impression": "Normal chest."}),
        ("FINDINGS AND IMPRESSION: Normal chest.", {"findings": "Normal chest."}),
        ("**FINDINGS:** Clear.\n**IMPRESSION**: Normal.", {"findings": "Clear.", "impression": "Normal."}),
        ("FINDINGS: LUNGS: Clear. HEART: Normal.", {"findings": "LUNGS: Clear. HEART: Normal."}),
        ("FINDINGS: Clear. IMPRESSION: NO IMPRESSION", {"findings": "Clear."}),
        ("FINDINGS: See impression. IMPRESSION: Normal.", {"impression": "Normal."}),
        ("FINDINGS: Clear lungs.\nFINDINGS: Normal heart.", {"findings": "Clear lungs.\nNormal heart."}),
        ("CLINICAL HISTORY: Pain. COMPARISON: None. FINDINGS: Clear.", {"indication": "Pain.", "findings": "Clear."}),
        (
            f"COMPARISON: {REMOVED}. FINDINGS: Clear.",
            {"findings": "Clear."},
        ),
        ("FINDINGS: Compared to the history: worse.", {"findings": "Compared to the history: worse."}),
    ],
)
def test_sections(text: str, sections: dict[str, str]) -> None:
    assert parse_sections(text) == sections


@pytest.mark.parametrize(
    "section, header", [(name, header) for name, all_ in SECTION_HEADERS.items() for header in all_]
)
def test_every_header_opens_its_section(section: str, header: str) -> None:
    for written in (header, header.lower(), header.title()):
        assert parse_sections(f"{written}: The lungs are clear.") == {section: "The lungs are clear."}


def test_report_text_is_findings_then_impression() -> None:
    sections = {"impression": "Normal.", "findings": "Clear\nlungs.", "indication": "Cough."}
    assert report_text(sections) == "Clear lungs. Normal."
    assert report_text({"findings": "Normal.", "impression": "Normal."}) == "Normal."
    assert report_text({"indication": "Cough."}) == ""


@pytest.mark.parametrize(
    "text, dropped, masked",
    [
        (f"Told to Dr. {REMOVED} at {REMOVED}.", "Told to Dr. at.", "Told to Dr. [MASK] at [MASK]."),
        (f"Seen by {REMOVED}, {REMOVED}{REMOVED}, now.", "Seen by, now.", "Seen by [MASK], now."),
        ("Compared to [**2101-3-4**] and [** Name **].", "Compared to and.", "Compared to [MASK] and [MASK]."),
        ("The XXXX XXXX is clear.", "The is clear.", "The [MASK] is clear."),
        ("Chest x-XXXX of XXXX's heart (XXXX).", "Chest of heart ().", "Chest [MASK] of [MASK] heart ([MASK])."),
        ("T12, ax_b, 3 xx and XX stay.", "T12, ax_b, 3 xx and XX stay.", "T12, ax_b, 3 xx and XX stay."),
        (REMOVED, "", "[MASK]"),
    ],
)
def test_marks_of_deidentification(text: str, dropped: str, masked: str) -> None:
    assert replace_marks(text) == dropped
    assert replace_marks(text, "[MASK]") == masked


@given(TEXTS)
def test_no_mark_is_left(text: str) -> None:
    assert not re.search(r"_{2}|XXX|\[\*\*.*\*\*\]", replace_marks(text.replace("\n", " ")))


@pytest.mark.parametrize(
    "text, sentences",
    [
        ("Clear lungs. Normal heart.", ["Clear lungs.", "Normal heart."]),
        ("clear lungs. normal heart", ["clear lungs.", "normal heart"]),
        ("1. Clear lungs. 2. Normal heart.", ["Clear lungs.", "Normal heart."]),
        ("1. Clear lungs 2. Normal heart", ["Clear lungs", "Normal heart"]),
        ("1) Clear lungs\n2) Normal heart", ["Clear lungs", "Normal heart"]),
        ("(1) Clear lungs. (2) Normal heart.", ["Clear lungs.", "Normal heart."]),
        ("1.Clear lungs. 2.Normal heart.", ["Clear lungs.", "Normal heart."]),
        ("A nodule of 2.5 cm. Clear lungs.", ["A nodule of 2.5 cm.", "Clear lungs."]),
        ("A nodule of 2. 5 cm is seen.", ["A nodule of 2. 5 cm is seen."]),
        ("Nodules of 1.2 x 3.4 cm and 5 mm.", ["Nodules of 1.2 x 3.4 cm and 5 mm."]),
        ("Fracture of rib 2. Clear lungs.", ["Fracture of rib 2.", "Clear lungs."]),
        ("Fracture at T12. Clear lungs.", ["Fracture at T12.", "Clear lungs."]),
        ("Told to Dr. Example at noon. Normal.", ["Told to Dr. Example at noon.", "Normal."]),
        ("Devices, e.g. Tubes, are seen.", ["Devices, e.g. Tubes, are seen."]),
        ("It measures approx. 3 cm.", ["It measures approx. 3 cm."]),
        ("Atelectasis vs. Pneumonia.", ["Atelectasis vs. Pneumonia."]),
        ("Called at 5 p.m. yesterday. Normal.", ["Called at 5 p.m. yesterday.", "Normal."]),
        ("Called at 5 p.m. Normal.", ["Called at 5 p.m.", "Normal."]),
        ("Compared to XXXX. XXXX XXXX unchanged.", ["Compared to XXXX.", "XXXX XXXX unchanged."]),
        (f"Compared to {REMOVED}, {REMOVED}. Normal.", [f"Compared to {REMOVED}, {REMOVED}.", "Normal."]),
        ("Is it new? Clear lungs!", ["Is it new?", "Clear lungs!"]),
        ("Clear lungs.. . Normal.", ["Clear lungs..", "Normal."]),
        ("Clear lungs.Normal heart.", ["Clear lungs.", "Normal heart."]),
        ("The lungs\nare clear.", ["The lungs are clear."]),
        ("Clear lungs\n\nNormal heart", ["Clear lungs", "Normal heart"]),
        ("- Clear lungs\n- Normal heart", ["Clear lungs", "Normal heart"]),
        ("1.\nClear lungs", ["Clear lungs"]),
        ("1. 2. 3.", []),
        ("", []),
    ],
)
def test_sentences(text: str, sentences: list[str]) -> None:
    assert split_sentences(text) == sentences


PLACEHOLDERS = ("none", "n/a", "na", "as above", "no findings", "no impression", "not available")


def letters(text: str) -> str:
    return "".join(filter(str.isalpha, text))


@given(TEXTS)
def test_splitting_loses_no_letter_and_keeps_no_list_number(text: str) -> None:
    sentences = split_sentences(text)
    assert "".join(map(letters, sentences)) == letters(text)
    for sentence in sentences:
        assert sentence == " ".join(sentence.split())
        assert any(map(str.isalpha, sentence))
        assert not re.match(r"\(?\d{1,2}[.)]\s", sentence)


@given(TEXTS)
def test_numbers_other_than_of_lists_stay(text: str) -> None:
    decimals = re.findall(r"\d\.\d+ cm", text)
    joined = " ".join(split_sentences(text))
    for decimal in decimals:
        assert decimal in joined


@given(TEXTS)
def test_sections_never_raise_and_lose_only_headers_and_placeholders(text: str) -> None:
    sections = parse_sections(text)
    assert set(sections) <= {"preamble", *SECTION_HEADERS}
    for content in sections.values():
        assert content == content.strip()
        assert content
    if not any(mark in text for mark in ":\n\r") and any(map(str.isalnum, text)):
        whole = "".join("".join(sections.values()).split())
        assert whole == "".join(text.split()) or (not sections and text.strip(" .-\t").lower() in PLACEHOLDERS)
