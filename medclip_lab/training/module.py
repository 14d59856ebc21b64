"""One optimisation step: towers, loss, temperature."""

import hashlib
import math
from collections.abc import Callable
from typing import Any, Self

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from medclip_lab import distributed
from medclip_lab.data.pipeline import Batch
from medclip_lab.errors import UserError
from medclip_lab.losses.diagnostics import diagnose
from medclip_lab.losses.functional import row_ids
from medclip_lab.models.dual_encoder import DualEncoder, Features
from medclip_lab.models.tokens import TOKENS
from medclip_lab.training.freezing import Freezing
from medclip_lab.training.gradient_cache import in_chunks, refuse_batch_statistics
from medclip_lab.training.gradients import clip, global_norm, separate
from medclip_lab.training.optim import OptimConfig, build_optimizer, parameter_groups
from medclip_lab.training.precision import full_float32
from medclip_lab.training.rules import treatments
from medclip_lab.training.teacher import Teacher

SCALE_RANGE = (1.0, 100.0)  # Radford et al. 2021: a larger scale makes training unstable


class ContrastiveModule(LightningModule):
    """A dual encoder, a loss and an optimizer.

    Args:
        encoder: towers; called with a batch, returns a dict of features.
        loss: called as open_clip calls its losses. Its attribute `inputs` names the tensors it wants beside features,
            scale and bias; `paired` says whether row i of both modalities must be one study.
        steps: length of the run, which the schedule needs.
        gradient_cache: rows of a tower's forward; 0 takes the whole batch at once.
        diagnose_every: steps between diagnostics of the batch; 0 never.
        finish: makes ready, on this device, what the loader left of a batch.
        teacher: whose features a loss may ask for, as "teacher_image_features".
    """

    def __init__(
        self,
        encoder: DualEncoder,
        loss: nn.Module,
        optim: OptimConfig,
        steps: int,
        gradient_cache: int = 0,
        diagnose_every: int = 0,
        finish: Callable[[Batch, torch.device], Batch] | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.loss = loss
        self.optim = optim
        self.steps = steps
        self.gradient_cache = gradient_cache
        self.diagnose_every = diagnose_every
        self.finish = finish
        self.terms_now: dict[str, Tensor] = {}
        """Of the step that is being made."""
        self.teacher = teacher
        self.grad_norm: Tensor | None = None
        """Of the last step, before clipping."""
        self.treated = treatments(encoder.model, optim, steps, loss)
        self.freezing = Freezing(encoder.model, self._parameters_by_name, self.treated)
        wanted = (*getattr(loss, "inputs", ()), *getattr(loss, "optional_inputs", ()))
        encoder.tokens = frozenset(TOKENS) & frozenset(wanted)
        if gradient_cache and encoder.tokens:
            raise UserError(
                f"trainer.gradient_cache: {type(loss).__name__} takes {', '.join(sorted(encoder.tokens))}, which are "
                "not kept in chunks: set it to 0"
            )
        if gradient_cache:
            refuse_batch_statistics(encoder.model, gradient_cache)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        return self.finish(batch, self.device) if self.finish else batch

    def features(self, batch: Batch) -> Features:
        """Features of every modality, and second view of one, that the batch holds."""
        rows = self.rows_at_a_time()
        if not rows:
            features: Features = self.encoder(batch)
            return features
        towers = self.encoder.towers_of(batch).items()
        return {name: in_chunks(tower, batch[name], rows) for name, tower in towers}

    def rows_at_a_time(self) -> int:
        """Of a tower; 0 for all."""
        return self.gradient_cache

    def given(self, batch: Batch) -> Features:
        """What the loss may see of a batch: features of the towers, and of a teacher."""
        if not batch["image_id"] and not batch["text_id"]:
            # Many a tower cannot take no rows, and under FSDP2 every rank must call it: one row, and nothing of it.
            one = {name: rows.new_zeros(1, *rows.shape[1:]) for name, rows in batch.items() if isinstance(rows, Tensor)}
            found = self.given(batch | one | {"image_id": ["none"]})
            return {name: value[:0] if value.ndim else value for name, value in found.items()}
        features = self.features(batch)
        if self.teacher is not None:
            features |= self.teacher.features(batch, self.device, self.gradient_cache)
        return features

    def terms(self, batch: Batch, diagnose_too: bool = False) -> dict[str, Tensor]:
        """The loss of a batch under "loss" and its parts by name.

        Raises:
            UserError: the batch lacks what the loss needs.
        """
        features = self.given(batch)
        paired = bool(getattr(self.loss, "paired", True))
        wanted = getattr(self.loss, "inputs", ())
        inputs = {name: _input(name, features, batch) for name in (*wanted, *getattr(self.loss, "optional_inputs", ()))}
        missing = [name for name in ("image", "text") if name not in batch]
        missing += [name for name in wanted if inputs[name] is None]
        if missing:
            raise UserError(f"{type(self.loss).__name__} needs {', '.join(missing)}, and a batch has none: check data")
        if paired and batch["image_id"] != batch["text_id"]:
            raise UserError(
                f"{type(self.loss).__name__} needs an image and a text of every study; some have one only. "
                "Train on paired sources, or with a loss on labels such as SoftTargetClipLoss"
            )
        with full_float32():
            terms: dict[str, Tensor] = self.loss(
                features["image"],
                features["text"],
                self.encoder.logit_scale,
                self.encoder.logit_bias,
                **{name: value for name, value in inputs.items() if value is not None},
                output_dict=True,
            )
        terms = {"loss": terms.pop("contrastive_loss"), **terms}
        if diagnose_too:
            text_ids = row_ids(batch["text"])
            scale, bias = self.encoder.logit_scale, self.encoder.logit_bias
            terms |= diagnose(features["image"], features["text"], scale, bias, text_ids, paired)
        return terms

    def training_step(self, batch: Batch, index: int) -> dict[str, Tensor]:
        # The step that ends with this batch is the one the metrics file writes down.
        terms = self.terms(batch, bool(self.diagnose_every) and (self.global_step + 1) % self.diagnose_every == 0)
        self.terms_now, self.grad_norm = {name: value.detach() for name, value in terms.items()}, None
        return terms

    def on_validation_epoch_start(self) -> None:
        self._validated = torch.zeros(2, dtype=torch.float64, device=self.device)  # sum of losses by row, and rows

    def validation_step(self, batch: Batch, index: int) -> None:
        terms = self.terms(batch)
        rows = len(batch["image_id"])
        loss = terms.get("excess_loss", terms["loss"])
        self._validated += torch.stack([loss.double() * rows, torch.full_like(loss, rows, dtype=torch.float64)])

    def on_validation_epoch_end(self) -> None:
        # Lightning's own mean over ranks divides the count of rows as an integer.
        total, rows = distributed.all_sum(self._validated)
        self.log("val_loss", (total / rows).float())

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        # Here, and not in a hook after the batch: whoever saves then must see what the next step will start from.
        least, most = getattr(self.loss, "logit_scale_range", None) or SCALE_RANGE
        with torch.no_grad():
            self.encoder.model.logit_scale.clamp_(math.log(least), math.log(most))

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        self.freezing.at(self.global_step)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.freezing.set_norms(mode)
        return self

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        norm = self.measure_gradient(optimizer) if self.grad_norm is None else self.grad_norm
        if gradient_clip_val:
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            clip(parameters, norm, float(gradient_clip_val))

    def measure_gradient(self, optimizer: Any) -> Tensor:
        """Take the norm of all gradients, on all ranks the same, before they are clipped."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.grad_norm = global_norm(p.grad for p in parameters if p.grad is not None)
        return self.grad_norm

    def configure_optimizers(self) -> Any:
        towers = {parameter for parameter in self.encoder.model.parameters() if parameter.ndim}
        groups = separate(parameter_groups(self._parameters_by_name(), self.treated), towers)
        # A gradient scaler unscales before the clipping, which the fused kernel would do within its step.
        fused = self.device.type == "cuda" and self.trainer.precision != "16-mixed"
        optimizer, schedules = build_optimizer(groups, self.optim, fused)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, schedules)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _parameters_by_name(self) -> dict[str, nn.Parameter]:
        own = {f"loss.{name}": parameter for name, parameter in self.loss.named_parameters()}
        return dict(self.encoder.model.named_parameters()) | own


def _input(name: str, features: Features, batch: Batch) -> Tensor | None:
    """What a loss calls `name`: features ("image_tokens", "second_image_features"), ids, or a tensor of the batch."""
    for key in (name, name.removesuffix("_features")):
        if key in features:
            return features[key]
    if name in batch:
        value: Tensor = batch[name]
        return value
    if name == "text_ids" and "text" in batch:
        return row_ids(batch["text"])
    for kind, key in (("study_ids", "image_id"), ("patient_ids", "patient_id")):
        if name == kind and key in batch:
            # The same number on every rank, whatever studies it has met before.
            marks = [int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1 for text in batch[key]]
            return torch.tensor(marks, dtype=torch.int64, device=next(iter(features.values())).device)
    return None
