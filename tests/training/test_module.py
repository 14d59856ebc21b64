"""What a loss may ask of a batch and of the towers."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medclip_lab.data.preprocess import PreprocessConfig
from medclip_lab.errors import UserError
from medclip_lab.losses import MultiViewClipLoss
from medclip_lab.models.dual_encoder import DualEncoder
from medclip_lab.models.spec import build_spec
from medclip_lab.training.module import ContrastiveModule
from medclip_lab.training.optim import OptimConfig
from medclip_lab.training.rules import Rule


class ThreeModalities(nn.Module):
    """An encoder with a third modality, and tokens of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Linear(1, 1)
        self.logit_scale = torch.tensor(10.0)
        self.logit_bias = None

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        rows = len(batch["image"])
        return {
            "image": torch.full((rows, 4), 1.0),
            "text": torch.full((rows, 4), 2.0),
            "ecg": torch.full((rows, 4), 3.0),
            "image_tokens": torch.full((rows, 7, 4), 4.0),
        }


class OwnLoss(nn.Module):
    inputs = ("image_tokens", "ecg_features", "text_ids", "study_ids", "patient_ids", "image_labels")
    optional_inputs = ("text_mask",)

    def forward(self, image: Tensor, text: Tensor, scale: Tensor, bias: Any, **given: Any) -> dict[str, Tensor]:
        self.given = given
        return {"contrastive_loss": image.sum(), "extra": text.sum()}


def batch() -> dict[str, Any]:
    return {
        "image": torch.zeros(3, 1, 2, 2),
        "text": torch.tensor([[5, 6, 0], [5, 7, 0], [5, 6, 0]]),
        "image_labels": torch.ones(3, 2),
        "image_id": ["a", "b", "c"],
        "text_id": ["a", "b", "c"],
        "patient_id": ["p", "q", "p"],
    }


def test_a_loss_gets_what_it_names() -> None:
    loss = OwnLoss()
    module = ContrastiveModule(ThreeModalities(), loss, OptimConfig(), 1)  # type: ignore[arg-type]
    assert set(module.terms(batch())) == {"loss", "extra"}
    given = loss.given
    assert given["image_tokens"].shape == (3, 7, 4)
    assert given["ecg_features"][0, 0] == 3
    assert "text_mask" not in given
    assert given["text_ids"].tolist()[0] == given["text_ids"].tolist()[2] != given["text_ids"].tolist()[1]
    assert given["patient_ids"].tolist()[0] == given["patient_ids"].tolist()[2] != given["patient_ids"].tolist()[1]
    assert len(set(given["study_ids"].tolist())) == 3
    assert all(int(given[name].min()) >= 0 for name in ("text_ids", "study_ids", "patient_ids"))


@pytest.mark.parametrize("gradient_cache", [0, 2])
def test_second_views_go_through_the_same_towers(gradient_cache: int) -> None:
    spec = {
        "embed_dim": 8,
        "vision_cfg": {"layers": 1, "width": 64, "image_size": 16, "patch_size": 8},
        "text_cfg": {"context_length": 4, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1},
    }
    encoder = DualEncoder(build_spec(spec), PreprocessConfig(size=16))
    loss = MultiViewClipLoss(1.0, 0.5)
    module = ContrastiveModule(encoder, loss, OptimConfig(), 1, gradient_cache)
    ids = torch.randint(1, 19, (3, 4), generator=torch.Generator().manual_seed(0))
    pixels = torch.rand(2, 3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    views = batch() | {"image": pixels[0], "second_image": pixels[1], "text": ids, "second_text": ids.flip(0)}
    terms = module.terms(views)
    first, second = (
        encoder({"image": image, "text": text}) for image, text in zip(pixels, (ids, ids.flip(0)), strict=True)
    )
    expected = loss(
        *(first["image"], first["text"], encoder.logit_scale),
        second_image_features=second["image"],
        second_text_features=second["text"],
    )
    assert torch.allclose(terms["loss"], expected, atol=1e-5)
    assert set(terms) == {"loss", "image_text_loss", "image_image_loss", "text_text_loss"}


def test_what_is_missing_is_named() -> None:
    module = ContrastiveModule(ThreeModalities(), OwnLoss(), OptimConfig(), 1)  # type: ignore[arg-type]
    poor = {name: value for name, value in batch().items() if name not in ("patient_id", "image_labels")}
    with pytest.raises(UserError, match="OwnLoss needs patient_ids, image_labels, and a batch has none"):
        module.terms(poor)


def test_frozen_norms_stand_in_whatever_mode_the_module_is_put() -> None:
    spec = {
        "embed_dim": 8,
        "vision_cfg": {"timm_model_name": "test_resnet", "image_size": 32},
        "text_cfg": {"context_length": 4, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1},
    }
    encoder = DualEncoder(build_spec(spec), PreprocessConfig(size=32))
    module = ContrastiveModule(encoder, OwnLoss(), OptimConfig(rules=[Rule("visual", freeze=True)]), 10)
    norms = [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]
    assert norms
    for mode in (True, False, True):
        assert module.train(mode) is module
        assert module.encoder.model.training == mode
        assert not any(norm.training for norm in norms)
