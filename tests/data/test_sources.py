"""Sources: NIH in both layouts, Open-i archives, tables of the user's own. Every image and text is made up."""

import gzip
import io
import json
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from medclip_lab.data.findings import CHEXPERT14
from medclip_lab.data.quarantine import Quarantine
from medclip_lab.data.shards import write_shards
from medclip_lab.data.sources.common import BadImageError, check_image, image_suffix, read_table, split_by_hash
from medclip_lab.data.sources.nih_cxr14 import CHEXPERT_OF, NEVER_LABELLED, NihCxr14
from medclip_lab.data.sources.openi import MAX_XML_BYTES, OpenI
from medclip_lab.data.sources.reading import read_all
from medclip_lab.errors import UserError


def encoded(kind: str = "PNG", shade: int = 90) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (48, 40), shade).save(buffer, kind)
    return buffer.getvalue()


PNG = encoded()
DICOM = bytes(128) + b"DICM" + bytes(20)


def lenient() -> Quarantine:
    return Quarantine(10, ceiling=1.0)


# ------------------------------------------------------------------------------------------------------------- common


def test_split_by_hash_is_fixed_and_has_the_asked_shares() -> None:
    splits = Counter(split_by_hash(str(number)) for number in range(5000))
    assert 0.08 < splits["val"] / 5000 < 0.12
    assert 0.08 < splits["test"] / 5000 < 0.12
    assert Counter(split_by_hash(str(number), val=0.1, test=0) for number in range(500))["test"] == 0
    # Of all time: another answer would move patients between the splits of shards that exist.
    assert [split_by_hash(f"patient-{number}") for number in (1, 2, 8)] == ["train", "test", "val"]


@pytest.mark.parametrize(
    "name, suffix",
    [
        ("a.PNG", "png"),
        ("a.b.jpeg", "jpeg"),
        ("a.nii.gz", "nii.gz"),
        ("1.2.840.dcm", "dcm"),
        ("a.DICOM", "dcm"),
        ("a.gif", None),
        ("a", None),
        ("a.gz", None),
    ],
)
def test_image_suffix(name: str, suffix: str | None) -> None:
    assert image_suffix(name) == suffix


@pytest.mark.parametrize(
    "suffix, data",
    [
        *((kind.lower(), encoded(kind)) for kind in ("PNG", "JPEG", "TIFF", "WEBP")),
        ("dcm", DICOM),
        ("nii.gz", gzip.compress(bytes(344) + b"n+1\0" + bytes(100))),
    ],
)
def test_images_that_are_whole_pass_and_others_do_not(suffix: str, data: bytes) -> None:
    check_image(suffix, data)
    for damaged in (data[: len(data) // 2], b"", b"not an image"):
        if suffix == "dcm" and damaged.startswith(data[:132]):
            continue  # of DICOM only the preamble is looked at
        with pytest.raises(BadImageError) as caught:
            check_image(suffix, damaged)
        assert caught.value.cause == "unreadable image"


def test_an_image_of_another_format_than_pillow_may_open_is_refused() -> None:
    with pytest.raises(BadImageError, match="not a JPEG"):
        check_image("png", encoded("GIF"))


@pytest.mark.parametrize("head, suffix", [("a,b", "csv"), ("a;b", "csv"), ("a\tb", "csv"), ("a\tb", "tsv")])
def test_tables_of_several_separators(tmp_path: Path, head: str, suffix: str) -> None:
    separator = head[1]
    path = tmp_path / f"table.{suffix}"
    rows = [head, f'1{separator}"x, ""y""\nz"', "", f" 2 {separator}"]
    path.write_text("\ufeff" + "\r\n".join(rows), encoding="utf-8", newline="")
    columns, read = read_table(path)
    assert columns == ["a", "b"]
    assert list(read) == [(2, {"a": "1", "b": 'x, "y"\nz'}), (5, {"a": "2", "b": ""})]


# ---------------------------------------------------------------------------------------------------------------- NIH

ORIGINAL = "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,Other[Width\n"
REDUCED = "image,finding_labels,patient_id,follow_up,age,sex,view,split\n"


@pytest.fixture
def nih(tmp_path: Path) -> Callable[..., Path]:
    """Writes a folder in one of the layouts; `images` are paths under it."""

    def make(table: str, text: str, images: list[str]) -> Path:
        folder = tmp_path / "nih"
        for image in images:
            (folder / image).parent.mkdir(parents=True, exist_ok=True)
            (folder / image).write_bytes(PNG)
        (folder / table).write_text(text)
        return folder

    return make


def test_nih_original_layout(nih: Callable[..., Path]) -> None:
    rows = (
        "00000001_000.png,Cardiomegaly|Emphysema,0,1,058Y,M,PA,1\n"
        "00000001_001.png,No Finding,1,1,58,M,AP,1\n"
        "00000002_000.png,Effusion|Infiltration|Mass|Nodule|Pleural_Thickening,0,2,414,F,PA,1\n"
        "00000003_000.png,Hernia,0,3,013M,F,PA,1\n"
    )
    folders = ["images_001/images", "images_001/images", "images_002/images", "images"]
    names = [line.split(",")[0] for line in rows.splitlines()]
    folder = nih(
        "Data_Entry_2017_v2020.csv", ORIGINAL + rows, [f"{a}/{b}" for a, b in zip(folders, names, strict=True)]
    )
    (folder / "Data_Entry_2017.csv").write_text("an older release")
    (folder / "test_list.txt").write_text("00000003_000.png\n")
    (folder / "train_val_list.txt").write_text("\n".join(names[:3]))
    assert len(NihCxr14(folder).records()) == 4
    samples = list(read_all(NihCxr14(folder)))
    assert [sample.study_id for sample in samples] == [f"nih-{name[:8]}-{name[9:12]}" for name in names]
    assert all(sample.key == sample.study_id for sample in samples)
    assert [sample.patient_id for sample in samples] == ["nih-00000001"] * 2 + ["nih-00000002", "nih-00000003"]
    assert [sample.split == "test" for sample in samples] == [False, False, False, True]
    assert samples[0].split == samples[1].split == split_by_hash("nih-00000001", val=0.1, test=0)
    assert samples[0].images == [("png", PNG)]
    assert [sample.view for sample in samples[:2]] == [["PA"], ["AP"]]
    assert samples[0].extra == {
        "age": 58, "sex": "M", "follow_up": 0, "finding_labels": ["Cardiomegaly", "Emphysema"]
    }  # fmt: skip
    assert [sample.extra["age"] for sample in samples] == [58, 58, None, 1]
    positive = [{name for name, value in sample.labels.items() if value == 1} for sample in samples]
    lesions = {"Pleural Effusion", "Lung Opacity", "Lung Lesion", "Pleural Other"}
    assert positive == [{"Cardiomegaly"}, {"No Finding"}, lesions, set()]
    for sample in samples:
        assert list(sample.labels) == list(CHEXPERT14)
        assert {name for name, value in sample.labels.items() if value is None} == set(NEVER_LABELLED)
        assert (sample.sections, sample.text, sample.sentences) == ({}, "", [])
    assert set(NEVER_LABELLED) == {"Fracture", "Support Devices", "Enlarged Cardiomediastinum"}
    assert len(CHEXPERT_OF) == 15


def test_nih_without_lists_splits_by_patient(nih: Callable[..., Path]) -> None:
    rows = "".join(f"{n:08}_{m:03}.png,No Finding,{m},{n},50,M,PA,1\n" for n in range(1, 21) for m in range(2))
    folder = nih("Data_Entry_2017.csv", ORIGINAL + rows, [f"images/{row.split(',')[0]}" for row in rows.splitlines()])
    splits: dict[str, set[str]] = {}
    for sample in read_all(NihCxr14(folder)):
        splits.setdefault(sample.patient_id, set()).add(sample.split)
    assert splits == {patient: {split_by_hash(patient)} for patient in splits}


def test_nih_reduced_layout_and_bad_images(nih: Callable[..., Path], tmp_path: Path) -> None:
    rows = "".join(
        f"0000000{n}_000.png,Pneumonia,{n},0,60,F,AP,{s}\n" for n, s in ((1, "train"), (2, "val"), (3, "test"))
    )
    folder = nih("metadata.csv", REDUCED + rows, ["images/00000001_000.png", "images/00000003_000.png"])
    (folder / "images" / "00000003_000.png").write_bytes(PNG[:-30])
    listed = tmp_path / "bad.jsonl"
    quarantine = Quarantine(3, ceiling=1.0, path=listed)
    (sample,) = read_all(NihCxr14(folder), quarantine)
    assert (sample.split, sample.labels["Pneumonia"], sample.labels["No Finding"]) == ("train", 1, 0)
    assert quarantine.causes == {"missing image": 1, "unreadable image": 1}
    assert [json.loads(line)["key"] for line in listed.read_text().splitlines()] == [
        "nih-00000002-000",
        "nih-00000003-000",
    ]
    with pytest.raises(UserError, match="unusable"):
        list(read_all(NihCxr14(folder)))  # the usual ceiling is one of three


@pytest.mark.parametrize(
    "table, text, message",
    [
        ("metadata.csv", REDUCED.replace("finding_labels", "findings"), "no column 'finding_labels' .*'findings'"),
        ("Data_Entry_2017.csv", ORIGINAL.replace("View Position", "View"), "no column 'View Position'.*'Patient ID'"),
        ("metadata.csv", REDUCED + "a.png,Cough,1,0,60,F,AP,train", "line 2: unknown finding 'Cough'"),
        ("metadata.csv", REDUCED + "a.png,Edema,x,0,60,F,AP,train", "line 2: patient 'x'"),
        ("metadata.csv", REDUCED + "a.png,Edema,1,0,60,F,AP,dev", "line 2: unknown split 'dev'"),
        ("metadata.csv", "", "the file is empty"),
        ("other.csv", "", "neither Data_Entry_2017"),
    ],
)
def test_nih_says_what_is_wrong_with_a_table(nih: Callable[..., Path], table: str, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        list(read_all(NihCxr14(nih(table, text, ["images/a.png"]))))


def test_nih_needs_a_folder_with_images(nih: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        list(read_all(NihCxr14(tmp_path / "nowhere")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty"):
        NihCxr14(tmp_path / "empty").records()
    (tmp_path / "nih").mkdir()
    with pytest.raises(UserError, match="no images in"):
        list(read_all(NihCxr14(nih("metadata.csv", REDUCED + "a.png,Edema,1,0,60,F,AP,train", []))))


def test_nih_names_in_the_table_are_no_paths(nih: Callable[..., Path]) -> None:
    folder = nih("metadata.csv", REDUCED + "../metadata.csv,Edema,1,0,60,F,AP,train", ["images/a.png"])
    quarantine = lenient()
    assert list(read_all(NihCxr14(folder), quarantine)) == []
    assert quarantine.causes == {"missing image": 1}


def test_nih_real(real_data: Path) -> None:
    folder = real_data / "nih-cxr-1000"
    quarantine = Quarantine(len(NihCxr14(folder).records()))
    samples = list(read_all(NihCxr14(folder), quarantine))
    assert not quarantine.causes
    assert len(samples) == len({sample.key for sample in samples}) == 1000
    assert len({sample.patient_id for sample in samples}) == 682
    assert Counter(sample.split for sample in samples) == {"train": 619, "val": 189, "test": 192}
    assert sum(sample.labels["Pneumonia"] or 0 for sample in samples) == 500
    assert sum(sample.labels["No Finding"] or 0 for sample in samples) == 500
    assert sum(sample.labels["Pneumonia"] or 0 for sample in samples if sample.split == "test") == 87


# ------------------------------------------------------------------------------------------------------------- Open-i


def report_xml(number: int, findings: str = "Small effusion.", impression: str = "1. Effusion. 2. No edema.") -> str:
    return (
        f'<?xml version="1.0" encoding="utf-8"?><eCitation><uId id="CXR{number}"/><MedlineCitation><Article><Abstract>'
        '<AbstractText Label="COMPARISON">None.</AbstractText><AbstractText Label="INDICATION">Pneumonia?'
        f'</AbstractText><AbstractText Label="FINDINGS">{findings}</AbstractText><AbstractText Label="IMPRESSION">'
        f"{impression}</AbstractText></Abstract></Article></MedlineCitation><MeSH><major>Pleural Effusion/small</major>"
        f"<automatic>Lung</automatic></MeSH></eCitation>"
    )


def archive(path: Path, members: dict[str, bytes | tarfile.TarInfo]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
                continue
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_openi_archive_and_folder_give_the_same(tmp_path: Path) -> None:
    reports = {f"ecgen-radiology/{n}.xml": report_xml(n).encode() for n in (1, 2, 3)}
    for name, data in reports.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    path = archive(tmp_path / "reports.tgz", {**reports, "ecgen-radiology/README.txt": b"no report"})
    samples = list(read_all(OpenI(path)))
    assert samples == list(read_all(OpenI(tmp_path / "ecgen-radiology"))) == list(read_all(OpenI(tmp_path)))
    assert len(OpenI(path).records()) == len(OpenI(tmp_path).records()) == 3
    sample = samples[0]
    assert (sample.study_id, sample.patient_id, sample.key) == ("openi-cxr1", "openi-cxr1", "openi-cxr1")
    assert sample.split == split_by_hash("openi-cxr1")
    assert sample.images == []
    assert sample.sections == {
        "comparison": "None.",
        "indication": "Pneumonia?",
        "findings": "Small effusion.",
        "impression": "1. Effusion. 2. No edema.",
    }
    assert sample.text == "Small effusion. 1. Effusion. 2. No edema."
    assert sample.sentences == [
        {"text": "Small effusion.", "labels": {"Pleural Effusion": 1}},
        {"text": "Effusion.", "labels": {"Pleural Effusion": 1}},
        {"text": "No edema.", "labels": {"Edema": 0}},
    ]
    assert (sample.labels["Pleural Effusion"], sample.labels["Edema"], sample.labels["Pneumonia"]) == (1, 0, None)
    assert sample.extra == {"mesh": ["Pleural Effusion/small"], "mesh_labels": {"Pleural Effusion": 1}}
    assert sample.license == "CC BY-NC-ND 4.0"


BOMB = '<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;">]><eCitation><uId id="CXR1"/>&b;</eCitation>'


@pytest.mark.parametrize(
    "data, cause, reason",
    [
        (BOMB.encode(), "bad xml", "document types are refused"),
        (BOMB.encode("utf-16"), "bad xml", "document types are refused"),
        (BOMB.encode("utf-16-le"), "bad xml", "document types are refused"),
        (b"<eCitation>", "bad xml", "not well-formed at line 1"),
        (b"<eCitation/>", "bad xml", "no uId"),
        (b'<eCitation><uId id="../../x"/></eCitation>', "bad xml", "no uId"),
        (b" " * (MAX_XML_BYTES + 1), "bad xml", "larger than"),
        (report_xml(1, "", "").encode(), "no findings and no impression", "nothing to train on"),
        (report_xml(1, " . ", " ").encode(), "no findings and no impression", "nothing to train on"),
    ],
)
def test_openi_counts_what_is_no_report(tmp_path: Path, data: bytes, cause: str, reason: str) -> None:
    listed = tmp_path / "bad.jsonl"
    quarantine = Quarantine(2, ceiling=0.5, path=listed)
    samples = list(
        read_all(OpenI(archive(tmp_path / "a.tgz", {"1.xml": data, "2.xml": report_xml(2).encode()})), quarantine)
    )
    assert [sample.study_id for sample in samples] == ["openi-cxr2"]
    assert quarantine.causes == {cause: 1}
    entry = json.loads(listed.read_text())
    assert reason in entry["reason"]
    assert entry["key"] in ("openi-1", "openi-cxr1")


def test_openi_reads_plain_files_only_and_writes_none(tmp_path: Path) -> None:
    link = tarfile.TarInfo("link.xml")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
    work = tmp_path / "work"
    work.mkdir()
    path = archive(work / "a.tgz", {"link.xml": link, "../../escape.xml": report_xml(7).encode()})
    assert [sample.study_id for sample in read_all(OpenI(path))] == ["openi-cxr7"]
    assert [entry.name for entry in tmp_path.rglob("*")] == ["work", "a.tgz"]


def test_openi_says_what_is_wrong_with_the_path(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        list(read_all(OpenI(tmp_path / "nowhere")))
    (tmp_path / "file.tgz").write_bytes(b"no archive")
    with pytest.raises(UserError, match="cannot read the archive"):
        list(read_all(OpenI(tmp_path / "file.tgz")))
    whole = archive(tmp_path / "whole.tgz", {f"{n}.xml": report_xml(n).encode() for n in range(50)})
    (tmp_path / "cut.tgz").write_bytes(whole.read_bytes()[:-200])
    with pytest.raises(UserError, match="cannot read the archive"):
        list(read_all(OpenI(tmp_path / "cut.tgz")))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.txt").write_text("")
    with pytest.raises(UserError, match=r"no \.xml file"):
        list(read_all(OpenI(tmp_path / "folder")))


def test_openi_real(real_data: Path, tmp_path: Path) -> None:
    quarantine = Quarantine(3955)
    samples = list(read_all(OpenI(real_data / "openi-reports" / "NLMCXR_reports.tgz"), quarantine))
    assert quarantine.causes == {"no findings and no impression": 28}
    assert len(samples) == len({sample.key for sample in samples}) == 3955 - 28
    assert sum("impression" in sample.sections for sample in samples) == 3921
    assert sum("findings" in sample.sections for sample in samples) == 3425
    sentences = [sentence["text"] for sample in samples for sentence in sample.sentences]
    assert 22_000 < len(sentences) < 24_000
    assert not [sentence for sentence in sentences if sentence[:1].isdigit() and sentence[1:3] in (". ", ") ")]
    shares = Counter(sample.split for sample in samples)
    assert 0.08 < shares["val"] / len(samples) < 0.12
    assert write_shards(samples[:300], tmp_path / "shards", "openi").facts["samples"] == 300
