"""In which numbers a run computes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

from medclip_lab.errors import UserError

Precision = Literal["auto", "32-true", "bf16-mixed", "16-mixed"]


def resolve_precision(precision: Precision, accelerator: str) -> Literal["32-true", "bf16-mixed", "16-mixed"]:
    """What "auto" means on this machine.

    Raises:
        UserError: 16-mixed without a GPU.
    """
    gpu = accelerator != "cpu" and torch.cuda.is_available()
    if precision == "16-mixed" and not gpu:
        raise UserError("trainer.precision: 16-mixed needs a GPU; a CPU takes 'bf16-mixed' or '32-true'")
    if precision != "auto":
        return precision
    if gpu:
        return "bf16-mixed" if torch.cuda.is_bf16_supported() else "16-mixed"
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # torch before 2.11 cannot say
    fast = capabilities.get("amx_bf16") or capabilities.get("avx512_bf16")
    return "bf16-mixed" if fast else "32-true"


@contextmanager
def full_float32() -> Iterator[None]:
    """Matrix products of float32 in float32, whatever the towers may do: a loss multiplies rounding by its scale."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def compile_towers(model: Any, backend: str) -> None:
    """Have torch compile the towers of an open_clip model where they stand: names and weights stay as they are.

    Raises:
        UserError: no such backend.
    """
    known = torch.compiler.list_backends(exclude_tags=())
    if backend not in known:
        raise UserError(f"trainer.compile: unknown backend {backend!r}; one of {', '.join(known)}")
    for tower in (model.visual, model.text if hasattr(model, "text") else model.transformer):
        tower.compile(backend=backend)
