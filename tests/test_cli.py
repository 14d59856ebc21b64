"""The verbs at work, and one line with exit code 2 for every mistake."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medclip_lab.cli import main
from medclip_lab.data.manifest import Manifest


@pytest.fixture
def place(toy_bundle: Path, toy_shards: Manifest, toy_run: Path, tmp_path: Path) -> dict[str, str]:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.csv").write_text("picture,text\na.png,Normal.\n")
    (tmp_path / "label.csv").write_text("image,text,Edema\na.png,Normal.,2\n")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "films.tar").touch()
    report = "The heart is enlarged and " * 20
    (tmp_path / "swapped.csv").write_text("image,text\n" + "".join(f"{n}.png,{n} {report}\n" for n in range(3)))
    (tmp_path / "bad.yaml").write_text("data:\n  sources:\n    a: {shards: x}\noptim:\n  rate: 1\n")
    return {
        "BUNDLE": str(toy_bundle),
        "SHARDS": str(toy_shards.folder),
        "RUN": str(toy_run),
        "TMP": str(tmp_path),
    }


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("prepare nih-cxr14 TMP/none --out TMP/o", "no such"),
        ("prepare nih-cxr14 TMP/empty --out TMP/o", "empty"),
        ("prepare openi TMP/none.tgz --out TMP/o", "no such"),
        ("prepare csv TMP/none.csv --out TMP/o", "none.csv"),
        ("prepare csv TMP/bad.csv --out TMP/o", "'image'"),
        ("prepare csv TMP/label.csv --out TMP/o", "Edema"),
        ("prepare phantom --studies 0 --out TMP/o", "studies"),
        ("prepare phantom --samples-per-shard 0 --out TMP/o", "--samples-per-shard"),
        ("prepare phantom --workers 0 --out TMP/o", "--workers"),
        ("train", "--config is missing"),
        ("train --config TMP/none.yaml", "cannot read"),
        ("train --config TMP/bad.yaml", "bad.yaml:5: unknown key optim.rate"),
        ("train --config phantom --out TMP/r --optim.lr=fast", "optim.lr"),
        ("train --config phantom --out TMP/r --data.sources.phantom.shards=TMP/none", "no such folder"),
        ("train --config phantom --out TMP/r extra", "write overrides as"),
        ("export TMP/none --out TMP/b", "no such folder"),
        ("export TMP/empty --out TMP/b", "empty"),
        ("evaluate TMP/empty SHARDS", "empty"),
        ("evaluate BUNDLE TMP/empty", "no such file"),
        ("evaluate BUNDLE SHARDS --split holdout", "no split 'holdout'"),
        ("evaluate BUNDLE SHARDS --labelset nothing", "no shipped set is called 'nothing'"),
        ("embed BUNDLE TMP/none --out TMP/e", "no such folder"),
        ("index TMP/none --out TMP/i", "no such file"),
        ("index --out TMP/i", "at least one folder"),
        ("index TMP/none --out TMP/i --max-memory lots", "'lots' is no size"),
        ("index TMP/none --out TMP/i --target-recall 2", "a share above 0"),
        ("index TMP/none --out TMP/i --add TMP/empty", "name no other embeddings"),
        ("index --out TMP/i --remove TMP/none", "cannot read"),
        ("embed BUNDLE SHARDS --out TMP/e --modalities sound", "modalities are image and text"),
        ("embed BUNDLE SHARDS --out TMP/e --workers -1", "--workers"),
        ("search BUNDLE TMP/none --text x", "no such folder"),
        ("classify BUNDLE TMP/none.png", "cannot read"),
        ("classify BUNDLE TMP/bad.csv", "no decoder for .csv"),
        ("export RUN --out SHARDS", "exists and is no bundle"),
        ("export RUN --out TMP/bad.csv", "exists and is no bundle"),
        ("index TMP/none --out SHARDS", "exists and is no index"),
        ("prepare phantom --studies 5 --out TMP/foreign", "holds other files, such as 'films.tar'"),
        ("prepare phantom --studies 5 --out TMP/bad.csv", "is a file"),
        (
            "prepare csv TMP/swapped.csv --image text --text image --out TMP/o",
            "2 of 3 samples are unusable (2 missing image)",
        ),
        ("evaluate BUNDLE SHARDS --out TMP", "is a folder"),
        ("evaluate BUNDLE SHARDS --draws 0", "at least one bootstrap draw"),
        ("evaluate BUNDLE SHARDS --draws 0 --protocol chexzero", "at least one bootstrap draw"),
        ("evaluate --compare TMP/a.json TMP/b.json --draws 0", "at least one bootstrap draw"),
        ("evaluate --compare TMP/a.json TMP/b.json --page TMP/p.html", "stands alone: leave --page away"),
        ("evaluate --compare TMP/a.json TMP/b.json --labelset nih14", "stands alone: leave --labelset away"),
        ("evaluate --compare TMP/a.json TMP/b.json --protocol rsna", "stands alone: leave --protocol away"),
        ("evaluate BUNDLE SHARDS --protocol chexzero --split val", "stands alone: leave --split away"),
        ("evaluate BUNDLE SHARDS --protocol chexzero --labelset nih14", "stands alone: leave --labelset away"),
        ("evaluate BUNDLE SHARDS --protocol chexzero --average scores", "stands alone: leave --average away"),
        ("evaluate BUNDLE SHARDS --protocol chexzero --no-calibration", "stands alone: leave --no-calibration away"),
        ("evaluate BUNDLE SHARDS --protocol chexzero --baseline TMP/b.json", "stands alone: leave --baseline away"),
        ("evaluate BUNDLE SHARDS --protocol chexzero --show-images", "stands alone: leave --show-images away"),
        ("evaluate BUNDLE SHARDS --protocol chexzero --labels-from votes", "stands alone: leave --labels-from away"),
        (
            "evaluate BUNDLE SHARDS --labels-from label",
            "no study has a field 'label' with labels; did you mean 'labels'?",
        ),
        ("calibrate BUNDLE SHARDS --labels-from TMP/x.csv", "no such file"),
        ("calibrate BUNDLE SHARDS --average logits", "--average belongs to --ensemble"),
        ("evaluate BUNDLE SHARDS --average logits", "--average belongs to --ensemble"),
        ("classify BUNDLE TMP/image.png --average logits", "--average belongs to --ensemble"),
        ("evaluate BUNDLE SHARDS --labelset nih15", "did you mean 'nih14'?"),
        ("evaluate BUNDLE SHARDS --score softmax", "did you mean 'pair_softmax'?"),
        ("evaluate BUNDLE SHARDS --temperature 1", "a temperature is that of 'pair_softmax'"),
        ("evaluate BUNDLE SHARDS --compare TMP/empty", "empty"),
        ("calibrate BUNDLE SHARDS --split test", "split 'test' is for evaluation alone"),
        ("calibrate BUNDLE SHARDS --threshold best", "--threshold: 'best' is none of youden"),
        ("calibrate BUNDLE SHARDS --method plat", "did you mean 'platt'?"),
        ("calibrate BUNDLE SHARDS --false-alarm 2", "a share between 0 and 1, got 2"),
        ("classify BUNDLE TMP/none.png --score sigmoids", "did you mean 'sigmoid'?"),
        ("bench evaluate --only boots", "did you mean 'bootstrap'?"),
        ("evaluate BUNDLE", "name a model and shards"),
        ("evaluate --compare TMP/a.json TMP/b.json", "no such file"),
        ("evaluate BUNDLE SHARDS --protocol none", "neither a .yaml file nor the name of a shipped one"),
        ("evaluate BUNDLE SHARDS --protocol report_retrieval --corruptions", "--protocol stands alone"),
        ("evaluate BUNDLE SHARDS --subgroups hospital", "no record has 'hospital'"),
        ("evaluate BUNDLE SHARDS --baseline TMP/b.json", "--baseline belongs to --corruptions"),
        ("evaluate BUNDLE SHARDS --show-images", "--show-images belongs to --page"),
        ("evaluate BUNDLE SHARDS --probe linear --split train", "what probes are fitted on"),
        ("evaluate hf:TMP/none SHARDS", "no such folder"),
        ("explain BUNDLE TMP/none.png effusion --out TMP/m.png", "cannot read"),
        ("export TMP/none --to transformers --out TMP/h", "no such folder"),
        ("shards leaks TMP/none SHARDS", "no such folder"),
        ("embed BUNDLE SHARDS --out TMP/bad.csv", "bad.csv"),
        ("train --config phantom --out TMP/r --trainer.devices=2", "torchrun --nproc_per_node 2"),
        ("train --config phantom --out TMP/r --trainer.log_every=0", "log_every"),
        ("train --config phantom --out TMP/r --data.workers=-1", "workers"),
        ("demo --studies 10 --out TMP/d", "--studies must be at least 200"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(
    place: dict[str, str], capsys: pytest.CaptureFixture[str], command: str, message: str
) -> None:
    for name, value in place.items():
        command = command.replace(name, value)
    assert main(command.split()) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line]
    assert lines[-1].startswith(f"medclip-lab {command.split()[0]}: ")
    assert message in lines[-1]
    assert not any("Traceback" in line or "heart" in line for line in lines)
    assert (Path(place["TMP"]) / "foreign" / "films.tar").exists()
    assert Manifest.load(place["SHARDS"]).shards
    assert captured.out == ""


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        main(["embed", str(tmp_path / "a"), str(tmp_path), "--out", str(tmp_path / "e"), "--debug"])


def test_unknown_verbs_and_flags() -> None:
    for arguments in (["fly"], ["doctor", "--wings"], []):
        with pytest.raises(SystemExit) as error:
            main(arguments)
        assert error.value.code == 2


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_whole_way_by_commands(
    toy_config: Callable[..., Any], toy_shards: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = str(toy_shards.folder)
    run, bundle, out = str(tmp_path / "run"), str(tmp_path / "bundle"), tmp_path
    config = str(toy_config.path)  # type: ignore[attr-defined]
    assert run_json(capsys, "train", "--config", config, "--out", run, "--trainer.steps=3")["step"] == 3
    assert run_json(capsys, "export", run, "--out", bundle)["fingerprint"]
    results = run_json(capsys, "evaluate", bundle, shards, "--draws", "10", "--out", str(out / "r.json"))
    assert results["zero_shot"]["macro"]["labels"] == 1
    assert json.loads((out / "r.json").read_text())["split"] == "test"
    embeddings = run_json(capsys, "embed", bundle, shards, "--split", "test", "--out", str(out / "e"))
    assert not embeddings["include_text"]
    goals = ("--target-recall", "1.0", "--at", "5", "--queries", "image,text", "--max-memory", "8GB")
    made = run_json(capsys, "index", str(out / "e"), "--out", str(out / "i"), *goals)
    assert made["recall"]["text"]["confirmed"] == 1.0
    hits = run_json(capsys, "search", bundle, str(out / "i"), "--text", "The heart is enlarged.", "-k", "3")
    assert [hit["rank"] for hit in hits] == [1, 2, 3]
    assert "text" not in hits[0]
    image = out / "image.png"
    image.write_bytes(next(toy_images(toy_shards)))
    assert run_json(capsys, "classify", bundle, str(image))[0]["labels"]["Edema"]["probability"] is None
    assert main(["classify", bundle, str(image), "--ensemble", bundle, "--average", "logits"]) == 0
    assert "the ensemble is not calibrated" in capsys.readouterr().out
    facts = run_json(capsys, "calibrate", bundle, shards, "--split", "train")
    assert facts["hash"]
    assert "patients" not in facts
    answer = run_json(capsys, "classify", bundle, str(image))[0]
    assert answer["labels"]["Cardiomegaly"]["decision"] in (True, False)
    assert answer["out_of_domain"]["flag"] in (True, False)
    assert main(["classify", bundle, str(image)]) == 0
    assert "operating" in capsys.readouterr().out
    assert main(["classify", bundle, str(image), "--score", "max_similarity"]) == 0
    assert "the bundle is calibrated for sigmoid, not for max_similarity" in capsys.readouterr().out
    table = out / "labels.csv"
    table.write_text("study_id,edema\n" + "".join(f"study-{number},{number % 2}\n" for number in range(150)))
    told = run_json(
        capsys, "evaluate", bundle, shards, "--draws", "10", "--labels-from", str(table), "--no-calibration"
    )
    assert told["labels_from"]["labels"]["Edema"]["as"] == "edema"
    assert told["labels_from"]["labels"]["Cardiomegaly"]["as"] is None
    assert main(["calibrate", bundle, shards, "--split", "train", "--ensemble", bundle]) == 0
    assert "of 2 models together" in capsys.readouterr().out
    assert main(["classify", bundle, str(image), "--ensemble", bundle]) == 0
    assert "operating" in capsys.readouterr().out
    assert main(["classify", bundle, str(image), "--ensemble", bundle, "--average", "logits"]) == 0
    assert "the ensemble is calibrated for mean scores of 2 checkpoints, sigmoid, not for" in capsys.readouterr().out
    told = run_json(capsys, "evaluate", f"local-dir:{bundle}", shards, "--draws", "10")
    assert told["zero_shot"]["calibration"] is None, "another fingerprint, another calibration"
    both = run_json(capsys, "evaluate", bundle, shards, "--draws", "10", "--compare", bundle, "--collapse-texts")
    assert both["zero_shot"]["comparison"]["macro"]["auroc"]["difference"] == 0.0
    assert both["zero_shot"]["calibration"]["hash"] == facts["hash"]
    assert main(["calibrate", bundle, shards, "--split", "train"]) == 0
    assert "WARNING: split train is what the model was fitted on" in capsys.readouterr().err
    hits = run_json(capsys, "search", bundle, str(out / "i"), "--image", str(image), "-k", "1000")
    assert len(hits) == toy_shards.count("test")
    assert main(["search", bundle, str(out / "i"), "--text", "x"]) == 0
    assert "cosine" in capsys.readouterr().out
    assert run_json(capsys, "embed", bundle, shards, "--split", "val", "--out", str(out / "v"))["run"]["rows"]["text"]
    grown = run_json(capsys, "index", "--add", str(out / "v"), "--out", str(out / "i"))
    assert grown["changed"]["added"] == toy_shards.count("val")
    (out / "gone.txt").write_text(hits[0]["study_id"] + "\n")
    assert main(["index", "--remove", str(out / "gone.txt"), "--out", str(out / "i")]) == 0
    told = capsys.readouterr().out
    assert f"{toy_shards.count('val')} rows were added and 1 removed" in told
    assert "build it anew" in told
    hits_now = run_json(capsys, "search", bundle, str(out / "i"), "--image", str(image), "-k", "1000")
    assert hits[0]["study_id"] not in [hit["study_id"] for hit in hits_now]


def toy_images(manifest: Manifest) -> Any:
    from medclip_lab.data.quarantine import Quarantine
    from medclip_lab.data.reader import read_split

    return (study.images[0][1] for study in read_split(manifest, "test", Quarantine(1)))


def test_an_index_of_another_bundle_is_refused(
    toy_bundle: Path, toy_shards: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["embed", str(toy_bundle), str(toy_shards.folder), "--split", "val", "--out", str(tmp_path / "e")]) == 0
    assert main(["index", str(tmp_path / "e"), "--out", str(tmp_path / "i")]) == 0
    manifest = json.loads((tmp_path / "i" / "manifest.json").read_text())
    manifest["bundle"] = "f" * 64
    (tmp_path / "i" / "manifest.json").write_text(json.dumps(manifest))
    capsys.readouterr()
    assert main(["search", str(toy_bundle), str(tmp_path / "i"), "--text", "x"]) == 2
    assert "was built with bundle ffffffffffff" in capsys.readouterr().err


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["doctor", "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert code == (1 if facts["problems"] else 0)
    assert facts["versions"]["torch"]
    assert facts["faiss"]
    assert facts["free_disk_gib"] > 0


def test_doctor_finds_two_faiss(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("faiss_gpu", "faiss_cpu"):
        info = tmp_path / f"{name}-1.15.1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.15.1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    from medclip_lab.doctor import examine

    problems = examine(tmp_path)["problems"]
    assert any("2 faiss packages (faiss-cpu, faiss-gpu) install the same module" in problem for problem in problems)


def test_doctor_names_the_faiss_that_fits() -> None:
    from medclip_lab.doctor import fitting_faiss

    assert fitting_faiss("13.2", True).startswith("faiss-gpu-cuvs")
    assert fitting_faiss("12.8", True).startswith("faiss-gpu:")
    assert fitting_faiss("13.2", False).startswith("faiss-cpu")
    assert fitting_faiss(None, False).startswith("faiss-cpu")
    assert "no package for CUDA 20.1" in fitting_faiss("20.1", True)


def test_module_is_the_command() -> None:
    result = subprocess.run([sys.executable, "-m", "medclip_lab", "--version"], capture_output=True, text=True)
    assert result.stdout.startswith("medclip_lab 0")


def test_prepare_again_reuses_and_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["prepare", "phantom", "--studies", "12", "--size", "48", "--out", str(tmp_path / "s")]
    assert main(command) == 0
    before = (tmp_path / "s" / "manifest.json").read_text()
    assert main(command) == 0
    assert "prepared before" in capsys.readouterr().out
    assert (tmp_path / "s" / "manifest.json").read_text() == before
    assert main([*command, "--seed", "1"]) == 2
    assert "holds other shards" in capsys.readouterr().err
    assert (tmp_path / "s" / "manifest.json").read_text() == before
