"""The losses over all pairs without a matrix of all pairs."""

import torch


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator] # a graph is for one device and dtype
def missing(device: torch.device, half: torch.dtype | None, columns: int) -> str | None:
    """What keeps the fused kernels from a call; None if nothing does. See `fused.missing`."""
    try:
        from medclip_lab.losses.kernels import fused
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    return fused.missing(device, half, columns)
