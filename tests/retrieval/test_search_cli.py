"""search and rag by commands."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medclip_lab.cli import main
from medclip_lab.retrieval.build import build_index
from medclip_lab.retrieval.index import open_index


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*arguments: object) -> Any:
        assert main([*(str(argument) for argument in arguments), "--json"]) == 0
        out = capsys.readouterr()
        call.err = out.err  # type: ignore[attr-defined]
        return json.loads(out.out)

    return call


@pytest.fixture(scope="module")
def reports(embeddings: Path) -> Path:
    build_index(embeddings, embeddings.parent / "reports", "text", include_text=True, say=lambda _: None)
    return embeddings.parent / "reports"


def test_filters_exclusions_and_vectors(run: Any, toy_bundle: Path, index: Path, tmp_path: Path) -> None:
    opened = open_index(index)
    large = run("search", toy_bundle, index, "--text", "heart", "-k", 100, "--where", "labels.Cardiomegaly=1")
    assert {hit["labels"]["Cardiomegaly"] for hit in large} == {1}
    assert len(large) == len(opened.ids(())) - len(
        opened.search(opened.vectors([0]), 99, where=["labels.Cardiomegaly=0"])[0]
    )
    assert f"{len(large)} of 100: no other row can be an answer" in run.err
    assert not any("text" in hit for hit in large)
    hits = run("search", toy_bundle, index, "--id", 3, "--other-patients", "--with-text", "--with-vectors")
    assert opened.rows([3])[0]["patient_id"] not in {hit["patient_id"] for hit in hits}
    assert all(hit["text"] for hit in hits)
    np.testing.assert_allclose(hits[0]["vector"], opened.vectors([hits[0]["id"]])[0], atol=1e-6)
    np.save(tmp_path / "q.npy", opened.vectors([3])[0])
    own = run("search", toy_bundle, index, "--vector", tmp_path / "q.npy", "-k", 1)
    assert own[0]["score"] == pytest.approx(1, abs=1e-5)
    assert run("search", toy_bundle, index, "--id", 3, "--policy", "ratio", "--ratio", "1.0001", "-k", 25)
    assert "the policy keeps no more" in run.err


def test_rag(
    run: Any, toy_bundle: Path, reports: Path, index: Path, embeddings: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    made = run("rag", "calibrate", reports, embeddings, "--alpha", 0.3, "-k", 5, "--out", tmp_path / "c.json")
    patients = len(set(open_index(reports).table["patient_id"].to_pylist()))
    assert made["queries"] == patients - -(-patients // 3)  # every third fits the model
    calibrated = ("--policy", "calibrated", "--calibration", tmp_path / "c.json")
    found = run("rag", "export", reports, embeddings, *calibrated, "-k", 5, "--out", tmp_path / "o.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert found["queries"] == len(lines)
    assert found["kept"] == pytest.approx(np.mean([line["retrieve_k"] for line in lines]))
    np.save(tmp_path / "q.npy", open_index(index).vectors([3])[0])
    query = ("search", toy_bundle, reports, "--vector", tmp_path / "q.npy", *calibrated)
    patient = open_index(index).rows([3])[0]["patient_id"]
    assert patient not in {hit["patient_id"] for hit in run(*query, "--not-patient", patient)}
    for command, message in (
        (query, "holds for answers of other patients alone"),
        (("search", toy_bundle, reports, "--text", "x", "--not-patient", "p", *calibrated), "not for text queries"),
        (("search", toy_bundle, reports, "--id", 3, "--other-patients", *calibrated), "not for text queries"),
        (("rag", "export", reports, embeddings, "--out", tmp_path / "x", "--same-patient", *calibrated), "own patient"),
        (("rag", "export", reports, embeddings, "--out", tmp_path / "x", "--labels", "Edema", *calibrated), "labels"),
    ):
        assert main([str(word) for word in command]) == 2
        assert message in capsys.readouterr().err
    domains = [f"--domain={name}={index},{embeddings}" for name in ("one", "two")]
    assert run("rag", "route", *domains, "--out", tmp_path / "router.json")["domains"] == ["one", "two"]
    router = ("search", toy_bundle, tmp_path / "router.json", "--text", "heart", "-k", 2)
    assert len(run(*router, "--domain", "two")) == 2
    assert main([str(word) for word in router]) == 2


def test_a_patient_that_is_not_there_is_said_to_be(run: Any, toy_bundle: Path, index: Path) -> None:
    query = ("search", toy_bundle, index, "--text", "heart", "-k", 2, "--not-patient")
    run(*query, "nobody")
    assert "--not-patient excludes nobody" in run.err
    run(*query, open_index(index).rows([0])[0]["patient_id"])
    assert "nobody" not in run.err


def test_milvus(run: Any, toy_bundle: Path, index: Path, embeddings: Path, tmp_path: Path) -> None:
    pytest.importorskip("milvus_lite")
    store = ("--store", "milvus", "--uri", tmp_path / "m.db")
    made = run("index", embeddings, "--out", "studies", "--include-text", *store)
    assert made["size"] == len(open_index(index))
    query = ("--text", "The heart is enlarged.", "--where", "view=PA", "-k", 4)
    both = [run("search", toy_bundle, *where, *query) for where in ((index,), ("studies", *store))]
    assert [hit["study_id"] for hit in both[0]] == [hit["study_id"] for hit in both[1]]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("search BUNDLE INDEX --text x --where view==PA", "cannot read 'view==PA'"),
        ("search BUNDLE INDEX --text x --policy calibrated", "--policy calibrated and --calibration go together"),
        (
            "search BUNDLE INDEX --text x --policy calibrated --calibration c --nprobe 1",
            "as they were tuned: leave --np",
        ),
        ("search BUNDLE INDEX --text x --ratio 2", "--ratio is for --policy ratio"),
        ("search BUNDLE INDEX --text x --with-vectors", "--with-vectors is for --json"),
        ("search BUNDLE INDEX --text x --uri m.db", "--store milvus and --uri go together"),
        ("search BUNDLE INDEX --text x --other-patients", "--other-patients is for --id"),
        ("search BUNDLE INDEX --text x --domain a", "--domain is for a router"),
        ("search BUNDLE INDEX --vector INDEX/manifest.json", "no .npy file of numbers"),
        ("search BUNDLE INDEX --id 100000", "holds no id 100000"),
        ("search BUNDLE INDEX --text x --nprobe 0", "nprobe must be at least 1, got 0"),
        ("rag calibrate INDEX EMBEDDINGS --alpha 0.001 --out TMP/c", "too few for alpha 0.001: at least 999"),
        ("rag calibrate INDEX EMBEDDINGS --labels Gout --out TMP/c", "no query has a label to compare"),
        ("rag route --domain a=b --out TMP/r", "write NAME=INDEX,EMBEDDINGS"),
        ("index EMBEDDINGS --out c --store milvus --uri TMP/m.db --target-recall 0.9", "--target-recall means nothing"),
        ("index EMBEDDINGS --out c --store milvus --uri TMP/m.db --factory Flat", "--factory means nothing beside"),
        ("index EMBEDDINGS --out c --store milvus --uri TMP/m.db --max-memory 1GB", "--max-memory means nothing"),
        ("index EMBEDDINGS --out c --store milvus --uri TMP/m.db --no-dedup", "--dedup means nothing beside"),
        ("index --add EMBEDDINGS --out INDEX --modality text", "--modality means nothing beside --add and --remove"),
        ("index --add EMBEDDINGS --out INDEX --factory Flat", "--factory means nothing beside --add and --remove"),
        ("index --remove TMP/x --out INDEX --include-text", "--include-text means nothing beside --add"),
        ("index --remove TMP/x --out c --store milvus --uri TMP/m.db", "--remove is for a FAISS index"),
    ],
)
def test_mistakes(
    command: str, message: str, toy_bundle: Path, index: Path, embeddings: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    places = {"BUNDLE": toy_bundle, "INDEX": index, "EMBEDDINGS": embeddings, "TMP": tmp_path}
    for name, place in places.items():
        command = command.replace(name, str(place))
    assert main(command.split()) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
