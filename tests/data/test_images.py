"""Views of a study, and images that the tower's device makes ready."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from medclip_lab.data.augment import AugmentConfig
from medclip_lab.data.images import Pending
from medclip_lab.data.pipeline import BatchStream, DataConfig, SourceConfig
from medclip_lab.data.preprocess import PreprocessConfig
from medclip_lab.data.sample import Sample
from medclip_lab.data.shards import write_shards
from medclip_lab.data.text import TextConfig
from medclip_lab.errors import UserError

CPU = torch.device("cpu")
Write = Callable[[list[list[tuple[str, bytes]]]], str]


def tokenizer(texts: list[str]) -> Tensor:
    return torch.tensor([[int(text.split()[-1])] for text in texts])


def smooth(level: int, channels: int = 1, size: tuple[int, int] = (90, 60)) -> Image.Image:
    """A picture whose mean is about `level`."""
    x, y = np.meshgrid(np.linspace(-20, 20, size[0]), np.linspace(-20, 20, size[1]))
    plane = np.clip(level + x + 0.5 * y, 0, 255).astype(np.uint8)
    return Image.fromarray(plane if channels == 1 else np.stack([plane, plane // 2, plane // 3], -1))


def jpeg(level: int, channels: int = 1, **options: Any) -> tuple[str, bytes]:
    file = io.BytesIO()
    smooth(level, channels).save(file, "JPEG", quality=95, **options)
    return "jpg", file.getvalue()


def sample(number: int, images: list[tuple[str, bytes]], text: str) -> Sample:
    return Sample(
        study_id=f"study-{number}",
        patient_id=f"patient-{number}",
        split="train",
        images=images,
        text=text,
        labels={"Edema": 1},
        source="toy",
        license="synthetic",
    )


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_them(studies: list[list[tuple[str, bytes]]]) -> str:
        samples = [sample(n, images, f"text {n}") for n, images in enumerate(studies)]
        write_shards(samples, tmp_path / "shards", source="toy", samples_per_shard=8)
        return str(tmp_path / "shards")

    return write_them


def stream(shards: str, training: bool = True, quarantine: Path | None = None, **changes: Any) -> BatchStream:
    config = DataConfig(
        **({"sources": {"toy": SourceConfig(shards)}, "batch_size": 8, "workers": 0, "max_bad": 0.5} | changes),
        preprocess=PreprocessConfig(size=32),
    )
    return BatchStream(config, tokenizer, 1, training=training, quarantine_path=quarantine)


def levels(images: Tensor) -> list[int]:
    """Which of the levels 60, 120, 180 each image has."""
    inside = images[:, :, 12:20, 12:20].float().mean((1, 2, 3))
    return [round(float(value) / 60) * 60 for value in inside]


def test_the_second_view_is_another_image_of_the_study(write: Write) -> None:
    shards = write([[jpeg(60), jpeg(180)]] * 8)
    one = next(iter(stream(shards)))
    two = next(iter(stream(shards, augment=AugmentConfig(views=2))))
    assert "second_image" not in one
    assert levels(two["image"]) != levels(two["second_image"])
    assert all({a, b} == {60, 180} for a, b in zip(levels(two["image"]), levels(two["second_image"]), strict=True))
    quiet = next(iter(stream(shards, training=False, augment=AugmentConfig(views=2))))
    assert (levels(quiet["image"]), levels(quiet["second_image"])) == ([60] * 8, [180] * 8)


def test_a_study_of_one_good_image_shows_it_twice_and_changed_apart(write: Write, tmp_path: Path) -> None:
    changes = AugmentConfig(brightness=0.1, degrees=20, views=2)
    broken = ("jpg", jpeg(180)[1][:400])
    shards = write([[jpeg(120)]] * 4 + [[jpeg(120), broken]] * 4)
    batch = next(iter(stream(shards, augment=changes, quarantine=tmp_path / "bad.jsonl")))
    assert levels(batch["image"]) == levels(batch["second_image"]) == [120] * 8
    assert ((batch["image"] != batch["second_image"]).flatten(1).any(1)).all()
    assert len((tmp_path / "bad.jsonl").read_text().splitlines()) == 4


def test_reports_of_validation_are_treated_as_in_training(tmp_path: Path) -> None:
    text = "Compared to the prior study, the effusion is unchanged. No pneumothorax in " + 3 * "_" + " today."
    samples = [sample(n, [jpeg(60)], text) for n in range(8)]
    write_shards(samples, tmp_path / "shards", source="toy", samples_per_shard=8)
    seen: list[str] = []

    def note(texts: list[str]) -> Tensor:
        seen.extend(texts)
        return torch.zeros(len(texts), 1, dtype=torch.int64)

    policy = TextConfig(report=0, sentence=1, marks="mask", priors="drop", paraphrases=str(tmp_path / "not read.yaml"))
    config = DataConfig({"toy": SourceConfig(str(tmp_path / "shards"))}, batch_size=8, workers=0, text=policy)
    next(iter(BatchStream(config, note, 1, training=False)))
    assert len(set(seen)) == 1
    assert "[MASK]" in seen[0]
    assert 3 * "_" not in seen[0]
    assert "prior" not in seen[0]
    assert "No pneumothorax in" in seen[0]


@pytest.mark.parametrize("mode", ["longest", "shortest", "squash"])
def test_a_device_makes_the_pixels_that_a_loader_process_makes(write: Write, mode: Any) -> None:
    pytest.importorskip("torchcodec")
    deep = io.BytesIO()
    Image.fromarray(np.asarray(smooth(120)).astype(np.uint16) * 200).save(deep, "PNG")
    shards = write([[jpeg(60)], [jpeg(120, 3)], [jpeg(180, progressive=True)], [("png", deep.getvalue())]] * 2)
    changes = AugmentConfig(crop=(0.6, 0.9), degrees=5, brightness=0.1, views=2)
    here, there = (
        stream(shards, augment=changes, scaled_decode=False, finish_on=where) for where in ("loader", "device")
    )
    for source in (here, there):
        source.images.preprocess = type(source.images.preprocess)(PreprocessConfig(size=32, resize_mode=mode))
    expected, pending = next(iter(here)), next(iter(there))
    assert isinstance(pending["image"], Pending)
    batch = there.finish(pending, CPU)
    assert batch.keys() == expected.keys()
    for name in ("image", "second_image"):
        assert batch[name].shape == expected[name].shape == (8, 3, 32, 32)
        apart = (batch[name].int() - expected[name].int()).abs()
        assert apart.max() <= 3
        assert apart.float().mean() < 0.5
    assert (batch["text"] == expected["text"]).all()
    assert here.finish(expected, CPU) is expected


def test_what_the_device_cannot_decode_is_listed_and_leaves_with_its_text(write: Write, tmp_path: Path) -> None:
    pytest.importorskip("torchcodec")
    cut = ("jpg", jpeg(120)[1][:-200])  # its header is whole: only a decoder can tell
    source = stream(write([[jpeg(60)]] * 5 + [[cut]] * 3), finish_on="device", quarantine=tmp_path / "bad.jsonl")
    pending = next(iter(source))
    assert len(pending["image"]) == 8
    batch = source.finish(pending, CPU)
    assert sorted(batch["image_id"]) == [f"study-{n}" for n in range(5)]
    assert batch["text"][:, 0].tolist() == [int(name[-1]) for name in batch["image_id"]]
    assert batch["image_id"] == batch["text_id"]
    assert batch["image"].shape[1] == 1, "greyscale stays one channel"
    assert {len(batch[name]) for name in ("image", "image_labels", "text_labels", "patient_id")} == {5}
    listed = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert sorted(line["key"] for line in listed) == ["study-5", "study-6", "study-7"]
    assert {line["cause"] for line in listed} == {"unreadable image"}


def test_a_batch_of_which_nothing_is_left(write: Write) -> None:
    pytest.importorskip("torchcodec")
    source = stream(write([[("jpg", jpeg(120)[1][:-200])]] * 8), finish_on="device", max_bad=1.0)
    with pytest.raises(UserError, match="none of the 8 images of a batch can be decoded on cpu"):
        source.finish(next(iter(source)), CPU)


def test_without_torchcodec_the_way_out_is_named(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = write([[jpeg(60)]] * 8)
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    with pytest.raises(UserError, match=r"data\.finish_on: .* pip install 'medclip_lab\[decode\]'"):
        stream(shards, finish_on="device")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_nvjpeg_makes_the_pixels_that_pillow_makes(write: Write) -> None:
    pytest.importorskip("torchcodec")
    shards = write([[jpeg(60)], [jpeg(120, 3)]] * 4)
    expected = next(iter(stream(shards, scaled_decode=False)))
    there = stream(shards, finish_on="device")
    batch = there.finish(next(iter(there)), torch.device("cuda"))
    assert batch["image"].is_cuda
    assert (batch["image"].cpu().int() - expected["image"].int()).abs().max() <= 4
