"""Are the losses right on this device?"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from medclip_lab.gpu_bench.cases import Machine, Say, Sizes, arguments, clear, losses, make_inputs, step
from medclip_lab.losses.base import Batch, PairLoss

TOLERANCES = {"loss_error": 1e-6, "gradient": 3e-3, "row": 1e-2, "angle": 1e-5, "scalar": 1e-5}
"""Relative error of the loss; relative L2 of both towers' gradients; worst row; 1 less the cosine of the gradients;
error of the gradients of scale and bias over the sum of the absolute values of their terms. Asked of bfloat16; features
of float16 are rounded once more before the products with the slopes, and a pair alone has no others to average with."""
SLACK = 10
"""What misses its tolerance by less is rounding; by more, a fault."""


def correctness(machine: Machine, sizes: Sizes, say: Say) -> list[dict[str, Any]]:
    """Each loss against the dense formula in float64 on the same rounded features."""
    rows: list[dict[str, Any]] = []
    for name, loss in losses(machine.impl, sizes.only).items():
        for batch, dim in sizes.correct:
            for trained in (False, True):
                for dtype in (torch.bfloat16, torch.float16):
                    given = make_inputs(batch, dim, machine, name, trained, dtype)
                    entry: dict[str, Any] = {"loss": name, "batch": batch, "dim": dim}
                    entry["dtype"] = str(dtype).removeprefix("torch.")
                    entry["inputs"] = "trained" if trained else "initial"
                    try:
                        rows.append(entry | _errors(loss, given))
                    except Exception as error:  # what else there is to learn should still be learnt
                        rows.append(entry | _failed(error))
        mine = [row for row in rows if row["loss"] == name]
        fine = all(row["right"] for row in mine)
        say(f"{name}: {'right' if fine else 'WRONG'}, gradients within {max(row['gradient'] for row in mine):.1e}")
        clear()
    return rows


def _failed(error: Exception) -> dict[str, Any]:
    told = f"{type(error).__name__}: {error}"[:500]
    return {**dict.fromkeys(TOLERANCES, math.inf), "holds": False, "right": False, "error": told}


def _errors(loss: PairLoss, given: dict[str, Tensor]) -> dict[str, Any]:
    found = step(loss, given)
    got = {name: value.grad.double() for name, value in given.items() if value.grad is not None}
    features = ("image_features", "text_features")
    wide = {name: value.detach().double() if value.is_floating_point() else value for name, value in given.items()}
    leaves = {name: wide[name].requires_grad_() for name in (*features, "logit_scale", "logit_bias")}
    image, text, scale, bias = leaves.values()
    cosines = image @ text.T
    logits = scale * cosines + (bias if loss.uses_bias else 0.0)
    inputs = {name: wide[name] for name in loss.inputs}
    batch = Batch(image, text, scale, bias, inputs, [len(image)], [len(text)])
    value = loss.reference(logits, batch)["contrastive_loss"]
    (slopes,) = torch.autograd.grad(value, logits, retain_graph=True)
    truth = dict(zip(leaves, torch.autograd.grad(value, list(leaves.values()), allow_unused=True), strict=True))
    value = value.detach()
    scale = scale.detach()
    errors: dict[str, Any] = {"loss_error": float(abs(found - value) / abs(value).clamp_min(1e-12))}
    size = {name: float(truth[name].norm()) for name in features}
    # Of a batch of one a softmax has no gradient: then what is left is rounding.
    floor = 1e-7 * float(scale)
    errors["gradient"] = max(float((got[n] - truth[n]).norm()) / max(size[n], floor) for n in features)
    row = max(float(truth[n].norm(dim=1).max()) for n in features)
    errors["row"] = max(float((got[n] - truth[n]).norm(dim=1).max()) for n in features) / max(row, floor)
    errors["angle"] = max(
        1 - float(F.cosine_similarity(got[n].flatten(), truth[n].flatten(), dim=0)) if size[n] > floor else 0.0
        for n in features
    )
    terms = {"logit_scale": float((slopes * cosines.detach()).abs().sum()), "logit_bias": float(slopes.abs().sum())}
    errors["scalar"] = max(abs(float(got[n] - truth[n])) / max(terms[n], 1e-12) for n in terms if truth[n] is not None)
    finite = all(bool(gradient.isfinite().all()) for gradient in got.values())
    small = abs(float(value)) < 1e-3  # a loss of nearly nothing is the difference of two large numbers
    misses = {name: errors[name] / limit for name, limit in TOLERANCES.items()}
    if small and abs(float(found - value)) <= TOLERANCES["loss_error"]:
        del misses["loss_error"]
    worst = max(misses.values())
    errors["holds"], errors["right"] = finite and worst <= 1, finite and worst <= SLACK
    return errors


def behaviour(machine: Machine, sizes: Sizes, repeats: int = 20) -> dict[str, dict[str, bool]]:
    """What must hold whatever the size: the same bits every run, gradients that scale, frozen towers, NaN comes out."""
    found = {}
    for name, loss in losses(machine.impl, sizes.only).items():
        try:
            found[name] = _behaviour(name, loss, machine, *sizes.correct[-1], repeats)
        except Exception as error:
            found[name] = {f"{type(error).__name__}: {error}"[:200]: False}
    return found


def _behaviour(name: str, loss: PairLoss, machine: Machine, batch: int, dim: int, repeats: int) -> dict[str, bool]:
    given = make_inputs(batch, dim, machine, name)
    leaves = [given[key] for key in ("image_features", "text_features", "logit_scale")]
    first = step(loss, given)
    kept = [leaf.grad.clone() for leaf in leaves if leaf.grad is not None]
    same = True
    for _ in range(repeats):
        again = step(loss, given)
        same &= torch.equal(first, again) and all(map(torch.equal, kept, (leaf.grad for leaf in leaves)))  # type: ignore[arg-type]
    scaled = True
    for factor in (1e-3, 65536.0):
        step(loss, given, factor)
        pairs = zip(leaves, kept, strict=True)
        scaled &= all(torch.allclose(a.grad.float(), factor * b.float(), rtol=1e-2) for a, b in pairs)  # type: ignore[union-attr]
    with torch.no_grad():
        value = loss(**arguments(loss, given))
    frozen = make_inputs(batch, dim, machine, name)
    frozen["image_features"] = frozen["image_features"].detach()
    step(loss, frozen)
    thawed = frozen["text_features"].grad
    broken = {key: value.detach() for key, value in make_inputs(batch, dim, machine, name).items()}
    broken["text_features"][batch // 2, dim // 2] = math.nan
    return {
        "same bits": same,
        "gradients scale": scaled,
        "value without gradients": bool((value - first).abs() <= 1e-6 * first.abs()),
        "frozen tower": thawed is not None and torch.equal(thawed, kept[1]),
        "NaN comes out": not bool(loss(**arguments(loss, broken)).isfinite()),
    }
