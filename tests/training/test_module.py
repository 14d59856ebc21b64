"""What a loss may ask of a batch and of the towers."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medclip_lab.errors import UserError
from medclip_lab.training.module import ContrastiveModule
from medclip_lab.training.optim import OptimConfig


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


def test_what_is_missing_is_named() -> None:
    module = ContrastiveModule(ThreeModalities(), OwnLoss(), OptimConfig(), 1)  # type: ignore[arg-type]
    poor = {name: value for name, value in batch().items() if name not in ("patient_id", "image_labels")}
    with pytest.raises(UserError, match="OwnLoss needs patient_ids, image_labels, and a batch has none"):
        module.terms(poor)
