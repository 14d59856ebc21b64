"""What a process and all it started cost, by the kernel's own figures, and why it failed."""

import os
import signal
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from subprocess import CompletedProcess

PAGE, TICKS = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_CLK_TCK")


def why_failed(run: "CompletedProcess[str]") -> str:
    """The last line a process wrote to standard error; one that was killed may have written none."""
    if said := run.stderr.strip().splitlines():
        return said[-1]
    if run.returncode == -signal.SIGKILL:
        return "killed: out of memory?"
    return f"exit code {run.returncode}, and not a word"


def tree(process: int) -> Iterator[int]:
    """The process and its descendants; one that is gone is left out."""
    if not Path(f"/proc/{process}").exists():
        return
    children = [_read(str(path)).split() for path in Path(f"/proc/{process}/task").glob("*/children")]
    yield process
    for child in chain.from_iterable(children):
        yield from tree(int(child))


def cpu_seconds(process: int) -> float:
    """Seconds of a core that a tree has used, in user and system mode."""
    fields = (_read(f"/proc/{one}/stat").rpartition(")")[2].split() for one in tree(process))
    return sum(int(told[11]) + int(told[12]) for told in fields if told) / TICKS


def resident_mib(process: int) -> float:
    """Memory that a tree holds; pages that its processes share count for each."""
    fields = (_read(f"/proc/{one}/statm").split() for one in tree(process))
    return sum(int(told[1]) for told in fields if told) * PAGE / 2**20


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
