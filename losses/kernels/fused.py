"""Blocks of pairs on NVIDIA GPUs: one product whose epilogue makes the slopes, then two library products with them.

The logits of a block never leave registers. Its slopes are written once in bfloat16, to a chunk that fills the chip,
and read twice by products that sum in float32; that traffic hides behind the arithmetic. Scale, 1 / N and the incoming
gradient stay out of the 16 bits. See `sigmoid_tile.py` and `softmax_tile.py` for the kernels.

With TRITON_INTERPRET=1 in the environment before the first import they run on the CPU, slowly, for tests.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from medclip_lab.losses.kernels import label_tile, sigmoid_tile, softmax_tile
from medclip_lab.losses.kernels.pairs import Block, Formula
from medclip_lab.losses.kernels.shapes import SHAPES
from medclip_lab.losses.kernels.targets import LabelTarget, Target, Vectors
from medclip_lab.losses.kernels.tile_values import LOG2E, by_tile, label_sides, same_ids, split, told

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HALF = torch.bfloat16, torch.float16
ALIGN = 16
"""Features are padded to a multiple: 32 bytes, for vector loads and TMA."""
CHUNK_BYTES = 2**30
"""Of the slopes that are held at a time, unless that would be too few rows to keep the GPU busy."""
SMALL_BYTES, FEWEST_ROWS, LEAST_ROWS = 2**28, 4096, 128
LABEL_TILE = 64
"""Rows and columns of a tile of similarities of labels."""
LABEL_ROWS = 4096
"""Distinct label vectors that are compared with all others at a time."""


def capability(device: torch.device) -> int:
    """Compute capability of a GPU as one number, 90 for 9.0; 0 of what is no NVIDIA GPU."""
    if INTERPRETED:
        return 90
    if device.type != "cuda" or torch.version.hip is not None:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def missing(device: torch.device, half: torch.dtype | None, columns: int) -> str | None:
    """What keeps the fused kernels from a call, in words; None if nothing does.

    Args:
        half: dtype of the features.
        columns: texts of a rank.
    """
    if device.type != "cuda" and not INTERPRETED:
        return f"the features are on {device}, not on an NVIDIA GPU"
    if capability(device) < min(SHAPES):
        name = torch.cuda.get_device_name(device)
        return f"an NVIDIA GPU of compute capability 8.0 is needed, {name} has {capability(device) / 10}"
    if half not in HALF:
        return "features of 16 bits are needed: cast them to bfloat16, or call the loss under torch.autocast"
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
        ids = [same_ids(kinds) for kinds in (positive_ids, ignored_ids)]
        of_images, of_texts = ([*positive, *ignored] for positive, ignored in zip(*ids, strict=True))

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
                image_ids=by_tile(of_images, block.rows, self.shapes[kind].rows) if of_images else self.scale,
                text_ids=by_tile(of_texts, block.columns, self.shapes[kind].columns) if of_texts else self.scale,
                stride=self._wide,
                POSITIVE=len(ids[0][0]),
                IGNORED=len(ids[1][0]),
                SLOPES=slopes,
            )
            return sums.sum(0, dtype=torch.float64), chunk

        return formula

    def logsumexp(self, block: Block, everything: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | float]:
        rows, columns = len(block.images), len(block.texts)
        shape = self.shapes["logsumexp"]
        high, wide = triton.cdiv(rows, shape.rows), triton.cdiv(columns, shape.columns)
        row_tops, row_sums, column_tops, column_sums = self._tops_and_sums(high, wide, rows, columns)
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

    def _tops_and_sums(self, high: int, wide: int, rows: int, columns: int) -> list[Tensor]:
        """Room for those of the rows in every column of tiles, and for those of the columns in every row of tiles."""
        shapes = ((wide, rows), (wide, rows), (high, columns), (high, columns))
        # Each of its own, so that each begins where vector loads want it whatever the sizes.
        return [torch.empty(shape, dtype=torch.float32, device=self.device) for shape in shapes]

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
        wanted = told(target)
        none = self.scale.view(1, 1, 1)
        image_labels, text_labels = wanted.labels or (none, none)
        of_rows = [*split(row_lse_N, by_row), *wanted.of_rows]
        of_columns = [*split(column_lse_M, by_column), *wanted.of_columns]
        shape = self.shapes[wanted.kind]

        def formula(block: Block, slopes: bool) -> tuple[Tensor, Tensor | None]:
            rows, columns = block.rows, block.columns
            chunk = self._chunk(block) if slopes else None
            sums = self._sums(wanted.kind, block, 3)
            self._launch(
                softmax_tile.softmax_tile,
                wanted.kind,
                block,
                chunk,
                sums=sums,
                scale=self.scale,
                row_values=by_tile(of_rows, rows, shape.rows),
                column_values=by_tile(of_columns, columns, shape.columns),
                image_labels=image_labels[:, rows],
                text_labels=text_labels[:, columns],
                image_stride=image_labels.stride(0),
                text_stride=text_labels.stride(0),
                width=image_labels.shape[2],
                table=none if wanted.table is None else wanted.table,
                own=wanted.own,
                spread=target.spread,
                stride=self._wide,
                TARGET=wanted.code,
                KINDS=wanted.kinds,
                VALUES=len(of_rows),
                SLOPES=slopes,
            )
            agreement, cosines, similarities = sums.sum(0, dtype=torch.float64)
            if isinstance(target, LabelTarget):
                target.agreement += similarities / LOG2E  # 0 where there is a table
            loss = -self.scale.double()[0] * agreement
            return torch.stack([loss, cosines, torch.zeros_like(loss)]), chunk

        return formula

    def label_sums(self, images: Vectors, texts: Vectors, target: LabelTarget) -> tuple[Tensor, Tensor]:
        """See `targets.LabelSums`."""
        own, other = label_sides(images.values, images.known, texts.values, texts.known, target.similarity)
        row_lse = torch.empty_like(images.counts)
        column_lse = torch.full_like(texts.counts, float("-inf"))
        many, step, columns = texts.counts.float(), LABEL_ROWS, len(texts)
        for start in range(0, len(images), step):
            part = own[:, start : start + step]
            rows = part.shape[1]
            high, wide = triton.cdiv(rows, LABEL_TILE), triton.cdiv(columns, LABEL_TILE)
            found = self._tops_and_sums(high, wide, rows, columns)
            with self._guard():
                label_tile.label_logsumexp_tile[(high * wide,)](
                    part,
                    other,
                    own.stride(0),
                    other.stride(0),
                    images.counts[start : start + step].float(),
                    many,
                    *found,
                    LOG2E / target.temperature,
                    rows,
                    columns,
                    own.shape[2],
                    NORMS=len(own) > 1,
                    BM=LABEL_TILE,
                    BN=LABEL_TILE,
                    GROUP=8,
                    num_warps=4,
                    enable_fp_fusion=True,
                )
            row_lse[start : start + step] = self._combine(*found[:2])
            column_lse = torch.logaddexp(column_lse, self._combine(*found[2:]))
        return row_lse, column_lse
