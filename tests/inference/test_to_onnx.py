"""Bundles as ONNX: features of every kind of tower, any number of rows, int8, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from medclip_lab.cli import main
from medclip_lab.data.preprocess import stack
from medclip_lab.errors import UserError
from medclip_lab.inference import to_onnx as module
from medclip_lab.inference.encoder import load
from medclip_lab.inference.onnx_towers import with_onnx
from medclip_lab.inference.to_onnx import to_onnx
from tests.inference.towers import TEXT, VIT, make_bundle, pictures

TEXTS = ["The heart is enlarged.", "Heart size is normal. No effusion.", "word " * 60]
BERT = {
    "context_length": 24,
    "hf_pooler_type": "mean_pooler",
    "hf_config": {
        "model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 32, "vocab_size": 512, "max_position_embeddings": 24, "pad_token_id": 0,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def written(toy_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy bundle, a ResNet of timm beside open_clip's text transformer, by the command line."""
    out = tmp_path_factory.mktemp("onnx") / "onnx"
    assert main(["export", str(toy_bundle), "--to", "onnx", "--out", str(out), "--json"]) == 0
    return out


@pytest.fixture(scope="module")
def attention(toy_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A ViT whose patches are pooled by attention, with another GELU, beside a BERT; its bundle and its int8 graphs."""
    folder = tmp_path_factory.mktemp("attention")
    vision = VIT | {"attentional_pool": True, "attn_pooler_heads": 2}
    bundle = make_bundle(folder / "bundle", toy_bundle, vision, BERT, quick_gelu=True)
    to_onnx(bundle, folder / "onnx", precision="int8")
    return bundle, folder / "onnx"


@pytest.mark.parametrize("count", [1, 2, 7])
def test_features_are_those_of_the_bundle(toy_bundle: Path, written: Path, count: int) -> None:
    ours = load(toy_bundle, device="cpu")
    theirs = with_onnx(ours, written)
    assert theirs.encode_texts(TEXTS[:count]) == pytest.approx(ours.encode_texts(TEXTS[:count]), abs=1e-4)
    assert theirs.encode_images(pictures(count)) == pytest.approx(ours.encode_images(pictures(count)), abs=1e-4)
    grey = pictures(2)[1:]  # alone, one channel reaches the tower
    assert theirs.encode_images(grey) == pytest.approx(ours.encode_images(grey), abs=1e-4)
    assert theirs.fingerprint == ours.fingerprint


def test_the_facts_are_enough_to_use_the_graph(toy_bundle: Path, written: Path) -> None:
    """As someone without this library would: by the JSON, ONNX Runtime and the tokenizer's file alone."""
    import onnxruntime
    from tokenizers import Tokenizer

    facts = json.loads((written / "medclip_lab.json").read_text())
    encoder = load(toy_bundle, device="cpu")
    words = Tokenizer.from_file(str(written / "tokenizer.json"))
    words.enable_padding(length=facts["tokenizer"]["context_length"])
    text = onnxruntime.InferenceSession(written / "text.onnx")
    made = text.run(None, {facts["text"]["input"]["name"]: np.array([words.encode(TEXTS[0]).ids])})[0]
    assert made == pytest.approx(encoder.encode_texts(TEXTS[:1]), abs=1e-4)
    side = facts["preprocess"]["size"][0]
    assert facts["image"]["input"] == {"name": "pixels", "dtype": "float32", "shape": ["rows", 3, side, side]}
    image = onnxruntime.InferenceSession(written / "image.onnx")
    colour = pictures(1)[0]
    pixels = np.asarray(colour, dtype=np.float32).transpose(2, 0, 1)[None] / 255
    assert image.run(None, {"pixels": pixels})[0] == pytest.approx(encoder.encode_images([colour]), abs=1e-4)
    assert facts["bundle"] == encoder.fingerprint
    assert max(facts[name]["largest_difference"] for name in ("image", "text")) <= 1e-4


def test_int8_costs_little_and_says_how_much(attention: tuple[Path, Path]) -> None:
    bundle, folder = attention
    facts = json.loads((folder / "medclip_lab.json").read_text())
    ours = load(bundle, device="cpu")
    theirs = with_onnx(ours, folder)
    for name in ("image", "text"):
        assert facts[name]["largest_difference"] <= 1e-4  # of the float32 graph that it was made of
        assert 0.9 < facts[name]["least_cosine"] < 1 - 1e-6
    assert facts["image"]["share_in_int8"] > 0.5
    images = pictures(6)
    cosines = (ours.encode_images(images) * theirs.encode_images(images)).sum(1)
    assert 0.99 < cosines.min() < 1 - 1e-6
    assert not list(folder.glob("*.float32"))


def test_grey_towers_take_colour_as_the_bundle_does(toy_bundle: Path, tmp_path: Path) -> None:
    bundle = make_bundle(
        tmp_path / "bundle", toy_bundle, VIT | {"in_chans": 1, "layers": 1}, TEXT, mean=(0.5,) * 3, std=(0.25,) * 3
    )
    to_onnx(bundle, tmp_path / "onnx")
    ours = load(bundle, device="cpu")
    theirs = with_onnx(ours, tmp_path / "onnx")
    for images in (pictures(1), pictures(2)[1:], pictures(4)):
        assert theirs.encode_images(images) == pytest.approx(ours.encode_images(images), abs=1e-4)
    pixels = stack([ours.preprocess(image) for image in pictures(4)])
    float_pixels = theirs.model.encode_image(pixels.float() / 255)
    assert float_pixels.numpy() == pytest.approx(ours.encode_images(pictures(4)), abs=1e-4)


def test_int8_of_convolutions_is_refused(toy_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"int8 reaches \d% of the image tower's weights.*--precision float32"):
        to_onnx(toy_bundle, tmp_path / "onnx", precision="int8")
    assert list(tmp_path.iterdir()) == []


def test_a_difference_is_refused(toy_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TOLERANCE", 0.0)
    with pytest.raises(UserError, match=r"features of the image tower differ by \d\.\de-\d+, more than 0"):
        to_onnx(toy_bundle, tmp_path / "onnx")
    assert list(tmp_path.iterdir()) == []


def test_another_graph_than_the_bundles_towers_is_refused(
    toy_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is exported leaves the normalisation of pixels out; run as it is, for a faithful graph says the same."""
    towers: dict[str, Any] = {}
    monkeypatch.setattr(module._Tower, "forward", lambda self, pixels: self.dual.model.encode_image(pixels))
    monkeypatch.setattr(module, "_export", lambda name, tower, *_: towers.update({name: tower}))
    monkeypatch.setattr(module, "_run", lambda name, _path, rows: [towers[name](rows).numpy()])
    with pytest.raises(UserError, match=r"features of the image tower differ by \d"):
        to_onnx(toy_bundle, tmp_path / "onnx")
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_number_is_refused(toy_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_export", lambda *_: None)
    monkeypatch.setattr(module, "_run", lambda *_: [np.zeros((5, 16), np.float32), np.full((5, 16), np.nan)])
    with pytest.raises(UserError, match="features of the image tower differ by nan"):
        to_onnx(toy_bundle, tmp_path / "onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_tower_that_decides_by_its_values_is_refused(
    toy_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from medclip_lab.models.dual_encoder import DualEncoder

    whole = DualEncoder.encode_image

    def branching(self: DualEncoder, pixels: torch.Tensor) -> torch.Tensor:
        return whole(self, pixels if float(pixels.sum()) > 0 else -pixels)

    monkeypatch.setattr(DualEncoder, "encode_image", branching)
    with pytest.raises(UserError, match=r"torch cannot export the image tower, ResNet: .*keep to open_clip"):
        to_onnx(toy_bundle, tmp_path / "onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_fixed_batch_is_refused(toy_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exporter sometimes keeps the batch it was traced with, and says nothing."""
    export = torch.onnx.export

    def fixed(*args: Any, dynamic_shapes: Any, **options: Any) -> Any:
        return export(*args, **options)

    monkeypatch.setattr(torch.onnx, "export", fixed)
    with pytest.raises(UserError, match="the graph of the image tower takes no 1 rows at once"):
        to_onnx(toy_bundle, tmp_path / "onnx")


def test_what_does_not_belong_together_is_refused(
    toy_bundle: Path, written: Path, attention: tuple[Path, Path], tmp_path: Path
) -> None:
    encoder = load(toy_bundle, device="cpu")
    with pytest.raises(UserError, match="was exported from another bundle"):
        with_onnx(encoder, attention[1])
    with pytest.raises(UserError, match="no such folder"):
        with_onnx(encoder, tmp_path / "nowhere")
    with pytest.raises(UserError, match="exists and is no folder for ONNX"):
        to_onnx(toy_bundle, toy_bundle)
    import shutil

    copy = shutil.copytree(written, tmp_path / "copy")
    (copy / "image.onnx").write_bytes((copy / "image.onnx").read_bytes()[:-1])
    with pytest.raises(UserError, match=r"image\.onnx is missing or was changed after export"):
        with_onnx(encoder, copy)
    with pytest.raises(UserError, match="precision is one of float32, int8, got 'int4'"):
        to_onnx(toy_bundle, tmp_path / "onnx", precision="int4")  # type: ignore[arg-type]


def test_a_missing_package_is_named(toy_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == "onnxscript" else True)
    with pytest.raises(UserError, match=r"onnxscript is not installed: pip install 'medclip_lab\[onnx\]'"):
        to_onnx(toy_bundle, tmp_path / "onnx")


def test_flags_of_another_kind_are_refused(
    toy_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(toy_bundle), "--to", "timm", "--out", str(tmp_path / "x"), "--precision", "int8"]) == 2
    assert "--precision belongs to --to onnx" in capsys.readouterr().err
    assert main(["export", str(toy_bundle), "--to", "onnx", "--out", str(tmp_path / "x"), "--image-size", "64"]) == 2
    assert "--image-size belongs to --to transformers and --to vision" in capsys.readouterr().err


def test_classify_by_onnx(toy_bundle: Path, written: Path, toy_image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = []
    for options in ([], ["--onnx", str(written)]):
        assert main(["classify", str(toy_bundle), str(toy_image), "--json", *options]) == 0
        (row,) = json.loads(capsys.readouterr().out)
        answers.append({name: value["score"] for name, value in row["labels"].items()})
    assert answers[1] == pytest.approx(answers[0], abs=1e-4)
