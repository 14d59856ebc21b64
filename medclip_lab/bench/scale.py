"""A model of a training step's time, memory and network on many GPUs, fitted to what our trainer takes here.

What is measured here: how time and memory grow with the rows of a rank, and how near a training step comes to the speed
of bare matrix products. What no machine here can tell is assumed, and stands in `Cluster` with its source.
"""

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from medclip_lab.bench.data_shards import KINDS, made, write
from medclip_lab.bench.machine import facts
from medclip_lab.bench.train import CASES, PACKAGES, Case, run_side, write_model
from medclip_lab.errors import UserError

FITTED, CHECKED = (4, 8, 16), 12  # rows of the steps that the line is laid through, and of one that it must foretell
STEPS, WARM_UP = 8, 3
BYTES_A_PARAMETER = 16  # AdamW in float32: weight, gradient and two moments


@dataclass(frozen=True)
class Cluster:
    """What is assumed of the machines. Everything here is of NVIDIA's data sheets but for `mfu`."""

    tflops: float = 989.0
    """bf16, dense, of an H200."""
    memory_gbs: float = 4800.0
    mfu: float = 0.35
    """Share of that which the towers' products reach. Published runs of open_clip on A100 come to 0.11 to 0.13 of their
    peak (samples a second and FLOPs as open_clip's documentation gives them)."""
    node: int = 8
    nvlink_gbs: float = 450.0
    """One direction, a GPU, inside a node."""
    network_gbs: float = 50.0
    """One direction, a GPU, between nodes: 400 Gb/s."""
    hidden: float = 2 / 3
    """Share of the towers' time, the backward, behind which gradients may travel."""


@dataclass(frozen=True)
class Model:
    """A dual encoder as the model of a step sees it."""

    gflops: float
    """Forward, a sample, both towers."""
    parameters: float
    dim: int
    activation_mib: float
    """Kept for the backward, a sample, in bf16."""


# ViT-B/16 and its text tower: FLOPs of open_clip's profile; activations scaled from those measured here by FLOPs.
VIT_B_16 = Model(gflops=41.09, parameters=149.6e6, dim=512, activation_mib=0.0)
PLANS = ((8, 512), (64, 512), (1024, 32), (1024, 512))
"""GPUs and rows of each: 32,768 rows is where larger batches stop to pay (Zhai et al. 2023), so 1,024 GPUs have few."""


def bench_scale(say: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Train ViT-S/16 with several batch sizes, lay a line through them, foretell another, and extrapolate.

    Raises:
        UserError: the machine was so busy that the line does not rise.
    """
    case = CASES["compute-bound"]
    flops, rate = _flops_of(case), _matmul_gflops()
    runs: dict[int, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(prefix="medclip-lab-bench-") as name:
        folder = Path(name)
        write(made(KINDS[case.kind], 4 * max(FITTED)), folder / "ours", folder / "theirs")
        write_model(case.spec, folder / "model")
        for rows in (*FITTED, CHECKED):
            runs[rows] = _step_of(replace(case, batch=rows, steps=STEPS), folder)
            if say is not None:
                say(f"{rows:>3} rows: {runs[rows]['seconds']:.3f} s a step, {runs[rows]['peak_mib']:.0f} MiB")
    seconds = np.polyfit(FITTED, [runs[rows]["seconds"] for rows in FITTED], 1)
    memory = np.polyfit(FITTED, [runs[rows]["peak_mib"] for rows in FITTED], 1)
    if min(seconds[0], memory[0]) <= 0:
        raise UserError("bench scale: time or memory did not grow with the batch: other work disturbs this machine")
    foretold = float(np.polyval(seconds, CHECKED))
    # Half of the floats' bytes in bf16; the profile of memory is that of the arithmetic.
    activation = float(memory[0]) / 2 * VIT_B_16.gflops / (flops / 1e9)
    model, cluster = replace(VIT_B_16, activation_mib=activation), Cluster()
    return {
        **facts(PACKAGES),
        "here": {
            "forward_gflops_a_sample": round(flops / 1e9, 2),
            "matmul_gflops": round(rate, 1),
            "runs": {str(rows): run for rows, run in runs.items()},
            "seconds_a_row": round(float(seconds[0]), 4),
            "seconds_a_step": round(float(seconds[1]), 4),
            "share_of_matmul_rate": round(3 * flops / 1e9 / float(seconds[0]) / rate, 3),
            "mib_a_row": round(float(memory[0]), 1),
            "foretold_seconds": round(foretold, 3),
            "foretold_error": round(foretold / runs[CHECKED]["seconds"] - 1, 3),
        },
        "assumed": asdict(cluster) | {"model": asdict(model)},
        "plans": [foretell(model, cluster, gpus, rows) for gpus, rows in PLANS],
    }


def foretell(model: Model, cluster: Cluster, gpus: int, rows: int) -> dict[str, Any]:
    """Milliseconds, GiB and network of one rank's step under DDP, with every pair of the global batch in the loss.

    Args:
        gpus: ranks.
        rows: of each.
    """
    batch = gpus * rows
    flop_ms = cluster.tflops * cluster.mfu * 1e9  # FLOP in a millisecond
    bandwidth = (cluster.nvlink_gbs if gpus <= cluster.node else cluster.network_gbs) * 1e6  # bytes in a millisecond
    others = (gpus - 1) / gpus
    towers = 3 * model.gflops * 1e9 * rows / flop_ms
    # Three products of rows x batch x dim (losses/kernels): logits, and the gradients of both sides.
    loss = 6 * rows * batch * model.dim / flop_ms
    # Texts go round in float32 and their gradients come back, beside the products above.
    features = 2 * others * batch * model.dim * 4 / bandwidth
    gradients = 2 * others * model.parameters * 4 / bandwidth
    optimizer = 1.75 * BYTES_A_PARAMETER * model.parameters / (cluster.memory_gbs * 1e6)  # 4 arrays read, 3 written
    exposed = max(0.0, gradients - cluster.hidden * towers) + max(0.0, features - loss)
    step = towers + loss + optimizer + exposed
    memory = BYTES_A_PARAMETER * model.parameters + model.activation_mib * 2**20 * rows + 10 * batch * model.dim
    return {
        "gpus": gpus,
        "rows": rows,
        "batch": batch,
        "towers_ms": round(towers, 1),
        "loss_ms": round(loss, 2),
        "optimizer_ms": round(optimizer, 2),
        "features_ms": round(features, 2),
        "gradients_ms": round(gradients, 2),
        "exposed_ms": round(exposed, 2),
        "step_ms": round(step, 1),
        "samples_per_second": round(1000 * batch / step),
        "samples_per_second_a_gpu": round(1000 * rows / step),
        "memory_gib": round(memory / 2**30, 1),
    }


def table(result: dict[str, Any]) -> str:
    """Markdown of what was measured and what is foretold."""
    here = result["here"]
    lines = [
        f"Here: {here['seconds_a_step']:.3f} s + {here['seconds_a_row']:.4f} s a row; "
        f"{here['share_of_matmul_rate']:.0%} of the rate of matrix products; {here['mib_a_row']:.0f} MiB a row; "
        f"a batch of {CHECKED} foretold within {here['foretold_error']:+.1%}",
        "",
        "| GPUs | rows each | batch | towers ms | loss | optimizer | network not hidden | step ms | samples/s | a GPU "
        "| GiB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for plan in result["plans"]:
        lines.append(
            f"| {plan['gpus']:,} | {plan['rows']} | {plan['batch']:,} | {plan['towers_ms']} | {plan['loss_ms']} | "
            f"{plan['optimizer_ms']} | {plan['exposed_ms']} | {plan['step_ms']} | {plan['samples_per_second']:,} | "
            f"{plan['samples_per_second_a_gpu']:,} | {plan['memory_gib']} |"
        )
    return "\n".join(lines)


def _step_of(case: Case, folder: Path) -> dict[str, float]:
    run = run_side("train", case, folder)
    moments = np.array(run["moments"])[:, 0]
    return {
        "seconds": round(float(np.diff(moments[WARM_UP:]).min()), 4),  # other work on the machine only adds
        "peak_mib": float(run["peak_mib"]),
    }


def _flops_of(case: Case) -> float:
    """FLOPs of one sample's forward through both towers, two for a multiplication and addition."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from medclip_lab.models.spec import build_spec

    model: Any = build_spec(json.loads(json.dumps(case.spec)))
    size = case.spec["vision_cfg"]["image_size"]
    counter = FlopCounterMode(display=False)
    with counter:  # in training mode: the fast path of inference is one operator that nobody counts
        model.encode_image(torch.zeros(1, 3, size, size))
        model.encode_text(torch.zeros(1, case.spec["text_cfg"]["context_length"], dtype=torch.int64))
    return float(counter.get_total_flops())


def _matmul_gflops(side: int = 1536, repeats: int = 5) -> float:
    """Of a float32 product, the best of several: the ceiling of this machine."""
    import torch

    a, b = torch.randn(side, side), torch.randn(side, side)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best / 1e9
