import json
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

import medclip_lab
from medclip_lab.errors import UserError
from medclip_lab.inference.classifier import ZeroShotClassifier
from medclip_lab.inference.encoder import load
from medclip_lab.inference.labelset import LabelPrompts, LabelSet, load_labelset
from medclip_lab.training.export import export

TEXTS = ["The heart is enlarged.", "", "Größe 2.5 cm; " * 40]


@pytest.mark.parametrize("mode", ["L", "RGB", "I;16", "RGBA"])
def test_plain_open_clip_gives_the_same_features(toy_bundle: Path, tmp_path: Path, mode: str) -> None:
    rng = np.random.default_rng(0)
    pixels = (rng.random((50, 70, 3)) * 255).astype(np.uint8)
    image = Image.fromarray(pixels).convert("RGBA" if mode == "RGBA" else "RGB" if mode == "RGB" else "L")
    if mode == "I;16":
        # open_clip cuts 16 bits to 8; where the values already span 8 bits, ours is the same picture.
        values = np.asarray(image).astype(np.uint16)
        values[0, :2] = 0, 255
        image = Image.fromarray(values.astype(np.uint8))
        Image.fromarray(values).save(tmp_path / "image.png")
    else:
        image.save(tmp_path / "image.png")
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{toy_bundle}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{toy_bundle}")
    model.eval()
    with torch.no_grad():
        images = model.encode_image(preprocess(image)[None], normalize=True).numpy()
        texts = model.encode_text(tokenizer(TEXTS), normalize=True).numpy()
    encoder = medclip_lab.load(toy_bundle, device="cpu")
    np.testing.assert_allclose(encoder.encode_images([tmp_path / "image.png"]), images, atol=1e-5)
    np.testing.assert_allclose(encoder.encode_texts(TEXTS), texts, atol=1e-5)
    assert float(model.logit_scale.detach().exp()) == pytest.approx(encoder.logit_scale)
    assert model.logit_bias is not None


def test_embeddings_are_unit_float32_and_independent_of_the_batch(toy_bundle: Path, toy_image: Path) -> None:
    encoder = load(toy_bundle, device="cpu")
    alone, many = encoder.encode_images([toy_image]), encoder.encode_images([toy_image] * 5, batch_size=2)
    assert alone.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(many, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(many, np.repeat(alone, 5, axis=0), atol=1e-5)
    assert encoder.encode_images([]).shape == (0, alone.shape[1])


def test_classifier_from_file_equals_classifier_from_prompts(toy_bundle: Path, toy_image: Path) -> None:
    encoder = load(toy_bundle, device="cpu")
    stored = ZeroShotClassifier.load(toy_bundle / "classifiers" / "chexpert14.safetensors")
    built = ZeroShotClassifier.from_prompts(
        load_labelset("chexpert14"), encoder.encode_texts, encoder.logit_scale, encoder.logit_bias
    )
    features = encoder.encode_images([toy_image])
    np.testing.assert_allclose(stored.scores(features), built.scores(features), atol=1e-6)
    assert stored.labelset_hash == built.labelset_hash == load_labelset("chexpert14").hash
    assert stored.score_type == built.score_type == "sigmoid"


def test_predict(toy_bundle: Path, toy_image: Path) -> None:
    answers = load(toy_bundle, device="cpu").zero_shot_classifier().predict([toy_image, str(toy_image)])
    assert answers[0] == answers[1]
    assert list(answers[0]) == load_labelset("chexpert14").names
    for value in answers[0].values():
        assert 0 < value["score"] < 1
        assert value["score_type"] == "sigmoid"
        assert value["probability"] is None
        assert value["decision"] is None


def test_own_label_set(toy_bundle: Path, toy_image: Path) -> None:
    own = LabelSet("size", [LabelPrompts("large", ["The heart is enlarged."], ["Heart size is normal."])])
    swapped = LabelSet("size", [LabelPrompts("large", ["Heart size is normal."], ["The heart is enlarged."])])
    encoder = load(toy_bundle, device="cpu")
    score, other = (
        encoder.zero_shot_classifier(labelset, "pair_softmax").predict([toy_image])[0]["large"]["score"]
        for labelset in (own, swapped)
    )
    assert score + other == pytest.approx(1, abs=1e-5)
    assert own.hash != swapped.hash


@pytest.fixture
def copy(toy_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(toy_bundle, tmp_path / "copy"))


@pytest.mark.parametrize(
    "name",
    [
        "open_clip_model.safetensors",
        "open_clip_config.json",
        "tokenizer.json",
        "classifiers/chexpert14.safetensors",
        "labelsets/chexpert14.yaml",
        "README.md",
    ],
)
def test_a_changed_file_is_refused(copy: Path, name: str) -> None:
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(bytes(data))
    with pytest.raises(UserError, match=f"{name} was changed after export"):
        load(copy, device="cpu")


def test_what_is_no_bundle_is_refused(copy: Path, tmp_path: Path) -> None:
    for path, message in ((tmp_path / "none", "no such folder"), (tmp_path / "empty", "is empty")):
        if message == "is empty":
            path.mkdir()
        with pytest.raises(UserError, match=message):
            load(path, device="cpu")
    (copy / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="is missing"):
        load(copy, device="cpu")
    (copy / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="has format None"):
        load(copy, device="cpu")
    (copy / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"no such file.*manifest"):
        load(copy, device="cpu")


def test_a_manifest_cannot_claim_another_fingerprint(copy: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["fingerprint"] = "0" * 64
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="fingerprint"):
        load(copy, device="cpu")


def test_mistakes_with_images(toy_bundle: Path, tmp_path: Path) -> None:
    encoder = load(toy_bundle, device="cpu")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG broken")
    (tmp_path / "page.html").write_text("<html>")
    for name, message in (
        ("none.png", "cannot read"),
        ("broken.png", "cannot decode"),
        ("page.html", r"no decoder for \.html"),
    ):
        with pytest.raises(UserError, match=message):
            encoder.encode_images([tmp_path / name])
    with pytest.raises(UserError, match="a list is expected"):
        encoder.encode_images("one.png")
    with pytest.raises(UserError, match="a list is expected"):
        encoder.encode_texts("one text")


def test_export_keeps_what_is_not_a_bundle(toy_run: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="choose another folder"):
        export(toy_run, tmp_path)
    assert (tmp_path / "thesis.tex").exists()
    with pytest.raises(UserError, match="is not finished"):
        export(tmp_path, tmp_path / "out")
    with pytest.raises(UserError, match="no shipped set is called 'nowhere'"):
        export(toy_run, tmp_path / "out", ["nowhere"])
    assert not (tmp_path / "out").exists()


def test_unknown_label_set(toy_bundle: Path) -> None:
    with pytest.raises(UserError, match=r"no shipped set is called 'chexpert15' \(there are .*chexpert14"):
        load(toy_bundle, device="cpu").zero_shot_classifier("chexpert15")


def test_card_and_preprocess_are_written_for_people(toy_bundle: Path) -> None:
    assert "Not a medical device" in (toy_bundle / "README.md").read_text()
    preprocess = json.loads((toy_bundle / "preprocess.json").read_text())
    assert preprocess["size"] == [32, 32]
    assert any("VOI LUT" in step for step in preprocess["steps"])
    assert (preprocess["window"], preprocess["percentiles"]) == ("file", [0.0, 100.0])
    assert preprocess["augment"]["crop"] == [1.0, 1.0]
