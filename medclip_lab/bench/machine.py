"""On what something was measured, and the memory it took."""

import os
import resource
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from medclip_lab.doctor import commit, cpu_name, memory_gib


def facts(packages: Sequence[str] = ("torch", "numpy")) -> dict[str, Any]:
    """On what, when and with which versions something was measured."""
    return {
        "commit": commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": memory_gib(),
        "versions": {name: version(name) for name in packages},
    }


def memory_mib(peak: bool = False) -> float:
    """What this process holds of memory now, or held at most.

    Where the kernel tells it, of the program alone: `getrusage` would count the process that started it as well.
    """
    status = Path("/proc/self/status")
    name = "VmHWM:" if peak else "VmRSS:"
    if status.exists():
        line = next(line for line in status.read_text(encoding="ascii").splitlines() if line.startswith(name))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def stolen_seconds() -> float:
    """Time of cores that the machine beneath a virtual one gave to others, since it started; 0 where nobody tells."""
    path = Path("/proc/stat")
    if not path.exists():
        return 0.0
    first = path.read_text(encoding="ascii").splitlines()[0].split()
    return int(first[8]) / os.sysconf("SC_CLK_TCK") if len(first) > 8 else 0.0
