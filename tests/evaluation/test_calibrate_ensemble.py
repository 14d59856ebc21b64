"""An ensemble is calibrated as one: for just its members, kept in the bundle of the first, beside the bundle's own."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from medclip_lab.data.manifest import Manifest
from medclip_lab.errors import UserError
from medclip_lab.evaluation import suite
from medclip_lab.evaluation.calibrate import calibrate, summary
from medclip_lab.evaluation.protocol import evaluate
from medclip_lab.inference.calibration import Calibration
from medclip_lab.inference.encoder import Encoder, load
from medclip_lab.inference.ensemble import ClassifierEnsemble


def changed(bundle: Path, seed: int) -> Encoder:
    """Another checkpoint: the same towers, their weights moved a little."""
    encoder = load(bundle, device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in encoder.model.model.visual.parameters():
            weight += 0.02 * weight.std(correction=0) * torch.randn(weight.shape, generator=generator)
    encoder.manifest = encoder.manifest | {"fingerprint": f"{seed:064d}", "files": {}}
    return encoder


@pytest.fixture(scope="module")
def calibrated(toy_bundle: Path, toy_shards: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    bundle = Path(shutil.copytree(toy_bundle, tmp_path_factory.mktemp("ensemble") / "bundle"))
    first, second = load(bundle, device="cpu"), changed(bundle, 2)
    calibrate(first, toy_shards.folder, "chexpert14", "train").save(bundle)
    together = calibrate(first, toy_shards.folder, "chexpert14", "train", ensemble=[second])
    together.save(bundle)
    assert "of 2 models together" in summary(together)
    return bundle


def ensemble(bundle: Path, *seeds: int, average: str = "scores") -> ClassifierEnsemble:
    encoders = [load(bundle, device="cpu"), *(changed(bundle, seed) for seed in seeds)]
    return ClassifierEnsemble([encoder.zero_shot_classifier() for encoder in encoders], average)  # type: ignore[arg-type]


def test_an_ensemble_decides_by_its_own_calibration(calibrated: Path, toy_image: Path) -> None:
    both = ensemble(calibrated, 2)
    assert both.calibration is not None
    answer = both.classify([toy_image])[0]
    heart = answer["labels"]["Cardiomegaly"]
    expected = both.calibration.probabilities("Cardiomegaly", np.array([heart["score"]]))
    assert expected is not None
    assert heart["probability"] == expected[0]
    assert heart["decision"] == (heart["probability"] >= heart["threshold"])
    features = [member.features([toy_image]) for member in both.members]
    joint = np.concatenate(features, axis=1)
    assert answer["out_of_domain"]["distance"] == both.calibration.distances(joint)[0]
    alone = both.members[0].calibration
    assert alone is not None
    assert alone.hash != both.calibration.hash
    assert "members" not in json.dumps(answer)


def test_it_holds_for_just_these_members_and_this_average(calibrated: Path) -> None:
    assert ensemble(calibrated, 3).calibration is None
    assert ensemble(calibrated, 2, 3).calibration is None
    assert ensemble(calibrated, 2, average="logits").calibration is None
    assert ensemble(calibrated, 2, average="logits").made_for_members() is not None
    members = ensemble(calibrated, 2).members
    assert ClassifierEnsemble(members[::-1]).calibration is None, "the features lie side by side in another order"
    assert ClassifierEnsemble(members, calibrated=False).calibration is None
    for member in members:
        member._encoder = None
    assert ClassifierEnsemble(members).calibration is None, "of features alone nobody knows whose they are"


def test_the_hash_covers_every_member(calibrated: Path) -> None:
    both = ensemble(calibrated, 2).calibration
    assert both is not None
    fingerprints = [load(calibrated, device="cpu").fingerprint, f"{2:064d}"]
    assert both.facts["members"] == fingerprints
    for place in range(2):
        others = [*fingerprints]
        others[place] = "0" * 64
        assert Calibration(both.facts | {"members": others}, {}).hash != both.hash
    kept = json.loads((calibrated / "calibration.json").read_text())["labelsets"]
    assert len(kept) == 2
    assert kept["chexpert14"]["members"] == fingerprints[:1], "the bundle's own calibration stays beside it"


def test_an_ensemble_is_evaluated_with_its_calibration(calibrated: Path, toy_shards: Manifest) -> None:
    first, second = load(calibrated, device="cpu"), changed(calibrated, 2)
    models = suite.Models(ensemble=[second])
    evaluated = suite.run(first, toy_shards.folder, "test", "chexpert14", suite.Extras(), models, draws=20)
    shot = evaluated.results["zero_shot"]
    both = ensemble(calibrated, 2).calibration
    assert both is not None
    assert shot["calibration"]["hash"] == both.hash
    heart = next(row for row in shot["labels"] if row["name"] == "Cardiomegaly")
    assert heart["metrics"]["accuracy"]["value"] > 0.8
    other = evaluate(first, toy_shards.folder, draws=5, ensemble=[changed(calibrated, 3)])["zero_shot"]
    assert other["calibration"] is None
    with pytest.raises(UserError, match="are those the calibration was made with"):
        evaluate(first, toy_shards.folder, "train", draws=5, ensemble=[second])
