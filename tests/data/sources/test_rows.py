"""Tables of the user's own as JSON lines, Parquet and Hugging Face datasets: the same rows give the same studies."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medclip_lab.data.findings import CHEXPERT14
from medclip_lab.data.sources.common import split_by_hash
from medclip_lab.data.sources.hf_dataset import HfDataset
from medclip_lab.data.sources.jsonl import Jsonl
from medclip_lab.data.sources.parquet import Parquet
from medclip_lab.data.sources.rows import RowSource
from medclip_lab.errors import UserError
from tests.data.sources.helpers import dicom, image, run, write

Row = dict[str, Any]


def write_jsonl(home: Path, rows: list[Row]) -> RowSource:
    write(home / "table.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return Jsonl(home)


def write_parquet(home: Path, rows: list[Row]) -> RowSource:
    home.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), home / "table.parquet", row_group_size=2)
    return Parquet(home)


def write_hf(home: Path, rows: list[Row], files: int = 2) -> RowSource:
    """As `Dataset.save_to_disk(num_shards=files)` of datasets 5.2 leaves it."""
    table = pa.Table.from_pylist(rows)
    home.mkdir(parents=True, exist_ok=True)
    names = []
    step = math.ceil(len(rows) / files)
    for number in range(files):
        names.append(f"data-{number:05d}-of-{files:05d}.arrow")
        with pa.ipc.new_stream(home / names[-1], table.schema) as writer:
            writer.write_table(table.slice(number * step, step), max_chunksize=1)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "d817383bd0213d8f", "_split": None}
    write(home / "state.json", json.dumps(state))
    features = {name: {"dtype": "string", "_type": "Value"} for name in table.schema.names}
    write(home / "dataset_info.json", json.dumps({"citation": "", "features": features, "license": ""}))
    return HfDataset(home)


WRITERS = [write_jsonl, write_parquet, write_hf]
Writer = Callable[[Path, list[Row]], RowSource]


@pytest.fixture(params=WRITERS, ids=["jsonl", "parquet", "hf-dataset"])
def writer(request: pytest.FixtureRequest) -> Writer:
    made: Writer = request.param
    return made


ROWS: list[Row] = [
    {"study_id": "s1", "patient_id": "p1", "image": "a.png", "view": "L", "text": "Small effusion.", "split": "train"},
    {
        "study_id": "s1",
        "patient_id": "p1",
        "image": "sub/b.png",
        "view": "pa",
        "text": "Small effusion.",
        "split": "train",
    },
    {
        "study_id": "s2",
        "patient_id": "p1",
        "image": None,
        "view": None,
        "text": "FINDINGS: Clear lungs.",
        "split": "train",
    },
    {"study_id": "s3", "patient_id": "p2", "image": "c.dcm", "view": "", "text": None, "split": "validation"},
    {"study_id": "s4", "patient_id": "p3", "image": "a.png", "view": "", "text": "INDICATION: Cough.", "split": "test"},
]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    home = tmp_path / "data"
    write(home / "a.png", image(1))
    write(home / "sub/b.png", image(2))
    write(home / "c.dcm", dicom(3, SOPInstanceUID="1.2.3"))
    return home


def test_rows_become_studies(writer: Writer, home: Path, tmp_path: Path) -> None:
    outcome = run(writer(home, ROWS), tmp_path / "shards")
    assert not outcome.bad
    assert [(r.study_id, r.patient_id, r.split) for r in outcome.records] == [
        ("s1", "p1", "train"), ("s2", "p1", "train"), ("s3", "p2", "val"), ("s4", "p3", "test")
    ]  # fmt: skip
    first, second, third, fourth = outcome.samples.values()
    assert first.images == [("png", image(1)), ("png", image(2))]
    assert first.view == ["LATERAL", "PA"]
    assert first.text == "Small effusion."
    assert first.labels["Pleural Effusion"] == 1
    assert (second.images, second.text) == ([], "Clear lungs.")
    assert (third.images[0][0], third.text, third.labels) == ("dcm", "", {})
    assert fourth.sections == {"indication": "Cough."}
    assert outcome.notes == [("s4", "no findings and no impression", "kept as an image without text")]


def test_an_image_of_two_captions_is_one_image(writer: Writer, home: Path) -> None:
    rows = [{"study_id": "s", "image": "a.png", "text": text} for text in ("Edema.", "Edema.", "No effusion.")]
    sample = run(writer(home, rows)).only()
    assert sample.images == [("png", image(1))]
    assert sample.text == "Edema. No effusion."


def test_options(writer: Writer, home: Path) -> None:
    rows = [{"picture": "b.png", "report": "Edema.", "exam": 7, "mrn": 3, "part": "dev", "side": "ap"}]
    source = replace(
        writer(home, rows), image="picture", text="report", study="exam", patient="mrn", split="part", view="side",
        image_folder=home / "sub", label_text=False, license="CC0-1.0", modality="DX",
    )  # fmt: skip
    sample = run(source).only()
    assert (sample.study_id, sample.patient_id, sample.split, sample.view) == ("7", "3", "val", ["AP"])
    assert sample.images == [("png", image(2))]
    assert (sample.labels, sample.sentences, sample.license, sample.modality) == ({}, [], "CC0-1.0", "DX")


def test_without_ids_and_splits(writer: Writer, home: Path) -> None:
    outcome = run(writer(home, [{"image": "a.png", "text": "Edema."}, {"image": "sub/b.png", "text": ""}]))
    assert [record.study_id for record in outcome.records] == ["a.png", "sub/b.png"]
    assert all(r.patient_id == r.study_id and r.split == split_by_hash(r.study_id) for r in outcome.records)
    texts = [{"text": "Edema."}, {"text": "Clear."}]
    outcome = run(replace(writer(home / "texts", texts), image=""))
    assert len(outcome.samples) == 2
    assert [record.study_id[-6:] for record in outcome.records] == (
        ["-row-1", "-row-1"] if writer is write_hf else ["-row-1", "-row-2"]  # each file of its own
    )


@pytest.mark.parametrize("value, state", [(1, 1), (0.0, 0), (-1, -1), ("1.0", 1), ("", None), (None, None), (True, 1)])
def test_labels_of_the_table_come_before_those_of_the_text(
    writer: Writer, home: Path, value: Any, state: int | None
) -> None:
    rows = [
        {"image": "a.png", "text": "Edema.", "pleural_effusion": value},
        {"image": "sub/b.png", "text": "", "pleural_effusion": value},
    ]
    labels = run(writer(home, rows)).samples["a.png"].labels
    assert labels == {"Pleural Effusion": state}


def test_label_columns_that_are_named(writer: Writer, home: Path) -> None:
    source = writer(home, [{"image": "a.png", "text": "", "Edema": 1, "Emphysema": 0, "Rubbish": "x"}])
    assert run(replace(source, labels=("Emphysema", "Edema"))).only().labels == {"Emphysema": 0, "Edema": 1}


@pytest.mark.parametrize("writer", WRITERS[1:], indirect=True, ids=["parquet", "hf-dataset"])
def test_images_inside_the_table(writer: Writer, home: Path) -> None:
    rows = [
        {
            "study_id": "s1",
            "text": "Edema.",
            "image": [{"bytes": image(5), "path": "x.png"}, {"bytes": None, "path": "a.png"}],
        },
        {"study_id": "s2", "text": "Edema.", "image": [{"bytes": image(6, "JPEG"), "path": None}]},
        {"study_id": "s3", "text": "Edema.", "image": [{"bytes": dicom(7), "path": "IM0001"}]},
        {"study_id": "s4", "text": "Edema.", "image": [{"bytes": b"no image", "path": "x.png"}]},
        {"study_id": "s5", "text": "Edema.", "image": []},
    ]
    outcome = run(writer(home, rows))
    kinds = {name: [suffix for suffix, _ in sample.images] for name, sample in outcome.samples.items()}
    assert kinds == {"s1": ["png", "png"], "s2": ["jpg"], "s3": ["dcm"], "s5": []}
    assert outcome.samples["s1"].images == [("png", image(5)), ("png", image(1))]
    assert outcome.bad == {"s4": ("unreadable image", "1 of 1 images: not a JPEG, PNG, WebP or TIFF file")}
    plain = run(writer(home / "plain", [{"text": "", "image": image(8)}, {"text": "", "image": image(9)}]))
    assert [sample.images for sample in plain.samples.values()] == [[("png", image(8))], [("png", image(9))]]


@pytest.mark.parametrize("writer", WRITERS[1:], indirect=True, ids=["parquet", "hf-dataset"])
def test_no_image_is_read_to_list_studies(writer: Writer, home: Path) -> None:
    source = writer(home, [{"study_id": f"s{number}", "text": "", "image": image(number)} for number in range(4)])
    (file, _), *_ = source.files()
    rows = [row for _, row in source.scan(file, ["study_id", "image"])]
    assert rows[0] == {"study_id": "s0"}


def test_hostile_paths_open_nothing_outside(writer: Writer, home: Path) -> None:
    outside = write(home.parent / "outside.png", image(9))
    paths = ["../outside.png", str(outside), "sub/../../outside.png", "~/outside.png"]
    outcome = run(
        writer(home, [{"study_id": f"s{number}", "image": path, "text": ""} for number, path in enumerate(paths)])
    )
    assert {cause for cause, _ in outcome.bad.values()} == {"missing image"}
    assert len(outcome.bad) == len(paths)
    named = run(writer(home / "named", [{"image": str(outside), "text": ""}]))
    assert str(home.parent) not in named.records[0].study_id  # folders may name people


def test_bad_images_and_empty_rows(writer: Writer, home: Path) -> None:
    write(home / "cut.png", image(1)[:-30])
    rows = [
        {"study_id": "s1", "image": "a.png", "text": ""},
        {"study_id": "s1", "image": "cut.png", "text": "Edema."},
        {"study_id": "s2", "image": "cut.png", "text": "Edema."},
        {"study_id": "s3", "image": "", "text": "  "},
        {"study_id": "s4", "image": "", "text": "Clear lungs. COMPARISON: None seen."},
    ]
    outcome = run(writer(home, rows))
    assert [note[:2] for note in outcome.notes] == [("s1", "unreadable image")]
    assert {name: cause for name, (cause, _) in outcome.bad.items()} == {
        "s2": "unreadable image", "s3": "neither image nor text"
    }  # fmt: skip
    assert outcome.samples["s4"].text == "Clear lungs."


@pytest.mark.parametrize(
    "rows, options, message",
    [
        (ROWS, {"image": "picture"}, "no column 'picture'"),
        (ROWS, {"patient": "patient"}, r"no column 'patient' \(did you mean 'patient_id'\?\)"),
        (ROWS, {"labels": ("Edema",)}, "no column 'Edema'"),
        (ROWS, {"image": "", "text": ""}, "neither an image nor a text column is named"),
        (ROWS, {"image_folder": Path("nowhere")}, "image-folder: no such folder"),
        ([{"image": "a.png", "text": "", "split": "all"}], {}, "row 1: column 'split' holds 'all'"),
        ([{"image": "a.png", "text": "", "study_id": ""}], {}, "row 1: the study column 'study_id' is empty"),
        ([{"image": "a.png", "text": "", "Edema": "yes"}], {}, "row 1: label column 'Edema' holds 'yes'"),
        ([ROWS[0], ROWS[1] | {"patient_id": "p9"}], {}, "another patient than in .*row 1, which is of the same study"),
        ([ROWS[0], ROWS[1] | {"split": "test"}], {}, "another split than in"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(
    writer: Writer, home: Path, rows: list[Row], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        replace(writer(home, rows), **options).records()
    assert "\n" not in str(caught.value)


def test_nothing_there(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "")
    for source, message in (
        (Jsonl(tmp_path), r"jsonl: no \.jsonl file"),
        (Parquet(tmp_path), r"parquet: no \.parquet file"),
        (HfDataset(tmp_path), r"no such file: .*state\.json"),
    ):
        with pytest.raises(UserError, match=message):
            source.records()


# -------------------------------------------------------------------------------------------------- what is of one kind


@pytest.mark.parametrize(
    "name, split", [("train", "train"), ("valid-00000-of-00002", "val"), ("Test", "test"), ("x", "")]
)
def test_names_of_files_tell_splits(tmp_path: Path, name: str, split: str) -> None:
    file = write(tmp_path / f"{name}.jsonl", '{"text": "Edema."}\n')
    assert Jsonl(file, image="").files() == [(file, split)]
    assert run(Jsonl(file, image="")).only().split == (split or split_by_hash(f"{name}.jsonl-row-1"))


def test_jsonl_lines_may_be_long_empty_and_end_anyhow(tmp_path: Path) -> None:
    long = "Edema. " * 20_000
    file = write(tmp_path / "a.jsonl", f'\n{{"text": "{long}"}}\r\n\n{{"text": "Clear é."}}'.encode())
    assert [len(sample.text) for sample in run(Jsonl(file, image="")).samples.values()] == [len(long) - 1, 8]


@pytest.mark.parametrize("line", [b"{", b"[1]", b'"x"', b"\xff", b"[" * 100_000])
def test_jsonl_wrong_lines(tmp_path: Path, line: bytes) -> None:
    file = write(tmp_path / "a.jsonl", b'{"text": "x"}\n' + line)
    with pytest.raises(UserError, match="line 2: no JSON object in UTF-8"):
        Jsonl(file, image="").records()


def test_parquet_files_that_are_none_or_change(tmp_path: Path, home: Path) -> None:
    file = write(tmp_path / "a.parquet", b"PAR1 no more")
    with pytest.raises(UserError, match="no Parquet file"):
        Parquet(file).records()
    source = write_parquet(home, ROWS)
    record = source.records()[0]
    (home / "table.parquet").unlink()
    with pytest.raises(ValueError, match="FileNotFoundError"):
        source.read(record, lambda *note: None)


def test_parquet_rows_of_any_group(tmp_path: Path) -> None:
    rows = [{"study_id": f"s{number}", "text": f"Case {number}."} for number in range(7)]
    source = replace(write_parquet(tmp_path / "set", rows), image="")
    assert [sample.text for sample in run(source).samples.values()] == [row["text"] for row in rows]


def test_hf_splits_are_folders(tmp_path: Path) -> None:
    for split in ("train", "validation", "test"):
        write_hf(tmp_path / split, [{"text": f"{split}: edema.", "patient_id": f"{split}-{n}"} for n in range(3)])
    write(tmp_path / "dataset_dict.json", json.dumps({"splits": ["train", "validation", "test"]}))
    outcome = run(HfDataset(tmp_path, image=""))
    assert [record.split for record in outcome.records] == ["train"] * 3 + ["val"] * 3 + ["test"] * 3
    write(tmp_path / "dataset_dict.json", json.dumps({"splits": ["train", "../train"]}))
    with pytest.raises(UserError, match=r"names the split '\.\./train'"):
        HfDataset(tmp_path, image="").records()
    write(tmp_path / "dataset_dict.json", json.dumps({}))
    with pytest.raises(UserError, match="names no splits"):
        HfDataset(tmp_path, image="").records()


@pytest.mark.parametrize("names", [[], ["../other.arrow"], ["/etc/passwd"], ["missing.arrow"]])
def test_hf_state_must_name_files_beside_it(tmp_path: Path, names: list[str]) -> None:
    write_hf(tmp_path / "set", [{"text": "x"}], files=1)
    write(tmp_path / "other.arrow", b"")
    write(tmp_path / "set" / "state.json", json.dumps({"_data_files": [{"filename": name} for name in names]}))
    with pytest.raises(UserError, match="names no files, or some that are not beside it"):
        HfDataset(tmp_path / "set", image="").records()


def test_hf_files_that_are_no_streams(tmp_path: Path) -> None:
    write_hf(tmp_path, [{"text": "x"}], files=1)
    write(tmp_path / "data-00000-of-00001.arrow", b"ARROW1 no more")
    with pytest.raises(UserError, match="no stream of Arrow record batches"):
        HfDataset(tmp_path, image="").records()


def test_labels_are_named_as_chexpert_does(home: Path) -> None:
    rows = [{"image": "a.png", "text": ""} | {name.lower().replace(" ", "_"): 1 for name in CHEXPERT14}]
    assert run(write_jsonl(home, rows)).only().labels == dict.fromkeys(CHEXPERT14, 1)
