"""Others' models in our harness, and our bundles in theirs."""

import pickle
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

from medclip_lab.data.manifest import Manifest
from medclip_lab.errors import UserError
from medclip_lab.evaluation.protocol import evaluate
from medclip_lab.inference.clip_benchmark import load_medclip_lab, register
from medclip_lab.inference.encoder import load
from medclip_lab.inference.foreign import open_encoder

TEXTS = ["The heart is enlarged.", "Heart size is normal."]


def save_processors(folder: Path, tokenizer: Path, length: int = 24) -> None:
    from transformers import AutoTokenizer, CLIPImageProcessor

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    loaded.model_max_length = length
    loaded.save_pretrained(folder)
    CLIPImageProcessor(size={"height": 32, "width": 32}, do_center_crop=False).save_pretrained(folder)


@pytest.fixture(scope="module")
def siglip(toy_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import SiglipConfig, SiglipModel

    folder = tmp_path_factory.mktemp("siglip")
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = small | {"vocab_size": 400, "max_position_embeddings": 24, "projection_size": 16}
    torch.manual_seed(0)
    SiglipModel(
        SiglipConfig(text_config=text, vision_config=small | {"image_size": 32, "patch_size": 8})
    ).save_pretrained(folder)
    save_processors(folder, toy_bundle)
    return folder


def test_siglip_as_transformers_computes_it(siglip: Path, toy_image: Path) -> None:
    from transformers import AutoImageProcessor, AutoTokenizer, SiglipModel

    encoder = open_encoder(f"hf:{siglip}", device="cpu")
    model = SiglipModel.from_pretrained(siglip).eval()
    ids = AutoTokenizer.from_pretrained(siglip)(TEXTS, padding="max_length", max_length=24, return_tensors="pt")
    with Image.open(toy_image) as opened:
        image = opened.convert("RGB")
    pixels = AutoImageProcessor.from_pretrained(siglip)(images=image, return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        expected = model(input_ids=ids["input_ids"], pixel_values=pixels).logits_per_image.numpy()
    assert encoder.logit_bias is not None
    features = encoder.encode_images([toy_image]), encoder.encode_texts(TEXTS)
    np.testing.assert_allclose(np.linalg.norm(features[0], axis=1), 1, atol=1e-6)
    logits = encoder.logit_scale * features[0] @ features[1].T + encoder.logit_bias
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_others_run_in_the_harness(siglip: Path, toy_shards: Manifest, toy_bundle: Path) -> None:
    encoder = open_encoder(f"hf:{siglip}", device="cpu")
    results = evaluate(encoder, toy_shards.folder, draws=10)
    assert results["zero_shot"]["score"] == "sigmoid"
    assert results["bundle"] == encoder.fingerprint
    assert results["bundle"] == open_encoder(f"hf:{siglip}", device="cpu").fingerprint
    ours, opened = load(toy_bundle, device="cpu"), open_encoder(f"local-dir:{toy_bundle}", device="cpu")
    np.testing.assert_array_equal(opened.encode_texts(TEXTS), ours.encode_texts(TEXTS))
    assert open_encoder(toy_bundle, device="cpu").fingerprint == ours.fingerprint


def test_an_open_clip_name_with_weights_of_this_machine(tmp_path: Path, toy_image: Path) -> None:
    import open_clip

    name = "ViT-S-32-alt"
    if name not in open_clip.list_models():
        pytest.skip(f"this open_clip has no {name}")
    torch.manual_seed(0)
    model = open_clip.create_model(name)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    encoder = open_encoder(f"open_clip:{name}@{tmp_path / 'weights.pt'}", device="cpu")
    with torch.inference_mode():
        expected = F.normalize(model.eval().encode_text(open_clip.get_tokenizer(name)(TEXTS)), dim=-1)
    np.testing.assert_allclose(encoder.encode_texts(TEXTS), expected.numpy(), atol=1e-5)
    assert encoder.encode_images([toy_image]).shape[1] == expected.shape[1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf:TMP/none", "no such folder"),
        ("hf:TMP/bert", "holds a 'bert', one of clip, siglip"),
        ("hf:TMP/half", "transformers cannot open"),
        ("hf-hub:somebody/model", "would be fetched"),
        ("open_clip:ViT-B-32", "names no file of weights"),
        ("open_clip:ViT-B-32@TMP/none.pt", "names no file of weights"),
        ("local-dir:TMP/half", "no such file: .*open_clip_config.json"),
    ],
)
def test_what_is_no_model_is_said(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(UserError, match=message):
        open_encoder(name.replace("TMP", str(tmp_path)), device="cpu")


def test_pickled_weights_are_not_opened(siglip: Path, tmp_path: Path) -> None:
    """A folder whose only weights are a pickle is refused before anything of it runs."""
    import shutil

    folder = shutil.copytree(siglip, tmp_path / "pickled")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="transformers cannot open"):
        open_encoder(f"hf:{folder}", device="cpu")


def test_clip_benchmarks_interface(toy_bundle: Path, toy_image: Path) -> None:
    """As `clip_benchmark.models.load_clip` calls a loader, and as its metrics call what it returns."""
    models: Any = SimpleNamespace(TYPE2FUNC={"open_clip": None}, MODEL_TYPES=["open_clip"])
    register(models)
    assert models.MODEL_TYPES == ["open_clip", "medclip_lab"]
    load_function = models.TYPE2FUNC["medclip_lab"]
    model, transform, tokenizer = load_function(model_name=str(toy_bundle), pretrained="", cache_dir=None, device="cpu")
    with Image.open(toy_image) as image:
        batch = torch.stack([transform(image), transform(image)])
    with torch.no_grad():
        images = F.normalize(model.encode_image(batch.to("cpu")), dim=-1)
        texts = F.normalize(model.encode_text(tokenizer(TEXTS).to("cpu")), dim=-1)
    encoder = load(toy_bundle, device="cpu")
    np.testing.assert_allclose(images[:1].numpy(), encoder.encode_images([toy_image]), atol=1e-5)
    np.testing.assert_allclose(texts.numpy(), encoder.encode_texts(TEXTS), atol=1e-6)
    pickle.loads(pickle.dumps(transform))  # its loader processes get it so
    with pytest.raises(UserError, match="leave 'laion2b' away"):
        load_medclip_lab(str(toy_bundle), "laion2b")


def test_its_command_line_knows_our_type(
    toy_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stand-in with its structure: the parser has read the table of types before it is asked."""
    package = tmp_path / "clip_benchmark"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "models" / "__init__.py").write_text(
        "TYPE2FUNC = {}\nMODEL_TYPES = list(TYPE2FUNC)\n"
        "def load_clip(model_type, **named):\n"
        "    assert model_type in MODEL_TYPES\n"
        "    return TYPE2FUNC[model_type](**named)\n"
    )
    (package / "cli.py").write_text(
        "import argparse\nfrom clip_benchmark.models import load_clip, MODEL_TYPES\n"
        "def main():\n"
        "    parser = argparse.ArgumentParser()\n"
        "    parser.add_argument('--model_type', choices=MODEL_TYPES)\n"
        "    parser.add_argument('--model')\n"
        "    args = parser.parse_args()\n"
        "    model, transform, tokenizer = load_clip("
        "model_type=args.model_type, model_name=args.model, pretrained='', cache_dir=None, device='cpu')\n"
        "    print(tuple(model.encode_text(tokenizer(['a', 'b'])).shape))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["clip_benchmark", "--model_type", "medclip_lab", "--model", str(toy_bundle)])
    from medclip_lab.inference.clip_benchmark import main

    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert "(2, 16)" in capsys.readouterr().out
    for name in [name for name in sys.modules if name.startswith("clip_benchmark")]:
        del sys.modules[name]
