"""One optimisation step: towers, loss, temperature; and what the console and the metrics file show of it."""

import hashlib
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.progress import Progress
from torch import Tensor, nn

from medclip_lab import progress
from medclip_lab.data.pipeline import Batch
from medclip_lab.errors import UserError
from medclip_lab.losses.diagnostics import diagnose
from medclip_lab.losses.functional import row_ids
from medclip_lab.models.dual_encoder import DualEncoder, Features
from medclip_lab.training.gradient_cache import in_chunks, refuse_batch_statistics
from medclip_lab.training.optim import OptimConfig, build_optimizer, lr_factor

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
    """

    def __init__(
        self,
        encoder: DualEncoder,
        loss: nn.Module,
        optim: OptimConfig,
        steps: int,
        gradient_cache: int = 0,
        diagnose_every: int = 0,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.loss = loss
        self.optim = optim
        self.steps = steps
        self.gradient_cache = gradient_cache
        self.diagnose_every = diagnose_every
        if gradient_cache:
            refuse_batch_statistics(encoder.model, gradient_cache)

    def features(self, batch: Batch) -> Features:
        """Features of every modality, and second view of one, that the batch holds."""
        if not self.gradient_cache:
            features: Features = self.encoder(batch)
            return features
        towers = self.encoder.towers_of(batch).items()
        return {name: in_chunks(tower, batch[name], self.gradient_cache) for name, tower in towers}

    def terms(self, batch: Batch, diagnose_too: bool = False) -> dict[str, Tensor]:
        """The loss of a batch under "loss" and its parts by name.

        Raises:
            UserError: the batch lacks what the loss needs.
        """
        features = self.features(batch)
        paired = bool(getattr(self.loss, "paired", True))
        wanted = getattr(self.loss, "inputs", ())
        given = {name: _input(name, features, batch) for name in (*wanted, *getattr(self.loss, "optional_inputs", ()))}
        missing = [name for name in ("image", "text") if name not in batch]
        missing += [name for name in wanted if given[name] is None]
        if missing:
            raise UserError(f"{type(self.loss).__name__} needs {', '.join(missing)}, and a batch has none: check data")
        if paired and batch["image_id"] != batch["text_id"]:
            raise UserError(
                f"{type(self.loss).__name__} needs an image and a text of every study; some have one only. "
                "Train on paired sources, or with a loss on labels such as SoftTargetClipLoss"
            )
        terms: dict[str, Tensor] = self.loss(
            features["image"],
            features["text"],
            self.encoder.logit_scale,
            self.encoder.logit_bias,
            **{name: value for name, value in given.items() if value is not None},
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
        if not torch.isfinite(terms["loss"]):
            keys = ", ".join([*batch["image_id"], *batch["text_id"]][:8])
            raise UserError(f"the loss of step {self.global_step} is {terms['loss'].item()}; its studies: {keys} ...")
        return terms

    def validation_step(self, batch: Batch, index: int) -> None:
        terms = self.terms(batch)
        self.log("val_loss", terms.get("excess_loss", terms["loss"]), batch_size=len(batch["image_id"]), sync_dist=True)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        least, most = getattr(self.loss, "logit_scale_range", None) or SCALE_RANGE
        with torch.no_grad():
            self.encoder.model.logit_scale.clamp_(math.log(least), math.log(most))

    def configure_optimizers(self) -> Any:
        optimizer = build_optimizer(self.encoder.model, self.optim, self.loss)
        factor = lr_factor(self.steps, self.optim.warmup, self.optim.final_lr)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


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


class MetricsFile(Callback):
    """Appends a JSON object a step to a file: the run's diary, which plain tools can read."""

    def __init__(self, path: Path, every: int) -> None:
        self.path = path
        self.every = every
        self._last = (0, time.monotonic())

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._last = (trainer.global_step, time.monotonic())
        if trainer.is_global_zero and self.path.exists():
            # Lines after the checkpoint belong to steps that will be made again.
            lines = [
                line for line in self.path.read_text().splitlines() if json.loads(line)["step"] <= trainer.global_step
            ]
            self.path.write_text("".join(f"{line}\n" for line in lines))

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step % self.every and step != trainer.max_steps:
            return
        assert isinstance(module, ContrastiveModule)
        before, then = self._last
        now = time.monotonic()
        rate = len(batch["image_id"]) * trainer.world_size * (step - before) / (now - then)
        self._last = (step, now)
        bias = module.encoder.logit_bias
        values: dict[str, float | None] = {name: float(value.detach()) for name, value in outputs.items()}
        values |= {
            "logit_scale": float(module.encoder.logit_scale.detach()),
            "logit_bias": None if bias is None else float(bias.detach()),
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
            "samples_per_second": round(rate, 1),
        }
        self._write(trainer, {"step": step, **values})

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        if "val_loss" in trainer.callback_metrics:
            self._write(trainer, {"step": trainer.global_step, "val_loss": float(trainer.callback_metrics["val_loss"])})

    def _write(self, trainer: Trainer, values: dict[str, Any]) -> None:
        if trainer.is_global_zero:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")


class Console(Callback):
    """A bar with loss, rate and time left on a terminal; twenty lines over the run anywhere else."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._start = (0, 0.0)

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._start = (trainer.global_step, time.monotonic())
        if trainer.is_global_zero and sys.stderr.isatty():
            self._bar = progress.bar()
            self._task = self._bar.add_task("train", total=trainer.max_steps, completed=trainer.global_step)
            self._bar.start()

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not trainer.is_global_zero:
            return
        step, total, loss = trainer.global_step, trainer.max_steps, float(outputs["loss"].detach())
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=f"train  loss {loss:.3f}")
        elif step % max(1, total // 20) == 0 or step == total:
            first, start = self._start
            rate = (step - first) / (time.monotonic() - start)
            left = (total - step) / rate
            line = (
                f"step {step}/{total}  loss {loss:.3f}  {rate:.2f} steps/s  {int(left // 60)}:{int(left % 60):02d} left"
            )
            print(line, file=sys.stderr)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
