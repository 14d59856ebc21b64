"""Learning rate over the steps of a run, as a share of its peak."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Kind = Literal["cosine", "constant", "rsqrt", "wsd"]


def count(steps: int, share: float) -> int:
    """A share of the steps below 1, a number of steps from 1 on."""
    return int(share) if share >= 1 else round(steps * share)


def check_share(name: str, value: float) -> None:
    """Refuse what is neither a share nor a number of steps.

    Raises:
        ValueError: names it.
    """
    if not (0 <= value < 1 or (value >= 1 and value == int(value))):
        raise ValueError(f"{name} is a share of the steps in [0, 1) or a whole number of them, got {value}")


@dataclass(frozen=True)
class Schedule:
    """When a group of parameters trains, and how fast.

    The rate rises linearly over `warmup` steps from `start` on. After that
        cosine     half a cosine down to `final_lr` (Loshchilov and Hutter, ICLR 2017, arXiv 1608.03983);
        constant   stays;
        rsqrt      falls with one over the root of the steps since `start`, as in Vaswani et al., NeurIPS 2017;
        wsd        stays (warm-up, stable, decay; Hu et al., 2024, arXiv 2404.06395).
    The last `decay` steps of "rsqrt" and "wsd" go down to `final_lr` as one minus the root of the part that is done
    (Hägele et al., NeurIPS 2024, arXiv 2405.18392). Before them neither depends on `steps`.
    """

    kind: Kind
    steps: int
    """Of the run."""
    warmup: int
    decay: int = 0
    final_lr: float = 0.0
    start: int = 0
    """The first step that trains."""
    stop: int | None = None
    """The first one that does so no more; None: all do to the end."""

    def __post_init__(self) -> None:
        if self.kind in ("rsqrt", "wsd") and self.start + self.warmup + self.decay > self.steps:
            raise ValueError(
                f"optim: {self.warmup} steps of warmup and {self.decay} of decay from step {self.start} on are more "
                f"than the {self.steps} of the run"
            )

    def trains(self, step: int) -> bool:
        return self.start <= step and (self.stop is None or step < self.stop)

    def __call__(self, step: int) -> float:
        """The share of the peak at a step; 0 where nothing trains."""
        if not self.trains(step):
            return 0.0
        step, steps = step - self.start, self.steps - self.start
        rising = max(1, self.warmup)
        if step < rising:
            return (step + 1) / rising
        if self.kind == "cosine":
            done = min(1.0, (step - rising) / max(1, steps - rising))
            return self.final_lr + (1 - self.final_lr) * (1 + math.cos(math.pi * done)) / 2
        falling = min(step, steps - self.decay)
        top = math.sqrt(rising / (falling + 1)) if self.kind == "rsqrt" else 1.0
        if self.kind == "constant" or step <= steps - self.decay:
            return top
        done = min(1.0, (step - (steps - self.decay)) / self.decay)
        return self.final_lr + (top - self.final_lr) * (1 - math.sqrt(done))

    def function(self) -> Callable[[int], float]:
        """A plain function: torch would write a callable object's fields into the checkpoint, and read them again."""
        return lambda step: self(step)


def shared_steps(first: Schedule, second: Schedule) -> int:
    """From the start on, the steps whose rates are the same in both."""
    for step in range(min(first.steps, second.steps)):
        if first(step) != second(step):
            return step
    return min(first.steps, second.steps)
