"""Memory as users write it ("4GB"), and what the process took at its peak."""

import ctypes
import re
import sys
from contextlib import suppress
from pathlib import Path

import pyarrow as pa

from medclip_lab.doctor import memory_gib
from medclip_lab.errors import UserError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {f"{unit}I": 2 ** (10 * power) for power, unit in enumerate("KMGT", 1)}
_STATUS = Path("/proc/self/status")
SHARE = 0.75
"""Of the machine's memory that a build may take where nobody says otherwise."""


def parse_size(text: str) -> int:
    """Bytes of "4GB", "512 MiB", "1.5G" or "1000000"; GB are 10^9 and GiB 2^30 bytes.

    Raises:
        UserError: it is no size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", text.upper())
    if match is None or not float(match[1]) or match[2] == "I":
        raise UserError(f"max-memory: {text!r} is no size: write it as 4GB, 512MiB or a number of bytes")
    return int(float(match[1]) * _UNITS[match[2]])


def show_size(size: float) -> str:
    """ "1.2 GB" for people."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size:.0f} B"


class Meter:
    """The memory of this process, everything in it, against a limit.

    Args:
        limit: bytes; None takes three quarters of the machine's memory.
    """

    def __init__(self, limit: int | None = None) -> None:
        machine = memory_gib()
        self.limit = limit or int(SHARE * (machine * 2**30 if machine else sys.maxsize))
        release()
        _forget_peak()
        self.start = _status("VmRSS")
        """Bytes that the process took before the work."""
        self._highest = 0
        self._mapped_from: int | None = None
        """Bytes of files in memory before lists were mapped, while they are."""

    def peak(self) -> int:
        """Bytes at the highest since the start (Linux; elsewhere since the process began)."""
        return self._highest if self._mapped_from is not None else max(self._highest, peak())

    def beside(self, others: int) -> None:
        """Other processes took so much beside what this one takes."""
        self._highest = max(self._highest, _status("VmRSS") + others)

    def mapping(self) -> None:
        """From now on pages of files are not counted: the system takes them back whenever it wants them.

        The highest mark of the kernel has them, so that `check` marks what there is.
        """
        self._highest, self._mapped_from = max(self._highest, peak()), _status("RssFile")

    def unmapped(self) -> None:
        """All pages count again."""
        if self._mapped_from is not None:
            self._mapped_from = None
            _forget_peak()

    def check(self) -> None:
        """Stop before the limit is passed by more than a step of the work.

        Raises:
            UserError: more is taken than allowed.
        """
        taken = _status("VmRSS")
        if self._mapped_from is not None:
            taken -= max(0, _status("RssFile") - self._mapped_from)
            self._highest = max(self._highest, taken)
        if taken > self.limit:
            raise UserError(
                f"max-memory: more than {show_size(self.limit)} were taken, nothing was written: raise it, or ask for "
                "a lower target recall"
            )


def peak() -> int:
    """Bytes that this process took at its highest."""
    return _status("VmHWM")


def _forget_peak() -> None:
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def release() -> None:
    """Hand freed memory back to the system, where it would wait for reuse."""
    pa.default_memory_pool().release_unused()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _status(field: str) -> int:
    if _STATUS.exists():
        lines = _STATUS.read_text(encoding="utf-8").splitlines()
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), 0)
    from resource import RUSAGE_SELF, getrusage

    return getrusage(RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
