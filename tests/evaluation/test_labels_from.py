"""Labels of any label set from any field of the records, or from a table: what is said, and what is refused."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from medclip_lab.data.manifest import Manifest
from medclip_lab.errors import UserError
from medclip_lab.evaluation import suite
from medclip_lab.evaluation.calibrate import calibrate
from medclip_lab.evaluation.gather import read_records
from medclip_lab.evaluation.labels_from import LabelsFrom, lines_of_labels
from medclip_lab.inference.encoder import load


def table(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_lists_and_votes_deny_what_they_do_not_name() -> None:
    record = {"finding_labels": ["Pleural_Thickening", "Effusion"], "votes": {"COPD": 1, "Edema": 0}}
    listed = LabelsFrom("finding_labels").of(record, ["Pleural Thickening", "Mass"])
    assert listed == {"Pleural Thickening": 1, "Mass": 0, "Effusion": 1}
    assert LabelsFrom("votes").of(record, ["copd", "Edema", "Mass"]) == {"copd": 1, "Edema": 0, "Mass": 0}
    assert LabelsFrom("votes").of({"votes": {}}, ["Mass"]) == {"Mass": 0}, "who saw nothing at all denies it"
    assert LabelsFrom("votes").of({"labels": {"Edema": 1}}, ["Edema"]) == {}, "no votes were counted"
    several = {"readers": 3, "votes": {"Edema": 2, "Mass": 1, "COPD": 3}}
    assert LabelsFrom("votes").of(several, ["Edema", "Mass", "COPD"]) == {"Edema": 1, "Mass": -1, "COPD": 1}


def test_states_of_a_field_say_what_is_unknown_and_uncertain() -> None:
    states = {"pleural EFFUSION": 1.0, "Edema": float("nan"), "Mass": -1, "Age": None, "Hernia": False}
    found = LabelsFrom("mine").of({"mine": states}, ["Pleural Effusion", "Edema", "Mass", "Hernia"])
    assert found == {"Pleural Effusion": 1, "Edema": None, "Mass": -1, "Age": None, "Hernia": 0}
    with pytest.raises(UserError, match=r"--labels-from mine: label column 'Edema' holds '0\.7'"):
        LabelsFrom("mine").of({"mine": {"Edema": 0.7}}, ["Edema"])


def test_a_table_is_matched_by_its_first_column(tmp_path: Path) -> None:
    text = "study_id,Age,pleural_effusion,Edema,Tumour\ns1,61,1.0,nan,1\ns2,44,-1,0,0\ns3,50,,,1\n"
    truth = LabelsFrom(table(tmp_path / "labels.csv", text))
    records = [{"study_id": f"s{number}", "labels": {"Edema": 1}} for number in range(1, 5)]
    labels, told = truth.label(records, ["Pleural effusion", "Edema", "Lung tumor", "Oedema"])
    assert labels[0] == {"Pleural effusion": 1, "Edema": None}
    assert labels[1] == {"Pleural effusion": -1, "Edema": 0}
    assert labels[2] == {"Pleural effusion": None, "Edema": None}
    assert labels[3] == {}, "no row: not labelled, whatever the record says"
    assert (told["studies"], told["without"]) == (3, 1)
    row = {"as": "pleural_effusion", "present": 1, "absent": 0, "uncertain": 1, "unknown": 1}
    assert told["labels"]["Pleural effusion"] == row
    assert told["labels"]["Lung tumor"]["reason"].endswith("labels.csv; did you mean 'Tumour'?")
    assert told["labels"]["Oedema"]["reason"].endswith("labels.csv"), "Edema is another label's already"
    lines = "\n".join(lines_of_labels(told))
    assert "Pleural effusion: 1 uncertain, left out" in lines
    assert "did you mean 'Tumour'?" in lines


def test_a_table_of_images_speaks_of_the_image_at_hand(tmp_path: Path) -> None:
    truth = LabelsFrom(table(tmp_path / "labels.tsv", "image_id\tEdema\na\t1\nb\t0\n"))
    record = {"study_id": "s", "image_id": ["a", "b"]}
    assert truth.of(record, ["Edema"]) == {"Edema": 1}
    assert truth.of(record | {"image": 1}, ["Edema"]) == {"Edema": 0}
    assert truth.of(record | {"image": 2}, ["Edema"]) == {}


RECORDS = [
    {
        "study_id": "s1",
        "labels": {"Pleural Effusion": 1},
        "finding_labels": ["Effusion"],
        "twice": {"Effusions": 1, "effusions": 0},
        "nothing": {},
    }
]


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("labels", r"no label of the set is named in field 'labels': 'Effusions'; did you mean 'Pleural Effusion'\?"),
        ("finding_label", r"no study has a field 'finding_label' with labels; did you mean 'finding_labels'\?"),
        ("study_id", "no study has a field 'study_id' with labels"),
        ("nothing", "field 'nothing' is empty in all 1 studies"),
        (
            "study_id,Mass\ns1,1\n",
            r"no label of the set is named in .*\.csv: 'Effusions'$",
        ),
        ("studyid,Effusions\ns1,1\n", "its first column 'studyid' is no field of the studies: name it study_id"),
        ("study_id,Effusions\ns9,1\n", "column 'study_id' has none of the 1 studies"),
        ("study_id,Effusions\ns1,1\ns1,0\n", "line 3: an id of column 'study_id' stands there twice"),
        ("study_id,Effusions,effusions\ns1,1,0\n", "columns Effusions and effusions are one label: keep one"),
        ("study_id,Effusions,Effusions\ns1,1,0\n", "columns Effusions and Effusions are one label: keep one"),
        ("twice", "--labels-from twice: a study has 'Effusions' twice, and says another thing of each"),
        ("study_id,Effusions\ns1,yes\n", r"line 2: label column 'Effusions' holds 'yes', one of 1, 0, -1 or blank"),
    ],
)
def test_what_cannot_be_is_refused(where: str, message: str, tmp_path: Path) -> None:
    if "\n" in where:
        where = table(tmp_path / "labels.csv", where)
    with pytest.raises(UserError, match=message) as error:
        LabelsFrom(where).label(RECORDS, ["Effusions"])
    assert "\n" not in str(error.value)
    assert "s1" not in str(error.value)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory, toy_shards: Manifest) -> tuple[str, str]:
    """A label set with a name that no shard has, and a table of it that tells the opposite of the shards."""
    folder = tmp_path_factory.mktemp("own")
    prompts = "positive: [Heart size is normal.], negative: [The heart is enlarged.]"
    (folder / "small.yaml").write_text(f"name: small\nlabels:\n  - {{name: Small Heart, {prompts}}}\n")
    rows = [
        f"{record['study_id']},{1 - record['labels']['Cardiomegaly']}\n"
        for split in ("train", "val", "test")
        for record in read_records(toy_shards.folder, split)
    ]
    return str(folder / "small.yaml"), table(folder / "labels.csv", "study_id,small_heart\n" + "".join(rows))


def test_evaluate_and_calibrate_by_a_table(
    own: tuple[str, str], toy_bundle: Path, toy_shards: Manifest, tmp_path: Path
) -> None:
    labelset, where = own
    bundle = Path(shutil.copytree(toy_bundle, tmp_path / "bundle"))
    encoder = load(bundle, device="cpu")
    options: dict[str, Any] = {"draws": 20, "labels_from": where}
    extras, none = suite.Extras(probes=["knn"]), suite.Extras()
    results = suite.run(encoder, toy_shards.folder, "test", labelset, extras, **options).results
    assert results["zero_shot"]["labels"][0]["auroc"] > 0.9
    assert results["probes"]["knn"]["macro"]["auroc"] > 0.9, "labels of the training studies come from the table too"
    assert results["labels_from"]["sha256"]
    models = suite.Models(ensemble=[encoder], compare=encoder)
    results = suite.run(encoder, toy_shards.folder, "test", labelset, none, models, **options).results
    assert results["zero_shot"]["comparison"]["macro"]["auroc"]["difference"] == pytest.approx(0, abs=1e-12)
    with pytest.raises(UserError, match="no label of the set is named in field 'labels': 'Small Heart'"):
        suite.run(encoder, toy_shards.folder, "test", labelset, none, draws=20)
    calibration = calibrate(encoder, toy_shards.folder, labelset, "train", labels_from=where)
    assert calibration.labels["Small Heart"]["sensitivity"] > 0.8
    assert calibration.facts["labels_from"]["labels"]["Small Heart"]["as"] == "small_heart"
