"""Which sizes of tile are fastest on this GPU?"""

import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from medclip_lab.errors import UserError
from medclip_lab.gpu_bench.cases import MANY_LABELS, Machine, Say, Sizes, clear, losses, make_inputs, products, step
from medclip_lab.losses.kernels import fused
from medclip_lab.losses.kernels.shapes import SHAPES, Shape

LOSSES = {
    "sigmoid": "SigLipLoss",
    "logsumexp": "ClipLoss",
    "softmax": "ClipLoss",
    "softmax-table": "SoftTargetClipLoss",
    "softmax-labels": f"SoftTargetClipLoss, {MANY_LABELS} labels",
    "softmax-known": "SoftTargetClipLoss, ignore",
    "sigmoid-ids": "SigLipLoss, ids",
    "softmax-ids": "MultiPositiveClipLoss",
}
"""By kind of tile the loss that is timed."""
TILES = (
    Shape(128, 128, 64, 8),
    Shape(128, 128, 64, 8, stages=2),
    Shape(128, 128, 64, 8, warps=4),
    Shape(128, 256, 64, 8),
    Shape(128, 256, 64, 8, stages=4),
    Shape(64, 256, 64, 8, warps=4, stages=2),
    Shape(128, 64, 64, 8),
    Shape(128, 64, 64, 8, warps=4),
)
"""Beside those that are shipped, on sm_90."""


@contextmanager
def tile(kind: str, shape: Shape, level: int) -> Iterator[None]:
    """The kernels of one kind have this shape."""
    shipped = SHAPES[level]
    SHAPES[level] = {**shipped, kind: shape}
    try:
        yield
    finally:
        SHAPES[level] = shipped


def shapes(kind: str, level: int) -> list[Shape]:
    """The shipped one first, then others: of `TILES`, or on older GPUs near the shipped one, in other parts."""
    shipped = SHAPES[level][kind]
    near = [replace(shipped, stages=stages) for stages in (2, 4)] + [replace(shipped, parts=max(1, shipped.parts // 2))]
    others = near
    if level >= 90:
        finest = 16 if kind in ("logsumexp", "softmax-labels", "softmax-known") else 8
        others = near + [replace(shape, parts=shape.columns // finest) for shape in TILES]
    return list(dict.fromkeys([shipped, *others]))


def tune(machine: Machine, sizes: Sizes, say: Say, kinds: Sequence[str] = ()) -> list[dict[str, Any]]:
    """A step of a loss with each shape of a tile in turn, the others as shipped.

    Args:
        kinds: of tile; all of `LOSSES` by default.

    Raises:
        UserError: no such kind.
    """
    if unknown := [kind for kind in kinds if kind not in LOSSES]:
        raise UserError(f"no kind of tile is named {', '.join(unknown)}; there are {', '.join(LOSSES)}")
    level = fused.capability(torch.device(machine.device))
    known = max((known for known in SHAPES if known <= level), default=max(SHAPES))
    batch, dim = sizes.peers[-1]
    rows = []
    for kind in kinds or LOSSES:
        name = LOSSES[kind]
        loss = losses(machine.impl)[name]
        given = make_inputs(batch, dim, machine, name)
        for shape in shapes(kind, known):
            row: dict[str, Any] = {"kind": kind, "loss": name, "batch": batch, "dim": dim, "shape": str(shape)}
            row["shipped"] = shape == SHAPES[known][kind]
            try:
                with tile(kind, shape, known):
                    step(loss, given)  # compiles
                    times = [machine.seconds(lambda loss=loss, given=given: step(loss, given)) for _ in range(10)]  # type: ignore[misc]
                row["seconds"] = statistics.median(times)
                row["flops"] = 2 * products(name) * batch * batch * dim / row["seconds"]
                say(f"{kind} {shape}: {1e3 * row['seconds']:.3g} ms, {row['flops'] / 1e12:.3g} TFLOP/s")
            except Exception as error:  # too much shared memory, a shape the compiler refuses: the next may do
                row["seconds"] = f"{type(error).__name__}: {error}".splitlines()[0][:120]
                say(f"{kind} {shape}: {row['seconds']}")
                clear()
            rows.append(row)
        del given
        clear()
    return rows
