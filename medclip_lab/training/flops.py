"""How much a step computes, and how much a device could."""

import torch
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from medclip_lab.models.dual_encoder import DualEncoder

ROWS = 2  # a batch norm that trains wants more than one
PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "GH200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A40": 150e12,
    "A10": 125e12,
    "A10G": 70e12,
    "V100": 125e12,
    "T4": 65e12,
}
"""Dense products of 16 bits a second, from NVIDIA's data sheets."""


def peak_flops(device_name: str) -> float | None:
    """Floating-point operations a second of 16 bits; None for a device that is not in the table."""
    words = device_name.replace("-", " ").split()
    for name, peak in PEAKS.items():
        if all(part in words for part in name.split()):
            return peak
    return None


def flops_per_row(encoder: DualEncoder, image_size: int, context_length: int) -> dict[str, float] | None:
    """Modality -> floating-point operations of a forward and a backward of one row; a product and a sum are two.

    Counted without computing, on tensors without values, and without the loss. What is frozen has no backward; what
    activation checkpointing runs again is counted again. None where a tower cannot run without values.
    """
    state = {**dict(encoder.named_parameters()), **dict(encoder.named_buffers())}
    meta = {
        name: torch.empty_like(value, device="meta").requires_grad_(value.requires_grad)
        for name, value in state.items()
    }
    inputs = {
        "image": torch.empty(ROWS, 1, image_size, image_size, dtype=torch.uint8, device="meta"),
        "text": torch.empty(ROWS, context_length, dtype=torch.int64, device="meta"),
    }
    counts = {}
    for name, value in inputs.items():
        try:
            with FlopCounterMode(display=False) as counter:
                features = functional_call(encoder, meta, ({name: value},))[name]
                if features.requires_grad:
                    features.sum().backward()
        except (RuntimeError, NotImplementedError):
            return None
        counts[name] = counter.get_total_flops() / ROWS
    return counts
