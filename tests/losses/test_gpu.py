"""The losses on a CUDA device: the same values and gradients, nothing of the size of the pairs in memory."""

import pytest
import torch

from medclip_lab.losses.testing import Inputs, draw, outcome

from .test_contract import KINDS, Kind

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def on_gpu(inputs: Inputs) -> Inputs:
    leaves, extra = ({name: value.cuda() for name, value in part.items()} for part in (inputs.leaves, inputs.extra))
    return Inputs(leaves, extra)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_gpu_is_the_cpu(kind: Kind, impl: str, dtype: torch.dtype) -> None:
    inputs = draw(kind(), 67, 40).to(dtype)
    expected = outcome(kind(impl="reference"), inputs.to(torch.float64))
    found = outcome(kind(impl=impl, chunk_size=16), on_gpu(inputs))
    # What is stored in half precision is rounded; the loss never is.
    within = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}[dtype]
    torch.testing.assert_close(found.value.cpu().double(), expected.value, rtol=min(within, 1e-5), atol=1e-9)
    for name in ("image_features", "text_features"):
        error = (found.gradients[name].cpu().double() - expected.gradients[name]).norm()
        assert error <= within * expected.gradients[name].norm(), name


@pytest.mark.parametrize("kind", ["clip", "siglip", "multi-positive", "soft"])
def test_memory_on_the_gpu_is_linear(kind: str) -> None:
    peaks = []
    for rows in (8192, 16384):
        loss = KINDS[kind](impl="chunked")
        inputs = on_gpu(draw(loss, rows, 64).to(torch.float32))
        outcome(loss, inputs.share([256], 0))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        outcome(loss, inputs)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 16384 * 16384 * 4 / 4
    assert peaks[1] < 2.5 * peaks[0]
