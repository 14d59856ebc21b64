"""The phantom: the same everywhere, varied, consistent between picture, report and labels."""

import io
import re
from collections import Counter, defaultdict
from itertools import islice, pairwise

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from medclip_lab.data.findings import CHEXPERT14, NO_FINDING, SUPPORT_DEVICES
from medclip_lab.data.sample import SPLITS, Sample
from medclip_lab.data.sources.phantom import Phantom
from medclip_lab.data.sources.reading import read_all
from medclip_lab.errors import UserError

STUDIES = 640


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return list(read_all(Phantom(STUDIES, seed=5, size=64)))


def picture(sample: Sample, number: int = 0) -> NDArray[np.float64]:
    return np.asarray(Image.open(io.BytesIO(sample.images[number][1])), dtype=np.float64)


def inside(image: NDArray[np.float64], box: list[float]) -> float:
    """Mean brightness in a box."""
    height, width = image.shape
    x0, y0, x1, y1 = box
    return float(image[int(y0 * height) : int(np.ceil(y1 * height)), int(x0 * width) : int(np.ceil(x1 * width))].mean())


def test_same_seed_same_bytes() -> None:
    first, second = (list(read_all(Phantom(30, seed=3, size=48))) for _ in range(2))
    assert first == second
    other = list(read_all(Phantom(30, seed=4, size=48)))
    assert not {s.study_id for s in first} & {s.study_id for s in other}
    assert not {s.images[0][1] for s in first} & {s.images[0][1] for s in other}
    assert [s.text for s in first] != [s.text for s in other]


def test_pictures_of_a_study_differ_from_each_other(samples: list[Sample]) -> None:
    files = [data for sample in samples for _, data in sample.images]
    assert len(set(files)) == len(files)


def test_studies_are_numbered_in_order() -> None:
    records = Phantom(120, seed=1, size=32).records()
    assert [record.study_id for record in records] == [f"phantom-1-{number:06d}" for number in range(120)]


def test_fewer_studies_are_the_beginning_of_more() -> None:
    many = read_all(Phantom(60, seed=2, size=32))
    assert list(read_all(Phantom(25, seed=2, size=32))) == list(islice(many, 25))


def test_a_study_needs_no_other_to_be_read_first() -> None:
    source = Phantom(20, seed=3, size=32)
    in_order = list(read_all(source))
    assert [source.read(record, lambda *_: None) for record in reversed(source.records())] == in_order[::-1]


def test_every_label_has_every_state(samples: list[Sample]) -> None:
    for name in CHEXPERT14:
        states = Counter(sample.labels[name] for sample in samples)
        assert set(states) == {1, 0, -1, None}, f"{name}: {states}"
    assert all(tuple(sample.labels) == CHEXPERT14 for sample in samples)


def test_prevalences(samples: list[Sample]) -> None:
    share = {name: sum(s.labels[name] == 1 for s in samples) / len(samples) for name in CHEXPERT14}
    for name in CHEXPERT14:
        assert 0.05 <= share[name] <= 0.36, f"{name}: {share[name]:.3f}"
        doubted = sum(s.labels[name] == -1 for s in samples) / len(samples)
        assert doubted < 0.08, f"{name} uncertain: {doubted:.3f}"
    assert 0.20 <= share[NO_FINDING] <= 0.32
    assert 0.18 <= sum(len(s.images) == 2 for s in samples) / len(samples) <= 0.28


def test_findings_come_together_as_they_do(samples: list[Sample]) -> None:
    def lift(a: str, b: str) -> float:
        """How many times as often both are there as chance would have it."""
        has = {name: np.array([s.extra["truth"][name]["present"] for s in samples]) for name in (a, b)}
        return float((has[a] & has[b]).mean() / (has[a].mean() * has[b].mean()))

    for a, b in (
        ("Edema", "Cardiomegaly"),
        ("Edema", "Pleural Effusion"),
        ("Pneumonia", "Consolidation"),
        ("Fracture", "Pneumothorax"),
        ("Atelectasis", "Pleural Effusion"),
        ("Atelectasis", SUPPORT_DEVICES),
    ):
        assert lift(a, b) > 1.2, (a, b, lift(a, b))
    assert lift("Lung Lesion", "Edema") < 1.2


def test_labels_follow_the_sentences(samples: list[Sample]) -> None:
    for sample in samples:
        stated: dict[str, set[int]] = defaultdict(set)
        for sentence in sample.sentences:
            assert sentence["text"] in sample.text
            for name, state in sentence["labels"].items():
                stated[name].add(state)
        for name in CHEXPERT14:
            states = stated[name]
            expected = 1 if 1 in states else -1 if -1 in states else 0 if 0 in states else None
            assert sample.labels[name] == expected, (sample.study_id, name)
        if sample.labels[NO_FINDING] == 1:
            others = {sample.labels[name] for name in CHEXPERT14 if name not in (NO_FINDING, SUPPORT_DEVICES)}
            assert others <= {0, None}, sample.study_id


def test_report_says_what_was_drawn(samples: list[Sample]) -> None:
    unmentioned = present = 0
    for sample in samples:
        for name, truth in sample.extra["truth"].items():
            if name in (NO_FINDING, "Lung Opacity"):  # these follow from words as well as from the picture
                continue
            if sample.labels[name] == 1:
                assert truth["present"], (sample.study_id, name)
            if truth["present"]:
                present += 1
                unmentioned += sample.labels[name] in (0, None)
                assert sample.labels[name] in (1, -1) or truth["severity"] == "mild"
    assert 0 < unmentioned < 0.05 * present
    doubted = [s.extra["truth"][n]["present"] for s in samples for n in CHEXPERT14 if s.labels[n] == -1]
    assert 0.4 < np.mean(doubted) < 0.85


def test_report_text(samples: list[Sample]) -> None:
    texts = Counter(sample.text for sample in samples)
    assert max(texts.values()) >= 5, "normal reports repeat"
    assert len(texts) > 0.75 * len(samples), "the others do not"
    joined = " ".join(texts)
    assert "___" not in joined
    assert not re.search(r"\d{1,4}[-/]\d{1,2}[-/]\d{1,4}", joined), "no dates"
    assert re.search(r"\d\.\d cm", joined), "sizes with decimals"
    assert re.search(r"No [a-z ]+, [a-z ]+,? or [a-z ]+\.", joined), "negations in lists"
    assert any(sample.sections["impression"].startswith("1. ") for sample in samples)
    for sample in samples:
        assert set(sample.sections) == {"indication", "comparison", "findings", "impression"}
        assert all(sample.sections.values())
        assert sample.text == f"{sample.sections['findings']} {sample.sections['impression']}"
        assert not re.search(r"\s\s|\s\.|\.\.|\bNone\b", sample.text), sample.text


def test_side_of_the_report_is_the_side_of_the_picture(samples: list[Sample]) -> None:
    seen = 0
    for sample in samples:
        truth = sample.extra["truth"]["Pneumothorax"]
        if truth["present"] and sample.labels["Pneumothorax"] == 1:
            seen += 1
            sentence = next(s["text"] for s in sample.sentences if s["labels"].get("Pneumothorax") == 1)
            assert truth["side"] in sentence.lower()
            x0, _, x1, _ = sample.extra["regions"]["Pneumothorax"][0]["box"]
            assert ((x0 + x1) / 2 > 0.5) == (truth["side"] == "left")  # the patient's left is the picture's right
    assert seen > 10


def test_patients_and_splits(samples: list[Sample]) -> None:
    studies = Counter(sample.patient_id for sample in samples)
    assert set(studies.values()) == {1, 2, 3, 4}
    split_of: dict[str, set[str]] = defaultdict(set)
    for sample in samples:
        split_of[sample.patient_id].add(sample.split)
    assert all(len(splits) == 1 for splits in split_of.values())
    share = {split: sum(split in splits for splits in split_of.values()) / len(split_of) for split in SPLITS}
    assert 0.6 < share["train"] < 0.8
    assert 0.05 < share["val"] < 0.16
    assert 0.12 < share["test"] < 0.28


def test_follow_ups_resemble_the_study_before(samples: list[Sample]) -> None:
    pairs = [(a, b) for a, b in pairwise(samples) if a.patient_id == b.patient_id]
    names = ("Cardiomegaly", "Lung Lesion", "Pleural Effusion", SUPPORT_DEVICES)
    for name in names:
        kept = [b.extra["truth"][name]["present"] for a, b in pairs if a.extra["truth"][name]["present"]]
        fresh = [b.extra["truth"][name]["present"] for a, b in pairs if not a.extra["truth"][name]["present"]]
        assert np.mean(kept) > 0.5 > 3 * np.mean(fresh), name
    words = "unchanged", "stable", "increased", "worsening", "improv", "decreased", "resol"
    later = " ".join(b.text.lower() for _, b in pairs)
    assert all(word in later for word in words)
    assert all(a.extra["sex"] == b.extra["sex"] for a, b in pairs)


def test_files_and_keys(samples: list[Sample]) -> None:
    for sample in samples:
        assert re.fullmatch(r"[0-9a-z_-]+", sample.key)
        assert sample.key == sample.study_id
        assert re.fullmatch(r"[0-9a-z_-]+", sample.patient_id)
        assert len(sample.images) == len(sample.view)
        assert sample.view[0] in ("PA", "AP")
        assert sample.view[1:] in ([], ["LATERAL"])
        assert (sample.source, sample.license) == ("phantom", "CC0-1.0")
    for suffix, data in samples[0].images:
        image = Image.open(io.BytesIO(data))
        assert (suffix, image.format, image.mode, image.size) == ("png", "PNG", "L", (64, 64))


def test_exposure_is_that_of_a_radiograph(samples: list[Sample]) -> None:
    normal = [picture(s) for s in samples if s.extra["truth"][NO_FINDING]["present"]]
    lungs = np.mean([np.mean([image[22:34, 12:20], image[22:34, 44:52]]) for image in normal])
    middle = np.mean([image[40:50, 30:36] for image in normal])
    belly = np.mean([image[58:62, 12:52] for image in normal])
    assert lungs < 90 < 140 < min(middle, belly)
    assert np.std([image.mean() for image in normal]) > 4, "exposure varies"


def test_regions_lie_in_the_picture(samples: list[Sample]) -> None:
    seen = Counter[str]()
    for sample in samples:
        regions = sample.extra["regions"]
        for name, entries in regions.items():
            assert sample.extra["truth"][name]["present"], (sample.study_id, name)
            for entry in entries:
                x0, y0, x1, y1 = entry["box"]
                assert 0 <= x0 < x1 <= 1
                assert 0 <= y0 < y1 <= 1
                assert 0 <= entry["image"] < len(sample.images)
            seen[name] += 1
        for name, truth in sample.extra["truth"].items():
            if truth["present"] and name not in (NO_FINDING, "Edema"):  # edema is everywhere
                assert any(entry["image"] == 0 for entry in regions.get(name, [])), (sample.study_id, name)
    assert set(seen) == set(CHEXPERT14) - {NO_FINDING, "Edema"}


@pytest.mark.parametrize(
    ("name", "sign"),
    [("Lung Lesion", 1), ("Pneumonia", 1), ("Consolidation", 1), ("Pleural Effusion", 1), ("Pneumothorax", -1)],
)
def test_regions_differ_from_the_other_side(samples: list[Sample], name: str, sign: int) -> None:
    """On average what is boxed is brighter (pneumothorax: darker) than its mirror image."""
    differences = []
    for sample in samples:
        truth = sample.extra["truth"][name]
        if not truth["present"] or truth.get("side") not in ("left", "right"):
            continue
        image = picture(sample)
        for entry in sample.extra["regions"][name]:
            if entry["image"] == 0:
                x0, y0, x1, y1 = entry["box"]
                if name == "Pneumothorax":  # its lower part would be compared with the heart
                    y1 = (y0 + y1) / 2
                differences.append(sign * (inside(image, [x0, y0, x1, y1]) - inside(image, [1 - x1, y0, 1 - x0, y1])))
    assert len(differences) > 10
    values = np.array(differences)
    assert values.mean() > 3 * values.std() / np.sqrt(len(values)), (name, values.mean())


def test_large_heart_is_wide(samples: list[Sample]) -> None:
    width: dict[str, list[float]] = defaultdict(list)
    for sample in samples:
        truth = sample.extra["truth"]["Cardiomegaly"]
        for entry in sample.extra["regions"].get("Cardiomegaly", []):
            if entry["image"] == 0 and sample.view[0] == "PA":
                width[truth["severity"]].append(entry["box"][2] - entry["box"][0])
    spread = np.std(width["mild"]) / np.sqrt(len(width["mild"])) + np.std(width["severe"]) / np.sqrt(
        len(width["severe"])
    )
    assert np.mean(width["severe"]) - np.mean(width["mild"]) > spread


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"studies": 0}, "studies=0"),
        ({"studies": 4, "size": 31}, "size=31"),
        ({"studies": 4, "seed": -1}, "seed=-1"),
    ],
)
def test_bad_arguments(arguments: dict[str, int], named: str) -> None:
    with pytest.raises(UserError, match=named):
        Phantom(**arguments).records()
