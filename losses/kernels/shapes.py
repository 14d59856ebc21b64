"""Sizes of the tiles of the fused kernels, by GPU and kind of tile."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """Sizes of a tile and of the program that works on it."""

    rows: int
    columns: int
    depth: int
    parts: int
    """The epilogue takes the columns in so many parts, so that nothing spills."""
    warps: int = 8
    stages: int = 3
    lanes: int = 4
    """Threads that share a row of the product: 4 of a warp, times the warps side by side."""

    def __str__(self) -> str:
        size = f"{self.rows} x {self.columns} x {self.depth}"
        return f"{size}, {self.parts} parts, {self.warps} warps, {self.stages} stages"

    def programs(self, rows: int, columns: int) -> int:
        """Tiles that cover so many rows and columns."""
        return -(-rows // self.rows) * -(-columns // self.columns)

    def options(self) -> dict[str, int]:
        return {
            "BM": self.rows,
            "BN": self.columns,
            "BK": self.depth,
            "PARTS": self.parts,
            "LANES": self.lanes,
            "GROUP": 8,
            "num_warps": self.warps,
            "num_stages": self.stages,
            # What later versions of Triton no longer do unasked: a sum and a product in one instruction.
            "enable_fp_fusion": True,
        }


SHAPES: dict[int, dict[str, Shape]] = {
    # Up to 128 registers and 113 KiB two programs share a multiprocessor: one multiplies while the other does the rest.
    90: {
        "sigmoid": Shape(128, 128, 64, 16),
        "sigmoid-ids": Shape(128, 128, 64, 16),
        "logsumexp": Shape(128, 128, 64, 8),
        "softmax": Shape(128, 128, 64, 16),
        "softmax-ids": Shape(128, 128, 64, 16),
        "softmax-table": Shape(128, 128, 64, 16),
        "softmax-labels": Shape(128, 64, 64, 4),
        "softmax-known": Shape(128, 64, 64, 4),
    },
    80: {
        "sigmoid": Shape(128, 128, 32, 4, lanes=16),
        "sigmoid-ids": Shape(128, 128, 32, 1, lanes=16),
        "logsumexp": Shape(128, 128, 32, 4, lanes=16),
        "softmax": Shape(128, 128, 32, 4, lanes=16),
        "softmax-ids": Shape(128, 128, 32, 4, lanes=16),
        "softmax-table": Shape(128, 128, 32, 4, lanes=16),
        "softmax-labels": Shape(128, 64, 32, 2, lanes=16),
        "softmax-known": Shape(64, 64, 32, 2, warps=4, lanes=8),
    },
}
"""By compute capability from which they hold and kind of tile; what a test compiles to see that nothing spills."""
