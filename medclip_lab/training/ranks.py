"""Do all ranks make the same run? Found out before the first batch, by name of the odd one."""

import dataclasses
import functools
import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch

from medclip_lab import distributed
from medclip_lab.errors import UserError
from medclip_lab.version import __version__


@dataclass
class RanksConfig:
    """How the processes of a run share it; `torchrun` starts them."""

    strategy: Literal["ddp", "fsdp"] = "ddp"
    """"ddp" gives every rank the whole model; "fsdp" (FSDP2) a part of it and of the optimizer's state, for models that
    do not fit otherwise."""
    timeout_minutes: float = 10.0
    """How long a rank waits for the others before the job ends: more than the slowest step, validation or save."""

    def __post_init__(self) -> None:
        if self.timeout_minutes <= 0:
            raise ValueError(f"ranks.timeout_minutes must be positive, got {self.timeout_minutes}")

    @property
    def timeout(self) -> timedelta:
        return timedelta(minutes=self.timeout_minutes)


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted name -> value of everything in a config."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if not isinstance(value, Mapping) or not value:
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= flat(inner, f"{prefix}.{key}" if prefix else str(key))
    return found


@functools.cache
def code_version() -> dict[str, str]:
    """Version of this package, digest of its files, and version of torch."""
    root = Path(__file__).parents[1]
    mark = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        mark.update(f"{path.relative_to(root)}\n".encode())
        mark.update(path.read_bytes())
    return {"medclip_lab": __version__, "sources": mark.hexdigest()[:16], "torch": torch.__version__}


def refuse_odd_ranks(facts: Mapping[str, Any], problem: str | None) -> None:
    """Compare what all ranks are about to do; every rank calls this.

    Args:
        facts: name -> what must be equal.
        problem: what keeps this rank from it. To raise it here alone would leave the others waiting.

    Raises:
        UserError: on every rank, if one has a problem or differs from the others.
    """
    answers = distributed.everyones((dict(facts), problem))
    for index, (_, trouble) in enumerate(answers):
        if trouble is not None:
            raise UserError(trouble if index == distributed.rank() else f"on rank {index}: {trouble}")
    told = [answer for answer, _ in answers]
    for name in dict.fromkeys(name for answer in told for name in answer):
        values = [answer.get(name) for answer in told]
        counts = Counter(map(repr, values))
        usual, many = counts.most_common(1)[0]
        if many == len(values):
            continue
        odd = next(index for index, value in enumerate(values) if repr(value) != usual)
        others = f"{many} others" if many > 1 else f"rank {next(i for i, v in enumerate(values) if repr(v) == usual)}"
        raise UserError(
            f"ranks disagree on {name}: rank {odd} has {values[odd]!r}, unlike {others} with {usual}: start all with "
            "the same config, data and code"
        )
