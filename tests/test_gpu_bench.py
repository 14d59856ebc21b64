import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from medclip_lab import gpu_bench
from medclip_lab.cli import main
from medclip_lab.errors import UserError
from medclip_lab.gpu_bench import accuracy, cases, timing

QUICK = replace(gpu_bench.TINY, peers=(), only=("SigLipLoss", "ClipLoss"))


def quiet(_: str) -> None:
    pass


def test_rehearsal_has_every_part() -> None:
    result = dict(gpu_bench.measure("cpu", "chunked", QUICK, quiet))
    assert all(row["holds"] for row in result["correctness"])
    assert {row["dtype"] for row in result["correctness"]} == {"bfloat16", "float16"}
    assert all(all(checks.values()) for checks in result["behaviour"].values())
    assert {row["loss"] for row in result["speed"]} == {"SigLipLoss", "ClipLoss"}
    for row in result["speed"]:
        assert row["flops"] == pytest.approx(2 * row["products"] * 64 * 64 * 16 / row["seconds"]["ours"]["median"])
    assert result["largest"]["finite"]
    table = gpu_bench.markdown(result)
    assert "| SigLipLoss | 8 |" in table
    assert "8 of 8" in table
    json.dumps(result)


@pytest.mark.parametrize("fault", ["value", "gradient", "scale", "nan"])
def test_a_wrong_loss_is_told(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = accuracy.step

    def wrong(loss, given, grad_output=1.0):  # type: ignore[no-untyped-def]
        value = right(loss, given, grad_output)
        if fault == "value":
            return value * (1 + 1e-5)
        leaf = given["logit_scale" if fault == "scale" else "text_features"]
        if fault == "nan":
            leaf.grad[0, 0] = torch.nan
        else:
            leaf.grad.mul_(1.01)
        return value

    monkeypatch.setattr(accuracy, "step", wrong)
    sizes = replace(QUICK, correct=((40, 24),))
    rows = accuracy.correctness(cases.Machine("cpu", "chunked"), sizes, quiet)
    assert not any(row["holds"] for row in rows)


def test_a_peer_that_is_missing_or_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: object) -> torch.Tensor:
        raise RuntimeError("no kernel image")

    def full(_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError

    calls = {"open_clip": "not installed", "dense": fails, "large": full}
    monkeypatch.setattr(timing, "peers", lambda: {"SigLipLoss": calls})
    sizes = replace(QUICK, peers=QUICK.speed, only=("SigLipLoss",))
    (row,) = timing.speed(cases.Machine("cpu", "chunked"), sizes, quiet)
    assert isinstance(row["seconds"].pop("ours"), dict)
    told = {"open_clip": "not installed", "dense": "RuntimeError: no kernel image", "large": "out of memory"}
    assert row["seconds"] == told
    facts = {"device": "cpu", "versions": {}, "commit": "", "date": "", "python": ""}
    assert "| open_clip | not installed |" in gpu_bench.markdown({"facts": facts, "speed": [{**row, "seconds": told | {"ours": "out of memory"}}]})  # fmt: skip  # noqa: E501


def test_peers_compute_the_same() -> None:
    """A ratio between two different things would be none."""
    machine = cases.Machine("cpu", "reference")
    for name, calls in timing.peers().items():
        given = cases.make_inputs(24, 16, machine, name, dtype=torch.float32)
        ours = float(cases.step(cases.losses("reference")[name], given))
        for peer in ("open_clip", "dense torch"):
            call = calls[peer]
            assert not isinstance(call, str)
            assert float(call(given).detach()) == pytest.approx(ours, rel=1e-5), (name, peer)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "losses", "--device", "cuda"]) == 2
    assert "no device 'cuda' on this machine" in capsys.readouterr().err


def test_bad_settings_are_told() -> None:
    with pytest.raises(UserError, match="no loss is named Clip; there are SigLipLoss"):
        cases.losses("chunked", ("Clip",))
    with pytest.raises(UserError, match="no part is named spede"):
        dict(gpu_bench.measure("cpu", "chunked", QUICK, quiet, ("spede",)))
    with pytest.raises(UserError, match="sizes must be at least 1, got batch 0"):
        gpu_bench.Sizes.of(0, None, None, ())
    pytest.importorskip("triton")
    with pytest.raises(UserError, match="no kind of tile is named sigmiod; there are sigmoid, logsumexp"):
        dict(gpu_bench.measure("cpu", "chunked", QUICK, quiet, ("tune",), ("sigmiod",)))


def test_shapes_of_tiles_are_tried_in_turn_and_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    tuning = pytest.importorskip("medclip_lab.gpu_bench.tuning")
    before = {level: dict(kinds) for level, kinds in tuning.SHAPES.items()}
    tried = []

    def step(loss: object, given: object) -> None:
        del loss, given
        tried.append(tuning.SHAPES[90]["sigmoid"])
        if tried[-1].columns == 64:
            raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(tuning, "step", step)
    rows = tuning.tune(cases.Machine("cpu", "chunked"), replace(QUICK, peers=((8, 16),)), quiet, ["sigmoid"])
    assert list(dict.fromkeys(tried)) == tuning.shapes("sigmoid", 90)
    assert [row["shipped"] for row in rows] == [True] + [False] * (len(rows) - 1)
    assert before == tuning.SHAPES
    failed = [row for row in rows if isinstance(row["seconds"], str)]
    assert failed
    assert all("128 x 64 x 64" in row["shape"] and "shared memory" in row["seconds"] for row in failed)
    facts = {"device": "cpu", "commit": None, "date": "", "versions": {}, "python": ""}
    table = gpu_bench.markdown({"facts": facts, "tune": rows})
    assert f"| sigmoid | {before[90]['sigmoid']} |" in table
    assert table.count("| shipped |") == 1


def test_every_shape_that_is_tried_can_hold_its_parts() -> None:
    tuning = pytest.importorskip("medclip_lab.gpu_bench.tuning")
    for level, kinds in tuning.SHAPES.items():
        for kind in kinds.keys() & tuning.LOSSES.keys():
            shapes = tuning.shapes(kind, level)
            assert len(set(shapes)) == len(shapes) >= 3
            assert all(shape.columns // shape.parts >= 2 * shape.lanes for shape in shapes)


def test_the_script_runs(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "tools" / "gpu_report.py"
    command = [
        sys.executable,
        script,
        "--device",
        "cpu",
        "--out",
        tmp_path / "k",
        "--parts",
        "correctness",
        "matrix_rate",
    ]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "k.md").read_text() == run.stdout[run.stdout.index("# Fused") :]
    assert {"facts", "correctness", "matrix_rate", "command"} == set(json.loads((tmp_path / "k.json").read_text()))
