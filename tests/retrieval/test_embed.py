"""Shards to embeddings: the same bytes whatever interrupts, whoever helps and whatever is broken."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from filelock import FileLock

from medclip_lab.data.manifest import Manifest
from medclip_lab.data.shards import write_shards
from medclip_lab.errors import UserError
from medclip_lab.inference.encoder import Encoder, load
from medclip_lab.retrieval import embed as module
from medclip_lab.retrieval.embed import embed
from medclip_lab.retrieval.embeddings import Embeddings
from medclip_lab.retrieval.parts import EmbedConfig, text_key, texts_of
from tests.conftest import toy_samples

KILLS = int(os.environ.get("MEDCLIP_LAB_KILLS", "4"))
TEXT = EmbedConfig(include_text=True)


@pytest.fixture(scope="module")
def encoder(toy_bundle: Path) -> Encoder:
    return load(toy_bundle, device="cpu")


@pytest.fixture(scope="module")
def whole(encoder: Encoder, toy_shards: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All splits in one go, in small batches."""
    out = tmp_path_factory.mktemp("whole") / "e"
    embed(encoder, toy_shards.folder, out, config=EmbedConfig(batch_size=5))
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_embeddings_are_those_of_the_encoder(embeddings: Path, encoder: Encoder, toy_shards: Manifest) -> None:
    found = Embeddings(embeddings)
    features = found.vectors("text").take(np.arange(found.count("text")))
    table = found.table("text")
    assert len(features) == table.num_rows == toy_shards.count("test")
    np.testing.assert_allclose(features, encoder.encode_texts(table["text"].to_pylist()), atol=1e-5)
    assert found.manifest["bundle"] == encoder.fingerprint
    assert table["text_key"].to_pylist() == [text_key(text) for text in table["text"].to_pylist()]
    labels = {
        study: dict(labels)
        for study, labels in zip(*(table[c].to_pylist() for c in ("study_id", "labels")), strict=True)
    }
    assert set(labels["study-8"]) == {"Cardiomegaly"}


class Killed(BaseException):
    """Nobody catches it."""


@pytest.mark.parametrize("calls", [0, 1, 4, 9])
def test_an_interrupted_one_goes_on_with_the_same_bytes(
    whole: Path, encoder: Encoder, toy_shards: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    out, left = tmp_path / "e", [calls]
    real = module._encode

    def fails(*given: Any) -> Any:
        if not left[0]:
            raise Killed
        left[0] -= 1
        return real(*given)

    monkeypatch.setattr(module, "_encode", fails)
    for _ in range(3):
        left[0] = calls
        with pytest.raises(Killed):
            embed(encoder, toy_shards.folder, out, config=EmbedConfig(batch_size=5))
        # What a process leaves that had no time to tidy up:
        (out / ".test-00000.0123abcd.tmp").mkdir(exist_ok=True)
        (out / ".test-00000.0123abcd.tmp" / "image.npy").write_bytes(b"half")
    with pytest.raises(UserError, match="is not finished"):
        Embeddings(out)
    monkeypatch.setattr(module, "_encode", real)
    manifest = embed(encoder, toy_shards.folder, out, config=EmbedConfig(batch_size=5))
    assert contents(out) == contents(whole)
    assert manifest["run"]["device"] == "cpu"
    assert manifest["run"]["seconds"]["model"] > 0
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.npy")}
    assert embed(encoder, toy_shards.folder, out, config=EmbedConfig(batch_size=5))["run"]["rows"] == {}
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*.npy")}


def test_killed_for_real(whole: Path, encoder: Encoder, toy_bundle: Path, toy_shards: Manifest, tmp_path: Path) -> None:
    """SIGKILL in the middle of the second shard's files."""
    code = f"""
import os, signal
from medclip_lab.inference.encoder import load
from medclip_lab.retrieval import embed as module, embeddings
from medclip_lab.retrieval.parts import EmbedConfig
real, calls = embeddings.write_json, []
def kill(path, value):
    if path.name == "shard.json":
        calls.append(path)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
    real(path, value)
embeddings.write_json = kill
encoder, config = load({str(toy_bundle)!r}, "cpu"), EmbedConfig(batch_size=5)
module.embed(encoder, {str(toy_shards.folder)!r}, {str(tmp_path / "e")!r}, None, config)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert len(list((tmp_path / "e").glob("*/shard.json"))) == 1
    embed(encoder, toy_shards.folder, tmp_path / "e", config=EmbedConfig(batch_size=5))
    assert contents(tmp_path / "e") == contents(whole)


WORK = """
import os, sys
from medclip_lab.inference.encoder import load
from medclip_lab.retrieval.embed import embed
from medclip_lab.retrieval.parts import EmbedConfig
bundle, shards, out, workers = sys.argv[1:]
encoder = load(bundle, "cpu")
print("begin", flush=True)
embed(encoder, shards, out, None, EmbedConfig(batch_size=2), workers=int(workers))
os._exit(0)  # kills are to fall into the work, not into the seconds in which libraries are put away
"""


@pytest.mark.slow
def test_killed_at_random_moments(toy_bundle: Path, tmp_path: Path) -> None:
    """Processes of their own, SIGKILL after a time drawn by lot, with and without loader processes."""
    samples = list(toy_samples(240))
    for sample in samples:
        sample.split = "test"
    shards = write_shards(iter(samples), tmp_path / "shards", "toy", samples_per_shard=12).folder
    given = [sys.executable, "-c", WORK, str(toy_bundle), str(shards)]

    def begun(out: Path, workers: int) -> "subprocess.Popen[bytes]":
        run = [*given, str(out), str(workers)]
        process = subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"begin\n"
        return process

    process, start = begun(tmp_path / "whole", 0), time.monotonic()
    assert process.wait() == 0
    expected, longest = contents(tmp_path / "whole"), time.monotonic() - start
    seed = int(os.environ.get("MEDCLIP_LAB_SEED", random.SystemRandom().randrange(10**6)))
    print(f"MEDCLIP_LAB_SEED={seed}")
    chance, killed, finished, out = random.Random(seed), 0, 0, tmp_path / "killed"
    while killed < KILLS:
        process, wait = begun(out, killed % 2), chance.uniform(0, longest / 3)
        try:
            process.wait(wait)
        except subprocess.TimeoutExpired:
            process.kill()
        told = process.communicate()[1].decode()
        done = len(list(out.glob("*/shard.json")))
        print(f"{wait:.3f} s: {process.returncode}, {done} of 20 shards")
        if process.returncode == -signal.SIGKILL:
            killed += 1
            continue
        assert process.returncode == 0, told
        assert contents(out) == expected
        finished += 1
        shutil.rmtree(out)  # and from the beginning
    assert begun(out, 0).wait() == 0
    assert contents(out) == expected
    print(f"{killed} kills, {finished} runs that were done before")


def test_any_number_of_processes_gives_the_same_bytes(
    whole: Path, encoder: Encoder, toy_shards: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 of 2 goes first, finds a shard that rank 0 is at, and leaves it; rank 0 takes what is left."""
    out = tmp_path / "e"
    config = EmbedConfig(batch_size=5)
    (out / ".locks").mkdir(parents=True)
    taken = Path(toy_shards.shards[0].name).stem
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with FileLock(out / ".locks" / f"{taken}.lock"):
        embed(encoder, toy_shards.folder, out, config=config)
    assert not (out / taken).exists()
    assert len(list(out.glob("*/shard.json"))) == len(toy_shards.shards) - 1
    monkeypatch.setenv("RANK", "0")
    embed(encoder, toy_shards.folder, out, config=config, workers=2)
    assert contents(out) == contents(whole)


def test_the_next_shard_is_begun_ahead() -> None:
    begun = []

    def items() -> Any:
        for number in range(4):
            begun.append(number)
            yield number

    assert [(item, len(begun)) for item in module._ahead(items(), 1)] == [(0, 2), (1, 3), (2, 4), (3, 4)]
    begun.clear()
    assert [(item, len(begun)) for item in module._ahead(items(), 0)] == [(0, 1), (1, 2), (2, 3), (3, 4)]


def test_another_request_is_refused(whole: Path, encoder: Encoder, toy_shards: Manifest) -> None:
    for config, split in ((EmbedConfig(batch_size=6), None), (EmbedConfig(batch_size=5), "val")):
        with pytest.raises(UserError, match="another bundle, other shards or other settings"):
            embed(encoder, toy_shards.folder, whole, split, config)


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Twenty studies with an image that is none, a second image, and a report without a text."""
    samples = list(toy_samples(20))
    samples[3].images[0] = ("png", b"no image")
    samples[5].images.append(samples[4].images[0])
    samples[7].text = ""
    for sample in samples:
        sample.split = "test"
    return write_shards(iter(samples), tmp_path_factory.mktemp("broken") / "shards", "toy", samples_per_shard=8)


def test_every_row_has_a_status(encoder: Encoder, broken: Manifest, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="2 of 20 samples are unusable"):  # one alone is always let pass
        embed(encoder, damaged(tmp_path), tmp_path / "strict", max_bad=0.0)
    manifest = embed(encoder, broken.folder, tmp_path / "e", max_bad=0.1)
    found = Embeddings(tmp_path / "e")
    assert (found.count("image"), found.count("text")) == (20, 19)
    status = [
        row for path in sorted((tmp_path / "e").glob("*/status.parquet")) for row in pq.read_table(path).to_pylist()
    ]
    assert len(status) == 21 + 19
    bad = [row for row in status if row["status"] != "ok"]
    assert [(row["modality"], row["status"]) for row in bad] == [("image", "unreadable image")]
    assert "broken png" in bad[0]["reason"]
    listed = json.loads((tmp_path / "e" / "quarantine.jsonl").read_text())
    assert (listed["cause"], listed["key"]) == ("unreadable image", bad[0]["key"])
    assert manifest["run"]["unusable"] == "1 of 20 samples unusable: 1 unreadable image"
    # The rows of the table are those of the vectors: the study with two images stands there twice.
    studies = found.table("image")["study_id"].to_pylist()
    assert [study for study in studies if studies.count(study) == 2] == ["study-5", "study-5"]
    vectors = found.vectors("image").take(np.arange(20))
    place = studies.index("study-5") + 1
    assert found.table("image")["image"][place].as_py() == 1
    np.testing.assert_allclose(vectors[place], vectors[studies.index("study-4")], atol=1e-5)


def damaged(tmp_path: Path) -> Path:
    """Shards with two unreadable studies."""
    samples = list(toy_samples(20))
    for number in (3, 12):
        samples[number].images[0] = ("png", b"no image")
    for sample in samples:
        sample.split = "test"
    write_shards(iter(samples), tmp_path / "damaged", "toy", samples_per_shard=8)
    return tmp_path / "damaged"


def test_an_embedding_that_is_none_is_quarantined(
    encoder: Encoder, broken: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real: Callable[[torch.Tensor], torch.Tensor] = encoder.model.towers["text"]
    spoilt = [torch.nan, torch.inf, 2.0]

    def tower(ids: torch.Tensor) -> torch.Tensor:
        features = real(ids).clone()
        if spoilt:
            features[2] *= spoilt.pop()
        return features

    monkeypatch.setitem(encoder.model.towers, "text", tower)
    embed(encoder, broken.folder, tmp_path / "e", max_bad=0.5)
    found = Embeddings(tmp_path / "e")
    assert (found.count("image"), found.count("text")) == (20, 16)
    lines = [json.loads(line) for line in (tmp_path / "e" / "quarantine.jsonl").read_text().splitlines()]
    assert sum(line["cause"] == "bad embedding" for line in lines) == 3
    table, features = found.table("text"), found.vectors("text").take(np.arange(16))
    monkeypatch.undo()
    embed(encoder, broken.folder, tmp_path / "good", max_bad=0.5)
    good = Embeddings(tmp_path / "good")
    studies = good.table("text")["study_id"].to_pylist()
    expected = good.vectors("text").take(np.array([studies.index(s) for s in table["study_id"].to_pylist()]))
    np.testing.assert_allclose(features, expected, atol=1e-5)


def test_sentences_sections_and_float16(encoder: Encoder, broken: Manifest, tmp_path: Path) -> None:
    config = EmbedConfig(modalities=("text",), texts="sections", dtype="float16", include_text=True)
    embed(encoder, broken.folder, tmp_path / "s", config=config)
    found = Embeddings(tmp_path / "s")
    assert (found.count("image"), found.count("text")) == (0, 40)
    assert np.load(found.paths("text", "npy")[0]).dtype == np.float16
    table = found.table("text")
    assert table["part"].to_pylist()[:2] == ["findings", "impression"]
    expected = encoder.encode_texts(table["text"].to_pylist())
    np.testing.assert_allclose(found.vectors("text").take(np.arange(40)), expected, atol=1e-3)
    with pytest.raises(UserError, match="has no image embeddings"):
        found.vectors("image")


def test_texts_of_a_study() -> None:
    record = {"text": "Heart is large. No effusion.", "sections": {"findings": "Heart is large.", "history": ""}}
    assert texts_of(record, "report") == [(None, record["text"])]
    assert texts_of(record, "sections") == [("findings", "Heart is large.")]
    assert texts_of(record, "sentences") == [("0", "Heart is large."), ("1", "No effusion.")]
    assert texts_of(record | {"sentences": [{"text": "Own.", "labels": {}}]}, "sentences") == [("0", "Own.")]
    assert texts_of({}, "report") == texts_of({}, "sentences") == texts_of({}, "sections") == []
    assert text_key("No  effusion.") == text_key("no effusion") != text_key("effusion")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"modalities": ("sound",)}, "modalities are image and text, got 'sound'"),
        ({"modalities": ()}, "modalities are image and text"),
        ({"texts": "words"}, "no texts 'words'"),
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"batch_size": 0}, "batch-size must be at least 1, got 0"),
    ],
)
def test_bad_settings(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        EmbedConfig(**settings)


def test_changed_embeddings_are_refused(embeddings: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(embeddings, tmp_path / "copy"))
    file = next(copy.glob("*/image.npy"))
    good = file.read_bytes()
    features = np.load(file)
    features[0] = np.nan
    np.save(file, features)
    with pytest.raises(UserError, match="was changed since it was written"):
        Embeddings(copy)
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(UserError, match="is a pointer of Git LFS, not the file itself: run git lfs pull"):
        Embeddings(copy)
    file.write_bytes(good)
    Embeddings(copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | {"format": "medclip-lab-embeddings/1"}))
    with pytest.raises(UserError, match=r"has format 'medclip-lab-embeddings/1'.*embed again"):
        Embeddings(copy)


def test_shards_of_one_name_are_refused(encoder: Encoder, toy_shards: Manifest, tmp_path: Path) -> None:
    """Else the embeddings of the second would be those of the first."""
    for name in "ab":
        shutil.copytree(toy_shards.folder, tmp_path / name)
    with pytest.raises(UserError, match="two of them have the same name"):
        embed(encoder, f"{tmp_path}/{{a,b}}/test-*.tar", tmp_path / "e")
    assert not (tmp_path / "e").exists()
