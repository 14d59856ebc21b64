"""What a run shows: readings, the console, the loggers, the profile."""

import errno
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from medclip_lab.cli import main
from medclip_lab.data.preprocess import PreprocessConfig
from medclip_lab.errors import UserError
from medclip_lab.models.dual_encoder import DualEncoder
from medclip_lab.models.spec import build_spec
from medclip_lab.training import loggers as module
from medclip_lab.training import meter
from medclip_lab.training.console import METRICS, Console, Diary, diary, line
from medclip_lab.training.flops import flops_per_row, peak_flops
from medclip_lab.training.loggers import LoggerSink, build_loggers
from medclip_lab.training.meter import LoaderTime, Meter, Reading
from medclip_lab.training.run import RunConfig, train
from medclip_lab.training.trainer import TrainerConfig

Config = Callable[..., RunConfig]
VALUES: dict[str, float | None] = {
    "loss": 1.23456,
    "student": 1.0,
    "distill": 0.2,
    "image_rank": 3.0,
    "logit_scale": 14.2,
    "logit_bias": -10.0,
    "lr": 1.5e-4,
    "grad_norm": 0.5,
    "samples_per_second": 2000.0,
    "samples_per_second_per_device": 1000.0,
    "data_wait": 0.031,
    "tflops_per_second_per_device": 400.0,
    "mfu": 0.4044,
    "memory_gib": 12.34,
}


def test_a_line_for_people() -> None:
    assert line(Reading(500, 1000, VALUES, 3725)) == (
        "step 500/1000  loss 1.2346 (student 1.0000, distill 0.2000)  scale 14.20  bias -10.00  lr 1.50e-04  grad 0.5  "
        "1,000.0 samples/s/device  data 3%  MFU 40.4%  12.3 GiB  1:02:05 left"
    )
    poor = {name: value for name, value in VALUES.items() if name not in ("mfu", "logit_bias", "student", "distill")}
    told = line(Reading(1, 2, poor | {"grad_norm": None, "loss": None}, 5))
    assert "loss not finite  scale" in told
    assert "grad not finite" in told
    assert "400 TFLOP/s" in told
    assert "bias" not in told
    assert line(Reading(500, 1000, {"val_loss": 2.0})) == "step 500/1000  val_loss 2.0000"


def test_a_few_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    for step in range(10, 2001, 10):
        console.show(Reading(step, 2000, VALUES, 1.0))
        if step == 1990:
            console.show(Reading(step, 2000, {"val_loss": 1.0}))
    shown = [text.split()[1] for text in capsys.readouterr().err.splitlines()]
    assert shown == [*(f"{step}/2000" for step in range(10, 2000, 100)), "1990/2000", "2000/2000"]


def test_the_diary_forgets_steps_that_are_made_again(tmp_path: Path) -> None:
    file = Diary(tmp_path / METRICS)
    file.rewind(0)
    for step in (5, 10, 15):
        file.show(Reading(step, 20, {"loss": None, "lr": 0.1}))
    file.rewind(10)
    file.show(Reading(12, 20, {"loss": 1.0}))
    assert [(text["step"], text["loss"]) for text in diary(tmp_path)] == [(5, None), (10, None), (12, 1.0)]


class Shown:
    def __init__(self) -> None:
        self.readings: list[Reading] = []

    def show(self, reading: Reading) -> None:
        self.readings.append(reading)


def test_speed_and_waiting_are_those_since_the_last_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks, four studies a step; a step takes 2 s, half a second of it waiting; a device could do 64 FLOP/s."""
    time = SimpleNamespace(now=100.0)
    monkeypatch.setattr(meter, "time", SimpleNamespace(monotonic=lambda: time.now))
    shown, waiting = Shown(), LoaderTime()
    made = Meter(2, 4, {"image": 10.0, "text": 6.0}, 64.0, [shown])
    scale, bias = torch.tensor(3.0, requires_grad=True), torch.tensor(-1.0)
    encoder = SimpleNamespace(logit_scale=scale, logit_bias=bias, towers_of=lambda batch: batch)
    module_ = meter.ContrastiveModule.__new__(meter.ContrastiveModule)
    nn.Module.__init__(module_)
    object.__setattr__(module_, "encoder", encoder)
    object.__setattr__(module_, "grad_norm", torch.tensor(float("inf")))
    monkeypatch.setattr(meter.ContrastiveModule, "device", torch.device("cpu"))
    groups = [{"lr": 0.1}, {"lr": 0.3}]
    trainer: Any = SimpleNamespace(
        global_step=10, max_steps=15, world_size=2, is_global_zero=True, profiler=waiting, callback_metrics={}
    )
    trainer.optimizers = [SimpleNamespace(param_groups=groups)]
    made.on_train_start(trainer, module_)
    batch = {"image": torch.zeros(2, 1), "text": torch.zeros(2, 1), "second_text": torch.zeros(2, 1)}
    for step in range(11, 16):
        trainer.global_step = step
        waiting.start("[_TrainingEpochLoop].train_dataloader_next")
        time.now += 0.5
        waiting.stop("[_TrainingEpochLoop].train_dataloader_next")
        waiting.start("run_training_batch")
        time.now += 1.5
        waiting.stop("run_training_batch")
        made.on_train_batch_end(trainer, module_, {"loss": torch.tensor(2.0), "part": torch.tensor(1.0)}, batch, 0)
    assert [reading.step for reading in shown.readings] == [12, 14, 15]
    for reading in shown.readings:
        values = dict(reading.values)
        assert values.pop("memory_gib") > 0  # type: ignore[operator]
        assert values == {
            **{"loss": 2.0, "part": 1.0, "logit_scale": 3.0, "logit_bias": -1.0, "grad_norm": None, "lr": 0.3},
            **{"samples_per_second": 2.0, "samples_per_second_per_device": 1.0, "data_wait": 0.25},
            # 2 images, 2 texts and 2 second texts in 2 s are 22 FLOP/s.
            **{"tflops_per_second_per_device": 0.0, "mfu": round(22 / 64, 4)},
        }
        assert reading.left == pytest.approx((15 - reading.step) * 2)
    trainer.is_global_zero = False
    made.on_train_batch_end(trainer, module_, {}, batch, 0)
    assert len(shown.readings) == 3, "one rank shows"


def test_flops_are_counted_without_computing() -> None:
    spec = {
        "embed_dim": 8,
        "custom_text": True,
        "vision_cfg": {"layers": 2, "width": 64, "image_size": 16, "patch_size": 8},
        "text_cfg": {"context_length": 6, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1},
    }
    encoder = DualEncoder(build_spec(spec), PreprocessConfig(size=16))
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    state = torch.get_rng_state()
    counts = flops_per_row(encoder, 16, 6)
    assert counts is not None
    tokens, width = 5, 64
    products = 2 * (12 * width**2) * tokens + 2 * 2 * 2 * tokens**2 * width / 2  # two layers: weights, attention
    forward = 2 * (products + 4 * width * 3 * 64 + width * 8)
    # A backward is two products for one of the forward, less the gradient of the pixels.
    assert counts["image"] == pytest.approx(3 * forward - 2 * 4 * width * 3 * 64, rel=0.15)
    encoder.model.visual.requires_grad_(False)
    frozen = flops_per_row(encoder, 16, 6)
    assert frozen is not None
    assert frozen["text"] == counts["text"]
    assert frozen["image"] < counts["image"] / 2.5
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert all(parameter.grad is None for parameter in encoder.parameters())

    class Looking(nn.Module):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return ids if bool(ids.any()) else -ids

    encoder.model.text = Looking()
    assert flops_per_row(encoder, 16, 6) is None


def test_peaks_are_by_name() -> None:
    assert peak_flops("NVIDIA H200") == peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("Tesla V100-SXM2-16GB") == 125e12
    assert (peak_flops("NVIDIA A10"), peak_flops("NVIDIA A10G")) == (125e12, 70e12)
    assert peak_flops("NVIDIA L4") == 121e12
    assert peak_flops("Radeon") is None


def test_tensorboard_has_the_readings(toy_run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(toy_run / "tensorboard"))
    events.Reload()
    read = [(event.step, event.value) for event in events.Scalars("loss")]
    written = [(text["step"], pytest.approx(text["loss"])) for text in diary(toy_run)]
    assert read == written
    assert {"lr", "grad_norm", "samples_per_second", "data_wait", "memory_gib"} <= set(events.Tags()["scalars"])


class Fake:
    def __init__(self, *args: Any, **settings: Any) -> None:
        self.args, self.settings, self.logged = args, settings, []

    def log_hyperparams(self, settings: Any) -> None:
        self.hyperparameters = settings

    def log_metrics(self, values: Any, step: int) -> None:
        self.logged.append((values, step))


@pytest.mark.parametrize("online", [False, True])
def test_others_by_flag(online: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TensorBoardLogger", "WandbLogger", "MLFlowLogger"):
        monkeypatch.setattr(module, name, Fake)
    monkeypatch.setattr(module, "_mlflow_run", lambda *_: "1a2b")
    for name, value in (("WANDB_MODE", "online"), ("MLFLOW_TRACKING_URI", "http://here")):
        monkeypatch.delenv(name, raising=False)
        if online:
            monkeypatch.setenv(name, value)
    assert not build_loggers(TrainerConfig(tensorboard=False), tmp_path, {})
    config = TrainerConfig(wandb="chest", mlflow="films")
    board, wandb, mlflow = made = build_loggers(config, tmp_path / "run", {"seed": 3}, start=40)
    again = build_loggers(config, tmp_path / "run", {"seed": 3})
    assert isinstance(board, Fake)
    assert isinstance(wandb, Fake)
    assert isinstance(mlflow, Fake)
    assert (board.args, board.settings["purge_step"]) == ((tmp_path / "run",), 40)
    assert (wandb.settings["project"], wandb.settings["offline"]) == ("chest", not online), "no network by default"
    assert wandb.settings["id"] == again[1].settings["id"], "a run that goes on is one curve"  # type: ignore[attr-defined]
    assert mlflow.args == ("films",)
    assert mlflow.settings["tracking_uri"] == (
        "http://here" if online else f"sqlite:///{tmp_path / 'run' / 'mlflow.db'}"
    )
    assert wandb.hyperparameters == again[2].hyperparameters == {"seed": 3}  # type: ignore[attr-defined]
    assert (again[2].settings["run_id"], mlflow.settings["run_id"]) == (None, "1a2b")  # type: ignore[attr-defined]
    assert not hasattr(mlflow, "hyperparameters"), "MLflow refuses a setting that is another now"
    sink = LoggerSink(made)
    sink.show(Reading(5, 10, {"loss": 1.0, "grad_norm": None}))
    sink.show(Reading(5, 10, {"val_loss": 1.0}))
    assert wandb.logged == [({"loss": 1.0}, 5)]


@pytest.mark.parametrize(("name", "kind"), [("wandb", "WandbLogger"), ("mlflow", "MLFlowLogger")])
def test_a_logger_that_is_not_installed(name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: Any, **__: Any) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}\nlook here")

    monkeypatch.setattr(module, kind, absent)
    config = TrainerConfig(tensorboard=False, **{name: "x"})  # type: ignore[arg-type]
    with pytest.raises(
        UserError, match=rf"trainer\.{name}: No module named '{name}': pip install 'medclip_lab\[{name}\]'"
    ):
        build_loggers(config, tmp_path, {})


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_logger_that_is(name: str, toy_config: Config, tmp_path: Path) -> None:
    pytest.importorskip(name)
    out = train(toy_config(tmp_path / "run", f"--trainer.{name}=films", "--trainer.steps=2"))
    assert list(out.glob(f"{name}*"))


def test_mlflow_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", where := f"sqlite:///{tmp_path / 'mlflow.db'}")
    config = TrainerConfig(tensorboard=False, mlflow="films")
    out = tmp_path / "a run's folder"
    for start, settings, folder in ((0, {"workers": 1}, out), (0, {}, tmp_path / "other"), (2, {"workers": 2}, out)):
        (logger,) = build_loggers(config, folder, settings, start)
        logger.log_metrics({"loss": 3.0 - start}, start + 1)
        logger.finalize("success")
    client = MlflowClient(where)
    known = client.get_experiment_by_name("films")
    runs = {run.info.run_name.rpartition("-")[0]: run for run in client.search_runs([known.experiment_id])}
    assert sorted(runs) == ["a run's folder", "other"]
    run = runs["a run's folder"]
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 3.0), (3, 1.0)]
    assert (run.data.params, run.info.status) == ({"workers": "1"}, "FINISHED")


def test_profile(toy_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    arguments = ["train", "--config", str(toy_config.path), "--out", str(out)]  # type: ignore[attr-defined]
    assert main([*arguments, "--trainer.steps=6", "--profile", "2"]) == 0
    trace = json.loads((out / "trace.json").read_text())
    steps = {event["name"] for event in trace["traceEvents"] if event.get("name", "").startswith("ProfilerStep")}
    assert len(steps) == 2
    told = capsys.readouterr().err
    assert "Self CPU time total" in told
    assert "2 steps: " in told
    assert "profile:" not in (out / "config.yaml").read_text(), "a look at a run is no setting of it"
    shorter = [*arguments[:-1], str(tmp_path / "short"), "--trainer.steps=6", "--profile"]
    assert main(shorter) == 2
    assert "--profile: 5 steps after 2 to warm up, and the run has 6 left" in capsys.readouterr().err
    assert main([*arguments, "--profile", "-1"]) == 2
    assert "a number of steps, got -1" in capsys.readouterr().err


def test_a_terminal_has_a_bar_over_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []

    class Tty:
        encoding = "utf-8"

        def isatty(self) -> bool:
            return True

        def write(self, text: str) -> int:
            written.append(text)
            return len(text)

        def flush(self) -> None: ...

        def fileno(self) -> int:
            raise OSError

    monkeypatch.setattr(sys, "stderr", Tty())
    monkeypatch.setenv("TERM", "xterm")
    trainer: Any = SimpleNamespace(is_global_zero=True, max_steps=10, global_step=0)
    console = Console()
    console.on_train_start(trainer, None)  # type: ignore[arg-type]
    trainer.global_step = 7
    console.on_train_batch_end(trainer, None, None, None, 0)  # type: ignore[arg-type]
    console.show(Reading(7, 10, VALUES))
    console.on_train_end(trainer, None)  # type: ignore[arg-type]
    text = "".join(written)
    assert "7/10" in text
    assert "loss 1.2346" in text


def test_a_diary_survives_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 5, "loss": 1.0}\n{"step": 10, "lo')
    book = Diary(path)
    book.rewind(20)
    assert [line["step"] for line in diary(tmp_path)] == [5]

    def full(*_: object, **__: object) -> object:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    for step in (15, 20):
        book.show(Reading(step, 30, {"loss": 1.0}))
    assert capsys.readouterr().err == "medclip-lab train: metrics.jsonl was not written: No space left on device\n"
