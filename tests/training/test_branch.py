"""A cool-down from a checkpoint of a longer run is the run it claims to be."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from medclip_lab.data.pipeline import BatchStream
from medclip_lab.errors import UserError
from medclip_lab.training import run as runs
from medclip_lab.training.console import diary
from medclip_lab.training.run import RunConfig, train

Config = Callable[..., RunConfig]
LONG = ["--optim.schedule=wsd", "--optim.warmup=2", "--optim.decay=4", "--checkpoint.every=6"]


@pytest.fixture(scope="module")
def long(toy_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 100 steps that was stopped after its sixth."""
    out = tmp_path_factory.mktemp("branch") / "long"
    original = BatchStream.batch

    def stopping(self: BatchStream, rows: Any, step: int, readers: Any) -> object:
        if step == 7:
            raise KeyboardInterrupt
        return original(self, rows, step, readers)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BatchStream, "batch", stopping)
        with pytest.raises(KeyboardInterrupt):
            train(toy_config(out, *LONG, "--trainer.steps=100"))
    return out


def test_a_cool_down_is_the_short_run(long: Path, toy_config: Config, tmp_path: Path) -> None:
    short = [*LONG, "--trainer.steps=10", "--trainer.log_every=1"]
    whole = train(toy_config(tmp_path / "whole", *short))
    branch = train(toy_config(tmp_path / "branch", *short, f"--branch_from={long}"))
    expected = load_file(whole / runs.WEIGHTS)
    for name, value in load_file(branch / runs.WEIGHTS).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)
    rates = {line["step"]: line["lr"] for line in diary(whole)}
    assert {line["step"]: line["lr"] for line in diary(branch)} == {step: rates[step] for step in (7, 8, 9, 10)}
    assert rates[6] > rates[7] > rates[8]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--optim.decay=5"], r"is at step 6, and the rate of .* is another from step 6 on"),
        (["--optim.warmup=0.2"], None),
        (["--optim.warmup=3"], "is another from step 0 on"),
        (["--optim.schedule=cosine"], r"is another from step 3 on: only 'wsd', 'rsqrt' and 'constant'"),
        (["--optim.lr=1e-4"], "is another from step 0 on"),
        (["--optim.rules=[{match: text, freeze: true}]"], r"the rate of text\..* is another from step 0 on"),
        (["--data.batch_size=4"], "has another data"),
        (["--seed=3"], "has another seed"),
        (["--trainer.ema=0.9"], r"has another trainer\.ema"),
        (["--optim.clip_norm=2"], r"has another optim\.clip_norm"),
    ],
)
def test_a_branch_of_another_run_is_refused(
    settings: list[str], message: str | None, long: Path, toy_config: Config, tmp_path: Path
) -> None:
    config = toy_config(tmp_path / "run", *LONG, "--trainer.steps=10", f"--branch_from={long}", *settings)
    if message is None:  # a fifth of ten steps are two
        train(config)
        return
    with pytest.raises(UserError, match=message) as error:
        train(config)
    assert "\n" not in str(error.value)


def test_nothing_to_branch_from(toy_config: Config, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="branch_from: no such folder"):
        train(toy_config(tmp_path / "run", f"--branch_from={tmp_path / 'none'}"))
