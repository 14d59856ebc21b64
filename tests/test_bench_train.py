from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from medclip_lab.bench import trainers
from medclip_lab.bench.data_shards import Kind, made, write
from medclip_lab.bench.scale import Cluster, Model, foretell, table
from medclip_lab.bench.train import bench_train, write_model
from medclip_lab.cli import main
from medclip_lab.errors import UserError
from medclip_lab.training.module import ContrastiveModule

SPEC: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1},
}
STEPS, BATCH = 5, 4


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("bench")
    write(made(Kind(48, "jpg"), 2 * BATCH), folder / "ours", folder / "theirs")
    write_model(SPEC, folder / "model")
    return {
        "shards": str(folder / "ours"),
        "their_shards": str(folder / "theirs"),
        "model": str(folder / "model"),
        "size": 32,
        "steps": STEPS,
        "batch": BATCH,
        "save_every": 2,
    }


@pytest.mark.parametrize("side", ["our_trainer", "bare_loop", "their_trainer"])
def test_every_side_makes_the_steps(job: dict[str, Any], side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pandas")
    monkeypatch.setattr(ContrastiveModule, "training_step", ContrastiveModule.training_step)  # put back what it wraps
    moments: list[tuple[float, float]] = []
    getattr(trainers, side)(job, moments)
    assert len(moments) == STEPS
    assert moments == sorted(moments)


def test_the_bare_loop_makes_the_steps_that_train_makes(
    job: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ratio between two different things would be none: the weights after the run are equal."""
    from medclip_lab.training.run import WEIGHTS, train

    # Of a gradient near zero Adam makes a whole step in the direction that the order of sums left it.
    monkeypatch.setattr(trainers, "EPS", 1e-3)
    bare = trainers.bare_loop(job, [])
    run = train(trainers.run_config(job, str(tmp_path / "run")))
    expected = load_file(run / WEIGHTS)
    for name, value in bare.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=2e-7)


def test_what_cannot_be_measured() -> None:
    with pytest.raises(UserError, match="no case is named huge; there are data-bound, compute-bound, saving"):
        bench_train(["huge"])
    with pytest.raises(UserError, match="samples a batch, got 3 and 8"):
        bench_train(samples=8)


def test_a_step_is_foretold_by_hand() -> None:
    model = Model(gflops=10.0, parameters=1e8, dim=512, activation_mib=64.0)
    cluster = Cluster(tflops=1000.0, mfu=0.5, memory_gbs=5000.0, node=8, nvlink_gbs=400.0, network_gbs=40.0, hidden=0.5)
    alone = foretell(model, cluster, 1, 100)
    assert alone["towers_ms"] == 6.0  # 3 x 10 GFLOP x 100 at 500 TFLOP/s
    assert alone["loss_ms"] == pytest.approx(6 * 100 * 100 * 512 / 5e11, abs=0.01)
    assert alone["gradients_ms"] == alone["features_ms"] == alone["exposed_ms"] == 0
    assert alone["memory_gib"] == pytest.approx((16e8 + 6400 * 2**20) / 2**30, abs=0.1)
    node, two = foretell(model, cluster, 8, 100), foretell(model, cluster, 16, 100)
    assert node["gradients_ms"] == pytest.approx(2 * 7 / 8 * 4e8 / 4e8)  # inside a node
    assert node["exposed_ms"] < 0.05  # behind half of the 6 ms of the towers
    assert two["gradients_ms"] == pytest.approx(2 * 15 / 16 * 4e8 / 4e7, abs=0.01)  # between nodes
    assert two["exposed_ms"] == pytest.approx(18.75 - 3, abs=0.2)
    assert two["samples_per_second"] == pytest.approx(1600 / two["step_ms"] * 1000, rel=0.02)


def test_the_table_of_a_result() -> None:
    here = {
        "seconds_a_step": 0.1,
        "seconds_a_row": 0.2,
        "share_of_matmul_rate": 0.7,
        "mib_a_row": 90.0,
        "foretold_error": 0.02,
    }
    plans = [foretell(Model(41.09, 149.6e6, 512, 40.0), Cluster(), 1024, 32)]
    lines = table({"here": here, "plans": plans}).splitlines()
    assert lines[0].startswith("Here: 0.100 s + 0.2000 s a row; 70% of the rate of matrix products; 90 MiB a row")
    assert lines[-1].startswith("| 1,024 | 32 | 32,768 | 11.4 |")


def test_the_verb_refuses_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "train", "--only", "huge"]) == 2
    assert capsys.readouterr().err.startswith("medclip-lab bench: bench train: no case is named huge")
