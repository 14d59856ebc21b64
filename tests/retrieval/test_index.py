"""An opened index: what it answers, what it refuses to open, and how it changes as a whole."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import medclip_lab
from medclip_lab.bench.vectors import Corpus
from medclip_lab.errors import UserError
from medclip_lab.files import sha256
from medclip_lab.retrieval import build, store, update
from medclip_lab.retrieval.build import build_index
from medclip_lab.retrieval.choose import Goals
from medclip_lab.retrieval.embeddings import Embeddings
from medclip_lab.retrieval.families import import_faiss
from medclip_lab.retrieval.index import open_index
from medclip_lab.retrieval.update import add_to_index
from tests.retrieval.synthetic import contents, features_of, quiet, renamed


def test_an_image_finds_itself(index: Path, embeddings: Path) -> None:
    features, table = features_of(embeddings, "image"), Embeddings(embeddings).table("image")
    opened = open_index(index)
    assert len(opened) == len(features)
    for row, hits in enumerate(opened.search(features, k=3)):
        assert [hit.rank for hit in hits] == [1, 2, 3]
        assert hits[0].score == pytest.approx(1, abs=1e-5)
        assert table["study_id"][row].as_py() in [hit.study_id for hit in hits if hit.score > 1 - 1e-5]
        assert hits[0].score >= hits[1].score >= hits[2].score


def test_text_finds_images_with_the_finding(index: Path, toy_bundle: Path) -> None:
    encoder = medclip_lab.load(toy_bundle, device="cpu")
    opened = medclip_lab.open_index(index, bundle_fingerprint=encoder.fingerprint)
    hits = opened.search(encoder.encode_texts(["The heart is enlarged."]), k=5, direction="text", with_text=True)[0]
    assert sum("enlarged" in hit.row["text"] for hit in hits) >= 4
    assert sum(hit.row["labels"]["Cardiomegaly"] for hit in hits) >= 4


def test_text_stays_out_unless_asked_for(embeddings: Path, tmp_path: Path) -> None:
    build_index(embeddings, tmp_path / "private", "image", say=quiet)
    opened = open_index(tmp_path / "private")
    assert "text" not in opened.table.column_names
    assert not any(b"enlarged" in file.read_bytes() for file in (tmp_path / "private").iterdir())


def test_mistakes(index: Path, tmp_path: Path) -> None:
    opened = open_index(index)
    dim = opened.manifest["dim"]
    with pytest.raises(UserError, match="dimensions"):
        opened.search(np.ones((1, dim + 1), np.float32))
    with pytest.raises(UserError, match="norm 1"):
        opened.search(np.full((1, dim), np.nan, np.float32))
    with pytest.raises(UserError, match="norm 1"):
        opened.search(np.ones((1, dim), np.float32))
    with pytest.raises(UserError, match="k must be at least 1"):
        opened.search(np.eye(dim, dtype=np.float32)[:1], k=0)
    assert len(opened.search(np.eye(dim, dtype=np.float32)[0], k=10**6)[0]) == len(opened)
    assert opened.search(np.empty((0, dim), np.float32)) == []
    with pytest.raises(UserError, match="embed and index again with this bundle"):
        open_index(index, bundle_fingerprint="0" * 64)
    with pytest.raises(UserError, match="no such folder"):
        open_index(tmp_path / "none")
    for identifier in (-1, len(opened), 10**12):
        with pytest.raises(UserError, match=f"holds no id {identifier}"):
            opened.rows([identifier])
    assert opened.rows([3])[0]["id"] == 3


ROLES = ["vectors", "rows", "starts", "members"]


def file_of(folder: Path, role: str) -> Path:
    return folder / json.loads((folder / "manifest.json").read_text())["files"][role]["name"]


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data + b"x",
        lambda data: data[:-1],
        lambda data: bytes([data[0] ^ 1]) + data[1:],
        lambda data: b"",
    ],
    ids=["longer", "shorter", "altered", "empty"],
)
def test_a_changed_index_is_refused_before_anything_reads_it(
    small: Path, monkeypatch: pytest.MonkeyPatch, role: str, spoil: Callable[[bytes], bytes]
) -> None:
    file = file_of(small, role)
    file.write_bytes(spoil(file.read_bytes()))
    monkeypatch.setattr(import_faiss(), "read_index", lambda *_: pytest.fail("it was read"))
    with pytest.raises(UserError, match=f"{file.name} is missing or was changed since it was written: index again"):
        open_index(small)
    file.unlink()
    with pytest.raises(UserError, match="is missing or was changed"):
        open_index(small)


@pytest.mark.parametrize(
    "changes",
    [
        {"files": dict.fromkeys(("vectors", "rows", "starts", "members"))},
        {"bundle": None},
        {"dim": "24"},
        {"parameters": {"image": {"depth": 3}}},
        {"parameters": None},
    ],
)
def test_a_manifest_that_somebody_wrote_in_is_damaged(small: Path, changes: dict[str, object]) -> None:
    manifest = json.loads((small / "manifest.json").read_text())
    (small / "manifest.json").write_text(json.dumps(manifest | changes))
    with pytest.raises(UserError, match=r"manifest\.json is damaged: index again"):
        open_index(small, "0" * 64)


def test_a_manifest_that_is_a_pointer_of_git_lfs_is_named(small: Path) -> None:
    (small / "manifest.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    with pytest.raises(UserError, match=r"manifest\.json is a pointer of Git LFS, not the file itself"):
        open_index(small)


def test_a_pointer_of_git_lfs_is_named(small: Path) -> None:
    file_of(small, "vectors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    with pytest.raises(UserError, match="is a pointer of Git LFS, not the file itself: run git lfs pull"):
        open_index(small)


def resealed(folder: Path, role: str, data: bytes) -> None:
    """A file replaced together with its hash, as an attacker or a careless tool might."""
    manifest = json.loads((folder / "manifest.json").read_text())
    entry = manifest["files"][role]
    (folder / entry["name"]).write_bytes(data)
    entry |= {"bytes": len(data), "sha256": sha256(folder / entry["name"])}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def edited(folder: Path, **facts: Any) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | facts))


def test_an_index_of_a_newer_faiss(small: Path) -> None:
    edited(small, faiss="99.1.0")
    assert len(open_index(small)) == 900  # it may well be readable
    resealed(small, "vectors", b"IxZZ" + file_of(small, "vectors").read_bytes()[4:])
    with pytest.raises(UserError, match=r"cannot read .*, written by faiss 99\.1\.0: install that version or a newer"):
        open_index(small)
    edited(small, faiss="1.0")
    with pytest.raises(UserError, match=r"written by faiss 1\.0: index again"):
        open_index(small)
    assert store.newer("1.15.0", "1.9.3")


def test_arrays_may_claim_no_more_bytes_than_the_file_has(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faiss = import_faiss()
    limit, real, seen = faiss.get_deserialization_vector_byte_limit(), faiss.read_index, []

    def read(*given: Any) -> Any:
        seen.append(faiss.get_deserialization_vector_byte_limit())
        return real(*given)

    monkeypatch.setattr(faiss, "read_index", read)
    open_index(small)
    assert seen == [file_of(small, "vectors").stat().st_size + store.SLACK]
    assert faiss.get_deserialization_vector_byte_limit() == limit
    data = bytearray(file_of(small, "vectors").read_bytes())
    place = data.index((900 * 24 * 4).to_bytes(8, "little")) if (900 * 24 * 4).to_bytes(8, "little") in data else None
    place = place if place is not None else data.index((900 * 24).to_bytes(8, "little"))
    data[place : place + 8] = (10**11).to_bytes(8, "little")
    resealed(small, "vectors", bytes(data))
    with pytest.raises(UserError, match="cannot read"):
        open_index(small)


def arrow(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue().to_pybytes())


def numbers(path: Path, values: Any) -> bytes:
    np.save(path, values, allow_pickle=False)
    return path.with_suffix(".npy").read_bytes()


def test_parts_that_do_not_belong_together(small: Path, tmp_path: Path) -> None:
    whole = Path(shutil.copytree(small, tmp_path / "whole"))
    rows = open_index(whole).table
    ids = rows["id"].to_pylist()
    cases: list[tuple[str, bytes, str]] = [
        ("rows", arrow(rows.set_column(0, "id", pa.array([*ids[:-1], 5]))), "ids that repeat or do not ascend"),
        ("rows", arrow(rows.slice(0, 800)), "do not belong together"),
        ("members", numbers(tmp_path / "m", np.full(900, 900)), "do not belong together"),
        ("members", numbers(tmp_path / "m", np.full(900, -1)), "do not belong together"),
        ("starts", numbers(tmp_path / "m", np.arange(901)[::-1]), "do not belong together"),
    ]
    for role, data, said in cases:
        copy = Path(shutil.copytree(whole, tmp_path / "copy", dirs_exist_ok=True))
        resealed(copy, role, data)
        with pytest.raises(UserError, match=said):
            open_index(copy)
        shutil.rmtree(copy)
    manifest = json.loads((whole / "manifest.json").read_text())
    manifest["files"]["rows"]["name"] = "../whole/" + manifest["files"]["rows"]["name"]
    (whole / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="names a file outside of it"):
        open_index(whole)
    edited(whole, files={})
    with pytest.raises(UserError, match="names no files"):
        open_index(whole)
    for files in (3, None, "x"):
        edited(whole, files=files)
        with pytest.raises(UserError, match="names no files"):
            open_index(whole)
    damaged: list[Any] = [3, [1], {"image": 3}, {"image": None}, {"image": "nprobe"}, {"image": {"nprobe": "4"}}]
    edited(whole, files=manifest["files"])
    for parameters in damaged:
        edited(whole, parameters=parameters)
        with pytest.raises(UserError, match="is damaged: index again"):
            open_index(whole)
    edited(whole, parameters={}, files=manifest["files"] | {"rows": manifest["files"]["rows"] | {"bytes": None}})
    with pytest.raises(UserError, match="is damaged: index again"):
        open_index(whole)
    edited(whole, format="medclip-lab-index/1")
    with pytest.raises(UserError, match="has format 'medclip-lab-index/1'"):
        open_index(whole)


@pytest.mark.parametrize("where", ["save_index", "save_array"])
def test_nothing_is_half_written(made: Path, small: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """A full disk: a new index leaves nothing behind, an old one stays as it was."""
    before = contents(small)

    def full(path: Path, _: Any) -> Path:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(build, where, full)
    for out in (small, small.parent / "new"):
        with pytest.raises(OSError, match="No space left"):
            build_index(made, out, goals=Goals(seed=1), say=quiet)
    assert contents(small) == before
    assert not (small.parent / "new").exists()
    assert sorted(path.name for path in small.parent.iterdir()) == ["small"]


def test_faiss_says_when_the_disk_is_full(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="faiss could not write the index"):
        store.save_index(tmp_path / "none" / "x.faiss", import_faiss().IndexFlatIP(4))


def test_a_change_is_seen_as_a_whole_or_not_at_all(
    made: Path, small: Path, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before the manifest is replaced: the old index. Opened while it is replaced: the new one."""
    other = replace(corpus, seed=8, size=100)
    more = renamed(other, tmp_path / "more", "new")
    before = contents(small)

    class Killed(BaseException):
        pass

    def killed(path: Path, value: Any) -> None:
        raise Killed

    real = store.write_json
    monkeypatch.setattr(store, "write_json", killed)
    with pytest.raises(Killed):
        add_to_index(small, more)
    assert {name: data for name, data in contents(small).items() if name in before} == before
    assert len(open_index(small)) == 900
    monkeypatch.setattr(store, "write_json", real)
    old = open_index(small)
    read, done = store.Opened._read, []

    def slow(self: Any) -> None:
        if not done:
            done.append(add_to_index(small, more))  # another process, while this one had read the manifest only
        read(self)

    monkeypatch.setattr(store.Opened, "_read", slow)
    monkeypatch.setattr(update, "Opened", type("Fast", (store.Opened,), {"_read": read}))
    assert len(open_index(small)) == 1000
    assert len(contents(small)) == len(before)  # what nothing names any more is gone
    assert len(old.search(features_of(made, "image")[:2], 3)[0]) == 3  # and who has it open can go on


def test_threads_search_one_index(made: Path, tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    from medclip_lab.retrieval.parameters import Parameters

    build_index(made, tmp_path / "i", goals=Goals(factory="IVF32,Flat", target_recall=0.9), say=quiet)
    index, queries = open_index(tmp_path / "i"), features_of(made, "text")[:40]

    def ask(number: int) -> Any:
        return [[hit.id for hit in hits] for hits in index.search(queries, 5, parameters=Parameters(nprobe=number))]

    alone = {number: ask(number) for number in (1, 4, 32)}
    assert alone[1] != alone[32]
    with ThreadPoolExecutor(4) as pool:
        asked = [1, 4, 32] * 20
        assert list(pool.map(ask, asked)) == [alone[number] for number in asked]
