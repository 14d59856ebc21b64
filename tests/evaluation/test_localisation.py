"""Pointing game and CNR: by hand, with an oracle, with its opposite, and with chance stated."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medclip_lab.data.shards import write_shards
from medclip_lab.data.sources.phantom import Phantom
from medclip_lab.errors import UserError
from medclip_lab.evaluation import localisation as module
from medclip_lab.evaluation.localisation import contrast_to_noise, localisation, points_at, region_mask, summary
from medclip_lab.evaluation.report_page import render
from medclip_lab.evaluation.suite import Extras, run
from medclip_lab.inference.encoder import Encoder, load
from medclip_lab.inference.explain import Explanation

WHOLE = (0.0, 0.0, 1.0, 1.0)


def test_masks_by_hand() -> None:
    mask = region_mask([[0.5, 0.0, 1.0, 0.25]], WHOLE, 4)
    assert mask.tolist() == [[False, False, True, True], *[[False] * 4] * 3]
    padded = region_mask([[0.0, 0.0, 1.0, 1.0]], (0.0, -0.5, 1.0, 1.5), 4)
    assert padded.any(axis=1).tolist() == [False, True, True, False], "of a wide picture the border is no part"


def test_pointing_and_contrast_by_hand() -> None:
    mask = np.array([[True, False], [False, False]])
    assert points_at(np.array([[2.0, 1.0], [0.0, 1.0]]), mask) == 1
    assert points_at(np.array([[1.0, 2.0], [0.0, 1.0]]), mask) == 0
    assert points_at(np.array([[1.0, 1.0], [0.0, 0.0]]), mask) == 0.5
    relevance = np.array([[4.0, 1.0], [2.0, 3.0]])
    assert contrast_to_noise(relevance, mask) == pytest.approx((4 - 2) / np.sqrt(0 + 2 / 3))
    assert contrast_to_noise(-relevance, mask) == pytest.approx(-2 / np.sqrt(2 / 3))
    assert contrast_to_noise(np.ones((2, 2)), mask) is None
    assert contrast_to_noise(relevance, np.ones((2, 2), bool)) is None


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("phantoms") / "shards"
    source = Phantom(studies=60, size=64)
    samples = [source.read(record, lambda *_: None) for record in source.records()]  # type: ignore[arg-type]
    for sample in samples:
        sample.split = "test"
    write_shards(iter(samples), out, "phantom", samples_per_shard=64)
    return out


@pytest.fixture(scope="module")
def encoder(toy_bundle: Path) -> Encoder:
    return load(toy_bundle, device="cpu")


def test_a_map_of_anything_has_its_chance_beside_it(encoder: Encoder, shards: Path) -> None:
    result = localisation(encoder, shards, limit=40)
    rows = {row["name"]: row for row in result["labels"]}
    for row in rows.values():
        if row["pointing"] is None:
            assert row["reason"] == "no image with a region of it"
        else:
            assert 0 < row["chance"] < row["fixed"] <= 1
            assert 0 <= row["pointing"] <= 1
    assert sum(row["images"] for row in rows.values()) > 10
    assert "best fixed point" in summary(result)
    assert "nan" not in summary(result).lower()


def test_the_page_shows_where_maps_point(encoder: Encoder, shards: Path) -> None:
    evaluated = run(encoder, shards, "test", "chexpert14", Extras(pointing=True), draws=20)
    html = render(encoder, evaluated, "chexpert14", "")
    assert "Best fixed point" in html
    told = evaluated.results["localisation"]["labels"][0]
    assert f"{100 * told['chance']:.1f}%" in html


@pytest.mark.parametrize(("sign", "pointing"), [(1, 1.0), (-1, 0.0)])
def test_an_oracle_hits_and_its_opposite_misses(
    encoder: Encoder, shards: Path, monkeypatch: pytest.MonkeyPatch, sign: int, pointing: float
) -> None:
    """The regions themselves as maps; turned round, CNR keeps its absolute value and shows its sign."""
    boxes: list[Any] = []
    of_study = module._regions

    def told(study: Any, labels: Any) -> Any:
        found = of_study(study, labels)
        boxes.extend(found.values())
        return found

    def oracle(_encoder: Any, _image: Any, *_: Any, **__: Any) -> Explanation:
        mask = region_mask(boxes.pop(0), WHOLE, 32)
        noise = np.random.default_rng(0).random((32, 32)) * 0.1
        return Explanation(
            (sign * (mask + noise)).astype(np.float32), 0.0, "oracle", np.zeros((32, 32), np.uint8), WHOLE
        )

    monkeypatch.setattr(module, "_regions", told)
    monkeypatch.setattr(module, "explain", oracle)
    result = localisation(encoder, shards, labels=["Lung Lesion", "Pneumothorax"], limit=60)
    assert result["mean"]["pointing"] == pointing
    assert sign * result["mean"]["signed_cnr"] > 5
    assert result["mean"]["cnr"] > 5


def test_data_without_regions_is_refused(encoder: Encoder, toy_shards: Any) -> None:
    with pytest.raises(UserError, match="no study of split 'test' tells where Lung Lesion"):
        localisation(encoder, toy_shards.folder)
    with pytest.raises(UserError, match="has no 'Flu'"):
        localisation(encoder, toy_shards.folder, labels=["Flu"])
