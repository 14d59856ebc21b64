"""Additions and removals, and what is left of them when an index is built anew."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medclip_lab.bench.vectors import Corpus
from medclip_lab.errors import UserError
from medclip_lab.retrieval import build, store
from medclip_lab.retrieval.build import build_index
from medclip_lab.retrieval.choose import Goals
from medclip_lab.retrieval.index import open_index
from medclip_lab.retrieval.update import add_to_index, remove_from_index
from tests.retrieval.synthetic import contents, features_of, quiet, renamed


@pytest.mark.parametrize("factory", ["Flat", "SQ8", "IVF8,Flat", "HNSW8_SQfp16", "PQ12x4fs,Refine(SQfp16)"])
def test_added_and_removed(made: Path, corpus: Corpus, tmp_path: Path, factory: str) -> None:
    out = tmp_path / "i"
    build_index(made, out, goals=Goals(factory=factory, target_recall=0.9), say=quiet)
    more = renamed(replace(corpus, seed=8, size=100), tmp_path / "more", "new")
    manifest = add_to_index(out, more)
    assert (manifest["size"], manifest["next_id"], manifest["rebuild"]) == (1000, 1000, False)
    index, added, first = open_index(out), features_of(more, "image"), features_of(made, "image")
    hits = [found[0] for found in index.search(np.concatenate([first[:3], added[:3]]), 1)]
    assert [hit.id for hit in hits] == [0, 1, 2, 900, 901, 902]
    assert hits[3].study_id == "new-study-0"
    with pytest.raises(UserError, match=r"100 of 100 rows to add are in .* already"):
        add_to_index(out, more)
    gone = [f"new-study-{number}" for number in range(100)]
    removed = remove_from_index(out, gone[:50])
    assert (removed["size"], len(open_index(out))) == (950, 950)
    index = open_index(out)
    for found in index.search(added, 20):
        assert len(found) == 20
        assert not {hit.study_id for hit in found} & set(gone[:50])
        assert [hit.rank for hit in found] == list(range(1, 21))
    assert len(index.search(added[:1], 5000)[0]) == 950
    with pytest.raises(UserError, match="holds no id 900"):
        index.rows([900])
    with pytest.raises(UserError, match=r"1 of 2 studies to remove are not in .*: none was"):
        remove_from_index(out, [gone[0], gone[60]])
    assert len(open_index(out)) == 950
    again = remove_from_index(out, gone[50:])
    assert (again["size"], again["changed"]) == (900, {"added": 100, "removed": 100})
    assert again["rebuild"]  # a fifth of it has changed
    back = add_to_index(out, more)  # what was removed may come back, under new ids
    assert back["next_id"] == 1100
    assert open_index(out).search(added[:1], 1)[0][0].id == 1000
    anew = build_index([made, more], out, say=quiet)
    assert (anew["changed"], anew["size"], "rebuild" in anew) == ({"added": 0, "removed": 0}, 1000, False)


@pytest.mark.parametrize("modality", ["image", "text"])
def test_a_removed_study_stays_out_of_what_is_built_anew(
    made: Path, corpus: Corpus, tmp_path: Path, modality: str
) -> None:
    """A consent that was withdrawn: neither its rows nor its vectors come back, however often it is built."""
    out, features = tmp_path / "i", features_of(made, modality)
    build_index(made, out, modality, say=quiet)
    studies = [row["study_id"] for row in open_index(out).rows(range(900))]
    gone = [studies[7], studies[450]]
    remove_from_index(out, gone)
    for turn in (1, 2):
        manifest = build_index(made, out, modality, say=quiet)
        index = open_index(out)
        assert (len(index), manifest["size"], manifest["next_id"]) == (898, 898, 900 + turn * 898)
        assert index.ids(()).min() == 900 + (turn - 1) * 898  # ids of another row are never given again
        assert not {row["study_id"] for row in index.rows(index.ids(()))} & set(gone)
        # And what stays has its own vector still.
        hits = [found[0] for found in index.search(features[[6, 8, 899]], 1)]
        assert all(hit.score == pytest.approx(1, abs=1e-5) for hit in hits)
        if modality == "image":
            assert [hit.study_id for hit in hits] == [studies[6], studies[8], studies[899]]
            assert all(found[0].score < 0.9999 for found in index.search(features[[7, 450]], 1))
    assert not any(study in (out / "manifest.json").read_text() for study in gone)
    more = renamed(replace(corpus, seed=8, size=100), tmp_path / "more", "new")
    add_to_index(out, more)
    remove_from_index(out, ["new-study-3", "new-study-4"])
    assert len(build_index([made, more], out, modality, say=quiet)["withdrawn"]["studies"]) == 4
    assert len(open_index(out)) == 996


def test_a_change_deletes_no_file_of_others(made: Path, small: Path) -> None:
    kept = ["README.md", "notes-2024.npy", ".gitignore", "vectors.faiss", "index.faiss"]
    for name in kept:
        (small / name).write_text("mine")
    for name in ("rows-0123456789abcdef.arrow", ".manifest.json.01234567.tmp"):
        (small / name).write_text("left by a change that was killed")
    remove_from_index(small, ["study-1"])
    build_index(made, small, say=quiet)
    names = {entry["name"] for entry in open_index(small).manifest["files"].values()}
    assert set(contents(small)) == {*kept, *names, "manifest.json"}


def test_files_of_the_first_format_go(made: Path, tmp_path: Path) -> None:
    """They hold what the embeddings may hold no longer."""
    (tmp_path / "i").mkdir()
    (tmp_path / "i" / "manifest.json").write_text(json.dumps({"format": "medclip-lab-index/1"}))
    for name in ("index.faiss", "ids.parquet"):
        (tmp_path / "i" / name).write_text("old")
    build_index(made, tmp_path / "i", say=quiet)
    assert not {"index.faiss", "ids.parquet"} & set(contents(tmp_path / "i"))
    assert len(open_index(tmp_path / "i")) == 900


def test_the_folder_one_stands_in(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for _ in range(2):
        build_index(made, ".", say=quiet)
        assert len(open_index(".")) == 900
        assert (tmp_path / "here").samefile(".")
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_nothing_but_removed_studies(made: Path, small: Path) -> None:
    remove_from_index(small, [row["study_id"] for row in open_index(small).rows(range(900))])
    with pytest.raises(UserError, match="all rows of the embeddings are of studies that were removed"):
        build_index(made, small, say=quiet)


def test_an_index_that_is_built_anew_takes_no_changes(made: Path, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A removal meanwhile would be forgotten."""
    choose, tried = build.choose, []

    def meanwhile(*arguments: Any) -> Any:
        with pytest.raises(UserError, match="is being changed by another process"):
            remove_from_index(small, ["study-1"])
        tried.append(True)
        return choose(*arguments)

    monkeypatch.setattr(build, "choose", meanwhile)
    build_index(made, small, say=quiet)
    assert tried


def test_removals_of_an_earlier_version(made: Path, small: Path) -> None:
    remove_from_index(small, ["study-1"])
    manifest = json.loads((small / "manifest.json").read_text())
    del manifest["withdrawn"]
    (small / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="does not say which studies were removed"):
        build_index(made, small, say=quiet)
    remove_from_index(small, ["study-2"])  # notes both
    build_index(made, small, say=quiet)
    assert len(open_index(small)) == 898


def test_a_removed_copy_leaves_the_others(made: Path, tmp_path: Path) -> None:
    build_index(made, tmp_path / "i", "text", say=quiet)
    index = open_index(tmp_path / "i")
    group = index.groups.of(int(np.diff(index.groups.starts).argmax()))
    assert len(group) > 1
    studies = [index.row(int(row))["study_id"] for row in group]
    query = features_of(made, "text")[group[0]]
    assert [hit.study_id for hit in index.search(query, len(group))[0]] == studies
    remove_from_index(tmp_path / "i", studies[:1])
    assert [hit.study_id for hit in open_index(tmp_path / "i").search(query, len(group) - 1)[0]] == studies[1:]


def test_changes_that_cannot_be(made: Path, small: Path, corpus: Corpus, embeddings: Path, tmp_path: Path) -> None:
    narrow = replace(corpus, dim=8, size=50).write(tmp_path / "narrow")
    with pytest.raises(UserError, match=r"have 8 dimensions, .* has 24"):
        add_to_index(small, narrow)
    with pytest.raises(UserError, match="was built with bundle"):
        add_to_index(small, embeddings)
    with pytest.raises(UserError, match="no such folder"):
        remove_from_index(tmp_path / "none", ["a"])
    with (
        store.changing(small),
        pytest.raises(UserError, match="is being changed by another process: try again when it is done"),
    ):
        remove_from_index(small, ["study-1"])
