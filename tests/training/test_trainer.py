"""How long a run is, in which numbers, with which weights, and that it goes on with what thaws."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from medclip_lab.data.pipeline import BatchStream
from medclip_lab.errors import UserError
from medclip_lab.training import run as runs
from medclip_lab.training.averaging import decay_at
from medclip_lab.training.checkpoint_files import read_tensors
from medclip_lab.training.clock import ValidationClock
from medclip_lab.training.console import diary
from medclip_lab.training.module import ContrastiveModule
from medclip_lab.training.precision import compile_towers, full_float32, resolve_precision
from medclip_lab.training.run import RunConfig, train
from medclip_lab.training.trainer import TrainerConfig, budget

from .test_run import on_ranks

Config = Callable[..., RunConfig]
VIT = "--model.spec.vision_cfg={timm_model_name: test_vit, image_size: 32, timm_pool: avg}"


def test_budget(toy_config: Config, tmp_path: Path) -> None:
    """90 studies of the training split, 8 in a batch: 11 batches an epoch."""

    def steps(*settings: str) -> int:
        config = toy_config(tmp_path, "--trainer.steps=null", *settings)
        return budget(config.trainer, config.data)

    assert steps("--trainer.steps=7") == 7
    assert steps("--trainer.samples=17") == 3
    assert steps("--trainer.epochs=2") == 22
    assert steps("--trainer.epochs=0.01") == 1
    assert steps() == 110


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 3, "epochs": 1.0}, "one of steps, epochs ends a run: set the others to null"),
        ({"samples": 3, "epochs": 1.0}, "one of samples, epochs ends a run"),
        ({"steps": 0}, r"trainer\.steps must be at least 1, got 0"),
        ({"samples": -1}, r"trainer\.samples must be at least 1, got -1"),
        ({"epochs": 0.0}, r"trainer\.epochs must be positive"),
        ({"val_every": 5, "val_minutes": 1.0}, "val_every counts steps and val_minutes time"),
        ({"val_minutes": -1.0}, "cannot be negative, got 0, -1"),
        ({"ema": 1.0}, "is a decay in"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainerConfig(**settings)


def test_precision() -> None:
    assert resolve_precision("32-true", "auto") == "32-true"
    assert resolve_precision("auto", "cpu") in ("bf16-mixed", "32-true")
    with pytest.raises(UserError, match="16-mixed needs a GPU; a CPU takes 'bf16-mixed' or '32-true'"):
        resolve_precision("16-mixed", "cpu")


def test_tf32_is_for_towers_and_not_for_the_loss(
    toy_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    met = {}
    original = ContrastiveModule.features

    def features(self: ContrastiveModule, batch: Any) -> Any:
        met["towers"] = torch.get_float32_matmul_precision()
        self.loss.register_forward_pre_hook(lambda *_: met.update(loss=torch.get_float32_matmul_precision()))
        return original(self, batch)

    monkeypatch.setattr(ContrastiveModule, "features", features)
    train(toy_config(tmp_path / "run", "--trainer.steps=1", "--trainer.tf32=true"))
    assert met == {"towers": "high", "loss": "highest"}
    assert torch.get_float32_matmul_precision() == "high"
    train(toy_config(tmp_path / "other", "--trainer.steps=1"))
    assert met == {"towers": "highest", "loss": "highest"}
    with pytest.raises(RuntimeError), full_float32():
        raise RuntimeError
    assert torch.get_float32_matmul_precision() == "highest"


def test_half_precision_trains(toy_config: Config, tmp_path: Path) -> None:
    out = train(toy_config(tmp_path / "run", "--trainer.steps=10", "--trainer.precision=bf16-mixed"))
    losses = [line["loss"] for line in diary(out)]
    assert losses[-1] < losses[0]
    assert {value.dtype for value in load_file(out / runs.WEIGHTS).values() if value.is_floating_point()} == {
        torch.float32
    }


def test_compiled_towers_are_the_same_towers(toy_config: Config, tmp_path: Path) -> None:
    torch.compiler.reset()
    settings = ["--trainer.steps=3", "--trainer.log_every=1", "--optim.eps=1e-3"]
    settings.append(VIT)
    compiled = train(toy_config(tmp_path / "compiled", *settings, "--trainer.compile=aot_eager"))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2, "both towers are compiled"
    plain = train(toy_config(tmp_path / "plain", *settings))
    weights, expected = load_file(compiled / runs.WEIGHTS), load_file(plain / runs.WEIGHTS)
    assert set(weights) == set(expected)
    for name, value in weights.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-5)
    with pytest.raises(UserError, match=r"trainer\.compile: unknown backend 'inducto'; one of .*inductor"):
        compile_towers(None, "inducto")


def test_the_norm_of_the_gradient_is_that_before_clipping(toy_config: Config, tmp_path: Path) -> None:
    settings = ["--trainer.steps=1", "--trainer.log_every=1"]
    norms = {}
    for clip in (0, 0.01):
        out = train(toy_config(tmp_path / f"{clip}", *settings, f"--optim.clip_norm={clip}"))
        norms[clip] = next(diary(out))["grad_norm"]
    assert norms[0] == pytest.approx(norms[0.01], rel=1e-5)
    assert norms[0] > 0.1


def test_clipping_leaves_the_norm_it_was_told(toy_config: Config, tmp_path: Path) -> None:
    module = ContrastiveModule.__new__(ContrastiveModule)
    parameters = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))]
    optimizer = torch.optim.SGD([{"params": parameters[:1]}, {"params": parameters[1:]}], lr=1.0)
    for limit, expected in ((None, 5.0), (1.0, 1.0), (10.0, 5.0)):
        parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 0, 0]), torch.tensor([0, 4.0])
        object.__setattr__(module, "grad_norm", None)
        ContrastiveModule.configure_gradient_clipping(module, optimizer, limit)
        assert float(module.grad_norm) == 5.0  # type: ignore[arg-type]
        found = torch.cat([p.grad for p in parameters[:2]]).norm()  # type: ignore[misc]
        assert float(found) == pytest.approx(expected, rel=1e-5)


def test_averaged_weights_are_what_is_validated_and_exported(
    toy_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "text.text_projection"
    steps: list[Tensor] = []
    validated: list[Tensor] = []

    def weight(module: ContrastiveModule) -> Tensor:
        value: Tensor = module.encoder.model.text.text_projection.detach().clone()
        return value

    after, check = ContrastiveModule.on_train_batch_end, ContrastiveModule.validation_step

    def batch_end(self: ContrastiveModule, *args: Any) -> None:
        after(self, *args)
        steps.append(weight(self))

    def validation_step(self: ContrastiveModule, *args: Any) -> None:
        validated.append(weight(self))
        check(self, *args)

    monkeypatch.setattr(ContrastiveModule, "on_train_batch_end", batch_end)
    monkeypatch.setattr(ContrastiveModule, "validation_step", validation_step)
    out = train(toy_config(tmp_path / "run", "--trainer.steps=6", "--trainer.val_every=3", "--trainer.ema=0.6"))
    average, expected = steps[0], []
    for updates, value in enumerate(steps):
        if updates:
            average = average.lerp(value, 1 - decay_at(0.6, updates))
        expected.append(average)
    torch.testing.assert_close(validated[0], expected[2])
    torch.testing.assert_close(validated[-1], expected[5])
    exported = load_file(out / runs.WEIGHTS)
    assert torch.equal(exported[name], validated[-1])
    assert not torch.allclose(exported[name], steps[-1])


def test_the_average_forgets_its_first_weights() -> None:
    assert [round(decay_at(0.999, updates), 3) for updates in (1, 8, 80, 100_000)] == [0.182, 0.5, 0.9, 0.999]
    assert decay_at(0.5, 1000) == 0.5


def test_validation_by_the_clock(toy_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A minute a step: every three minutes, looked at every second step, and at the end."""
    now = iter(range(0, 10**6, 60))
    from medclip_lab.training import clock

    class Time:
        last = 0

        def monotonic(self) -> float:
            return self.last

    time = Time()
    monkeypatch.setattr(clock, "time", time)
    original = ContrastiveModule.training_step

    def step(self: ContrastiveModule, *args: Any) -> Any:
        time.last = next(now)
        return original(self, *args)

    monkeypatch.setattr(ContrastiveModule, "training_step", step)
    settings = ["--trainer.steps=11", "--trainer.val_minutes=3", "--trainer.log_every=2"]
    out = train(toy_config(tmp_path / "run", *settings))
    assert [line["step"] for line in diary(out) if "val_loss" in line] == [4, 8, 11]


def test_one_clock_counts_for_all_ranks() -> None:
    """A rank whose own clock says no validates where the first rank's says yes."""

    class Trainer:
        global_step, max_steps, val_check_batch = 2, 9, 0

        class strategy:  # noqa: N801
            @staticmethod
            def broadcast(_: bool) -> bool:
                return True

        class fit_loop:  # noqa: N801
            class epoch_loop:  # noqa: N801
                total_batch_idx = 1

    clock = ValidationClock(1e9, 2)
    clock.on_train_start(Trainer, None)  # type: ignore[arg-type]
    clock.on_train_batch_end(Trainer, None, None, None, 1)  # type: ignore[arg-type]
    assert Trainer.val_check_batch == 2


THAWING = [
    VIT,
    "--optim.rules=[{match: text, frozen_until: 4}, {match: visual.trunk.blocks.0, frozen_from: 6}]",
    "--optim.eps=1e-3",  # else a gradient that is zero but for rounding is a full step of Adam's
    "--trainer.steps=8",
    "--checkpoint.every=2",
    "--trainer.log_every=2",
]


@pytest.fixture(scope="module")
def thawed(toy_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(toy_config(tmp_path_factory.mktemp("thawed") / "run", *THAWING))


def alike(out: Path, whole: Path) -> None:
    expected = load_file(whole / runs.WEIGHTS)
    for name, value in load_file(out / runs.WEIGHTS).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("stop", [3, 5, 7])
def test_a_run_goes_on_with_what_is_frozen_as_it_was(
    stop: int, thawed: Path, toy_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = BatchStream.batch

    def stopping(self: BatchStream, rows: Any, step: int, readers: Any) -> object:
        if step == stop:
            raise KeyboardInterrupt
        return original(self, rows, step, readers)

    with monkeypatch.context() as patch:
        patch.setattr(BatchStream, "batch", stopping)
        with pytest.raises(KeyboardInterrupt):
            train(toy_config(tmp_path / "run", *THAWING))
    moved: dict[int, set[str]] = {}
    before: dict[str, Tensor] = {}
    original_end = ContrastiveModule.on_train_batch_end

    def batch_end(self: ContrastiveModule, *args: Any) -> None:
        original_end(self, *args)
        state = {name: value.detach().clone() for name, value in self.encoder.model.named_parameters()}
        if before:
            moved[self.global_step] = {name for name, value in state.items() if not torch.equal(value, before[name])}
        before.update(state)

    monkeypatch.setattr(ContrastiveModule, "on_train_batch_end", batch_end)
    alike(train(toy_config(tmp_path / "run", *THAWING)), thawed)
    for step, names in moved.items():
        assert any(name.startswith("text.") for name in names) == (step > 4), step
        assert any(name.startswith("visual.trunk.blocks.0.") for name in names) == (step <= 6), step
        assert "visual.head.proj.weight" in names


@pytest.mark.slow
def test_what_thaws_is_averaged_over_ranks(thawed: Path, toy_config: Config, tmp_path: Path) -> None:
    on_ranks(2, toy_config, tmp_path / "run", *THAWING)
    alike(tmp_path / "run", thawed)


def test_a_frozen_tower_asks_the_loss_for_no_gradient(
    toy_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    met = []
    original = ContrastiveModule.features

    def features(self: ContrastiveModule, batch: Any) -> Any:
        found = original(self, batch)
        if torch.is_grad_enabled():
            met.append({name: value.requires_grad for name, value in found.items()})
        return found

    monkeypatch.setattr(ContrastiveModule, "features", features)
    settings = ["--trainer.steps=2", "--trainer.val_every=1", "--optim.rules=[{match: visual, freeze: true}]"]
    out = train(toy_config(tmp_path / "run", *settings))
    assert met == [{"image": False, "text": True}] * 2
    start = read_tensors(out / "checkpoints" / "step-00000002")
    counters = {int(value) for name, value in start.items() if name.endswith("num_batches_tracked")}
    assert counters == {0}, "also after a validation the norms of a frozen tower stand"
