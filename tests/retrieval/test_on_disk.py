"""Lists on the disk: filled in parts by several processes they are those that one process makes, and stay there."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from medclip_lab.bench.vectors import Corpus
from medclip_lab.errors import UserError
from medclip_lab.retrieval import choose, on_disk
from medclip_lab.retrieval.build import build_index
from medclip_lab.retrieval.choose import Goals
from medclip_lab.retrieval.embeddings import Arrays, Embeddings, Vectors
from medclip_lab.retrieval.families import import_faiss, make
from medclip_lab.retrieval.gallery import Chosen, Joined
from medclip_lab.retrieval.index import open_index
from medclip_lab.retrieval.mapped_lists import attach
from medclip_lab.retrieval.on_disk import open_lists, workshop
from medclip_lab.retrieval.store import MANIFEST, Opened
from medclip_lab.retrieval.update import add_to_index, remove_from_index
from tests.retrieval.synthetic import features_of, quiet, renamed

faiss = import_faiss()
SIZE, DIM = 1200, 16
GOALS = Goals(0.95, on_disk=True, factory="IVF32,SQ8")
"""A kind is named: which of two is quicker is not always the same."""


@pytest.fixture(scope="module")
def vectors() -> Any:
    return next(Corpus(size=SIZE, dim=DIM, clusters=30).blocks())["image"]


def lists_of(index: Any) -> list[tuple[bytes, list[int]]]:
    """(codes, ids) of each list."""
    found = []
    for number in range(index.nlist):
        size = index.invlists.list_size(number)
        codes = faiss.rev_swig_ptr(index.invlists.get_codes(number), size * index.code_size).tobytes() if size else b""
        ids = faiss.rev_swig_ptr(index.invlists.get_ids(number), size).tolist() if size else []
        found.append((codes, ids))
    return found


@pytest.mark.parametrize("key", ["IVF24,SQ8", "IVF24,SQfp16", "IVF24,Flat", "IVF24,PQ8x4", "IVF24,RaBitQ"])
def test_parts_of_several_processes_are_the_lists_of_one(
    key: str, vectors: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_disk, "PART_BYTES", 250 * (2 * DIM + 8))
    whole = make(key, DIM)
    whole.train(vectors)
    with workshop(tmp_path / "index") as shop:
        shop.start(whole, 2)
        shop.add(Chosen(Arrays(vectors), np.arange(1000)), 0)
        first = open_lists(shop.merge())
        shop.add(Arrays(vectors[1000:]), 1000)
        parts = len(list(shop.folder.glob("part-*")))
        index = open_lists(shop.merge())
        assert len(list(shop.folder.glob("lists-*"))) == 1, "no disk holds what was merged before"
        assert shop.taken > 50 * 2**20, "a python and faiss"
        whole.add(vectors[:1000])
        assert lists_of(first) == lists_of(whole), "also while another merge has taken its place"
        whole.add(vectors[1000:])
        assert lists_of(index) == lists_of(whole)
        assert parts >= 3
        assert index.ntotal == SIZE
        settings = faiss.SearchParametersIVF(nprobe=8)
        for ours, theirs in zip(
            index.search(vectors[:40], 5, params=settings), whole.search(vectors[:40], 5, params=settings), strict=True
        ):
            np.testing.assert_array_equal(ours, theirs)
        shop.start(whole, 2)
        assert {path.name for path in shop.folder.iterdir()} == {".lock", "trained.faiss"}, (
            "another begins with nothing"
        )
    assert list(tmp_path.iterdir()) == []


def test_blocks_of_a_stretch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kind of vectors gives the rows that are asked for and no others, under their own numbers."""
    monkeypatch.setattr("medclip_lab.retrieval.embeddings.BLOCK_BYTES", 4 * DIM * 100)
    monkeypatch.setattr("medclip_lab.bench.vectors.BLOCK", 500)
    folder = Corpus(size=SIZE, dim=DIM, clusters=30).write(tmp_path / "e")
    values, files = features_of(folder, "image"), Embeddings(folder).vectors("image")
    assert len(files.paths) == 3
    odd = np.arange(1, SIZE, 2)
    several: list[tuple[Vectors, Any]] = [
        (files, values),
        (Arrays(values), values),
        (Joined([files, Arrays(values), files]), np.concatenate([values] * 3)),
        (Chosen(files, odd), values[odd]),
        (Chosen(Chosen(files, odd), np.arange(100, 500)), values[odd][100:500]),
    ]
    for (given, expected), first, last in product(several, (0, 3, 311, 1199, 1200), (0, 4, 312, 1200, None)):
        end = len(expected) if last is None else min(last, len(expected))
        found = list(given.blocks(first, end))
        rows = [start + row for start, block in found for row in range(len(block))]
        assert rows == list(range(len(expected)))[first:end]
        if rows:
            np.testing.assert_array_equal(np.concatenate([block for _, block in found]), expected[first:end])


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Corpus(size=SIZE, dim=DIM, clusters=30).write(tmp_path_factory.mktemp("e") / "embeddings")


@pytest.fixture(scope="module")
def built(embedded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("i") / "index"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(on_disk, "PART_BYTES", SIZE * (DIM + 8) // 3)
        manifest = build_index(embedded, out, goals=replace(GOALS, processes=2), say=quiet)
    assert manifest["on_disk"]
    return out


def test_an_index_with_lists_on_the_disk(built: Path, embedded: Path, tmp_path: Path) -> None:
    manifest = json.loads((built / MANIFEST).read_text())
    assert {"vectors", "lists", "lengths"} < set(manifest["files"])
    assert sorted(path.name for path in built.parent.iterdir()) == ["index"], "no folder of parts is left"
    memory = manifest["memory"]
    assert memory["process"] + 10**8 < memory["peak"] <= 1.2 * memory["predicted"], "with two processes beside"
    index = open_index(built)
    assert index.index.ntotal == SIZE
    values = features_of(embedded, "image")
    assert [hits[0].id for hits in index.search(values, 1)] == list(range(SIZE)), "those that were held out too"
    some = index.search(values[:20], 5, where=["study_id in " + ",".join(f"study-{row}" for row in range(100, 110))])
    assert all(100 <= hit.id < 110 for hits in some for hit in hits)
    np.testing.assert_allclose(index.vectors([3, 1100]), values[[3, 1100]], atol=0.03)
    again = build_index(embedded, tmp_path / "again", goals=replace(GOALS, processes=1), say=quiet)
    assert again["files"] == manifest["files"], "the same to the byte by any number of processes"


def test_it_takes_additions_and_removals(built: Path, embedded: Path, tmp_path: Path) -> None:
    folder = tmp_path / "index"
    shutil.copytree(built, folder)
    before = open_index(folder)
    more = renamed(Corpus(size=300, dim=DIM, clusters=30, seed=7), tmp_path / "more", "more")
    manifest = add_to_index(folder, more)
    index = open_index(folder)
    assert manifest["vectors"] == index.index.ntotal == SIZE + 300
    assert index.fingerprint() != before.fingerprint()
    new, old = features_of(more, "image"), features_of(embedded, "image")
    for values, first in ((old, 0), (new, SIZE)):  # but for a few that have a neighbour nearer than 8 bits tell
        found = np.array([hits[0].id for hits in index.search(values, 1)])
        assert (found == first + np.arange(len(values))).mean() > 0.95
    assert [hits[0].id for hits in before.search(old, 1)] == list(range(SIZE)), "who has it open goes on"
    remove_from_index(folder, ["study-5"])
    assert 5 not in [hit.id for hits in open_index(folder).search(old[5:6], 10) for hit in hits]
    assert len(list(folder.glob("lists-*"))) == 1, "what the manifest no longer names is gone"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index", "more"]


def test_a_budget_that_nothing_else_fits(embedded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chosen by itself where nothing fits, unless it is refused; the least that would do is named."""
    monkeypatch.setattr(choose, "PLAIN_VALUES", 0)
    real = choose._Search.predicted

    def predicted(search: Any, key: str, size: int) -> int:
        return real(search, key, size) + (0 if search.on_disk else 2**40)

    monkeypatch.setattr(choose._Search, "predicted", predicted)
    lines: list[str] = []
    manifest = build_index(embedded, tmp_path / "i", goals=Goals(0.9, max_memory=2**40), say=lines.append)
    assert manifest["on_disk"]
    assert "nothing fits into 1.1e+03 GB: lists stay on the disk" in lines[0]
    with pytest.raises(UserError, match=r"too little for 1200 vectors of 16 dimensions: at least .*\(.*[^k]\)$"):
        build_index(embedded, tmp_path / "j", goals=Goals(0.9, max_memory=2**40, on_disk=False), say=quiet)
    with pytest.raises(UserError, match=r"at least .*B \(IVF64,SQ8 on the disk\)$"):
        build_index(embedded, tmp_path / "j", goals=Goals(0.9, max_memory=2**20), say=quiet)
    assert not (tmp_path / "j").exists()


@pytest.mark.parametrize("size", [1, 5, 30])
def test_a_corpus_of_a_few(size: int, tmp_path: Path) -> None:
    folder = Corpus(size=size, dim=DIM, clusters=3).write(tmp_path / "e")
    manifest = build_index(folder, tmp_path / "i", goals=Goals(0.5, on_disk=True), say=quiet)
    assert manifest["on_disk"]
    hits = open_index(tmp_path / "i").search(features_of(folder, "image"), 10)
    assert [found[0].id for found in hits] == list(range(size))
    assert {len(found) for found in hits} == {min(size, 10)}


def test_what_cannot_be(embedded: Path, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("HNSW32", "IVF16,PQ8x4fs", "IVF16,SQ8,Refine(SQfp16)", "Flat"):
        with pytest.raises(UserError, match="cannot stay on the disk"):
            build_index(embedded, tmp_path / "j", goals=Goals(0.9, on_disk=True, factory=key), say=quiet)
    with pytest.raises(UserError, match="processes: at least 1, got 0"):
        Goals(processes=0)
    goals = Goals(0.9, on_disk=True, factory="IVF16,SQ8")
    with workshop(tmp_path / "j"), pytest.raises(UserError, match="being changed by another process"):
        build_index(embedded, tmp_path / "j", goals=goals, say=quiet)
    free = SimpleNamespace(free=1000)
    monkeypatch.setattr(on_disk.shutil, "disk_usage", lambda _: free)
    with pytest.raises(UserError, match=r"has 1 kB left on its disk, and .* are needed"):
        build_index(embedded, tmp_path / "j", goals=goals, say=quiet)
    assert list(tmp_path.iterdir()) == []


def test_lists_that_do_not_belong(built: Path, tmp_path: Path) -> None:
    """Places follow from lengths that are checked against the file: nothing outside of it is read."""
    opened = Opened(built)
    lengths = np.load(opened.path("lengths"))
    absurd = lengths.copy()
    absurd[:2] = 2**62
    below = lengths.copy()
    below[:2] = lengths[:2].sum() + 1, -1  # the sum is right
    for wrong in (lengths + 1, lengths[:-1], -lengths, absurd, below, lengths * 0):
        with pytest.raises(UserError, match="do not belong to the index"):
            attach(faiss.read_index(str(opened.path("vectors"))), opened.path("lists"), wrong)
    with pytest.raises(UserError, match="do not belong to the index"):
        attach(faiss.IndexFlatIP(DIM), opened.path("lists"), lengths)


def test_a_process_that_dies(vectors: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = make("IVF8,SQ8", DIM)
    index.train(vectors)
    with workshop(tmp_path / "index") as shop:
        shop.start(index, 2)
        monkeypatch.setattr(on_disk, "_fill", _die)
        with pytest.raises(UserError, match="died, for want of memory or of room on the disk"):
            shop.add(Arrays(vectors), 0)
    assert list(tmp_path.iterdir()) == []


def _die(_: Any) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


def test_a_kill_leaves_nothing_that_counts(embedded: Path, built: Path, tmp_path: Path) -> None:
    """Killed while parts are there: no index; the next build of that name begins with an empty folder."""
    out = tmp_path / "index"
    code = f"""
if __name__ == "__main__":
    import os, signal
    from medclip_lab.retrieval import on_disk
    from medclip_lab.retrieval.build import build_index
    from medclip_lab.retrieval.choose import Goals
    on_disk.Workshop.merge = lambda self, old=None: os.kill(os.getpid(), signal.SIGKILL)
    build_index({str(embedded)!r}, {str(out)!r}, goals={GOALS!r})
"""
    script = tmp_path / "script.py"
    script.write_text(code)
    ended = subprocess.run([sys.executable, str(script)], capture_output=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert not out.exists()
    assert list((tmp_path / ".index.parts").glob("part-*"))
    build_index(embedded, out, goals=GOALS, say=quiet)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index", "script.py"]
    assert json.loads((out / MANIFEST).read_text())["files"] == json.loads((built / MANIFEST).read_text())["files"]
