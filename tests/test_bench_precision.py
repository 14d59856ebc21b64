"""Precisions of the image tower side by side: what is compared with what, and mistakes."""

from pathlib import Path

import numpy as np
import pytest
import torch

from medclip_lab.bench import precision as module
from medclip_lab.bench.precision import bench_precision, table
from medclip_lab.data.manifest import Manifest
from medclip_lab.errors import UserError


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SECONDS", 0.01)


def test_bfloat16_beside_float32(toy_bundle: Path, toy_shards: Manifest) -> None:
    result = bench_precision(toy_bundle, toy_shards.folder, ["bfloat16"], samples=20, batch=4, repeats=1)
    whole, half = result["sides"]["float32"], result["sides"]["bfloat16"]
    assert whole["cosine_least"] == pytest.approx(1, abs=1e-6)
    assert whole["auroc_largest_change"] == 0
    assert 0.99 < half["cosine_least"] < 1 - 1e-7  # it is another arithmetic
    assert whole["auroc_labels"] == 1  # Cardiomegaly alone is labelled there
    assert 0 <= half["auroc_largest_change"] < 0.2
    assert min(whole["per_second_1"], half["per_second_4"]) > 0
    assert len(table(result).splitlines()) == 4


def test_a_tower_that_says_something_else_is_seen(
    toy_bundle: Path, toy_shards: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Features that point the other way: cosine -1, and an AUROC that is turned around."""
    whole = module._side

    def turned(name: str, encoder: module.Encoder, folder: Path) -> module.Side:
        side = whole("float32", encoder, folder)
        return side if name == "float32" else lambda pixels: -side(pixels)

    monkeypatch.setattr(module, "_side", turned)
    found = bench_precision(toy_bundle, toy_shards.folder, ["bfloat16"], samples=20, batch=4, repeats=1)["sides"]
    assert found["bfloat16"]["cosine_least"] == pytest.approx(-1, abs=1e-5)
    assert found["bfloat16"]["macro_auroc"] == pytest.approx(1 - found["float32"]["macro_auroc"], abs=1e-4)


def test_what_cannot_be_made_is_told_and_the_rest_measured(toy_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise UserError("onnx: int8 reaches 3% of the image tower's weights")

    monkeypatch.setattr(module, "to_onnx", refuse)
    result = bench_precision(toy_bundle, None, ["onnx-int8"], samples=3, batch=2, repeats=1)
    assert "int8 reaches 3%" in result["sides"]["onnx-int8"]["refused"]
    assert result["sides"]["float32"]["macro_auroc"] is None  # drawn images have no labels
    assert "| onnx-int8 | onnx: int8 reaches" in table(result)


def test_what_a_batch_does_to_a_feature_is_seen() -> None:
    def relative(pixels: torch.Tensor) -> torch.Tensor:
        return pixels.float().flatten(1) / pixels.max()  # as a scale of the whole batch is

    rows = torch.arange(1, 9, dtype=torch.uint8).reshape(4, 2, 1, 1)
    assert np.abs(module._features(relative, rows, 1) - module._features(relative, rows, 4)).max() > 0.5


@pytest.mark.parametrize(
    ("options", "told"),
    [({"only": ["int4"]}, "no side is named 'int4'"), ({"samples": 0}, "samples"), ({"batch": 0}, "batch")],
)
def test_mistakes(options: dict[str, object], told: str) -> None:
    with pytest.raises(UserError, match=told):
        bench_precision(**options)  # type: ignore[arg-type]
