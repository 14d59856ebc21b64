"""Runs that are killed, told to stop, moved to other ranks and fed bad batches."""

import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from medclip_lab.cli import main
from medclip_lab.data.order import Row
from medclip_lab.data.pipeline import BatchStream
from medclip_lab.data.reader import Reader
from medclip_lab.errors import UserError
from medclip_lab.models.dual_encoder import DualEncoder
from medclip_lab.training import resume
from medclip_lab.training.checkpoint_files import manifest_of, read_tensors
from medclip_lab.training.console import diary
from medclip_lab.training.module import ContrastiveModule
from medclip_lab.training.run import RunConfig, train
from medclip_lab.training.survival import DUMPS, SKIPPED

from . import helpers

Config = Callable[..., RunConfig]

KILLS = int(os.environ.get("MEDCLIP_LAB_KILLS", "4"))
LONG = bool(os.environ.get("MEDCLIP_LAB_LONG"))
VIT = "--model.spec.vision_cfg={timm_model_name: test_vit, image_size: 32, timm_pool: avg}"
EPS = "--optim.eps=1e-3"  # else a gradient that is zero but for rounding is a full step of Adam's


def losses(folder: Path) -> dict[int, float]:
    """Step -> loss; each step must stand there once."""
    lines = [(line["step"], line["loss"]) for line in diary(folder) if "loss" in line]
    assert len(dict(lines)) == len(lines)
    return dict(lines)


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bits(toy_config: Config, tmp_path: Path) -> None:
    """Dropout, averaged weights, batch norm and validation; killed at seeded moments, in the midst of saving too."""
    steps = 6 + 2 * KILLS
    settings = [
        "--model.spec.vision_cfg={timm_model_name: test_resnet, image_size: 32, timm_drop: 0.2}",
        f"--trainer.steps={steps}",
        "--checkpoint.every=2",
        "--checkpoint.keep_best=true",
        "--trainer.val_every=3",
        "--trainer.log_every=1",
        "--trainer.ema=0.9",
        # The scale meets the end of its range: what is saved must be what the next step starts from.
        "--model.logit_scale=1.001",
        "--loss.name=ClipLoss",
    ]
    ((code, told),) = helpers.on_ranks(1, toy_config(tmp_path / "whole", *settings))
    assert code == 0, told
    chance = random.Random(0)
    out = tmp_path / "killed"
    for number in range(KILLS):
        event = chance.choice(helpers.EVENTS[1:]) if number % 2 else "batch"
        turn = chance.randint(2, 5) if event == "batch" else chance.randint(1, 3)
        process = helpers.start(toy_config(out, *settings), helpers.die_at, event, turn)
        process.join(helpers.TIMEOUT)
        assert process.exitcode == -signal.SIGKILL, f"{event} {turn}"
    ((code, told),) = helpers.on_ranks(1, toy_config(out, *settings))
    assert code == 0, told
    expected, found = helpers.weights(tmp_path / "whole"), helpers.weights(out)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert losses(out) == losses(tmp_path / "whole")
    assert list(losses(out)) == list(range(1, steps + 1))


@pytest.mark.slow
def test_ranks_come_and_go(toy_config: Config, tmp_path: Path) -> None:
    """1 -> 2 -> 4 -> 1 ranks, copies and shards, by SIGTERM: the one-rank run without a gradient cache cannot tell."""
    settings = [VIT, EPS, "--trainer.steps=8", "--trainer.log_every=1", "--data.augment.degrees=5"]
    ((code, told),) = helpers.on_ranks(1, toy_config(tmp_path / "whole", *settings))
    assert code == 0, told
    out = tmp_path / "run"
    settings += ["--trainer.gradient_cache=1"]
    for world, strategy, last in ((1, "ddp", 1), (2, "ddp", 3), (4, "fsdp", 5), (1, "ddp", None)):
        config = toy_config(out, *settings, f"--ranks.strategy={strategy}")
        stop = (helpers.at_batch, last, signal.SIGTERM, world - 1) if last is not None else ()
        for code, told in helpers.on_ranks(world, config, *stop):
            assert code == (0 if last is None else 75), told
            assert last is None or "start it again" in told
    done = json.loads((out / resume.DONE).read_text())
    assert done["resumed_at"] == 7, "a rank is heard a step later by all"
    expected = losses(tmp_path / "whole")
    assert losses(out) == pytest.approx(expected, rel=1e-5)
    assert helpers.off(helpers.weights(out), helpers.weights(tmp_path / "whole")) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["0", "2"] if LONG else ["0"])
def test_copies_and_shards_are_one_model(toy_config: Config, tmp_path: Path, cache: str) -> None:
    steps = 50 if LONG else 4
    # The last validation batch is shorter than the ranks: it has 1 row.
    settings = [VIT, EPS, f"--trainer.steps={steps}", "--trainer.val_every=4", "--data.batch_size=29"]
    if LONG:
        settings[-1] = "--data.batch_size=8"
    # Over blocks of pairs each rank has its own share of the gradient of the scale.
    settings += [f"--trainer.gradient_cache={cache}", "--loss.args.impl=chunked"]
    ((code, told),) = helpers.on_ranks(1, toy_config(tmp_path / "one", *settings))
    assert code == 0, told
    expected = helpers.weights(tmp_path / "one")
    validated = [line["val_loss"] for line in diary(tmp_path / "one") if "val_loss" in line]
    for world in (2, 4) if LONG else (2,):
        for strategy in ("ddp", "fsdp"):
            out = tmp_path / f"{strategy}{world}"
            config = toy_config(out, *settings, f"--ranks.strategy={strategy}")
            for code, told in helpers.on_ranks(world, config):
                assert code == 0, told
            assert helpers.off(helpers.weights(out), expected) < 1e-5, (strategy, world)
            assert [line["val_loss"] for line in diary(out) if "val_loss" in line] == pytest.approx(validated, rel=1e-5)


@pytest.mark.slow
def test_ranks_that_differ_and_ranks_that_die(toy_config: Config, tmp_path: Path) -> None:
    configs = [toy_config(tmp_path / "odd", f"--optim.lr={lr}") for lr in ("1e-3", "2e-3")]
    for code, told in helpers.on_ranks(2, configs):
        assert code == 2
        assert "ranks disagree on optim.lr: rank 1 has 0.002, unlike rank 0 with 0.001" in told
    config = toy_config(tmp_path / "dead", VIT, "--checkpoint.every=2")
    (first, told), (second, _) = helpers.on_ranks(2, config, helpers.at_batch, 3, signal.SIGKILL, 1)
    assert (first, second) == (75, -signal.SIGKILL)
    assert "rank 0 lost another rank" in told


def test_a_run_that_is_told_to_stop_saves_and_says_so(
    toy_run: Path,
    toy_config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    original = BatchStream.batch

    def stopping(self: BatchStream, rows: list[Row], step: int, readers: dict[str, Reader]) -> object:
        if step == 13:
            os.kill(os.getpid(), signal.SIGUSR1)
        return original(self, rows, step, readers)

    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(BatchStream, "batch", stopping)
        assert main(["train", "--config", str(toy_config.path), "--out", str(out)]) == 75  # type: ignore[attr-defined]
    assert "SIGUSR1: saved at step 14; start it again to go on" in capfd.readouterr().err
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)) == before
    train(toy_config(out))
    assert json.loads((out / resume.DONE).read_text())["resumed_at"] == 14
    for name, value in helpers.weights(out).items():
        assert torch.equal(value, helpers.weights(toy_run)[name])


class Poison:
    """A batch whose third image gives features that are no numbers, whoever encodes it."""

    def __init__(self, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.served: list[int] = []
        marks: set[float] = set()
        batch, encode = BatchStream.batch, DualEncoder.encode_image

        def poisoned(stream: BatchStream, rows: list[Row], step: int, readers: dict[str, Reader]) -> Any:
            made = batch(stream, rows, step, readers)
            self.served.append(step)
            if step == number:
                marks.add(float(made["image"].double().sum()))
                self.study = made["image_id"][2]
            return made

        def spoilt(encoder: DualEncoder, pixels: Tensor) -> Tensor:
            features = encode(encoder, pixels)
            if float(pixels.double().sum()) in marks:
                features = features * torch.where(torch.arange(len(pixels)) == 2, torch.nan, 1.0)[:, None]
            return features

        monkeypatch.setattr(BatchStream, "batch", poisoned)
        monkeypatch.setattr(DualEncoder, "encode_image", spoilt)


def test_a_bad_batch_stops_the_run_and_can_be_replayed(
    toy_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    poison = Poison(6, monkeypatch)
    out = tmp_path / "run"
    with pytest.raises(UserError, match=r"the loss of step 6 is nan; its studies: .*--replay .*step-00000006") as error:
        train(toy_config(out))
    assert poison.study in str(error.value)
    dump = out / DUMPS / "step-00000006"
    assert not [path for path in dump.rglob("*") if path.suffix in (".png", ".jpg", ".pt", ".pkl")]
    capsys.readouterr()
    assert main(["train", "--replay", str(dump), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["step"] == 6
    assert found["loss"] != found["loss"]
    assert found["features_not_finite"] == {"image": [poison.study], "text": []}
    assert 0 < len(found["parameters_not_finite"]) <= found["parameters"]
    assert main(["train", "--replay", str(dump)]) == 0
    assert f"image features that are not finite: 1, of {poison.study}" in capsys.readouterr().out


def test_replay_makes_the_very_step(toy_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With dropout and batch norm: the loss and the sum of gradients of the step that was dumped, to the bit."""
    from medclip_lab.training.replay import replay

    seen: dict[str, float] = {}
    original = ContrastiveModule.training_step

    def spike(self: ContrastiveModule, batch: Any, index: int) -> dict[str, Tensor]:
        terms = original(self, batch, index)
        if self.global_step == 4:
            seen["loss"] = float(terms["loss"].detach())
            terms["loss"] = terms["loss"] * torch.inf
            self.terms_now = {name: value.detach() for name, value in terms.items()}
        return terms

    monkeypatch.setattr(ContrastiveModule, "training_step", spike)
    tower = "--model.spec.vision_cfg={timm_model_name: test_resnet, image_size: 32, timm_drop: 0.2}"
    with pytest.raises(UserError, match="the loss of step 4 is inf"):
        train(toy_config(tmp_path / "run", tower))
    found = replay(tmp_path / "run" / DUMPS / "step-00000004")
    assert found["loss"] == seen["loss"]
    assert found["parameters_not_finite"] == []


def test_a_bad_batch_can_be_skipped(toy_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No step is made of it: weights, running means and the optimizer stay as they were."""
    poison = Poison(5, monkeypatch)
    settings = ["--survival.not_finite=skip", "--checkpoint.every=1", "--checkpoint.keep_every=1", "--trainer.steps=8"]
    out = train(toy_config(tmp_path / "run", *settings))
    before, after, later = (read_tensors(out / "checkpoints" / f"step-0000000{step}") for step in (5, 6, 7))
    for name, value in before.items():
        assert torch.equal(after[name], value), name
    assert any(not torch.equal(later[name], value) for name, value in before.items())
    (line,) = (json.loads(line) for line in (out / SKIPPED).read_text().splitlines())
    assert (line["step"], line["batch"], line["loss"], line["policy"]) == (5, 5, "nan", "skip")
    assert poison.study in line["studies"]


def test_rolling_back_goes_on_behind_the_bad_batch(
    toy_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PaLM's way; and a run that is then interrupted goes on behind it too."""
    poison = Poison(6, monkeypatch)
    served = BatchStream.batch

    def stopping(self: BatchStream, rows: list[Row], step: int, readers: dict[str, Reader]) -> object:
        if step == 12 and not (tmp_path / "again").exists():
            raise KeyboardInterrupt
        return served(self, rows, step, readers)

    settings = ["--survival.not_finite=roll_back", "--checkpoint.every=4", "--trainer.steps=12"]
    monkeypatch.setattr(BatchStream, "batch", stopping)
    with pytest.raises(KeyboardInterrupt):
        train(toy_config(tmp_path / "run", *settings))
    assert poison.served == [*range(7), *range(7, 12)], "the step after the fourth has the seventh batch"
    (tmp_path / "again").touch()
    poison.served.clear()
    out = train(toy_config(tmp_path / "run", *settings))
    assert poison.served == list(range(11, 15)), "step 8 and on"
    manifest = manifest_of(out / "checkpoints" / "step-00000012")
    assert (manifest["step"], manifest["batch"]) == (12, 15)


def test_patience_has_an_end(toy_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = ContrastiveModule.training_step

    def spoilt(self: ContrastiveModule, batch: Any, index: int) -> dict[str, Tensor]:
        terms = original(self, batch, index)
        if self.global_step >= 3:
            terms["loss"] = terms["loss"] * torch.nan
            self.terms_now = {name: value.detach() for name, value in terms.items()}
        return terms

    monkeypatch.setattr(ContrastiveModule, "training_step", spoilt)
    for policy in ("skip", "roll_back"):
        settings = [f"--survival.not_finite={policy}", "--survival.patience=2", "--checkpoint.every=2"]
        with pytest.raises(UserError, match=r"after 2 others: survival\.patience is at its end"):
            train(toy_config(tmp_path / policy, *settings))


def test_a_spike_is_skipped(toy_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = ContrastiveModule.training_step

    def spike(self: ContrastiveModule, batch: Any, index: int) -> dict[str, Tensor]:
        terms = original(self, batch, index)
        if self.global_step == 25:
            terms["loss"] = terms["loss"] * 100
            self.terms_now = {name: value.detach() for name, value in terms.items()}
        return terms

    monkeypatch.setattr(ContrastiveModule, "training_step", spike)
    out = train(toy_config(tmp_path / "run", "--survival.spike=8", "--survival.on_spike=skip"))
    (line,) = (json.loads(line) for line in (out / SKIPPED).read_text().splitlines())
    assert (line["step"], line["policy"]) == (25, "skip")
    assert not (out / DUMPS).exists()
    plain = train(toy_config(tmp_path / "plain"))
    assert not (plain / SKIPPED).exists(), "off unless asked for"


def test_what_cannot_work_is_refused_before_the_first_batch(toy_run: Path, toy_config: Config, tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "checkpoints").symlink_to(toy_run / "checkpoints")
    with pytest.raises(UserError, match=r"--resume never: .* has checkpoints"):
        train(toy_config(begun), "never")
    empty = tmp_path / "empty"
    (empty / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match=r"branch_from: .*empty has no whole checkpoint"):
        train(toy_config(tmp_path / "branch", f"--branch_from={empty}"))
