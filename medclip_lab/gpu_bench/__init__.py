"""The fused losses on a GPU: are they right, how fast are they, how much memory do they take.

Every figure is measured in the run that tells it; a peer that is not installed is said to be so. Needs no
more than torch and Triton.
"""

import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

import torch

from medclip_lab.doctor import commit
from medclip_lab.errors import UserError
from medclip_lab.gpu_bench.accuracy import behaviour, correctness
from medclip_lab.gpu_bench.cases import TINY, Machine, Say, Sizes, clear
from medclip_lab.gpu_bench.table import markdown
from medclip_lab.gpu_bench.timing import largest, matrix_rate, memory, speed

__all__ = ["TINY", "Sizes", "markdown", "measure"]


def _commit() -> str | None:
    try:
        return commit()
    except OSError:  # no git here
        return None


def facts(machine: Machine) -> dict[str, Any]:
    """Hardware and versions."""

    def installed(name: str) -> str:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    told: dict[str, Any] = {
        "commit": _commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": machine.device,
        "impl": machine.impl,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "versions": {name: installed(name) for name in ("torch", "triton", "open_clip_torch")},
    }
    if machine.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        told["gpu"] = properties.name
        told["capability"] = f"{properties.major}.{properties.minor}"
        told["memory_gib"] = round(properties.total_memory / 2**30, 1)
        told["processors"] = properties.multi_processor_count
        told["cuda"] = torch.version.cuda
    return told


def _tune(machine: Machine, sizes: Sizes, say: Say, tiles: Sequence[str]) -> Any:
    from medclip_lab.gpu_bench.tuning import tune  # Triton is not everywhere

    return tune(machine, sizes, say, tiles)


def measure(
    device: str = "cuda",
    impl: str = "fused",
    sizes: Sizes | None = None,
    say: Say = print,
    parts: Sequence[str] = (),
    tiles: Sequence[str] = (),
) -> Iterator[tuple[str, Any]]:
    """Each part of the report as soon as it is there: "facts", "correctness", "behaviour", "matrix_rate", "speed", ...

    Args:
        device: "cuda", or "cpu" for a rehearsal with another `impl`.
        parts: which; all but "tune" by default, which compiles some eighty kernels.
        tiles: kinds of tile that "tune" tries; all by default.

    Raises:
        UserError: no such device.
    """
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise UserError(f"no device {device!r} on this machine")
    sizes = sizes or Sizes()
    machine = Machine(device, impl)
    makers: dict[str, Callable[[], Any]] = {
        "correctness": lambda: correctness(machine, sizes, say),
        "behaviour": lambda: behaviour(machine, sizes),
        "matrix_rate": lambda: matrix_rate(machine, sizes.rate),
        "speed": lambda: speed(machine, sizes, say),
        "memory": lambda: memory(machine, sizes, say),
        "largest": lambda: largest(machine, sizes, say),
        "tune": lambda: _tune(machine, sizes, say, tiles),
    }
    if unknown := [part for part in parts if part not in makers]:
        raise UserError(f"no part is named {', '.join(unknown)}; there are {', '.join(makers)}")
    yield "facts", facts(machine)
    for name, make in makers.items():
        if name in parts or not (parts or name == "tune"):
            start = time.perf_counter()
            yield name, make()
            say(f"{name}: {time.perf_counter() - start:.0f} s")
            clear()
