"""A run that learns from a bundle."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import medclip_lab
from medclip_lab.errors import UserError
from medclip_lab.losses import ClipLoss, DistillLoss
from medclip_lab.training import run as runs
from medclip_lab.training.checkpoint_files import read_tensors
from medclip_lab.training.console import diary
from medclip_lab.training.module import ContrastiveModule
from medclip_lab.training.run import RunConfig, train
from medclip_lab.training.teacher import DistillConfig, Teacher

Config = Callable[..., RunConfig]


def test_a_teacher_gives_what_its_bundle_gives(toy_bundle: Path, toy_config: Config, tmp_path: Path) -> None:
    teacher, encoder = Teacher(str(toy_bundle), toy_config(tmp_path).data), medclip_lab.load(toy_bundle, device="cpu")
    texts = ["The heart is enlarged.", "Heart size is normal.", "Case 3."]
    pixels = torch.randint(0, 255, (3, 1, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    batch = {"image": pixels, "teacher_text": teacher.tokenizer(texts), "text": torch.ones(3, 4, dtype=torch.int64)}
    found = teacher.features(batch, torch.device("cpu"))
    torch.testing.assert_close(found["teacher_text"], torch.from_numpy(encoder.encode_texts(texts)))
    torch.testing.assert_close(found["teacher_image"], encoder.model.encode_image(pixels).detach())
    assert float(found["teacher_logit_scale"]) == pytest.approx(encoder.logit_scale)
    assert not any(value.requires_grad for value in found.values())
    in_parts = teacher.features(batch, torch.device("cpu"), 2)
    torch.testing.assert_close(in_parts["teacher_image"], found["teacher_image"])
    larger = batch | {"image": torch.nn.functional.interpolate(pixels, scale_factor=2)}
    found = teacher.features(larger, torch.device("cpu"))
    assert torch.cosine_similarity(found["teacher_image"], in_parts["teacher_image"]).min() > 0.9
    assert set(teacher.features({}, torch.device("cpu"))) == {"teacher_logit_scale"}


def test_a_student_comes_nearer_to_its_teacher(
    toy_bundle: Path, toy_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained on nothing but what the teacher says: shuffled texts, another tokenizer and another size of images."""
    settings = [
        *(f"--distill.bundle={toy_bundle}", "--distill.weight=3", "--loss.name=ClipLoss"),
        *("--model.vocab_size=300", "--data.preprocess.size=48", "--model.spec.vision_cfg.image_size=48"),
        *("--model.spec.embed_dim=24", "--trainer.val_every=20", "--trainer.steps=20"),
    ]
    out = train(toy_config(tmp_path / "run", *settings))
    lines = [line for line in diary(out) if "loss" in line]
    for line in lines:
        assert line["loss"] == pytest.approx(line["student"] + 3 * line["distill"], rel=1e-5)
    assert lines[-1]["distill"] < lines[0]["distill"]
    state = read_tensors(out / "checkpoints" / "step-00000020")
    assert not any("teacher" in name for name in state)
    names = [name.removeprefix("state_dict/") for name in state if name.startswith("state_dict/")]
    assert {name.split(".")[0] for name in names} == {"encoder"}
    assert load_file(out / runs.WEIGHTS)["text.text_projection"].shape[-1] == 24


def test_what_the_loss_is_given_is_of_this_batch(
    toy_bundle: Path, toy_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []
    original = ContrastiveModule.terms

    def terms(self: ContrastiveModule, batch: Any, diagnose_too: bool = False) -> Any:
        found = original(self, batch, diagnose_too)
        assert self.teacher is not None
        given = self.teacher.features(batch, self.device)
        features = self.features(batch)
        loss = DistillLoss()(
            *(features["image"], features["text"], self.encoder.logit_scale),
            teacher_image_features=given["teacher_image"],
            teacher_text_features=given["teacher_text"],
            teacher_logit_scale=given["teacher_logit_scale"],
        )
        own = ClipLoss()(features["image"], features["text"], self.encoder.logit_scale)
        seen.append({"found": float(found["loss"].detach()), "expected": float((own + loss).detach())})
        return found

    monkeypatch.setattr(ContrastiveModule, "terms", terms)
    vit = "--model.spec.vision_cfg={timm_model_name: test_vit, image_size: 32, timm_pool: avg}"
    settings = [f"--distill.bundle={toy_bundle}", "--loss.name=ClipLoss", "--trainer.steps=2", vit]
    train(toy_config(tmp_path / "run", *settings))
    assert all(one["found"] == pytest.approx(one["expected"], rel=1e-5) for one in seen)


def test_teachers_that_cannot_be(toy_bundle: Path, toy_config: Config, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="bundle: no such folder"):
        train(toy_config(tmp_path / "run", f"--distill.bundle={tmp_path / 'none'}"))
    with pytest.raises(UserError, match=r"trained with preprocess\.resize_mode 'squash', and this run has 'longest'"):
        train(toy_config(tmp_path / "run", f"--distill.bundle={toy_bundle}", "--data.preprocess.resize_mode=longest"))
    with pytest.raises(ValueError, match=r"distill\.weight must be positive, got 0"):
        DistillConfig("x", 0)
