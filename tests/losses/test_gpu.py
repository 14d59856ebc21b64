"""The losses on a CUDA device: the same values and gradients, nothing of the size of the pairs in memory."""

import os
import socket
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from medclip_lab.losses.kernels import targets
from medclip_lab.losses.testing import Inputs, Outcome, draw, outcome

from .test_contract import KINDS, Kind, relabelled

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
FUSED = ["clip", "clip-convirt", "clip-smooth", "siglip", "siglip-ids", "multi-positive", "soft", "soft-ignore"]


def on_gpu(inputs: Inputs) -> Inputs:
    leaves, extra = ({name: value.cuda() for name, value in part.items()} for part in (inputs.leaves, inputs.extra))
    return Inputs(leaves, extra)


def compare(found: Outcome, expected: Outcome, inputs: Inputs, within: float) -> None:
    torch.testing.assert_close(found.value.cpu().double(), expected.value, rtol=min(within, 1e-5), atol=1e-7)
    rows = len(inputs.leaves["image_features"])
    for name, gradient in expected.gradients.items():
        # A gradient is a sum whose terms may cancel; its accuracy is that of the terms.
        size = max(float(gradient.norm()), float(inputs.leaves["logit_scale"]) / rows**0.5)
        limit = within if gradient.ndim else min(within, 1e-5)
        assert float((found.gradients[name].cpu().double() - gradient).norm()) <= limit * size, name


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_gpu_is_the_cpu(kind: Kind, impl: str, dtype: torch.dtype) -> None:
    inputs = draw(kind(), 67, 40).to(dtype)
    expected = outcome(kind(impl="reference"), inputs.to(torch.float64))
    found = outcome(kind(impl=impl, chunk_size=16), on_gpu(inputs))
    # What is stored in half precision is rounded; the loss never is.
    within = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}[dtype]
    compare(found, expected, inputs, within)


@pytest.mark.parametrize("rows, dim, chunk", [(1, 8, None), (129, 96, None), (700, 520, 256), (1000, 64, None)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FUSED)
def test_fused_is_the_reference(name: str, dtype: torch.dtype, rows: int, dim: int, chunk: int | None) -> None:
    inputs = draw(KINDS[name](), rows, dim).to(dtype)
    expected = outcome(KINDS[name](impl="reference"), inputs.to(torch.float64))
    compare(outcome(KINDS[name](impl="fused", chunk_size=chunk), on_gpu(inputs)), expected, inputs, 5e-3)


@pytest.mark.parametrize("labels", ["masked", "known", "few", "many"])
@pytest.mark.parametrize("share", [1, 2**40], ids=["table", "no table"])
@pytest.mark.parametrize("name", ["soft", "soft-dot", "soft-ignore"])
def test_fused_takes_any_label_vectors(name: str, labels: str, share: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "TABLE_SHARE", share)
    inputs = relabelled(draw(KINDS[name](), 700, 96), labels).to(torch.bfloat16)
    expected = outcome(KINDS[name](impl="reference"), inputs.to(torch.float64))
    compare(outcome(KINDS[name](impl="fused", chunk_size=256), on_gpu(inputs)), expected, inputs, 5e-3)


@pytest.mark.parametrize("name", FUSED)
def test_fused_repeats_scales_and_freezes(name: str) -> None:
    inputs = on_gpu(draw(KINDS[name](), 500, 64).to(torch.bfloat16))
    loss = KINDS[name](impl="fused")
    first = outcome(loss, inputs)
    for _ in range(20):
        again = outcome(loss, inputs)
        assert torch.equal(first.value, again.value)
        assert all(torch.equal(value, again.gradients[leaf]) for leaf, value in first.gradients.items())
    scaled = outcome(loss, inputs, grad_output=65536.0)
    frozen = outcome(loss, inputs, frozen=["image_features"])
    assert "image_features" not in frozen.gradients
    assert torch.equal(frozen.gradients["text_features"], first.gradients["text_features"])
    for leaf, value in first.gradients.items():
        torch.testing.assert_close(scaled.gradients[leaf].float(), 65536 * value.float(), rtol=1e-2, atol=0.0)


@pytest.mark.parametrize("name", ["clip", "siglip-ids", "soft"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_fused_under_compile(name: str, backend: str) -> None:
    inputs = on_gpu(draw(KINDS[name](), 200, 64).to(torch.bfloat16))
    expected = outcome(KINDS[name](impl="fused"), inputs)
    torch.compiler.reset()
    found = outcome(torch.compile(KINDS[name](impl="fused"), backend=backend), inputs)  # type: ignore[arg-type]
    torch.testing.assert_close(found.value, expected.value)
    for leaf, value in expected.gradients.items():
        torch.testing.assert_close(found.gradients[leaf], value, rtol=1e-2, atol=1e-6)


def test_auto_takes_what_fits() -> None:
    inputs = on_gpu(draw(KINDS["siglip"](), 2000, 32).to(torch.float32))
    loss = KINDS["siglip"]()
    with pytest.warns(UserWarning, match="runs without its fused kernels: features of 16 bits are needed"):
        loss(**inputs.leaves)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        half = loss(**inputs.to(torch.bfloat16).leaves)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            mixed = loss(**inputs.leaves)
    torch.testing.assert_close(half, mixed, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("impl", ["chunked", "fused"])
@pytest.mark.parametrize("kind", ["clip", "siglip", "multi-positive", "soft"])
def test_memory_on_the_gpu_is_linear(kind: str, impl: str) -> None:
    peaks = []
    for rows in (8192, 16384):
        loss = KINDS[kind](impl=impl)
        inputs = on_gpu(draw(loss, rows, 768).to(torch.bfloat16))
        outcome(loss, inputs.share([256], 0))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        outcome(loss, inputs)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    # Gradients in float32 take 192 MiB, the fused kernels' chunk 256 MiB; the matrix of pairs would take 1 GiB.
    assert peaks[1] < 16384 * 16384 * 4 / 2
    assert peaks[1] < 2.5 * peaks[0]


def _on_rank(rank: int, world: int, port: int, inputs: Inputs, shares: list[int], answers: Any) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", rank=rank, world_size=world)
    for name in ("clip", "siglip"):
        found = outcome(KINDS[name](impl="fused"), on_gpu(inputs.share(shares, rank)))
        gathered: dict[str, Tensor] = {leaf: value.cpu() for leaf, value in found.gradients.items()}
        answers[name, rank] = found.value.cpu(), gathered
    dist.destroy_process_group()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@pytest.mark.parametrize("shares", [[300, 300], [37, 563]])
def test_gpus_are_one_process(shares: list[int]) -> None:
    import torch.multiprocessing as mp

    inputs = draw(KINDS["clip"](), sum(shares), 64).to(torch.bfloat16)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with mp.Manager() as manager:
        answers = manager.dict()
        mp.spawn(_on_rank, (2, port, inputs, shares, answers), nprocs=2)
        for name in ("clip", "siglip"):
            expected = outcome(KINDS[name](impl="reference"), inputs.to(torch.float64))
            parts = [answers[name, rank] for rank in range(2)]
            gradients = {}
            for leaf, value in expected.gradients.items():
                shared = [part[1][leaf].double() for part in parts]
                gradients[leaf] = (torch.cat(shared) if value.ndim == 2 else torch.stack(shared).sum(0)) / 2
            compare(Outcome(parts[0][0], gradients), expected, inputs, 5e-3)
