"""A frozen bundle that looks at the same batches, for a student to learn from."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import resize

from medclip_lab.data.pipeline import Batch, DataConfig
from medclip_lab.data.tokenizer import Tokenizer
from medclip_lab.errors import UserError
from medclip_lab.inference.encoder import load
from medclip_lab.losses import DistillLoss, WeightedSum
from medclip_lab.training.gradient_cache import in_chunks

OWN = ("size", "mean", "std", "interpolation")  # of a tower; the rest is what of an image is seen at all


@dataclass
class DistillConfig:
    """A teacher whose in-batch softmaxes the student learns beside its own loss."""

    bundle: str
    """Folder of the teacher, as `medclip-lab export` writes it."""
    weight: float = 1.0
    """Of the divergence from the teacher; the run's own loss has 1."""

    def __post_init__(self) -> None:
        if self.weight <= 0:
            raise ValueError(f"distill.weight must be positive, got {self.weight}")


class Teacher:
    """Both towers of a bundle, without gradients and in no state dict.

    Args:
        bundle: its folder.
        data: of the student's run; a batch holds the student's images, which the teacher sees at its own size.

    Raises:
        UserError: no bundle, or one that looks at another part of an image than the student.
    """

    def __init__(self, bundle: str, data: DataConfig) -> None:
        encoder = load(bundle, device="cpu")
        self.fingerprint = encoder.fingerprint
        self.tokenizer: Tokenizer = encoder.tokenizer
        self._model = encoder.model.requires_grad_(False)
        config = encoder.preprocess.config
        self._size, self._mode = config.size, InterpolationMode(config.interpolation)
        for name, value in asdict(config).items():
            if name not in OWN and value != getattr(data.preprocess, name):
                raise UserError(
                    f"distill.bundle: the teacher was trained with preprocess.{name} {value!r}, and this run has "
                    f"{getattr(data.preprocess, name)!r}: set data.preprocess.{name} to the teacher's"
                )

    @torch.no_grad()
    def features(self, batch: Batch, device: torch.device, chunk_size: int = 0) -> dict[str, Tensor]:
        """What `DistillLoss` wants of the batch's "image" and "teacher_text", under the names a loss finds them by."""
        self._model.to(device)
        found = {"teacher_logit_scale": self._model.logit_scale}
        for name, rows in (("image", batch.get("image")), ("text", batch.get("teacher_text"))):
            if rows is None:
                continue
            if name == "image" and rows.shape[-1] != self._size:
                rows = resize(rows, [self._size, self._size], self._mode, antialias=True)
            tower = self._model.towers[name]
            found[f"teacher_{name}"] = in_chunks(tower, rows, chunk_size) if chunk_size else tower(rows)
        return found


def with_teacher(loss: nn.Module, config: DistillConfig) -> nn.Module:
    """The run's loss, logged as "student", and the divergence from the teacher, as "distill"."""
    options: dict[str, Any] = {"grad_reduction": getattr(loss, "grad_reduction", "mean")}
    return WeightedSum({"student": loss, "distill": DistillLoss(**options)}, {"distill": config.weight})
