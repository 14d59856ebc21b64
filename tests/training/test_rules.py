"""What a line of YAML does to the parameters of two real towers."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.optim import param_groups_layer_decay
from torch import nn

from medclip_lab.config import load_config
from medclip_lab.errors import UserError
from medclip_lab.losses import PrototypeLoss
from medclip_lab.models.spec import build_spec
from medclip_lab.training.freezing import Freezing
from medclip_lab.training.layers import layers_above
from medclip_lab.training.optim import OptimConfig
from medclip_lab.training.rules import Treatment, treatments
from medclip_lab.training.run import RunConfig

TEXT = {"context_length": 8, "vocab_size": 20, "width": 8, "heads": 1, "layers": 2}


def build(vision: str = "test_resnet", **more: Any) -> nn.Module:
    spec = {"embed_dim": 8, "custom_text": True, "init_logit_bias": -10, "text_cfg": TEXT}
    return build_spec(spec | {"vision_cfg": {"timm_model_name": vision, "image_size": 32, "timm_pool": "avg"}} | more)


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    return build()


def treat(model: nn.Module, yaml: str, tmp_path: Any, steps: int = 100, **more: Any) -> dict[str, Treatment | None]:
    path = tmp_path / "optim.yaml"
    path.write_text(yaml)
    return treatments(model, load_config(OptimConfig, path, ["--lr=1.0", "--weight_decay=0.1"]), steps, **more)


def frozen(treated: dict[str, Treatment | None]) -> set[str]:
    return {name for name, treatment in treated.items() if treatment is None}


def test_norms_biases_positions_scale_and_bias_do_not_decay(resnet: nn.Module, tmp_path: Any) -> None:
    decay = {name: t.weight_decay for name, t in treat(resnet, "", tmp_path).items() if t is not None}
    for name in (
        "logit_scale",
        "logit_bias",
        "text.positional_embedding",
        "text.ln_final.weight",
        "visual.trunk.bn1.bias",
    ):
        assert decay.get(name, 0.0) == 0.0
    assert decay["text.token_embedding.weight"] == decay["text.text_projection"] == 0.1
    assert decay == {name: decay[name] for name, _ in resnet.named_parameters()}, "each parameter once"


def test_locked_image_text_tuning(resnet: nn.Module, tmp_path: Any) -> None:
    held = frozen(treat(resnet, "rules: [{match: visual, freeze: true}]", tmp_path))
    assert held == {name for name, _ in resnet.named_parameters() if name.startswith("visual.")}


def test_locked_text(resnet: nn.Module, tmp_path: Any) -> None:
    held = frozen(treat(resnet, "rules: [{match: text, freeze: true}]", tmp_path))
    assert held == {name for name, _ in resnet.named_parameters() if name.startswith("text.")}


def test_bitfit(resnet: nn.Module, tmp_path: Any) -> None:
    held = frozen(treat(resnet, "rules: [{match: '(?!.*bias$|logit_)', freeze: true}]", tmp_path))
    assert held == {n for n, _ in resnet.named_parameters() if not n.endswith("bias") and not n.startswith("logit_")}


def test_a_later_rule_decides(resnet: nn.Module, tmp_path: Any) -> None:
    yaml = (
        "rules: [{match: '.*', lr_factor: 0.5, weight_decay: 0.3}, {match: text, lr_factor: 0.1, schedule: constant}]"
    )
    treated = treat(resnet, yaml, tmp_path)
    table, kernel = treated["text.token_embedding.weight"], treated["visual.head.proj.weight"]
    assert table is not None
    assert kernel is not None
    assert (table.lr, table.weight_decay, table.schedule.kind) == (0.1, 0.3, "constant")
    assert (kernel.lr, kernel.weight_decay, kernel.schedule.kind) == (0.5, 0.3, "cosine")
    yaml = "rules: [{match: '.*', freeze: true}, {match: 'visual.head', freeze: false}]"
    assert treat(resnet, yaml, tmp_path)["visual.head.proj.weight"] is not None


def test_a_schedule_of_their_own(resnet: nn.Module, tmp_path: Any) -> None:
    treated = treat(resnet, "rules: [{match: text, frozen_until: 0.4, warmup: 30, frozen_from: 90}]", tmp_path)
    text, image = treated["text.text_projection"], treated["visual.head.proj.weight"]
    assert text is not None
    assert image is not None
    assert (text.schedule.start, text.schedule.warmup, text.schedule.stop) == (40, 30, 90)
    assert (image.schedule.start, image.schedule.warmup, image.schedule.stop) == (0, 5, None)


def test_what_a_loss_brings_has_a_name(resnet: nn.Module, tmp_path: Any) -> None:
    treated = treat(resnet, "rules: [{match: loss, lr_factor: 10}]", tmp_path, loss=PrototypeLoss(5, 8))
    assert {name for name, t in treated.items() if t is not None and t.lr == 10} == {
        *("loss.prototypes", "loss.head.weight", "loss.bias")
    }


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_convnext"])
def test_layer_decay_is_that_of_timm(name: str, tmp_path: Any) -> None:
    model = build(name)
    treated = treat(model, "rules: [{match: visual, layer_decay: 0.75}]", tmp_path)
    trunk = model.visual.trunk
    assert isinstance(trunk, nn.Module)
    names = {id(parameter): key for key, parameter in trunk.named_parameters()}
    groups: Any = param_groups_layer_decay(trunk, layer_decay=0.75)
    theirs = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    ours = {key: treated[f"visual.trunk.{key}"].lr for key in theirs}  # type: ignore[union-attr]
    assert len(set(theirs.values())) > 2
    # A tower has one layer more than its trunk: the projection.
    for key, scale in theirs.items():
        assert ours[key] == pytest.approx(0.75 * scale), key
    assert treated["visual.head.proj.weight"].lr == 1.0  # type: ignore[union-attr]
    assert treated["text.token_embedding.weight"].lr == treated["logit_scale"].lr == 1.0  # type: ignore[union-attr]


def test_layers_by_name() -> None:
    above = layers_above(build())
    assert above["text.text_projection"] == above["text.ln_final.weight"] == 0
    assert above["text.transformer.resblocks.1.mlp.c_fc.weight"] == 1
    assert above["text.transformer.resblocks.0.mlp.c_fc.weight"] == 2
    assert above["text.token_embedding.weight"] == above["text.positional_embedding"] == 3
    own = build(vision_cfg={"layers": 3, "width": 64, "image_size": 16, "patch_size": 8})
    above = layers_above(own)
    assert above["visual.conv1.weight"] == above["visual.class_embedding"] == above["visual.ln_pre.weight"] == 4
    assert [above[f"visual.transformer.resblocks.{n}.ln_1.weight"] for n in range(3)] == [3, 2, 1]
    assert above["visual.proj"] == above["visual.ln_post.weight"] == 0
    assert "logit_scale" not in above


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("rules: [{match: visul, freeze: true}]", "no parameter matches 'visul'; did you mean 'visual'"),
        (
            "rules: [{match: qqq, freeze: true}]",
            "no parameter matches 'qqq'; names begin with logit_scale, logit_bias, ",
        ),
        ("rules: [{match: '(', freeze: true}]", "is no regular expression"),
        ("rules: [{match: text}]", "the rule on 'text' says nothing"),
        ("rules: [{match: text, lr_factor: 0}]", "lr_factor of 'text' must be positive, got 0.* say freeze: true"),
        ("rules: [{match: text, layer_decay: 2}]", r"layer_decay of 'text' is in \(0, 1\], got 2"),
        ("rules: [{match: text, frozen_until: 1.5}]", "frozen_until of 'text' is a share of the steps"),
        ("rules: [{match: text, freez: true}]", r"unknown key rules\.0\.freez; did you mean freeze\?"),
        ("rules: [{match: '.*', freeze: true}]", "everything is frozen: there is nothing to train"),
        ("rules: [{match: 'visual|text', freeze: true}]", "everything is frozen: there is nothing"),
        ("rules: [{match: visual, freeze: true}, {match: text, frozen_from: 0.5}]", "frozen from step 50 on"),
        ("{schedule: wsd, decay: 200}", "5 steps of warmup and 200 of decay from step 0 on are more than the 100"),
    ],
)
def test_rules_that_cannot_be(resnet: nn.Module, tmp_path: Any, yaml: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        treat(resnet, yaml, tmp_path)
    assert "\n" not in str(error.value)


def test_a_tower_without_layers(tmp_path: Any) -> None:
    with pytest.raises(UserError, match=r"layer_decay of 'a': the tower of a\.weight has no layers that can be told"):
        treat(nn.ModuleDict({"a": nn.Linear(2, 2)}), "rules: [{match: a, layer_decay: 0.5}]", tmp_path)


def test_frozen_parameters_ask_for_no_gradient_and_their_norms_stand(tmp_path: Any) -> None:
    model = build()
    yaml = "rules: [{match: visual, frozen_until: 10}, {match: visual.head, freeze: true}]"
    freezing = Freezing(model, lambda: dict(model.named_parameters()), treat(model, yaml, tmp_path))
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    kernel, head = model.get_parameter("visual.trunk.conv1.0.weight"), model.get_parameter("visual.head.proj.weight")
    assert freezing.changes
    assert kernel.requires_grad, "else DDP would not average it later"
    assert not head.requires_grad

    def statistics() -> list[torch.Tensor]:
        return [norm.running_mean.clone() for norm in norms if norm.running_mean is not None]

    def forward() -> torch.Tensor:
        features: torch.Tensor = model.visual(torch.rand(4, 3, 32, 32))  # type: ignore[operator]
        return features

    for step, trains in ((0, False), (9, False), (10, True), (5, False), (99, True)):
        freezing.at(step)
        assert kernel.requires_grad == trains
        assert not head.requires_grad
        before = statistics()
        assert forward().requires_grad == trains
        assert trains != all(torch.equal(a, b) for a, b in zip(before, statistics(), strict=True))
    freezing.at(0)
    model.train()
    freezing.set_norms(True)
    assert not any(norm.training for norm in norms)


def test_a_norm_without_parameters_goes_with_what_is_around_it(tmp_path: Any) -> None:
    def block() -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2, affine=False))

    model = nn.ModuleDict({"a": block(), "b": block()})
    treated = treat(model, "rules: [{match: a, freeze: true}]", tmp_path)
    Freezing(model, lambda: dict(model.named_parameters()), treated)
    assert [module.training for module in model.modules() if isinstance(module, nn.BatchNorm2d)] == [False, True]


DOCS = Path(__file__).parents[2] / "docs" / "training.md"


def documented() -> list[str]:
    """Every piece of YAML in the page: blocks, and the one-liners of its tables."""
    text = DOCS.read_text(encoding="utf-8")
    lines = [f"optim: {{{line}}}".replace(r"\|", "|") for line in re.findall(r"\| `(rules: .*)` \|", text)]
    return [*re.findall(r"```yaml\n(.*?)```", text, re.DOTALL), *lines]


def test_the_page_has_what_the_tests_try() -> None:
    found = "".join(documented())
    for text in ("{match: visual, freeze: true}", "{match: text, freeze: true}", "'(?!.*bias$|logit_)', freeze: true"):
        assert text in found
    assert len(documented()) >= 13


@pytest.mark.parametrize("yaml", documented())
def test_every_line_of_the_page_is_a_config(yaml: str, tmp_path: Any) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"data: {{sources: {{a: {{shards: x}}}}}}\n{yaml}")
    config = load_config(RunConfig, path)
    if config.optim.rules:
        model = build("test_vit")
        plain = treatments(model, replace(config.optim, rules=[]), 20000)
        assert treatments(model, config.optim, 20000) != plain, "each line changes something"
