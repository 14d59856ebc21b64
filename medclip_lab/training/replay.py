"""A step that went wrong, written down so that one process can make it again and look where it breaks.

A dump holds the weights before the step, the random numbers and which step it was. The batch is no part of it: what is
in it follows from seed and step, so it is read from the shards again, and no image or report lies in a dump.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, seed_everything
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from medclip_lab import distributed
from medclip_lab.config import load_config
from medclip_lab.data.pipeline import BatchStream
from medclip_lab.files import atomic_folder, existing_folder, read_json, write_json
from medclip_lab.losses import build_loss
from medclip_lab.training.build import prepare_model, start_temperature
from medclip_lab.training.module import ContrastiveModule
from medclip_lab.training.random_state import restore_random
from medclip_lab.training.teacher import Teacher, with_teacher

TOLD, WEIGHTS, RANDOM = "dump.json", "weights.safetensors", "random.safetensors"
COPIED = ("config.yaml", "tokenizer")


def write_dump(
    path: Path,
    run: Path,
    module: LightningModule,
    told: Mapping[str, Any],
    buffers: Mapping[str, Tensor],
    random: dict[str, Tensor],
    precision: str,
) -> None:
    """Write down a step before it is made; every rank calls this, and the first one writes.

    Args:
        told: step, batch and what was wrong.
        buffers: those that the step has changed already, as they were.
        random: the generators of this rank as they stood before the step.
        precision: Lightning's word for it.
    """
    weights: dict[str, Any] = get_model_state_dict(
        module, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    if distributed.rank() != 0:
        return
    weights |= {name: buffer.cpu() for name, buffer in buffers.items() if name in weights}
    with atomic_folder(path) as folder:
        save_file({name: value.contiguous().clone() for name, value in weights.items()}, folder / WEIGHTS)
        save_file(random, folder / RANDOM)
        write_json(folder / TOLD, {**told, "ranks": distributed.world_size(), "precision": precision})
        for name in COPIED:
            if (run / name).is_dir():
                shutil.copytree(run / name, folder / name)
            elif (run / name).exists():
                shutil.copy(run / name, folder / name)


def replay(dump: str | Path) -> dict[str, Any]:
    """Make the step of a dump again, on one process and without an optimizer.

    Returns:
        "step", "loss" and the loss's other terms; "terms_not_finite", "features_not_finite" (modality -> studies whose
        features are not finite), "parameters" (how many have a gradient) and "parameters_not_finite" (names of those
        whose gradient is not). With dropout, a step of several ranks is made with other random numbers.

    Raises:
        UserError: no dump, or its shards are no longer there.
    """
    from medclip_lab.training.run import RunConfig

    folder = existing_folder(dump, "dump")
    told = read_json(folder / TOLD, "dump")
    config = load_config(RunConfig, folder / "config.yaml")
    seed_everything(config.seed, verbose=False)
    loss = build_loss(config.loss)
    teacher = None
    if config.distill is not None:
        teacher = Teacher(config.distill.bundle, config.data)
        loss = with_teacher(loss, config.distill)
    encoder, tokenizer, _ = prepare_model(config.model, config.data, folder, 0)
    if isinstance(config.model.spec, dict):
        start_temperature(config.model, encoder, loss)
    module = ContrastiveModule(
        encoder, loss, config.optim, int(told["steps"]), config.trainer.gradient_cache, teacher=teacher
    )
    module.load_state_dict(load_file(folder / WEIGHTS))
    number = int(told["batch"])
    stream = BatchStream(
        config.data,
        tokenizer,
        number + 1,
        start=number,
        seed=config.seed,
        teacher_tokenizer=None if teacher is None else teacher.tokenizer,
    )
    batch = next(iter(stream))
    device = torch.device("cuda" if config.trainer.accelerator != "cpu" and torch.cuda.is_available() else "cpu")
    module.to(device).train()
    batch = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    batch = stream.finish(batch, device)
    half = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(told["precision"])
    restore_random(load_file(folder / RANDOM))
    with torch.autocast(device.type, half or torch.bfloat16, enabled=half is not None):
        terms = module.terms(batch)
    torch.autograd.backward(terms["loss"])
    with torch.no_grad(), torch.autocast(device.type, half or torch.bfloat16, enabled=half is not None):
        features = module.eval().features(batch)
    gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    ids = {name: batch["text_id" if name.endswith("text") else "image_id"] for name in features}
    return {
        "step": told["step"],
        **{name: float(value.detach()) for name, value in terms.items()},
        "terms_not_finite": [name for name, value in terms.items() if not bool(value.isfinite().all())],
        "features_not_finite": {
            name: [study for study, row in zip(ids[name], rows, strict=True) if not bool(row.isfinite().all())]
            for name, rows in features.items()
            if rows.ndim == 2
        },
        "parameters": len(gradients),
        "parameters_not_finite": [name for name, gradient in gradients.items() if not bool(gradient.isfinite().all())],
    }


def summary(result: Mapping[str, Any]) -> str:
    """What `replay` found, in a few lines."""
    lines = [f"step {result['step']}: loss {result['loss']:.6g}"]
    if result["terms_not_finite"]:
        lines.append(f"not finite among the loss's terms: {', '.join(result['terms_not_finite'])}")
    for modality, studies in result["features_not_finite"].items():
        if studies:
            lines.append(f"{modality} features that are not finite: {len(studies)}, of {', '.join(studies[:8])}")
    bad = result["parameters_not_finite"]
    lines.append(f"gradients that are not finite: {len(bad)} of {result['parameters']}")
    lines += [f"  {name}" for name in bad[:20]]
    return "\n".join(lines)
