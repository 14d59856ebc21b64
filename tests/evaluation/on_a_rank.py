"""What every rank of a group runs: in a file of its own, as each process imports it anew."""

from typing import Any

import numpy as np

from medclip_lab.evaluation import retrieval as rooms


def both_retrievals(seed: int) -> Any:
    """The same features everywhere, in blocks small enough that each rank has several."""
    rng = np.random.default_rng(seed)
    left, right = rng.normal(size=(50, 6)).astype(np.float32), rng.normal(size=(50, 6)).astype(np.float32)
    groups = [str(number // 2) for number in range(50)]
    findings = rng.random((50, 4)) < 0.4
    rows, rooms.ROWS = rooms.ROWS, 7
    try:
        found = rooms.retrieval(left, right, groups, groups)
        return found, rooms.overlap_retrieval(left, right, findings, findings)
    finally:
        rooms.ROWS = rows
