"""Adapters begin as nothing, train alone, and are gone from a bundle without changing what it answers."""

from pathlib import Path
from typing import Any

import pytest
import torch

from medclip_lab.data.preprocess import PreprocessConfig
from medclip_lab.errors import UserError
from medclip_lab.models.dual_encoder import DualEncoder, ModelConfig
from medclip_lab.models.lora import LoraConfig, merged_state
from medclip_lab.models.spec import build_spec

from .tiny import CLIP_VIT, CONVNEXT, TEXT, VIT, hf_text, ids_of, pixels, spec

PREPROCESS = PreprocessConfig(32)
CASES: dict[str, tuple[dict[str, Any], dict[str, LoraConfig]]] = {
    "timm and BERT": (
        spec(VIT, hf_text("bert")),
        {"image": LoraConfig(r".*attn\.(qkv|proj)"), "text": LoraConfig(".*(query|value)", rank=2)},
    ),
    "convolutions and Llama": (
        spec(CONVNEXT, hf_text("llama", hf_pooler_type="last_pooler")),
        {"image": LoraConfig(r".*(fc1|stem\.0)", 2), "text": LoraConfig(r".*[qkv]_proj|.*embed_tokens", 2, 32)},
    ),
    "attentions of torch": (
        spec(CLIP_VIT, TEXT),
        {"image": LoraConfig(r".*\.attn"), "text": LoraConfig(r".*\.(attn|c_fc|c_proj)", 4)},
    ),
    "text alone": (spec(VIT, hf_text("gpt2")), {"text": LoraConfig(".*c_attn")}),
}


def adapted(name: str) -> DualEncoder:
    torch.manual_seed(0)
    values, lora = CASES[name]
    encoder = DualEncoder(build_spec(values), PREPROCESS)
    encoder.adapt(lora)
    return encoder


def features(encoder: DualEncoder) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return encoder.eval()({"image": pixels(3), "text": ids_of(12)})  # type: ignore[no-any-return]


def train(encoder: DualEncoder, steps: int = 3) -> None:
    encoder.train()
    parameters = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=0.05)
    for _ in range(steps):
        made = encoder({"image": pixels(3), "text": ids_of(12)})
        loss = (made["image"] * made["text"]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("name", CASES)
def test_merged_weights_answer_as_adapters_do(name: str) -> None:
    values, _ = CASES[name]
    torch.manual_seed(0)
    plain: Any = build_spec(values)
    names = list(plain.state_dict())
    untouched = features(DualEncoder(plain, PREPROCESS))
    encoder = adapted(name)
    for key, value in features(encoder).items():
        torch.testing.assert_close(value, untouched[key], rtol=0, atol=1e-6)
    before = {key: value.clone() for key, value in encoder.model.state_dict().items()}
    train(encoder)
    expected = features(encoder)
    assert all((expected[key] - untouched[key]).abs().max() > 1e-3 for key in CASES[name][1])
    merged = encoder.weights()
    assert sorted(merged) == sorted(names), "as if there had never been any"
    plain.load_state_dict(merged, strict=True)
    for key, value in features(DualEncoder(plain, PREPROCESS)).items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-6)
    for key, value in features(encoder).items():
        assert torch.equal(value, expected[key]), "merging leaves the model that trains as it is"
    for key, value in encoder.model.state_dict().items():
        still = "base_layer" in key or ("norm" in key.lower() and "text" in key)
        assert not still or torch.equal(value, before[key]), key


def test_only_adapters_and_what_is_named_train() -> None:
    encoder = adapted("timm and BERT")
    trained = {name for name, parameter in encoder.model.named_parameters() if parameter.requires_grad}
    adapters = {name for name in trained if "lora_" in name}
    assert len(adapters) == 2 * (2 * len(encoder.model.visual.trunk.blocks) + 2 * 2)
    assert trained - adapters == {
        "logit_scale",
        "visual.head.proj.weight",
        "text.proj.0.weight",
        "text.proj.2.weight",
    }
    torch.manual_seed(0)
    values, _ = CASES["timm and BERT"]
    encoder = DualEncoder(build_spec(values), PREPROCESS)
    encoder.adapt({"text": LoraConfig(".*query", train=[".*LayerNorm", r".*\.bias$"])})
    parameters = dict(encoder.model.named_parameters())
    assert parameters["text.transformer.embeddings.LayerNorm.weight"].requires_grad
    assert parameters["text.transformer.encoder.layer.0.output.dense.bias"].requires_grad
    assert not parameters["text.transformer.encoder.layer.0.output.dense.weight"].requires_grad
    assert not parameters["text.proj.0.weight"].requires_grad
    assert parameters["visual.trunk.blocks.0.attn.qkv.weight"].requires_grad, "the other tower is as it was"


def test_scale_is_alpha_over_rank() -> None:
    torch.manual_seed(0)
    encoder = DualEncoder(build_spec(spec(VIT, hf_text("bert"))), PREPROCESS)
    encoder.adapt({"text": LoraConfig(r".*layer\.0.*query", rank=4, alpha=12)})
    layer = encoder.model.text.transformer.encoder.layer[0].attention.self.query
    assert layer.lora_A.default.weight.shape == (4, 16)
    with torch.no_grad():
        layer.lora_B.default.weight.normal_()
    name = "text.transformer.encoder.layer.0.attention.self.query.weight"
    change = merged_state(encoder.model)[name] - layer.base_layer.weight
    torch.testing.assert_close(change, 3 * layer.lora_B.default.weight @ layer.lora_A.default.weight)


def test_dropout_is_of_training_only() -> None:
    encoder = DualEncoder(build_spec(spec(VIT, hf_text("bert"))), PREPROCESS)
    encoder.adapt({"text": LoraConfig(".*query", dropout=0.5)})
    layer = encoder.model.text.transformer.encoder.layer[0].attention.self.query
    with torch.no_grad():
        layer.lora_B.default.weight.normal_()
        assert not torch.equal(encoder.encode_text(ids_of(12)), encoder.encode_text(ids_of(12)))
        encoder.eval()
        assert torch.equal(encoder.encode_text(ids_of(12)), encoder.encode_text(ids_of(12)))


@pytest.mark.parametrize(
    ("name", "tower", "config", "message"),
    [
        ("timm and BERT", "text", LoraConfig("query"), "lora.text.target: no module of the tower matches 'query'"),
        ("timm and BERT", "image", LoraConfig(".*norm1"), "model.lora.image.target: peft cannot adapt"),
        ("attentions of torch", "text", LoraConfig(".*out_proj"), "inside an attention of torch.*match transformer"),
        ("attentions of torch", "text", LoraConfig(r".*\.attn", dropout=0.1), "adapters have no dropout: set it to 0"),
        ("convolutions and Llama", "image", LoraConfig(".*conv_dw"), "conv_dw is a convolution in groups"),
    ],
)
def test_targets_that_cannot_be(name: str, tower: str, config: LoraConfig, message: str) -> None:
    encoder = DualEncoder(build_spec(CASES[name][0]), PREPROCESS)
    with pytest.raises(UserError, match=message) as error:
        encoder.adapt({tower: config})
    assert "\n" not in str(error.value)


def test_settings_that_cannot_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for values, message in (
        ({"target": "("}, "is no regular expression"),
        ({"target": "a", "train": ["["]}, "is no regular expression"),
        ({"target": "a", "rank": 0}, "rank is at least 1"),
        ({"target": "a", "dropout": 1.0}, r"dropout in \[0, 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            LoraConfig(**values)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"model.lora: towers are image and text, got texts"):
        ModelConfig(lora={"texts": LoraConfig("a")})
    import sys

    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"model.lora needs peft: pip install 'medclip_lab\[lora\]'"):
        adapted("text alone")
