"""ROCO v2, PMC-OA, Open-PMC and BIOMEDICA: made-up figures in their layouts."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from medclip_lab.data.sources.biomedica import Biomedica
from medclip_lab.data.sources.common import split_by_hash
from medclip_lab.data.sources.pmc_oa import OpenPmc, PmcOa, article_of
from medclip_lab.data.sources.rocov2 import Rocov2
from medclip_lab.errors import UserError
from tests.data.sources.helpers import image, run, write, write_csv

# --------------------------------------------------------------------------------------------------------------- ROCO


@pytest.fixture
def roco(tmp_path: Path) -> Path:
    home = tmp_path / "rocov2"
    for number, part in enumerate(("train", "valid", "test")):
        name = f"ROCOv2_2023_{part}_000001"
        write_csv(home / f"{part}_captions.csv", ("ID", "Caption"), [(name, f"Chest CT\n{number}: no effusion.")])
        write(home / part / f"{name}.jpg", image(number, "JPEG"))
        write_csv(home / f"{part}_concepts.csv", ("ID", "CUIs"), [(name, "C0040405;C0032227")])
        write_csv(home / f"{part}_concepts_manual.csv", ("ID", "CUIs"), [(name, "C0040405")])
    write_csv(home / "cui_mapping.csv", ("CUI", "Canonical name"), [("C0040405", "X-Ray Computed Tomography")])
    columns = ("ID", "PMCID", "Attribution", "Link")
    row = ("ROCOv2_2023_train_000001", "PMC1234567", "CC BY [A. et al. (2020)]", "https://example.org")
    write_csv(home / "license_information.csv", columns, [row])
    return home


def test_roco_figures(roco: Path, tmp_path: Path) -> None:
    outcome = run(Rocov2(roco), tmp_path / "shards")
    assert not outcome.bad
    assert {record.study_id: record.split for record in outcome.records} == {
        "rocov2_2023_train_000001": "train", "rocov2_2023_valid_000001": "val", "rocov2_2023_test_000001": "test"
    }  # fmt: skip
    sample = outcome.samples["rocov2_2023_train_000001"]
    assert sample.images == [("jpg", image(0, "JPEG"))]
    assert sample.text == "Chest CT 0: no effusion."
    assert (sample.labels, sample.sentences) == ({}, [])  # a caption is no chest radiograph report
    assert sample.extra == {
        "concepts": ["X-Ray Computed Tomography", "C0032227"],
        "article": "PMC1234567",
        "attribution": "CC BY [A. et al. (2020)]",
    }
    assert outcome.samples["rocov2_2023_test_000001"].extra["article"] == ""


def test_roco_with_captions_and_images_alone(roco: Path) -> None:
    for path in [
        *roco.glob("*concepts*"),
        roco / "valid_captions.csv",
        roco / "cui_mapping.csv",
        roco / "license_information.csv",
    ]:
        path.unlink()
    (roco / "test").rename(roco / "moved")
    (roco / "moved").rename(roco / "test_images")
    write(roco / "test_images/test/ROCOv2_2023_test_000001.jpg", image(2, "JPEG"))
    samples = run(Rocov2(roco)).samples
    assert list(samples) == ["rocov2_2023_train_000001", "rocov2_2023_test_000001"]
    assert samples["rocov2_2023_train_000001"].extra == {"concepts": [], "article": "", "attribution": ""}


def test_roco_missing_and_hostile_images_and_empty_captions(roco: Path) -> None:
    write(roco / "outside.jpg", image(1, "JPEG"))
    rows = [("../outside", "x"), (str(roco / "outside"), "x"), ("gone", "x"), ("ROCOv2_2023_train_000001", "")]
    write_csv(roco / "train_captions.csv", ("ID", "Caption"), rows)
    outcome = run(Rocov2(roco))
    assert [cause for cause, _ in outcome.bad.values()] == ["missing image"] * 3
    assert outcome.notes == [("rocov2_2023_train_000001", "no caption", "kept as an image without text")]


@pytest.mark.parametrize(
    "columns, rows, message",
    [
        (("ID", "Text"), [], "no column 'Caption'"),
        (("ID", "Caption"), [("", "x")], "line 2: the ID is empty"),
        (("ID", "Caption"), [("a", "x"), ("a", "y")], "line 3: another caption than before"),
    ],
)
def test_roco_wrong_tables(roco: Path, columns: Any, rows: Any, message: str) -> None:
    write_csv(roco / "train_captions.csv", columns, rows)
    with pytest.raises(UserError, match=message):
        Rocov2(roco).records()


def test_roco_without_captions(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "")
    with pytest.raises(UserError, match=r"rocov2: neither train_captions\.csv nor"):
        Rocov2(tmp_path).records()


# ---------------------------------------------------------------------------------------------------------------- PMC


def lines(path: Path, *rows: Any) -> None:
    write(path, "".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def pmc(tmp_path: Path) -> Path:
    home = tmp_path / "pmc_oa"
    lines(
        home / "train.jsonl",
        {"image": "PMC212319_Fig3_4.jpg", "caption": "A.  Chest\nradiograph.", "alignment_type": "rule"},
        {"image": "PMC212319_Fig3_5.jpg", "caption": "B. CT."},
        {"image": "PMC500000_Fig1_0.jpg", "caption": "Slide."},
    )
    lines(home / "valid.jsonl", {"image": "PMC600000_Fig1_0.jpg", "caption": "MRI."})
    lines(home / "test.jsonl", {"image": "PMC500000_Fig2_0.jpg", "caption": "Another slide."})
    for number, name in enumerate(
        ("PMC212319_Fig3_4", "PMC212319_Fig3_5", "PMC500000_Fig1_0", "PMC600000_Fig1_0", "PMC500000_Fig2_0")
    ):
        write(home / "images" / f"{name}.jpg", image(number, "JPEG"))
    return home


def test_pmc_figures_of_one_article_stay_together(pmc: Path, tmp_path: Path) -> None:
    outcome = run(PmcOa(pmc), tmp_path / "shards")
    assert [(record.patient_id, record.split) for record in outcome.records] == [
        *[("pmc212319", "train")] * 2, ("pmc500000", "test"), ("pmc600000", "val"), ("pmc500000", "test")
    ]  # fmt: skip
    sample = outcome.samples["pmc-PMC212319_Fig3_4.jpg"]
    assert (sample.text, sample.images) == ("A. Chest radiograph.", [("jpg", image(0, "JPEG"))])
    assert (sample.labels, sample.modality) == ({}, "OT")


def test_pmc_is_also_read_as_open_pmc_and_from_other_folders(pmc: Path) -> None:
    expected = run(PmcOa(pmc)).samples
    other = run(OpenPmc(pmc)).samples
    assert {sample.source for sample in other.values()} == {"open-pmc"}
    assert [sample.images for sample in other.values()] == [sample.images for sample in expected.values()]
    name = "caption_T060_filtered_top4_sep_v0_subfigures"
    (pmc / "images").rename(pmc / name)
    assert run(PmcOa(pmc)).samples == expected
    (pmc / "images").mkdir()
    (pmc / name).rename(pmc / "images" / name)
    assert run(PmcOa(pmc)).samples == expected


def test_pmc_one_file_is_split_by_article(pmc: Path) -> None:
    for name in ("train", "valid", "test"):
        (pmc / f"{name}.jsonl").unlink()
    rows = [{"image": f"PMC{number // 2}_{number}.jpg", "caption": ""} for number in range(400)]
    lines(pmc / "pmc_oa.jsonl", *rows)
    records = PmcOa(pmc).records()
    assert all(record.split == split_by_hash(record.patient_id) for record in records)
    assert {record.split for record in records} == {"train", "val", "test"}


def test_pmc_an_image_twice_has_both_captions(pmc: Path) -> None:
    row = {"image": "PMC212319_Fig3_4.jpg", "caption": "A."}
    lines(pmc / "train.jsonl", row, row, {**row, "caption": "B."}, {**row, "caption": None})
    assert run(PmcOa(pmc)).samples["pmc-PMC212319_Fig3_4.jpg"].text == "A. B."


def test_pmc_missing_and_hostile_images_and_empty_captions(pmc: Path) -> None:
    outside = write(pmc.parent / "outside.jpg", image(0, "JPEG"))
    lines(
        pmc / "train.jsonl",
        {"image": "../outside.jpg", "caption": "x"},
        {"image": "../../outside.jpg", "caption": "x"},
        {"image": str(outside), "caption": "x"},
        {"image": "PMC212319_Fig3_4.jpg"},
    )
    outcome = run(PmcOa(pmc))
    assert [cause for cause, _ in outcome.bad.values()] == ["missing image"] * 3
    assert [note[1] for note in outcome.notes] == ["no caption"]


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "line 1: no JSON object with an image"),
        ("[]", "line 1: no JSON object with an image"),
        ('{"caption": "x"}', "line 1: no JSON object with an image"),
        ('{"image": 5, "caption": "x"}', "line 1: image and caption must be texts"),
        ("\xff", "line 1: no JSON object with an image"),
    ],
)
def test_pmc_wrong_lines(pmc: Path, line: str, message: str) -> None:
    write(pmc / "train.jsonl", line.encode("latin-1"))
    with pytest.raises(UserError, match=message):
        PmcOa(pmc).records()


def test_pmc_without_tables(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "")
    with pytest.raises(UserError, match=r"pmc-oa: none of train\.jsonl, valid\.jsonl"):
        PmcOa(tmp_path).records()


def test_articles_by_name() -> None:
    assert article_of("3-PMC12345-0-fig.1") == article_of("pmc12345_F2.jpg") == "pmc12345"
    assert article_of("figure.jpg") == "figure.jpg"


# ---------------------------------------------------------------------------------------------------------- BIOMEDICA


def shard(path: Path, *members: tuple[str, bytes]) -> Path:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return write(path, buffer.getvalue())


def figure(key: str, shade: int, text: str = "A chest radiograph.", **facts: Any) -> list[tuple[str, bytes]]:
    known = {
        "image_file_name": "fig1.jpg", "image_panel_type": "Clinical Imaging", "image_primary_label": ["x-ray"],
        "image_context": {"fig1": "see Figure 1"}, "article_license": "CC BY", "article_text": "long " * 100,
        "article_accession_id": "PMC123",
    }  # fmt: skip
    data = json.dumps(known | facts).encode()
    return [(f"{key}.jpg", image(shade, "JPEG")), (f"{key}.txt", text.encode()), (f"{key}.json", data)]


FIRST, SECOND, THIRD = "0-PMC123-0-fig.1-a", "0-PMC123-1-fig2", "7-PMC456-0-fig1"


@pytest.fixture
def biomedica(tmp_path: Path) -> Path:
    home = tmp_path / "biomedica"
    shard(home / "commercial/0_20000000.tar", *figure(FIRST, 1), *figure(SECOND, 2))
    shard(home / "noncommercial/0_20000000.tar", *figure(THIRD, 3, text=" ", article_license="CC BY-NC"))
    return home


def test_biomedica_figures_where_they_lie(biomedica: Path, tmp_path: Path) -> None:
    outcome = run(Biomedica(biomedica), tmp_path / "shards")
    assert [record.study_id for record in outcome.records] == [f"biomedica-{key}" for key in (FIRST, SECOND, THIRD)]
    assert [record.patient_id for record in outcome.records] == ["pmc123", "pmc123", "pmc456"]
    first, second, third = outcome.samples.values()
    assert [sample.images for sample in (first, second, third)] == [[("jpg", image(n, "JPEG"))] for n in (1, 2, 3)]
    assert (first.text, first.license, third.license) == ("A chest radiograph.", "CC BY", "CC BY-NC")
    assert first.extra == {
        "image_panel_type": "Clinical Imaging", "image_primary_label": ["x-ray"], "article_license": "CC BY",
        "article_accession_id": "PMC123",
    }  # fmt: skip
    assert outcome.notes == [(f"biomedica-{THIRD}", "no caption", "kept as an image without text")]


def test_biomedica_members_that_are_missing_or_broken(biomedica: Path) -> None:
    one, two, three, four = (figure(f"0-PMC{number}-0-a", number) for number in range(4))
    two[0] = (two[0][0], b"no image")
    three[2] = (three[2][0], b"[1]")
    path = biomedica / "commercial/0_20000000.tar"
    shard(path, *one[1:], *two, *three, *four[:1])
    outcome = run(Biomedica(biomedica))
    assert {key[-12:]: cause for key, (cause, _) in outcome.bad.items()} == {
        "a-0-PMC0-0-a": "missing image", "a-0-PMC1-0-a": "unreadable image", "a-0-PMC2-0-a": "bad json"
    }  # fmt: skip
    alone = outcome.samples["biomedica-0-PMC3-0-a"]
    assert (alone.text, alone.extra, alone.license) == ("", {}, Biomedica.license)


def test_biomedica_broken_shards_lose_what_follows_and_are_listed(biomedica: Path) -> None:
    path = biomedica / "commercial/0_20000000.tar"
    data = path.read_bytes()
    (biomedica / "noncommercial/0_20000000.tar").write_bytes(b"no tar" * 200)
    second = data.index(SECOND.encode())
    path.write_bytes(data[: second + 200])  # inside a header
    outcome = run(Biomedica(biomedica))
    assert list(outcome.samples) == [f"biomedica-{FIRST}"]
    assert {cause for cause, _ in outcome.bad.values()} == {"unreadable shard"}
    assert len(outcome.bad) == 2
    path.write_bytes(data[:second] + b"\xff" * 200 + data[second + 200 :])  # a header that is none
    assert run(Biomedica(biomedica)).bad == outcome.bad
    path.write_bytes(data)
    assert len(run(Biomedica(biomedica)).bad) == 1


def test_biomedica_a_shard_cut_inside_an_image_or_changed_after_listing(biomedica: Path) -> None:
    path = biomedica / "noncommercial/0_20000000.tar"
    source = Biomedica(biomedica)
    record = source.records()[-1]
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(ValueError, match="bytes too early"):
        source.read(record, lambda *note: None)
    path.unlink()
    with pytest.raises(ValueError, match="No such file"):
        source.read(record, lambda *note: None)


def test_biomedica_hostile_members_are_not_followed(biomedica: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo(f"0-PMC9{kind.decode()}-0-a.jpg")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        info = tarfile.TarInfo("../../escape.jpg")
        info.size = 5
        tar.addfile(info, io.BytesIO(b"pwned"))
    write(biomedica / "commercial/0_20000000.tar", buffer.getvalue())
    before = sorted(biomedica.parent.rglob("*"))
    outcome = run(Biomedica(biomedica))
    assert {key: cause for key, (cause, _) in outcome.bad.items()} == {"biomedica-../../escape": "unreadable image"}
    assert sorted(biomedica.parent.rglob("*")) == before


def test_biomedica_a_member_that_claims_more_than_it_has_is_not_read(biomedica: Path) -> None:
    info = tarfile.TarInfo("0-PMC9-0-a.jpg")
    info.size = 2**40
    write(biomedica / "commercial/0_20000000.tar", info.tobuf() + b"x" * 512)
    outcome = run(Biomedica(biomedica))
    assert outcome.bad["biomedica-0-PMC9-0-a"] == ("member too large", f"{2**40} bytes")


def test_biomedica_without_shards(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "")
    with pytest.raises(UserError, match=r"biomedica: no \.tar file"):
        Biomedica(tmp_path).records()
