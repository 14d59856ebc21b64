import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import medclip_lab
from medclip_lab.data.manifest import Manifest
from medclip_lab.errors import UserError
from medclip_lab.inference.encoder import load
from medclip_lab.retrieval.embed import embed, read_embeddings
from medclip_lab.retrieval.index import build_index, measure_recall, open_index


@pytest.fixture(scope="module")
def embeddings(toy_bundle: Path, toy_shards: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("embeddings") / "test"
    embed(load(toy_bundle, device="cpu"), toy_shards.folder, out, "test", include_text=True)
    return out


@pytest.fixture(scope="module")
def index(embeddings: Path) -> Path:
    build_index(embeddings, embeddings.parent / "index", "image", include_text=True)
    return embeddings.parent / "index"


def test_embeddings_are_those_of_the_encoder(embeddings: Path, toy_bundle: Path, toy_shards: Manifest) -> None:
    features, table, manifest = read_embeddings(embeddings, "text")
    assert len(features) == table.num_rows == toy_shards.count("test")
    expected = load(toy_bundle, device="cpu").encode_texts(table["text"].to_pylist())
    np.testing.assert_allclose(features, expected, atol=1e-5)
    assert manifest["bundle"] == load(toy_bundle, device="cpu").fingerprint


def test_embed_goes_on_and_gives_the_same_bytes(
    embeddings: Path, toy_bundle: Path, toy_shards: Manifest, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(embeddings, tmp_path / "copy"))
    manifest = json.loads((copy / "manifest.json").read_text())
    lost = sorted(manifest["files"])[-1]
    del manifest["files"][lost]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    (copy / f"{lost}.image.npy").unlink()
    with pytest.raises(UserError, match="not finished"):
        read_embeddings(copy, "image")
    embed(load(toy_bundle, device="cpu"), toy_shards.folder, copy, "test", include_text=True)
    for file in embeddings.iterdir():
        assert (copy / file.name).read_bytes() == file.read_bytes()
    with pytest.raises(UserError, match="another bundle or other shards"):
        embed(load(toy_bundle, device="cpu"), toy_shards.folder, copy, "val", include_text=True)


def test_an_image_finds_itself(index: Path, embeddings: Path) -> None:
    features, table, _ = read_embeddings(embeddings, "image")
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
    hits = opened.search(encoder.encode_texts(["The heart is enlarged."]), k=5)[0]
    assert sum("enlarged" in hit.row["text"] for hit in hits) >= 4


def test_text_stays_out_unless_asked_for(embeddings: Path, tmp_path: Path) -> None:
    build_index(embeddings, tmp_path / "private", "image")
    assert "text" not in pq.read_table(tmp_path / "private" / "ids.parquet").column_names
    assert not any(b"enlarged" in file.read_bytes() for file in (tmp_path / "private").iterdir())


def test_embeddings_without_text_cannot_give_it(toy_bundle: Path, toy_shards: Manifest, tmp_path: Path) -> None:
    embed(load(toy_bundle, device="cpu"), toy_shards.folder, tmp_path / "e", "test")
    with pytest.raises(UserError, match="hold no report text"):
        build_index(tmp_path / "e", tmp_path / "i", include_text=True)


def test_manifest_tells_recall_of_both_directions(index: Path) -> None:
    manifest = json.loads((index / "manifest.json").read_text())
    assert manifest["recall_at_10"] == {"image": 1.0, "text": 1.0}
    assert manifest["faiss"]


def test_recall_is_measured() -> None:
    """An index that lacks half of the gallery is found out."""
    import faiss

    rng = np.random.default_rng(0)
    gallery = rng.normal(size=(400, 8)).astype(np.float32)
    gallery /= np.linalg.norm(gallery, axis=1, keepdims=True)
    half = faiss.IndexIDMap2(faiss.IndexFlatIP(8))
    half.add_with_ids(gallery[:200], np.arange(200))
    assert 0.2 < measure_recall(half, gallery, gallery) < 0.8


def test_mistakes(index: Path, embeddings: Path, tmp_path: Path) -> None:
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
    with pytest.raises(UserError, match="embed and index again with this bundle"):
        open_index(index, bundle_fingerprint="0" * 64)
    with pytest.raises(UserError, match="modality 'sound' is unknown"):
        build_index(embeddings, tmp_path / "x", "sound")
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="choose another folder"):
        build_index(embeddings, tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        open_index(tmp_path / "none")


@pytest.mark.parametrize("name", ["index.faiss", "ids.parquet"])
def test_a_changed_index_is_refused_before_faiss_reads_it(index: Path, tmp_path: Path, name: str) -> None:
    copy = Path(shutil.copytree(index, tmp_path / "copy"))
    with (copy / name).open("ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match=f"{name} is missing or was changed"):
        open_index(copy)


def test_changed_embeddings_are_refused(embeddings: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(embeddings, tmp_path / "copy"))
    file = next(copy.glob("*.image.npy"))
    features = np.load(file)
    features[0] = np.nan
    np.save(file, features)
    with pytest.raises(UserError, match="was changed since it was written"):
        build_index(copy, tmp_path / "index")
    assert not (tmp_path / "index").exists()


def test_shards_of_one_name_are_refused(toy_bundle: Path, toy_shards: Manifest, tmp_path: Path) -> None:
    """Else the embeddings of the second would be those of the first."""
    for name in "ab":
        shutil.copytree(toy_shards.folder, tmp_path / name)
    with pytest.raises(UserError, match="two of them have the same name"):
        embed(load(toy_bundle), f"{tmp_path}/{{a,b}}/test-*.tar", tmp_path / "e")
    assert not (tmp_path / "e").exists()
