"""Blocks of pairs on NVIDIA GPUs: one product whose epilogue makes the slopes, then two library products with them.

The logits of a block never leave registers. Its slopes are written once in bfloat16, to a chunk that fills the chip,
and read twice by products that sum in float32; that traffic hides behind the arithmetic. Scale, 1 / N and the incoming
gradient stay out of the 16 bits. See `sigmoid_tile.py` and `softmax_tile.py` for the kernels.

With TRITON_INTERPRET=1 in the environment before the first import they run on the CPU, slowly, for tests.
"""

import math
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from medclip_lab.losses.kernels import sigmoid_tile, softmax_tile
from medclip_lab.losses.kernels.pairs import Block, Formula
from medclip_lab.losses.kernels.shapes import SHAPES
from medclip_lab.losses.kernels.targets import EvenTarget, LabelTarget, Target, places

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LOG2E = 1 / math.log(2)
HALF = torch.bfloat16, torch.float16
ALIGN = 16
"""Features are padded to a multiple: 32 bytes, for vector loads and TMA."""
CHUNK_BYTES = 2**30
"""Of the slopes that are held at a time, unless that would be too few rows to keep the GPU busy."""
SMALL_BYTES, FEWEST_ROWS, LEAST_ROWS = 2**28, 4096, 128
MOST_LABELS = 128


def capability(device: torch.device) -> int:
    """Compute capability of a GPU as one number, 90 for 9.0; 0 of what is no NVIDIA GPU."""
    if INTERPRETED:
        return 90
    if device.type != "cuda" or torch.version.hip is not None:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def missing(device: torch.device, half: torch.dtype | None, columns: int, labels: int = 0) -> str | None:
    """What keeps the fused kernels from a call, in words; None if nothing does.

    Args:
        half: dtype of the features.
        columns: texts of a rank.
        labels: K of label vectors that are compared in the kernel.
    """
    if device.type != "cuda" and not INTERPRETED:
        return f"the features are on {device}, not on an NVIDIA GPU"
    if capability(device) < min(SHAPES):
        name = torch.cuda.get_device_name(device)
        return f"an NVIDIA GPU of compute capability 8.0 is needed, {name} has {capability(device) / 10}"
    if half not in HALF:
        return "features of 16 bits are needed: cast them to bfloat16, or call the loss under torch.autocast"
    if labels > MOST_LABELS:
        return f"at most {MOST_LABELS} labels can be compared, there are {labels}"
    least = 2 * LEAST_ROWS * columns
    if least > SMALL_BYTES and least > _free(device):
        return f"one chunk takes {least / 2**30:.1f} GiB of memory, {_free(device) / 2**30:.1f} GiB are free"
    return None


def _free(device: torch.device) -> int:
    if device.type != "cuda":
        return 2**62
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0] + unused)


def chunk_rows(rows: int, columns: int, dim: int, processors: int, free: Callable[[], int]) -> int:
    """Rows of a chunk of slopes.

    Args:
        columns: of the chunk.
        processors: multiprocessors of the GPU. The product of a chunk and the texts, in tiles of 128 x 256, should
            fill them once.
        free: tells the bytes that are free, where that matters.
    """
    fill = 128 * processors // max(1, -(-dim // 256))
    row_bytes = 2 * max(1, columns)
    wanted = max(fill, SMALL_BYTES // row_bytes)
    most = CHUNK_BYTES // row_bytes
    if most < FEWEST_ROWS:
        # Short chunks starve the products: a batch this large has memory to spare.
        most = min(FEWEST_ROWS, max(most, free() // 4 // row_bytes))
    chosen = max(LEAST_ROWS, min(wanted, most) // 128 * 128)
    return max(1, min(chosen, rows))


class Engine:
    """See `pairs.Engine`.

    Args:
        image: bfloat16 or float16.
        rows: images of a block; 0 fills the GPU.
    """

    sums_cosines = True

    def __init__(self, image: Tensor, scale: Tensor, sizes: Sequence[int], rows: int) -> None:
        self.device = image.device
        self.scale = scale.detach().float().reshape(1)
        level = capability(self.device)
        self.tma = level >= 90
        self.shapes = SHAPES[max(known for known in SHAPES if known <= level)]
        columns = max(*sizes, 1)
        count = 1 if self.device.type != "cuda" else torch.cuda.get_device_properties(self.device).multi_processor_count
        self.rows = rows or chunk_rows(len(image), columns, image.shape[1], count, lambda: _free(self.device))
        self._wide = -(-columns // ALIGN) * ALIGN
        self._slopes: Tensor | None = None

    def prepare(self, features: Tensor) -> Tensor:
        short = -features.shape[1] % ALIGN
        return F.pad(features, (0, short)) if short else features.contiguous()

    def add_product(self, out: Tensor, a: Tensor, b: Tensor) -> None:
        b = b.to(a.dtype)  # slopes need the range of bfloat16
        if INTERPRETED:
            out.addmm_(a, b)
        else:
            torch.ops.aten.addmm.dtype_out(out, a, b, torch.float32, out=out)

    def _chunk(self, block: Block) -> Tensor:
        if self._slopes is None:
            dtype = torch.float32 if INTERPRETED else torch.bfloat16
            self._slopes = torch.empty(self.rows, self._wide, dtype=dtype, device=self.device)
        return self._slopes[: len(block.images), : len(block.texts)]

    def _launch(self, kernel: Any, kind: str, block: Block, slopes: Tensor | None, **arguments: Any) -> None:
        """One program for every tile of the block."""
        shape = self.shapes[kind]
        images, texts = block.images, block.texts
        places: dict[str, Any] = {"image": images, "text": texts}
        if self.tma:
            places = {
                "image": TensorDescriptor.from_tensor(images, [shape.rows, shape.depth]),
                "text": TensorDescriptor.from_tensor(texts, [shape.columns, shape.depth]),
            }
        if "stride" in arguments:
            # Without slopes nothing is stored, and any matrix will do.
            into = images if slopes is None else slopes
            form = list(into.shape), list(into.stride())
            places["slopes"] = TensorDescriptor(into, *form, [shape.rows, shape.columns]) if self.tma else into
        with self._guard():
            kernel[(shape.programs(len(images), len(texts)),)](
                **places,
                **arguments,
                rows=len(images),
                columns=len(texts),
                dim=images.shape[1],
                pair=block.pair,
                TMA=self.tma,
                INTERPRETED=INTERPRETED,
                **shape.options(),
            )

    def _guard(self) -> AbstractContextManager[Any]:
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _sums(self, kind: str, block: Block, each: int) -> Tensor:
        tiles = self.shapes[kind].programs(len(block.images), len(block.texts))
        return torch.empty(tiles, each, dtype=torch.float32, device=self.device)

    def sigmoid(self, bias: Tensor, positive_ids: Sequence[Tensor], ignored_ids: Sequence[Tensor]) -> Formula:
        shift = bias.detach().float().reshape(1)
        kind = "sigmoid-ids" if positive_ids or ignored_ids else "sigmoid"
        positive, ignored = self._ids(positive_ids), self._ids(ignored_ids)
        strides = {"image_stride": positive[0].stride(0), "text_stride": positive[1].stride(0)}
        if len(ignored[0]) and not len(positive[0]):
            strides = {"image_stride": ignored[0].stride(0), "text_stride": ignored[1].stride(0)}

        def formula(block: Block, slopes: bool) -> tuple[Tensor, Tensor | None]:
            chunk = self._chunk(block) if slopes else None
            sums = self._sums(kind, block, 3)
            self._launch(
                sigmoid_tile.sigmoid_tile,
                kind,
                block,
                chunk,
                sums=sums,
                scale=self.scale,
                bias=shift,
                positive_image=positive[0][:, block.rows],
                positive_text=positive[1][:, block.columns],
                ignored_image=ignored[0][:, block.rows],
                ignored_text=ignored[1][:, block.columns],
                **strides,
                stride=self._wide,
                POSITIVE=len(positive[0]),
                IGNORED=len(ignored[0]),
                SLOPES=slopes,
            )
            return sums.sum(0, dtype=torch.float64), chunk

        return formula

    def _ids(self, ids: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """int32 [n, N] and [n, M] that are equal where the given ids are equal and not negative."""
        if not ids:
            return (torch.empty(0, 1, dtype=torch.int32, device=self.device),) * 2
        images, texts = ids
        kinds = [places(*pair) for pair in zip(images.T.contiguous(), texts.T.contiguous(), strict=True)]
        own, other = (torch.stack(side).int() for side in zip(*kinds, strict=True))
        return own, other

    def logsumexp(self, block: Block, everything: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | float]:
        rows, columns = len(block.images), len(block.texts)
        shape = self.shapes["logsumexp"]
        high, wide = triton.cdiv(rows, shape.rows), triton.cdiv(columns, shape.columns)
        # Each of its own, so that each begins where vector loads want it whatever the sizes.
        row_tops, row_sums, column_tops, column_sums = (
            torch.empty(shape, dtype=torch.float32, device=self.device)
            for shape in ((wide, rows), (wide, rows), (high, columns), (high, columns))
        )
        own = self._sums("logsumexp", block, 1)
        self._launch(
            softmax_tile.logsumexp_tile,
            "logsumexp",
            block,
            None,
            row_tops=row_tops,
            row_sums=row_sums,
            column_tops=column_tops,
            column_sums=column_sums,
            own=own,
            scale=self.scale,
        )
        total: Tensor | float = 0.0
        if everything:
            # The sum of all logits is the product of the sums of features.
            images, texts = (part.sum(0, dtype=torch.float64) for part in (block.images, block.texts))
            total = self.scale.double()[0] * (images @ texts)
        in_rows, in_columns = self._combine(row_tops, row_sums), self._combine(column_tops, column_sums)
        return in_rows, in_columns, own.sum(dtype=torch.float64), total

    def _combine(self, tops: Tensor, sums: Tensor) -> Tensor:
        """float64 log-sum-exp of the tiles' maxima and sums [tiles, length]."""
        many, length = tops.shape
        top = torch.empty(length, dtype=torch.float32, device=self.device)
        total = torch.empty(length, dtype=torch.float64, device=self.device)
        with self._guard():
            programs = (triton.cdiv(length, 32),)
            sizes = {"STEP": 32, "BLOCK": 32, "num_warps": 4, "enable_fp_fusion": True}
            softmax_tile.combine_stats[programs](tops, sums, top, total, many, length, **sizes)
        return top.double() / LOG2E + total.log()

    def softmax(
        self, row_lse_N: Tensor, column_lse_M: Tensor, by_row: float, by_column: float, target: Target
    ) -> Formula:
        row_tops, row_factors = _split(row_lse_N, by_row)
        column_tops, column_factors = _split(column_lse_M, by_column)
        wanted = self._target(target)

        def formula(block: Block, slopes: bool) -> tuple[Tensor, Tensor | None]:
            rows, columns = block.rows, block.columns
            chunk = self._chunk(block) if slopes else None
            sums = self._sums(wanted.kind, block, 2)
            self._launch(
                softmax_tile.softmax_tile,
                wanted.kind,
                block,
                chunk,
                sums=sums,
                scale=self.scale,
                row_tops=row_tops[rows],
                row_factors=row_factors[rows],
                column_tops=column_tops[columns],
                column_factors=column_factors[columns],
                target_image=wanted.image[:, rows],
                target_text=wanted.text[:, columns],
                image_stride=wanted.image.stride(0),
                text_stride=wanted.text.stride(0),
                target_rows=wanted.rows[:, rows].contiguous(),
                target_columns=wanted.columns[:, columns].contiguous(),
                own=wanted.own,
                spread=target.spread,
                stride=self._wide,
                TARGET=wanted.code,
                KINDS=wanted.width,
                SLOPES=slopes,
            )
            agreement, cosines = sums.sum(0, dtype=torch.float64)
            if not target.in_blocks:
                agreement = torch.zeros_like(agreement)
            loss = -self.scale.double()[0] * agreement
            return torch.stack([loss, cosines, torch.zeros_like(loss)]), chunk

        return formula

    def _target(self, target: Target) -> "_Target":
        if isinstance(target, EvenTarget):
            image, text = self._ids([target.image_ids_Nn, target.text_ids_Mn])
            rows, columns = target.by_row / target.in_row[None], target.by_column / target.in_column[None]
            return _Target("softmax-ids", 1, len(image), image, text, rows.float(), columns.float(), 0.0)
        if isinstance(target, LabelTarget):
            images, texts = target.images, target.texts
            sides = [[images], [texts]]
            if target.image_known is not None and target.text_known is not None:
                images, texts = images * target.image_known, texts * target.text_known
                sides = [[images], [texts]]
                if target.similarity == "cosine":
                    sides = [[images, images.square(), target.image_known], [texts, target.text_known, texts.square()]]
            elif target.similarity == "cosine":
                sides = [[F.normalize(images, dim=1)], [F.normalize(texts, dim=1)]]
            width = max(16, triton.next_power_of_2(images.shape[1]))
            image, text = (
                torch.stack([F.pad(value.float(), (0, width - value.shape[1])) for value in side]) for side in sides
            )
            rows, columns = (
                torch.stack(_split(lse, weight))
                for lse, weight in ((target.row_lse, target.by_row), (target.column_lse, target.by_column))
            )
            known = len(image) > 1
            kind, code = ("softmax-known", 3) if known else ("softmax-labels", 2)
            return _Target(kind, code, width, image, text, rows, columns, LOG2E / target.temperature)
        none = torch.empty(1, 1, dtype=torch.float32, device=self.device)
        return _Target("softmax", 0, 1, none, none, none, none, target.own)


@dataclass(frozen=True)
class _Target:
    """What `softmax_tile.softmax_tile` is told of a target."""

    kind: str
    code: int
    width: int
    image: Tensor
    text: Tensor
    rows: Tensor
    columns: Tensor
    own: float


def _split(lse: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """float32 top and factor with exp2(z - top) * factor = weight * exp(logit - lse), z the logit in units of log 2."""
    exact = lse * LOG2E
    top = exact.float()
    return top, (weight * torch.exp2(top.double() - exact)).float()
