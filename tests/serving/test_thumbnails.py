"""Small pictures of cases: only where the operator and the key allow, nothing in them but pixels, nothing kept."""

import base64
import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from medclip_lab.data.manifest import Manifest
from medclip_lab.data.preprocess import Preprocess, PreprocessConfig
from medclip_lab.errors import UserError
from medclip_lab.serving import answers, keys
from medclip_lab.serving.thumbnails import SIDE, ShardPictures, open_pictures, thumbnail

from .conftest import Serve, problem

ALL = ("classify", "search", "thumbnails")
SECRET = "NAME-OF-A-PATIENT"


def asked(client: TestClient, ids: list[int], index: str = "films") -> list[Any]:
    response = client.post("/v1/thumbnails", json={"ids": ids, "index": index})
    assert response.status_code == 200, response.text
    assert response.headers["cache-control"] == "no-store"
    answers.ThumbnailsOut.model_validate(response.json())
    return [one["image"] for one in response.json()["thumbnails"]]


def test_they_are_the_images_of_the_rows(serve: Serve, toy_shards: Manifest, tmp_path: Path) -> None:
    """Images of toy studies are bright where the heart is enlarged."""
    client = serve(local_scopes=ALL, thumbnails=tuple(f"{name}={toy_shards.folder}" for name in ("films", "reports")))
    assert [one["thumbnails"] for one in client.get("/v1/indexes").json()] == [True, True]
    for index in ("films", "reports"):
        hits = client.post("/v1/search", json={"text": "heart", "index": index, "k": 8}).json()["hits"]
        found = asked(client, [hit["id"] for hit in hits], index)
        for hit, image in zip(hits, found, strict=True):
            picture = Image.open(io.BytesIO(base64.b64decode(image)))
            assert (picture.format, picture.size) == ("JPEG", (40, 40))
            large = hit["fields"]["labels"]["Cardiomegaly"]
            assert (np.asarray(picture).mean() > 100) == bool(large)
    assert "unknown-id" in problem_kind(client.post("/v1/thumbnails", json={"ids": [10**6], "index": "films"}))
    many = client.post("/v1/thumbnails", json={"ids": [0] * 17, "index": "films"})
    assert "16 ids" in problem(many, 413, "too-many-images")


def problem_kind(response: Any) -> str:
    return str(response.json()["type"])


def test_nobody_sees_them_who_may_not(serve: Serve, toy_shards: Manifest, tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    client = serve(keys=path_with(path), thumbnails=(f"films={toy_shards.folder}",))
    for scopes, kind in (
        (("search",), "scope"),
        (("thumbnails",), "scope"),
        (("search", "thumbnails"), "no-thumbnails"),
    ):
        key = keys.new_key(path, scopes)
        client = serve(keys=path, thumbnails=(f"films={toy_shards.folder}",))
        headers = {"Authorization": f"Bearer {key}"}
        refused = client.post("/v1/thumbnails", json={"ids": [0], "index": "reports"}, headers=headers)
        problem(refused, 422 if kind == "no-thumbnails" else 403, kind)
    allowed = client.post("/v1/thumbnails", json={"ids": [0], "index": "films"}, headers=headers)
    assert allowed.status_code == 200
    refused = client.post("/v1/thumbnails", json={"ids": [0], "index": "films"})
    problem(refused, 401, "key")


def path_with(path: Path) -> Path:
    keys.new_key(path, ["search"])
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images with all that files carry beside pixels."""
    values = (np.indices((400, 300)).sum(0) % 256).astype(np.uint8)
    picture = Image.fromarray(values)
    exif = Image.Exif()
    exif[0x010E] = SECRET
    picture.save(tmp_path / "s1.jpg", comment=SECRET.encode(), exif=exif, icc_profile=SECRET.encode())
    (tmp_path / "s1").mkdir()
    turned = picture.transpose(Image.Transpose.ROTATE_90)
    turned.save(tmp_path / "s1" / "1.png")
    turned.save(tmp_path / "s1" / "first.png")
    turned.save(tmp_path / "s2.1.png")  # of the study s2.1
    (tmp_path / "s2.png").write_bytes(b"no image")
    (tmp_path / "notes.txt").write_text(SECRET)
    return tmp_path


def test_nothing_but_small_pixels_leaves(folder: Path) -> None:
    pictures, preprocess = open_pictures(folder), Preprocess(PreprocessConfig(size=32))

    def made(study: str, number: int = 0, max_bytes: int = 10**6, max_pixels: int = 10**6) -> Any:
        found = thumbnail(pictures, study, number, preprocess, max_pixels, max_bytes)
        return None if found is None else base64.b64decode(found)

    assert SECRET.encode() in (folder / "s1.jpg").read_bytes()
    first = made("s1")
    assert SECRET.encode() not in first
    picture = Image.open(io.BytesIO(first))
    assert picture.size == (SIDE * 3 // 4, SIDE)
    assert not set(picture.info) - {"jfif", "jfif_version", "jfif_unit", "jfif_density"}
    assert Image.open(io.BytesIO(made("s1", 1))).size == (SIDE, SIDE * 3 // 4)
    assert made("s2.1") is not None
    for study, number in (("s1", 2), ("s2", 0), ("s2", 1), ("s3", 0), ("../s1", 0), ("notes", 0)):
        assert made(study, number) is None
    assert made("s1", max_bytes=99) is None
    assert made("s1", max_pixels=100) is None


def test_sources_that_are_none_are_refused(folder: Path, tmp_path: Path) -> None:
    for path in folder.glob("s*.*"):
        path.unlink()
    (folder / "s1" / "1.png").unlink()
    with pytest.raises(UserError, match="neither shards nor images"):
        open_pictures(folder)  # there are notes in it
    with pytest.raises(UserError, match="thumbnails"):
        open_pictures(tmp_path / "none")


def test_other_shards_show_no_stranger(toy_shards: Manifest, tmp_path: Path) -> None:
    """A study of the same key in other shards is shown only if its record has the id."""
    pictures = open_pictures(toy_shards.folder)
    assert pictures.find("study-7", 0) is not None
    assert pictures.find("study-7", 1) is None
    assert pictures.find("Study 7", 0) is None
    assert isinstance(pictures, ShardPictures)
    pictures._places["stranger"] = pictures._places["study-7"]
    assert pictures.find("stranger", 0) is None
    copy = tmp_path / "copy"
    shutil.copytree(toy_shards.folder, copy)
    damaged = open_pictures(copy)
    for tar in copy.glob("*.tar"):
        tar.write_bytes(tar.read_bytes()[:100])
    assert open_pictures(copy).find("study-7", 0) is None
    assert damaged.find("study-7", 0) is None
