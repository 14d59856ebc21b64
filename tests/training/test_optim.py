"""Optimizers, and a step of them."""

from typing import Any

import pytest
import timm.optim
import torch
from torch import nn

from medclip_lab.errors import UserError
from medclip_lab.training.optim import OptimConfig, build_optimizer, parameter_groups
from medclip_lab.training.rules import Rule, treatments


def towers() -> nn.ModuleDict:
    torch.manual_seed(0)
    image = nn.Sequential(nn.Conv2d(1, 4, 2), nn.Flatten(), nn.Linear(4, 4))
    return nn.ModuleDict({"visual": image, "text": nn.EmbeddingBag(7, 4)})


def optimizer_of(model: nn.Module, config: OptimConfig) -> tuple[torch.optim.Optimizer, Any]:
    treated = treatments(model, config, 10)
    return build_optimizer(parameter_groups(dict(model.named_parameters()), treated), config)


def step(model: nn.ModuleDict, optimizer: torch.optim.Optimizer) -> None:
    images = model["visual"](torch.rand(3, 1, 2, 2, generator=torch.Generator().manual_seed(1)))
    texts = model["text"](torch.tensor([[1, 2], [3, 4], [5, 6]]))
    (images * texts).sum().backward()
    optimizer.step()


@pytest.mark.parametrize(
    ("name", "args", "kind"),
    [
        ("adamw", {}, torch.optim.AdamW),
        ("muon", {}, timm.optim.Muon),
        ("lion", {"betas": [0.9, 0.99]}, timm.optim.Lion),
        ("lamb", {}, timm.optim.Lamb),
        ("adafactorbv", {}, timm.optim.AdafactorBigVision),
        ("sgd", {"momentum": 0.8}, torch.optim.SGD),
        ("torch.optim.Adafactor", {"d": 2.0}, torch.optim.Adafactor),
        ("torch.optim.AdamW", {"betas": (0.5, 0.9)}, torch.optim.AdamW),
    ],
)
def test_every_kind_of_optimizer_takes_a_step(name: str, args: dict[str, Any], kind: type) -> None:
    model = towers()
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    rules = [Rule("text", lr_factor=0.5), Rule(r"visual\.0", freeze=True)]
    optimizer, schedules = optimizer_of(model, OptimConfig(name=name, args=args, lr=0.1, weight_decay=0.2, rules=rules))
    assert type(optimizer) is kind
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.1, 0.05]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.0, 0.2]
    for key, value in args.items():
        found = optimizer.param_groups[0][key]
        assert (list(found) if isinstance(value, list | tuple) else found) == (
            list(value) if isinstance(value, tuple) else value
        )
    torch.optim.lr_scheduler.LambdaLR(optimizer, schedules)
    step(model, optimizer)
    after = dict(model.named_parameters())
    moved = {key for key, value in before.items() if not torch.equal(value, after[key])}
    assert moved == {"visual.2.weight", "visual.2.bias", "text.weight"}


def test_adamw_is_as_configured() -> None:
    optimizer, _ = optimizer_of(towers(), OptimConfig(betas=(0.8, 0.95), eps=1e-6, args={"amsgrad": True}))
    group = optimizer.param_groups[0]
    assert (group["betas"], group["eps"], group["amsgrad"], group["fused"]) == ((0.8, 0.95), 1e-6, True, None)
    model = towers()
    treated = treatments(model, OptimConfig(), 10)
    groups = parameter_groups(dict(model.named_parameters()), treated)
    assert build_optimizer(groups, OptimConfig(), fused=True)[0].param_groups[0]["fused"] is True


def test_muon_turns_matrices_only() -> None:
    """The update of a matrix has all its singular values alike; tables, biases and a loss's own go to AdamW."""
    model = towers()
    optimizer, _ = optimizer_of(model, OptimConfig(name="muon", lr=0.1, weight_decay=0.0))
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    aside = {names[id(p)] for group in optimizer.param_groups if group["use_fallback"] for p in group["params"]}
    assert aside == {"visual.0.bias", "visual.2.bias", "text.weight"}
    before = model.get_parameter("visual.2.weight").detach().clone()
    table = model.get_parameter("text.weight").detach().clone()
    step(model, optimizer)
    turned = torch.linalg.svdvals(model.get_parameter("visual.2.weight").detach() - before)
    # The gradient of three rows has rank three.
    assert turned[2] > 0.4 * turned[0]
    rows = (model.get_parameter("text.weight").detach() - table).abs()
    assert torch.allclose(rows[1:], torch.full_like(rows[1:], 0.1), atol=1e-3), "AdamW's first step has one size"
    assert not rows[0].any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "adamv"}, "unknown optimizer 'adamv'; did you mean adamw?"),
        ({"name": "torch.optim.Adafactr"}, "cannot import 'torch.optim.Adafactr'"),
        ({"name": "torch.nn.Linear"}, "'torch.nn.Linear' is no torch optimizer"),
        ({"args": {"beta": 1}}, "optim.args: adamw does not take them: .*beta"),
        ({"name": "lion", "args": {"d": 1}}, "optim.args: lion does not take them: .*'d'"),
    ],
)
def test_no_such_optimizer(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        optimizer_of(towers(), OptimConfig(**settings))


def test_settings_of_adamw_are_no_others() -> None:
    with pytest.raises(ValueError, match=r"those of AdamW; say what lion takes in optim\.args"):
        OptimConfig(name="lion", betas=(0.9, 0.99))
