"""A run's towers and tokenizer as its settings describe them, up to a bundle; and settings that cannot work."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from medclip_lab.config import load_config
from medclip_lab.errors import UserError
from medclip_lab.inference.encoder import load
from medclip_lab.training.build import prepare_model
from medclip_lab.training.export import export
from medclip_lab.training.run import RunConfig, train

from ..models.tiny import VIT, hf_text, save_tokenizer, save_transformer, spec

Config = Callable[..., RunConfig]
SHORT = ["--trainer.steps=2", "--checkpoint.every=2", "--data.text.report=0", "--data.text.impression=0"]
SHORT += ["--data.text.findings=1"]


def settings(values: dict[str, Any], *more: str) -> list[str]:
    """Overrides that train on a spec, with short texts."""
    return [f"--model.spec={json.dumps(values)}", *SHORT, *more]


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_run_from_a_folder_of_transformers_to_a_bundle(
    toy_config: Config,
    toy_image: Path,
    tmp_path: Path,
    family: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = save_transformer(tmp_path / "text", family, pad_token_id=None if family == "llama" else 0)
    if family == "llama":
        save_tokenizer(folder, pad=None, side="left")  # as generators have them
    text = {"hf_model_name": str(folder), "context_length": 16, "hf_proj_type": "linear"}
    if family == "llama":
        text["hf_pooler_type"] = "last_pooler"
    lora = {"text": {"target": ".*(query|value|q_proj|v_proj)", "rank": 2}}
    more = ["--model.tokenizer=spec", f"--model.lora={json.dumps(lora)}", "--model.gradient_checkpointing=true"]
    out = train(toy_config(tmp_path / "run", *settings(spec(VIT, text), *more)))
    (record,) = json.loads((out / "warm_start.json").read_text())["sources"]
    assert (record["tower"], record["source"]) == ("text", str(folder))
    assert record["missing"] == ["text.proj.weight"]
    assert f"warm start of the text tower from {folder}: " in capfd.readouterr().err
    old, new = load_file(folder / "model.safetensors"), load_file(out / "model.safetensors")
    name = {"bert": "encoder.layer.0.attention.self.key.weight", "llama": "layers.0.self_attn.k_proj.weight"}[family]
    assert torch.equal(new[f"text.transformer.{name}"], old[name]), "what LoRA does not name stands still"
    name = name.replace("key", "query").replace("k_proj", "q_proj")
    assert not torch.equal(new[f"text.transformer.{name}"], old[name])
    assert not any("lora" in key for key in new)

    export(out, tmp_path / "bundle", [])
    said = capfd.readouterr().err
    encoder = load(tmp_path / "bundle", device="cpu")
    features = encoder.encode_texts(["The heart is enlarged."] * 2)
    assert features.shape == (2, 8)
    assert encoder.encode_images([toy_image]).shape == (1, 8)
    if family == "llama":
        assert "medclip_lab.load opens this bundle, plain open_clip does not: a text tower of the family llama" in said
        assert encoder.model.model.text.config.pad_token_id == 3, "a tokenizer without padding pads with its end"
        return
    assert "plain open_clip does not" not in said
    monkeypatch.chdir(tmp_path / "bundle")
    plain: Any = open_clip.create_model("local-dir:.").eval()
    ids = open_clip.get_tokenizer("local-dir:.")(["The heart is enlarged."])
    with torch.no_grad():
        theirs = plain.encode_text(ids, normalize=True)
    torch.testing.assert_close(torch.from_numpy(features[:1]), theirs, rtol=0, atol=1e-5)


def test_a_run_begins_with_another_run_and_with_its_bundle(
    toy_config: Config, toy_run: Path, toy_bundle: Path, tmp_path: Path
) -> None:
    """Where nothing is trained, the weights are those of the source, temperature aside."""
    expected = load_file(toy_run / "model.safetensors")
    for source in (toy_run, toy_bundle):
        starts = json.dumps([{"source": str(source), "tower": "image"}, {"source": str(source), "tower": "text"}])
        settings = [f"--model.warm_start={starts}", "--trainer.steps=1", "--optim.lr=1e-30"]
        out = train(toy_config(tmp_path / source.name, *settings))
        found = load_file(out / "model.safetensors")
        for name, value in expected.items():
            if not name.startswith("logit") and "running" not in name and "batches" not in name:
                torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6, msg=name)
        reports = json.loads((out / "warm_start.json").read_text())["sources"]
        assert [report["share"] for report in reports] == [1, 1]


def test_one_channel_and_open_clips_words(toy_config: Config, toy_image: Path, tmp_path: Path) -> None:
    values = spec(VIT | {"in_chans": 1}, {"context_length": 20, "width": 16, "heads": 2, "layers": 1})
    out = train(toy_config(tmp_path / "run", *settings(values, "--model.tokenizer=spec")))
    assert load_file(out / "model.safetensors")["visual.trunk.patch_embed.proj.weight"].shape[1] == 1
    export(out, tmp_path / "bundle", [])
    encoder = load(tmp_path / "bundle", device="cpu")
    assert encoder.encode_images([toy_image]).shape == (1, 8)
    assert encoder.encode_texts(["Heart."]).shape == (1, 8)
    preprocess = json.loads((tmp_path / "bundle" / "preprocess.json").read_text())
    assert any("one channel" in step for step in preprocess["steps"])


class WordsAndPatches(nn.Module):
    """A loss on tokens, as those of GLoRIA are."""

    inputs = ("image_tokens", "text_tokens", "text_mask")
    uses_bias = False

    def forward(self, image: Tensor, text: Tensor, scale: Tensor, bias: Any, **given: Tensor) -> dict[str, Tensor]:
        similar = torch.einsum("ipd,twd->itwp", given["image_tokens"], given["text_tokens"]).amax(3)
        local = (similar * given["text_mask"]).sum(2) / given["text_mask"].sum(1)
        target = torch.arange(len(image))
        value = nn.functional.cross_entropy(scale * image @ text.T, target) + nn.functional.cross_entropy(local, target)
        return {"contrastive_loss": value}


def test_a_loss_on_tokens_trains(toy_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["medclip_lab.training.run"], "build_loss", lambda _: WordsAndPatches())
    out = train(toy_config(tmp_path / "run", "--trainer.steps=3"))
    assert (out / "done.json").exists()
    with pytest.raises(UserError, match=r"gradient_cache: WordsAndPatches takes image_tokens, text_mask, text_tokens"):
        train(toy_config(tmp_path / "cached", "--trainer.gradient_cache=4"))


def test_a_named_model_begins_from_a_folder(toy_config: Config, toy_bundle: Path, tmp_path: Path) -> None:
    config = toy_config(tmp_path / "run", f"--model.spec=local-dir:{toy_bundle}", "--model.tokenizer=spec")
    (tmp_path / "run").mkdir()
    encoder, tokenizer, found = prepare_model(config.model, config.data, tmp_path / "run", 0)
    assert found["vision_cfg"]["timm_model_name"] == "test_resnet"
    assert tokenizer(["heart"]).shape == (1, found["text_cfg"]["context_length"])
    expected = load_file(toy_bundle / "open_clip_model.safetensors")
    assert torch.equal(encoder.weights()["visual.head.proj.weight"], expected["visual.head.proj.weight"])


BERT = hf_text("bert")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["--model.spec.text_cfg.context_length=5"],
            r"context_length is 5, and \d+ of \d+ texts of toy that were tried",
        ),
        (["--data.preprocess.size=64"], "image_size is 32 and data.preprocess.size is 64: they must be equal"),
        (["--model.pretrained=openai"], "model.spec is inline: see warm_start"),
        (["--model.tokenizer=nowhere"], "model.tokenizer: 'nowhere' is no folder here"),
        (["--model.tokenizer=EMPTY"], "model.tokenizer: no tokenizer in"),
        (["--model.tokenizer=WORDS", "--model.spec.text_cfg.vocab_size=9"], "has 31 words, and the text tower 9"),
        ([f"--model.spec.text_cfg={json.dumps(BERT)}", "--model.tokenizer=spec"], "the spec names none"),
        (["--model.spec.text_cfg={hf_model_name: BERT}"], "was pretrained on words of its own"),
        (["--model.spec=local-dir:EMPTY", "--model.tokenizer=spec"], "no such file: .*open_clip_config.json"),
        (
            ["--model.spec=local-dir:BUNDLE", "--model.tokenizer=spec", "--data.preprocess.size=64"],
            "they must be equal",
        ),
        (["--model.spec=local-dir:BUNDLE", "--model.tokenizer=spec", "--model.pretrained=x"], "brings its own weights"),
        (["--model.warm_start=[{source: nowhere/w}]"], "'nowhere/w' is no folder here"),
        (["--model.warm_start=[{source: EMPTY}]"], "is a Git-LFS pointer, not the weights"),
        (["--model.lora={text: {target: nothing}}"], "no module of the tower matches 'nothing'"),
        (["--model.spec.vision_cfg.in_chans=1", "--data.preprocess.mean=[0.1, 0.2, 0.3]"], "one mean and one std"),
    ],
)
def test_settings_that_cannot_work(
    toy_config: Config, toy_bundle: Path, tmp_path: Path, overrides: list[str], message: str
) -> None:
    """Before the first batch, in one line."""
    places = {"EMPTY": tmp_path / "empty", "BUNDLE": toy_bundle, "WORDS": tmp_path / "words", "BERT": tmp_path / "bert"}
    places["EMPTY"].mkdir()
    (places["EMPTY"] / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    save_tokenizer(places["WORDS"])
    save_transformer(places["BERT"])
    for name, path in places.items():
        overrides = [override.replace(name, str(path)) for override in overrides]
    with pytest.raises(UserError, match=message) as error:
        train(toy_config(tmp_path / "run", "--trainer.steps=1", *overrides))
    assert "\n" not in str(error.value)


def test_texts_may_be_cut_when_asked(toy_config: Config, tmp_path: Path) -> None:
    cut = ["--model.spec.text_cfg.context_length=5", "--model.truncation=end", "--trainer.steps=1"]
    assert train(toy_config(tmp_path / "run", *cut))


def documented() -> list[str]:
    """The cells of the table of towers."""
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    return re.findall(r"^\| [^|]+ \| `(\{.*\})` \|$", page, re.MULTILINE)


def test_the_page_on_towers_is_true(tmp_path: Path) -> None:
    cells = documented()
    assert len(cells) >= 10
    towers = {"vision_cfg": open_clip.model.CLIPVisionCfg, "text_cfg": open_clip.model.CLIPTextCfg}
    ours = {"vision_cfg": {"in_chans", "timm_input_size"}, "text_cfg": {"hf_config", "hf_layers"}}
    for cell in cells:
        path = tmp_path / "run.yaml"
        path.write_text(f"data: {{sources: {{a: {{shards: x}}}}}}\nmodel: {cell}")
        spec = load_config(RunConfig, path).model.spec
        assert isinstance(spec, dict)
        assert set(spec) <= {*towers, "quick_gelu"}, cell
        for tower, values in ((name, spec[name]) for name in towers if name in spec):
            assert set(values) <= set(towers[tower].__dataclass_fields__) | ours[tower], cell
            if "timm_model_name" in values:
                assert timm.is_model(values["timm_model_name"])
