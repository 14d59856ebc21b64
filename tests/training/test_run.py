import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from medclip_lab.cli import main
from medclip_lab.data.manifest import Manifest
from medclip_lab.data.order import Row
from medclip_lab.data.pipeline import BatchStream
from medclip_lab.data.reader import Reader
from medclip_lab.data.sample import Sample
from medclip_lab.data.shards import write_shards
from medclip_lab.errors import UserError
from medclip_lab.training import resume
from medclip_lab.training import run as runs
from medclip_lab.training.checkpoint_files import read_tensors
from medclip_lab.training.console import diary
from medclip_lab.training.run import RunConfig, train

from ..conftest import toy_samples

Config = Callable[..., RunConfig]


def test_training_learns_and_leaves_a_whole_folder(toy_run: Path) -> None:
    losses = [line["loss"] for line in diary(toy_run) if "loss" in line]
    assert losses[-1] < losses[0]
    assert {path.name for path in toy_run.iterdir()} == {
        "checkpoints",
        "config.yaml",
        "done.json",
        "metrics.jsonl",
        "model.json",
        "model.safetensors",
        "report.html",
        "run.json",
        "tensorboard",
        "tokenizer",
    }
    assert json.loads((toy_run / "done.json").read_text())["steps"] == 30


def test_a_finished_run_is_not_made_again(toy_run: Path, toy_config: Config) -> None:
    before = (toy_run / "model.safetensors").stat().st_mtime_ns
    assert train(toy_config(toy_run)) == toy_run
    assert (toy_run / "model.safetensors").stat().st_mtime_ns == before


def test_what_a_finished_run_cannot_do_is_said(toy_run: Path, toy_config: Config) -> None:
    with pytest.raises(UserError, match=r"--resume never: .* holds a finished run"):
        train(toy_config(toy_run), resume="never")
    with pytest.raises(UserError, match=r"--profile: .* holds a finished run"):
        train(toy_config(toy_run), profile=2)


def test_a_folder_holds_one_run(toy_run: Path, toy_config: Config) -> None:
    with pytest.raises(UserError, match="holds a run with another config"):
        train(toy_config(toy_run, "--optim.lr=1e-5"))


def test_an_interrupted_run_goes_on_where_it_was(
    toy_run: Path, toy_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batches after a resume are those the uninterrupted run had, and so are the weights."""
    served: list[int] = []
    original = BatchStream.batch

    def recording(self: BatchStream, rows: list[Row], step: int, readers: dict[str, Reader]) -> object:
        served.append(step)
        if step == 17 and not (tmp_path / "again").exists():
            raise KeyboardInterrupt
        return original(self, rows, step, readers)

    monkeypatch.setattr(BatchStream, "batch", recording)
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        train(toy_config(out))
    assert not (out / resume.DONE).exists()
    (tmp_path / "again").touch()
    served.clear()
    train(toy_config(out))
    assert served == list(range(10, 30)), "the last checkpoint was that of step 10"
    assert json.loads((out / resume.DONE).read_text())["resumed_at"] == 10
    assert [line["step"] for line in diary(out)] == [5, 10, 15, 20, 25, 30]
    expected = load_file(toy_run / runs.WEIGHTS)
    for name, value in load_file(out / runs.WEIGHTS).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)


def test_averaged_weights_are_exported_and_survive_an_interruption(
    toy_run: Path, toy_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(toy_config(tmp_path / "whole", "--trainer.ema=0.9"))
    averaged, last = load_file(whole / runs.WEIGHTS), load_file(toy_run / runs.WEIGHTS)
    name = "visual.head.proj.weight" if "visual.head.proj.weight" in last else next(iter(last))
    assert not torch.equal(averaged[name], last[name])
    original = BatchStream.batch

    def stopping(self: BatchStream, rows: list[Row], step: int, readers: dict[str, Reader]) -> object:
        if step == 17:
            raise KeyboardInterrupt
        return original(self, rows, step, readers)

    with monkeypatch.context() as patch:
        patch.setattr(BatchStream, "batch", stopping)
        with pytest.raises(KeyboardInterrupt):
            train(toy_config(tmp_path / "cut", "--trainer.ema=0.9"))
    cut = train(toy_config(tmp_path / "cut", "--trainer.ema=0.9"))
    for key, value in load_file(cut / runs.WEIGHTS).items():
        torch.testing.assert_close(value, averaged[key], rtol=1e-4, atol=1e-5)


def test_diary_tells_the_health_of_a_batch(toy_run: Path) -> None:
    line = next(line for line in diary(toy_run) if "loss" in line)
    assert {"positive_logit", "negative_logit", "image_to_text_top1", "text_to_image_top1"} <= set(line)
    assert 1 <= line["image_rank"] <= 16
    assert 0 <= line["repeated_texts"] <= 1


def test_losses_that_want_ids_labels_and_parameters_of_their_own(toy_config: Config, tmp_path: Path) -> None:
    terms = (
        "{pairs: {name: SigLipLoss, args: {positives: text, ignored: [patient, study]}}, "
        "classes: {name: PrototypeLoss, args: {classes: 14, dim: 16}, weight: 0.5}}"
    )
    settings = ["--loss.name=WeightedSum", "--loss.args={terms: " + terms + "}", "--trainer.steps=10"]
    out = train(toy_config(tmp_path / "run", *settings))
    lines = [line for line in diary(out) if "loss" in line]
    for line in lines:
        assert line["loss"] == pytest.approx(line["pairs"] + 0.5 * line["classes"], rel=1e-5)
    state = read_tensors(out / "checkpoints" / "step-00000010")
    assert state["state_dict/loss.terms.classes.prototypes"].shape == (14, 16)
    assert not torch.equal(state["state_dict/loss.terms.classes.head.weight"], torch.eye(16)), (
        "the loss's own parameters train too"
    )


def test_two_views_made_ready_on_the_device(toy_config: Config, tmp_path: Path) -> None:
    pytest.importorskip("torchcodec")
    data = ["--data.finish_on=device", "--data.augment.views=2", "--data.text.views=2", "--data.workers=1"]
    out = train(toy_config(tmp_path / "run", "--loss.name=MultiViewClipLoss", "--trainer.steps=4", *data))
    line = next(line for line in diary(out) if "loss" in line)
    assert {"image_text_loss", "image_image_loss", "text_text_loss"} <= line.keys()
    assert 0 < line["image_image_loss"] < 10


def test_gradient_cache_changes_nothing(toy_config: Config, tmp_path: Path) -> None:
    tower = "--model.spec.vision_cfg={timm_model_name: test_vit, image_size: 32, timm_pool: avg}"
    # With Adam's usual eps a gradient that is zero but for rounding (the bias of attention's keys) is a full step.
    settings = [tower, "--trainer.steps=4", "--trainer.log_every=1", "--checkpoint.every=4", "--optim.eps=1e-3"]
    whole = train(toy_config(tmp_path / "whole", *settings))
    cached = train(toy_config(tmp_path / "cached", *settings, "--trainer.gradient_cache=3"))
    for first, second in zip(diary(whole), diary(cached), strict=True):
        assert second["loss"] == pytest.approx(first["loss"], rel=1e-5)
    expected = load_file(whole / runs.WEIGHTS)
    for name, value in load_file(cached / runs.WEIGHTS).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4)


def test_a_run_goes_on_with_what_it_was_started_on(
    toy_run: Path, toy_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = Path(shutil.copytree(toy_run, tmp_path / "moved"))
    assert train(toy_config(moved)) == moved, "where a run lies is no setting of it"
    facts = json.loads((moved / resume.FACTS).read_text())
    facts["shards"] = {"toy": "of yesterday"}
    (moved / resume.FACTS).write_text(json.dumps(facts))
    with pytest.raises(UserError, match="the shards changed since"):
        train(toy_config(moved))

    begun = Path(shutil.copytree(toy_run, tmp_path / "begun"))
    (begun / resume.DONE).unlink()
    facts = json.loads((begun / resume.FACTS).read_text())
    (begun / resume.FACTS).write_text(json.dumps(facts | {"steps": 31}))
    with pytest.raises(UserError, match="was started with 31 steps, and this would be 30"):
        train(toy_config(begun))


def test_shuffled_pairs_are_no_control_of_a_loss_on_labels(toy_config: Config, tmp_path: Path) -> None:
    settings = ["--loss.name=SoftTargetClipLoss", "--data.control=shuffled_pairs"]
    with pytest.raises(UserError, match="trains on labels and not on pairs"):
        train(toy_config(tmp_path / "run", *settings))


def test_what_was_unusable_is_told_at_the_end(
    toy_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By several loader processes, over several epochs: each sample once."""
    samples = [sample for sample in toy_samples(120) if sample.split == "train"]
    samples[4].images = [("png", b"no image")]
    write_shards(samples, tmp_path / "s", "toy", 16)
    settings = [f"--data.sources.toy.shards={tmp_path / 's'}", "--data.workers=2", "--trainer.steps=20"]
    arguments = ["--config", str(toy_config.path), "--out", str(tmp_path / "run")]  # type: ignore[attr-defined]
    assert main(["train", *arguments, *settings]) == 0
    assert "unusable samples of toy: 1 unreadable image, listed in" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "done.json").read_text())["unusable"] == {"toy": {"unreadable image": 1}}


def test_an_error_in_a_loader_process_is_one_line(toy_config: Config, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    broken = (
        Sample(study_id=f"s{n}", patient_id=f"s{n}", split="train", images=[("png", b"no image")], text="Text.")
        for n in range(40)
    )
    write_shards(broken, shards, "t", 10)
    settings = [f"--data.sources.toy.shards={shards}", "--data.workers=1"]
    with pytest.raises(
        UserError, match=r"^\d+ of 40 samples of source toy are unusable \(\d+ unreadable image\)"
    ) as error:
        train(toy_config(tmp_path / "run", *settings))
    assert "\n" not in str(error.value)


def on_ranks(world: int, toy_config: Config, out: Path, *settings: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)]
    command += ["-m", "medclip_lab", "train", "--config", str(toy_config.path), "--out", str(out)]  # type: ignore[attr-defined]
    result = subprocess.run(
        [*command, *settings],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result


@pytest.mark.slow
def test_two_ranks_under_torchrun(toy_config: Config, toy_shards: Manifest, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = on_ranks(2, toy_config, out, "--trainer.steps=6")
    done = json.loads((out / "done.json").read_text())
    assert done["world_size"] == 2
    assert done["steps"] == 6
    assert result.stdout.count("loss") == 1, "one rank speaks"


@pytest.mark.slow
def test_a_run_goes_on_with_other_ranks_as_if_nothing_had_been(
    toy_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batches are global, and so are loss and gradients: a tower without batch norm cannot tell how many ranks."""
    settings = [
        "--model.spec.vision_cfg={timm_model_name: test_vit, image_size: 32, timm_pool: avg}",
        "--optim.eps=1e-3",  # else a gradient that is zero but for rounding is a full step of Adam's
        "--trainer.steps=8",
        "--checkpoint.every=4",
        "--data.augment.degrees=5",
    ]
    whole = train(toy_config(tmp_path / "whole", *settings))
    original = BatchStream.batch

    def stopping(self: BatchStream, rows: list[Row], step: int, readers: dict[str, Reader]) -> object:
        if step == 5:
            raise KeyboardInterrupt
        return original(self, rows, step, readers)

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(BatchStream, "batch", stopping)
        with pytest.raises(KeyboardInterrupt):
            train(toy_config(out, *settings))
    on_ranks(2, toy_config, out, *settings)
    done = json.loads((out / "done.json").read_text())
    assert (done["resumed_at"], done["world_size"]) == (4, 2)
    expected = load_file(whole / runs.WEIGHTS)
    for name, value in load_file(out / runs.WEIGHTS).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--loss.name=NoSuchLoss"], "unknown loss 'NoSuchLoss'"),
        (["--loss.name=ClipLoss", "--loss.args={tau: 1}"], r"loss\.args"),
        (["--loss.name=MultiViewClipLoss"], "needs second_image_features, second_text_features, and a batch has none"),
        (["--trainer.gradient_cache=4"], "normalises over its batch"),
        (["--data.batch_size=1000"], "to fill a batch of 1000"),
        (["--data.preprocess.size=64"], "they must be equal"),
        (["--model.spec.vision_cfg.timm_model_name=resnet19"], r"model\.spec: open_clip cannot build it"),
        (["--data.sources.toy.shards=nowhere"], "no such folder"),
        (["--data.sources.toy.split=holdout"], "no split 'holdout'"),
        (["--data.sources.toy.split=train+val", "--trainer.val_every=5"], "trains on the split 'val'"),
        (["--model.spec=ViT-B-32"], "has its own tokenizer"),
    ],
)
def test_configs_that_cannot_work(toy_config: Config, tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        train(toy_config(tmp_path / "run", "--trainer.epochs=1", "--trainer.steps=null", *overrides))
    assert "\n" not in str(error.value)


def test_a_loss_that_is_not_finite_stops_the_run(toy_config: Config, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the loss of step \d+ is (nan|inf); its studies: study-"):
        train(toy_config(tmp_path / "run", "--optim.lr=1e30", "--optim.clip_norm=0", "--optim.warmup=0"))


def test_semantic_loss_trains_on_the_labels(toy_config: Config, tmp_path: Path) -> None:
    settings = ["--loss.name=SoftTargetClipLoss", "--loss.args.target_temperature=0.2", "--trainer.steps=5"]
    run = train(toy_config(tmp_path / "run", *settings))
    assert "excess_loss" in next(diary(run))
    model = json.loads((run / "model.json").read_text())["model_cfg"]
    assert not any("bias" in name for name in load_file(run / "model.safetensors") if name.startswith("logit"))
    assert model["custom_text"] is True


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("--trainer.ema=0.9", "trainer.ema: averaged weights cannot be sharded"),
        ("--model.lora={text: {target: '.*out_proj'}}", "model.lora: adapters are few and cannot be sharded"),
        ("--trainer.gradient_cache=2", "data.batch_size 30 does not divide by 4 ranks"),
    ],
)
def test_what_shards_cannot_do(
    toy_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str, message: str
) -> None:
    config = toy_config(tmp_path / "run", setting, "--data.batch_size=30", "--ranks.strategy=fsdp")
    runs._refuse_uneven(config)  # of one rank
    monkeypatch.setattr(runs.distributed, "world_size", lambda: 4)
    with pytest.raises(UserError, match=message):
        runs._refuse_uneven(config)
