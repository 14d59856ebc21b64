"""Shared fixtures: toy studies, a trained toy run and its bundle, a pool of gloo ranks, the optional real data."""

import contextlib
import io
import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from medclip_lab.losses.testing import Runner, processes

# The rest is imported where it is used, so that the tests of the losses run where there is no more than torch.
if TYPE_CHECKING:
    from medclip_lab.data.manifest import Manifest
    from medclip_lab.data.sample import Sample
    from medclip_lab.training.run import RunConfig

# Without the extra `serve` there is no service to test.
collect_ignore = [] if find_spec("fastapi") else ["serving"]

TOY_SPLITS = ("train", "train", "train", "val", "test")


def png(pixels: "np.ndarray[Any, Any]") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def toy_samples(studies: int = 150, side: int = 40, seed: int = 0) -> Iterator["Sample"]:
    """Bright images say that the heart is enlarged: as easy as a task can be, so that a few steps learn it."""
    from medclip_lab.data.findings import CHEXPERT14
    from medclip_lab.data.sample import Sample

    rng = np.random.default_rng(seed)
    for number in range(studies):
        large = int(rng.random() < 0.5)
        pixels = (rng.random((side, side)) * 80 + 120 * large).astype(np.uint8)
        text = "The heart is enlarged." if large else "Heart size is normal."
        yield Sample(
            study_id=f"study-{number}",
            patient_id=f"patient-{number // 2}",
            split=TOY_SPLITS[(number // 2) % 5],
            images=[("png", png(pixels))],
            view=["PA"],
            sections={"findings": text, "impression": f"Case {number}."},
            text=f"{text} Case {number}.",
            labels=dict.fromkeys(CHEXPERT14) | {"Cardiomegaly": large},
            sentences=[{"text": text, "labels": {"Cardiomegaly": large}}],
            source="toy",
            license="CC0-1.0",
        )


TOY_CONFIG = """
data:
  sources:
    toy:
      shards: SHARDS
  batch_size: 8
  preprocess: {size: 32, resize_mode: squash}
  workers: 0
model:
  vocab_size: 400
  spec:
    embed_dim: 16
    vision_cfg: {timm_model_name: test_resnet, image_size: 32}
    text_cfg: {context_length: 80, width: 16, heads: 2, layers: 1}
optim: {lr: 5.0e-3}
trainer: {steps: 30, precision: 32-true, log_every: 5}
checkpoint: {every: 10}
"""


@pytest.fixture(scope="session")
def toy_shards(tmp_path_factory: pytest.TempPathFactory) -> "Manifest":
    from medclip_lab.data.shards import write_shards

    return write_shards(toy_samples(), tmp_path_factory.mktemp("toy") / "shards", "toy", samples_per_shard=16)


@pytest.fixture(scope="session")
def toy_config(tmp_path_factory: pytest.TempPathFactory, toy_shards: "Manifest") -> "Callable[..., RunConfig]":
    """A function from output folder and overrides to a run config over the toy shards."""
    from medclip_lab.config import load_config
    from medclip_lab.training.run import RunConfig

    path = tmp_path_factory.mktemp("config") / "toy.yaml"
    path.write_text(TOY_CONFIG.replace("SHARDS", str(toy_shards.folder)))

    def make(out: Path, *overrides: str) -> RunConfig:
        return load_config(RunConfig, path, [f"--out={out}", *overrides])

    make.path = path  # type: ignore[attr-defined]
    return make


@pytest.fixture(scope="session")
def toy_run(tmp_path_factory: pytest.TempPathFactory, toy_config: "Callable[..., RunConfig]") -> Path:
    from medclip_lab.training.run import train

    return train(toy_config(tmp_path_factory.mktemp("toy") / "run"))


@pytest.fixture(scope="session")
def toy_bundle(toy_run: Path) -> Path:
    from medclip_lab.training.export import export

    out = toy_run.parent / "bundle"
    export(toy_run, out, ["chexpert14"], "pytest")
    return out


@pytest.fixture(scope="session")
def toy_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PNG file that is not square."""
    path = tmp_path_factory.mktemp("image") / "image.png"
    Image.fromarray((np.random.default_rng(0).random((50, 70)) * 255).astype(np.uint8)).save(path)
    return path


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of public data sets named by MEDCLIP_LAB_DATA; the test is skipped without it."""
    named = os.environ.get("MEDCLIP_LAB_DATA")
    folder = Path(named) if named else Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no real data: MEDCLIP_LAB_DATA names no folder")
    return folder


@pytest.fixture(scope="session")
def gloo() -> Iterator[Callable[[int], Runner]]:
    """From a world size to what runs an importable function on every rank of a gloo group, started once a session."""
    running: dict[int, Runner] = {}
    with contextlib.ExitStack() as stack:

        def group(world: int) -> Runner:
            def run(function: Callable[..., Any], arguments: tuple[Any, ...]) -> list[Any]:
                if world not in running:
                    running[world] = stack.enter_context(processes(world))
                try:
                    return running[world](function, arguments)
                except Exception:
                    del running[world]  # a group that lost a call is gone; the next test starts another
                    raise

            return run

        yield group


@pytest.fixture(scope="session")
def ranks(gloo: Callable[[int], Runner]) -> Runner:
    """A group of two."""
    return gloo(2)
