"""CheXpert, small and full, and CheXpert Plus: made-up studies in their layouts."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from medclip_lab.data.findings import CHEXPERT14
from medclip_lab.data.sources.chexpert import Chexpert
from medclip_lab.data.sources.chexpert_plus import ChexpertPlus
from medclip_lab.errors import UserError
from tests.data.sources.helpers import image, run, write, write_csv

# The order of the columns in the original tables.
LABELS = (
    *("No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema"),
    *("Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture"),
    "Support Devices",
)
COLUMNS = ("Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *LABELS)
BLANK: dict[str, int | None] = dict.fromkeys(CHEXPERT14)


def row(path: str, sex: str = "Female", age: str = "68", direction: str = "AP", **labels: str) -> list[str]:
    side = "Lateral" if "lateral" in path else "Frontal"
    return [path, sex, age, side, "" if side == "Lateral" else direction] + [
        labels.get(name.replace(" ", "_"), "") for name in LABELS
    ]


def tables(home: Path, prefix: str) -> None:
    train = [
        row(f"{prefix}/train/patient00001/study1/view1_frontal.jpg", No_Finding="1.0", Support_Devices="1.0"),
        row(f"{prefix}/train/patient00002/study2/view2_lateral.jpg", Edema="-1.0", Fracture="0.0"),
        row(f"{prefix}/train/patient00002/study2/view1_frontal.jpg", direction="PA", Edema="-1.0", Fracture="0.0"),
        row(f"{prefix}/train/patient00002/study1/view1_frontal.jpg", sex="Male", age="87", Pneumonia="1.0"),
    ]
    write_csv(home / "train.csv", COLUMNS, train)
    valid = [row(f"{prefix}/valid/patient64541/study1/view1_frontal.jpg", direction="PA", Cardiomegaly="1.0")]
    write_csv(home / "valid.csv", COLUMNS, valid)


IMAGES = {
    "train/patient00001/study1/view1_frontal.jpg": 10,
    "train/patient00002/study2/view2_lateral.jpg": 20,
    "train/patient00002/study2/view1_frontal.jpg": 30,
    "train/patient00002/study1/view1_frontal.jpg": 40,
    "valid/patient64541/study1/view1_frontal.jpg": 50,
}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    home = tmp_path / "CheXpert-v1.0-small"
    tables(home, "CheXpert-v1.0-small")
    for name, shade in IMAGES.items():
        write(home / name, image(shade, "JPEG"))
    return home


@pytest.fixture
def full(tmp_path: Path) -> Path:
    """As the archives of the full set unpack: training images stand without train/."""
    home = tmp_path / "chexpertchestxrays-u20210408"
    tables(home / "CheXpert-v1.0 batch 1 (validate & csv)", "CheXpert-v1.0")
    batches = {
        "CheXpert-v1.0 batch 1 (validate & csv)/valid": ["valid/patient64541"],
        "CheXpert-v1.0 batch 2 (train 1)": ["train/patient00001"],
        "CheXpert-v1.0 batch 3 (train 2)": ["train/patient00002"],
    }
    for name, shade in IMAGES.items():
        for batch, starts in batches.items():
            if name.startswith(tuple(starts)):
                write(home / batch / name.partition("/")[2], image(shade, "JPEG"))
    return home


def test_small_and_full_give_the_same_studies(small: Path, full: Path, tmp_path: Path) -> None:
    outcome = run(Chexpert(small), tmp_path / "shards")
    assert not outcome.bad
    assert not outcome.notes
    assert [(r.study_id, r.patient_id, r.split) for r in outcome.records] == [
        ("chexpert-patient00001-study1", "chexpert-patient00001", "train"),
        ("chexpert-patient00002-study2", "chexpert-patient00002", "train"),
        ("chexpert-patient00002-study1", "chexpert-patient00002", "train"),
        ("chexpert-patient64541-study1", "chexpert-patient64541", "val"),
    ]
    assert run(Chexpert(full)).samples == run(Chexpert(small.parent)).samples == outcome.samples


def test_views_labels_and_facts(small: Path) -> None:
    samples = run(Chexpert(small)).samples
    study = samples["chexpert-patient00002-study2"]
    assert study.view == ["PA", "LATERAL"]
    assert study.images == [("jpg", image(30, "JPEG")), ("jpg", image(20, "JPEG"))]
    assert study.labels == BLANK | {"Edema": -1, "Fracture": 0}
    assert study.extra == {"sex": "Female", "age": 68}
    assert samples["chexpert-patient00001-study1"].labels == BLANK | {"No Finding": 1, "Support Devices": 1}
    assert study.text == ""


def test_the_test_set_and_other_labels(small: Path) -> None:
    # chexlocalize/CheXpert/test_labels.csv has neither sex, age nor view, and its paths no first folder
    path = "test/patient64741/study1/view1_frontal.jpg"
    write_csv(small / "test_labels.csv", ("Path", *LABELS), [[path, *["0.0"] * 13, "1.0"]])
    write(small / path, image(60, "JPEG"))
    head = "CheXpert-v1.0/train/patient00001/study1/view1_frontal.jpg"
    write_csv(small / "train_cheXbert.csv", COLUMNS, [row(head, Atelectasis="-1.0")])
    samples = run(Chexpert(small, train_table="train_cheXbert.csv")).samples
    assert samples["chexpert-patient00001-study1"].labels == BLANK | {"Atelectasis": -1}
    test = samples["chexpert-patient64741-study1"]
    assert (test.split, test.view, test.extra) == ("test", [""], {"sex": "", "age": None})
    assert test.images == [("jpg", image(60, "JPEG"))]


def test_rows_twice_and_rows_that_contradict(small: Path) -> None:
    path = "CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg"
    write_csv(small / "train.csv", COLUMNS, [row(path, Edema="1.0"), row(path, Edema="1.0")])
    assert len(run(Chexpert(small)).samples["chexpert-patient00001-study1"].images) == 1
    write_csv(small / "train.csv", COLUMNS, [row(path, Edema="1.0"), row(path, Edema="0.0")])
    outcome = run(Chexpert(small))
    assert [note[:2] for note in outcome.notes] == [("chexpert-patient00001-study1", "contradicting labels")]
    assert outcome.samples["chexpert-patient00001-study1"].labels["Edema"] == 1


def test_hostile_paths_open_nothing_outside(small: Path) -> None:
    end = "patient00009/study1/view1_frontal.jpg"
    outside = write(small.parent / "outside" / end, image(99, "JPEG"))
    hostile = [f"{small.parent}/outside/{end}", f"../outside/{end}", f"CheXpert-v1.0-small/../../outside/{end}"]
    for path in hostile:
        write_csv(small / "train.csv", COLUMNS, [row(path)])
        outcome = run(Chexpert(small))
        assert outcome.bad == {"chexpert-patient00009-study1": ("missing image", "1 of 1 images: no such file")}
    assert outside.is_file()


@pytest.mark.parametrize(
    "name, columns, rows, message",
    [
        ("train.csv", COLUMNS, [], "no row below the column names"),
        ("train.csv", COLUMNS, [row("report.jpg")], "line 2: the Path does not end in"),
        ("train.csv", COLUMNS[:-1], [], "no column 'Support Devices'"),
        ("train.csv", ("File", *COLUMNS[1:]), [], "no column 'Path'"),
        ("valid.csv", COLUMNS, [row("CheXpert/valid/patient1/study1/view1_frontal.jpg", Edema="u")], "holds 'u'"),
    ],
)
def test_wrong_tables(small: Path, name: str, columns: Any, rows: Any, message: str) -> None:
    write_csv(small / name, columns, rows)
    with pytest.raises(UserError, match=message):
        Chexpert(small).records()


def test_missing_tables(small: Path) -> None:
    (small / "valid.csv").unlink()
    with pytest.raises(UserError, match=r"chexpert: neither valid\.csv nor valid\.csv\.gz in"):
        Chexpert(small).records()


# --------------------------------------------------------------------------------------------------------------- Plus

PLUS = (
    *("path_to_image", "path_to_dcm", "frontal_lateral", "ap_pa", "deid_patient_id", "patient_report_date_order"),
    *("report", "section_narrative", "section_clinical_history", "section_history", "section_comparison"),
    *("section_technique", "section_procedure_comments", "section_findings", "section_impression"),
    *("section_end_of_impression", "section_summary", "section_accession_number", "age", "sex", "race", "ethnicity"),
    *("interpreter_needed", "insurance_type", "recent_bmi", "deceased", "split"),
)


def plus_row(path: str, split: str = "train", **cells: str) -> list[str]:
    side = "Lateral" if "lateral" in path else "Frontal"
    patient = path.split("/")[1]
    known = {
        "path_to_image": path, "path_to_dcm": path.replace(".jpg", ".dcm"), "frontal_lateral": side,
        "ap_pa": "AP" if side == "Frontal" else "", "deid_patient_id": patient, "split": split, "age": "68.0",
        "sex": "Female", "race": "Unknown", "section_accession_number": "1234567",
        "report": "NARRATIVE: ... ACCESSION NUMBER: 1234567",
    }  # fmt: skip
    return [(known | cells).get(name, "") for name in PLUS]


REPORT = {
    "section_narrative": "RADIOGRAPHIC EXAMINATION OF THE CHEST.",
    "section_clinical_history": "Cough.",
    "section_history": "68-year-old with cough.",
    "section_findings": "\nThere is pulmonary edema.\n",
    "section_impression": "\n1. EDEMA.\n2. NO PNEUMOTHORAX.\n",
}


@pytest.fixture
def plus(tmp_path: Path) -> Path:
    home = tmp_path / "chexpert-plus"
    rows = [
        plus_row("train/patient42142/study5/view2_lateral.jpg", **REPORT),
        plus_row("train/patient42142/study5/view1_frontal.jpg", **REPORT),
        plus_row("valid/patient64541/study1/view1_frontal.jpg", split="valid"),
    ]
    write_csv(home / "df_chexpert_plus_240401.csv", PLUS, rows)
    for number, cells in enumerate(rows):
        write(home / "PNG" / "PNG" / cells[0].replace(".jpg", ".png"), image(10 * number))
    for part, states in (("impression", {"Edema": 1.0}), ("findings", {"Edema": -1.0}), ("report", {"Edema": 0.0})):
        lines = [{"path_to_image": cells[0]} | dict.fromkeys(LABELS) | states for cells in rows[:2]]
        write(home / "chexbert_labels" / f"{part}_fixed.json", "".join(json.dumps(line) + "\n" for line in lines))
    return home


def test_plus_studies_sections_and_labels(plus: Path, tmp_path: Path) -> None:
    outcome = run(ChexpertPlus(plus), tmp_path / "shards")
    assert [(r.study_id, r.patient_id, r.split) for r in outcome.records] == [
        ("chexpert-patient42142-study5", "chexpert-patient42142", "train"),
        ("chexpert-patient64541-study1", "chexpert-patient64541", "val"),
    ]
    sample = outcome.samples["chexpert-patient42142-study5"]
    assert sample.view == ["AP", "LATERAL"]
    assert sample.images == [("png", image(10)), ("png", image(0))]
    assert sample.text == "There is pulmonary edema. 1. EDEMA. 2. NO PNEUMOTHORAX."
    assert sample.sections["indication"] == "Cough.\n68-year-old with cough."
    assert sample.labels == BLANK | {"Edema": 1}
    assert [sentence["labels"] for sentence in sample.sentences] == [{"Edema": 1}, {"Edema": 1}, {"Pneumothorax": 0}]
    assert sample.extra == {"age": "68.0", "sex": "Female", "race": "Unknown"}
    assert "1234567" not in json.dumps([sample.sections, sample.extra])
    other = outcome.samples["chexpert-patient64541-study1"]
    assert (other.text, other.labels) == ("", BLANK)
    assert not outcome.notes


def test_plus_labels_of_other_parts_and_ours(plus: Path) -> None:
    def edema(labels: str) -> int | None:
        return run(ChexpertPlus(plus, labels=labels)).samples["chexpert-patient42142-study5"].labels["Edema"]

    assert [edema(labels) for labels in ("findings", "report", "rules")] == [-1, 0, 1]


def test_plus_images_of_chexpert(plus: Path, small: Path) -> None:
    write(small / "train/patient42142/study5/view1_frontal.jpg", image(70, "JPEG"))
    outcome = run(ChexpertPlus(plus, images=small))
    sample = outcome.samples["chexpert-patient42142-study5"]
    assert (sample.images, sample.view) == ([("jpg", image(70, "JPEG"))], ["AP"])
    assert [note[1] for note in outcome.notes] == ["missing image"]


def test_plus_report_without_findings_and_impression(plus: Path) -> None:
    rows = [plus_row("train/patient42142/study5/view1_frontal.jpg", section_narrative="CHEST.", section_findings=" . ")]
    write_csv(plus / "df_chexpert_plus_240401.csv", PLUS, rows)
    outcome = run(ChexpertPlus(plus))
    assert [note[1] for note in outcome.notes] == ["no findings and no impression"]
    assert outcome.only().sections == {"narrative": "CHEST."}


@pytest.mark.parametrize(
    "line, message",
    [
        ("not json", "line 1: no JSON object with path_to_image"),
        ("[1]", "line 1: no JSON object with path_to_image"),
        (json.dumps({"path_to_image": "a.jpg"}), "line 1: no key 'No Finding'"),
        (
            json.dumps({"path_to_image": "a.jpg"} | dict.fromkeys(LABELS, 7)),
            "line 1: label column 'No Finding' holds '7'",
        ),
    ],
)
def test_plus_wrong_label_files(plus: Path, line: str, message: str) -> None:
    write(plus / "chexbert_labels" / "impression_fixed.json", line + "\n")
    with pytest.raises(UserError, match=message):
        ChexpertPlus(plus).records()


def test_plus_says_what_is_wrong(plus: Path) -> None:
    source = ChexpertPlus(plus)
    with pytest.raises(UserError, match="labels: one of impression, findings, report, rules expected, got 'all'"):
        replace(source, labels="all").records()
    with pytest.raises(UserError, match="images: no such folder"):
        replace(source, images=plus / "nowhere").records()
    (plus / "chexbert_labels" / "impression_fixed.json").unlink()
    with pytest.raises(UserError, match=r"no chexbert_labels/impression_fixed\.json"):
        source.records()
    write_csv(
        plus / "df_chexpert_plus_240401.csv", PLUS, [plus_row("train/patient1/study1/view1_frontal.jpg", split="dev2")]
    )
    with pytest.raises(UserError, match="unknown split 'dev2'"):
        replace(source, labels="rules").records()
