"""One look for everything that takes time: a bar with rate and time left, on standard error."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

T = TypeVar("T")


class RateColumn(ProgressColumn):
    """Items a second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.1f}/s" if speed else "-/s", style="progress.data.speed")


def bar(transient: bool = False) -> Progress:
    """A rich progress display with count, rate, time spent and time left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        RateColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=transient,
    )


def track(
    items: Iterable[T], description: str, total: int | None = None, weight: Callable[[T], int] = lambda _: 1
) -> Iterator[T]:
    """Pass `items` on while showing how far they are; one closing line where standard error is no terminal.

    Args:
        total: sum of the weights.
        weight: for how much an item counts.
    """
    if sys.stderr.isatty():
        with bar() as progress:
            task = progress.add_task(description, total=total)
            for item in items:
                yield item
                progress.advance(task, weight(item))
        return
    start, count = time.monotonic(), 0
    for item in items:
        yield item
        count += weight(item)
    seconds = time.monotonic() - start
    print(f"{description}: {count} in {seconds:.1f} s ({count / max(seconds, 1e-9):,.1f}/s)", file=sys.stderr)
