"""What of the fused kernels can be checked without a GPU: that they compile well, the host's part, and, in a process of
its own, what Triton's interpreter makes of them (`test_interpreter.py`)."""

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from medclip_lab.losses import ClipLoss, MultiPositiveClipLoss, SigLipLoss, SoftTargetClipLoss, functional, kernels
from medclip_lab.losses.base import PairLoss
from medclip_lab.losses.kernels import missing, targets
from medclip_lab.losses.testing import draw

triton = pytest.importorskip("triton")
SHARED_MEMORY = 227 * 1024
"""Bytes a program can have on sm_90; on sm_80 it is 163 KiB."""
TWO = ("sigmoid", "softmax", "softmax-ids", "softmax-table", "softmax-labels")
"""Kinds of which two programs share a multiprocessor on sm_90 while gradients are wanted."""


def test_interpreted_kernels_are_the_reference() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/losses/test_interpreter.py"]
    root = Path(__file__).parents[2]
    run = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-5000:]
    assert re.search(r"\b\d{2,} passed", run.stdout), run.stdout[-500:]
    assert "skipped" not in run.stdout.splitlines()[-1]


class Recorder:
    """Stands in for a kernel and keeps what it was launched with."""

    def __init__(self, kernel: Any, calls: list[tuple[Any, dict[str, Any]]]) -> None:
        self.kernel, self.calls = kernel, calls

    def __getitem__(self, _: Any) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            self.calls.append((self.kernel, dict(zip(self.kernel.arg_names, args, strict=False)) | options))

        return launch


VARIANTS = {
    "sigmoid": SigLipLoss(),
    "sigmoid-ids": SigLipLoss(positives="text", ignored=["patient", "study"]),
    "softmax": ClipLoss(),
    "softmax-ids": MultiPositiveClipLoss(["study", "text"]),
    "softmax-table": SoftTargetClipLoss(),
    "softmax-labels": SoftTargetClipLoss(),
    "softmax-known": SoftTargetClipLoss(unmentioned="ignore"),
}
"""By kind of tile a loss that makes it."""


def launches(kind: str, level: int, dtype: torch.dtype, slopes: bool) -> list[tuple[Any, dict[str, Any]]]:
    """What the engine launches for a loss on such a GPU."""
    from medclip_lab.losses.kernels import fused, label_tile, pairs, sigmoid_tile, softmax_tile

    rows, dim = 200, 100
    loss = VARIANTS[kind]
    inputs = draw(loss, rows, dim)
    image, text, scale, bias = (inputs.leaves[name] for name in inputs.leaves)
    calls: list[tuple[Any, dict[str, Any]]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "capability", lambda _: level)
        patch.setattr(sigmoid_tile, "sigmoid_tile", Recorder(sigmoid_tile.sigmoid_tile, calls))
        patch.setattr(label_tile, "label_logsumexp_tile", Recorder(label_tile.label_logsumexp_tile, calls))
        for name in ("logsumexp_tile", "softmax_tile", "combine_stats"):
            patch.setattr(softmax_tile, name, Recorder(getattr(softmax_tile, name), calls))
        engine = fused.Engine(image.to(dtype), scale, [rows], 128)
        walk = pairs.Pairs(engine, image.to(dtype), text.to(dtype), [rows])
        if kind.startswith("sigmoid"):
            ids = [[inputs.extra[f"{name}_ids"]] for name in getattr(loss, "positives", [])]
            ignored = [inputs.extra[f"{name}_ids"] for name in loss.ignored]  # type: ignore[union-attr]
            stacked = [torch.stack(part, 1) for part in ids]
            other = [torch.stack(ignored, 1)] if ignored else []
            formula = engine.sigmoid(bias, stacked * 2, other * 2)
        else:
            target = targets.Target(1.0, 0.0)
            if kind == "softmax-ids":
                both = torch.stack([inputs.extra["study_ids"], inputs.extra["text_ids"]], 1)
                target = targets.EvenTarget([both, both], 0, 0.5, 0.5)
            elif kind != "softmax":
                values = [functional.label_values(inputs.extra[f"{side}_labels"]) for side in ("image", "text")]
                known = [torch.ones_like(value) for value in values] if kind == "softmax-known" else []
                if kind != "softmax-table":
                    patch.setattr(targets, "TABLE_BYTES", 0)
                target = targets.LabelTarget([*values, *known], "cosine", 0.1, 0.5, 0.5, engine.label_sums)
            lse = torch.zeros(rows, dtype=torch.float64)
            formula = engine.softmax(lse, lse, 0.5, 0.5, target)
        for block in walk.blocks():
            if kind == "softmax":
                engine.logsumexp(block, False)
            formula(block, slopes)
    return calls


def compiled(kernel: Any, given: dict[str, Any], level: int) -> tuple[bytes, int]:
    """Compile a launch for a GPU that need not be there: the binary, and its bytes of shared memory."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.tools.tensor_descriptor import TensorDescriptor

    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}
    signature, constants, attributes = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        value = given[name]
        if kernel.params[place].is_constexpr:
            signature[name] = "constexpr"
            constants[name] = value
        elif isinstance(value, TensorDescriptor):
            signature[name] = f"tensordesc<{names[value.base.dtype]}{value.block_shape}>".replace(" ", "")
        elif isinstance(value, Tensor):
            signature[name] = f"*{names[value.dtype]}"
            attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32" if isinstance(value, int) else "fp32"
            if isinstance(value, int) and value % 16 == 0 and name in ("dim", "stride", "width"):
                attributes[(place,)] = [["tt.divisibility", 16]]
    options = {name: given[name] for name in ("num_warps", "num_stages", "enable_fp_fusion") if name in given}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = triton.compile(source, target=GPUTarget("cuda", level, 32), options=options)
    return result.asm["cubin"], result.metadata.shared


def machine_code(cubin: bytes, folder: Path, name: str) -> tuple[int, int, int, int]:
    """Stores to and loads from the stack, tensor-core instructions, and registers of a thread."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    path = folder / f"{name}.cubin"
    path.write_bytes(cubin)
    text, usage = (
        subprocess.run([tool, option, path], capture_output=True, text=True, check=True).stdout
        for option in ("-sass", "-res-usage")
    )
    counts = [len(re.findall(pattern, text)) for pattern in (r"\bSTL", r"\bLDL", r"\bH?G?MMA")]
    registers = re.search(r"\bREG:(\d+)", usage)
    assert registers
    return counts[0], counts[1], counts[2], int(registers[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("level", [80, 90], ids=["sm_80", "sm_90"])
def test_every_shipped_shape_compiles_without_spills(level: int, dtype: torch.dtype, tmp_path: Path) -> None:
    jobs = {}
    for kind in VARIANTS:
        # Without slopes a pair's part of a softmax needs no second look at the pairs.
        for slopes in (True,) if kind == "softmax" or dtype == torch.float16 else (True, False):
            for kernel, call in launches(kind, level, dtype, slopes):
                if kernel.__name__ != "combine_stats":
                    jobs[f"{kind}-{kernel.__name__}-{'slopes' if slopes else 'value'}"] = kernel, call
    kernels = {"sigmoid_tile", "logsumexp_tile", "softmax_tile", "label_logsumexp_tile"}
    assert {kernel.__name__ for kernel, _ in jobs.values()} == kernels

    def check(name: str) -> str | None:
        cubin, shared = compiled(*jobs[name], level)
        stores, loads, products, registers = machine_code(cubin, tmp_path, name)
        room = SHARED_MEMORY if level == 90 else 163 * 1024
        threads = 32 * jobs[name][1]["num_warps"]
        if level == 90 and name.endswith("-slopes") and "-".join(name.split("-")[:-2]) in TWO:
            # One multiplies while the other does the rest.
            room, registers = room // 2, 2 * registers
        fits = stores == loads == 0 and products > 0 and shared <= room and registers * threads <= 2**16
        return (
            None if fits else f"{name}: {stores} spilled, {products} products, {shared} shared, {registers} registers"
        )

    faults = [fault for name in jobs if (fault := check(name))]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("level", [80, 90])
def test_rows_begin_where_vector_loads_and_descriptors_want_them(level: int) -> None:
    """Every 32 bytes, for an embed dim of 100 too; the interpreter and the compiler would not mind."""
    for kind in VARIANTS:
        for kernel, call in launches(kind, level, torch.bfloat16, True):
            if kernel.__name__ in ("combine_stats", "label_logsumexp_tile"):
                continue
            assert call["dim"] == 112
            places = [getattr(call[name], "base", call[name]) for name in ("image", "text")]
            places += [getattr(call["slopes"], "base", call["slopes"])] if "slopes" in call else []
            assert all(place.stride(0) % 16 == 0 and place.data_ptr() % 32 == 0 for place in places)
            assert call["pair"] in (0, 128)


@settings(max_examples=200, deadline=None)
@given(
    rows=st.integers(1, 2**22),
    columns=st.integers(1, 2**22),
    dim=st.integers(1, 4096),
    processors=st.integers(1, 264),
    free=st.integers(0, 2**38),
)
def test_chunks_fit(rows: int, columns: int, dim: int, processors: int, free: int) -> None:
    from medclip_lab.losses.kernels import fused

    chosen = fused.chunk_rows(rows, columns, dim, processors, lambda: free)
    assert 1 <= chosen <= rows
    assert chosen % 128 == 0 or chosen == rows
    assert 2 * chosen * columns <= max(fused.CHUNK_BYTES, free // 4, 2 * 128 * columns)
    if rows >= 4096 and free >= 2**38 and columns <= 2**22:
        assert chosen >= min(4096, 128 * processors // -(-dim // 256) // 128 * 128)


def test_chunks_of_the_batches_we_speak_of() -> None:
    from medclip_lab.losses.kernels import fused

    def rows(batch: int, dim: int) -> int:
        return fused.chunk_rows(batch, batch, dim, 132, lambda: 100 * 2**30)

    assert rows(8192, 768) == 8192  # one chunk, for a launch costs as much as it does
    assert [rows(32768, dim) for dim in (512, 768)] == [8448, 5632]  # the product with the texts fills 132 processors
    assert 2 * rows(131072, 768) * 131072 <= 2**30
    assert rows(2**20, 768) == 4096


@settings(max_examples=100, deadline=None)
@given(data=st.data(), rows=st.integers(0, 12), columns=st.integers(0, 12), kinds=st.integers(1, 4))
def test_positives_are_counted_without_a_matrix(data: st.DataObject, rows: int, columns: int, kinds: int) -> None:
    def ids(many: int) -> Tensor:
        some = st.lists(st.integers(-2, 4), min_size=many * kinds, max_size=many * kinds)
        return torch.tensor(data.draw(some), dtype=torch.int64).reshape(many, kinds)

    images, texts = ids(rows), ids(columns)
    same = functional.same_ids(images, texts)
    in_row, in_column = targets.count_same(images, texts)
    assert torch.equal(in_row, same.sum(1))
    assert torch.equal(in_column, same.sum(0))


def test_the_lack_of_a_gpu_is_told() -> None:
    inputs = draw(SigLipLoss(), 4, 8).to(torch.bfloat16)
    with pytest.raises(ValueError, match="impl='fused': the features are on cpu, not on an NVIDIA GPU"):
        SigLipLoss(impl="fused")(**inputs.leaves)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SigLipLoss(impl="auto")(**inputs.leaves)


@pytest.mark.parametrize(
    "major, minor, dtype, texts, words",
    [
        (7, 5, torch.bfloat16, 8, "compute capability 8.0 is needed, GPU X has 7.5"),
        (9, 0, torch.float32, 8, "features of 16 bits are needed: cast them to bfloat16, or .* torch.autocast"),
        (9, 0, None, 8, "features of 16 bits are needed"),
        (9, 0, torch.bfloat16, 2**26, r"one chunk takes 16.0 GiB of memory, 8.0 GiB are free"),
        (8, 0, torch.float16, 2**20, None),
        (12, 0, torch.bfloat16, 2**20, None),
    ],
)
def test_what_is_missing_is_said(
    major: int, minor: int, dtype: torch.dtype, texts: int, words: str | None, monkeypatch: Any
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (major, minor))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "GPU X")
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 3 * 2**30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 2**30)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (6 * 2**30, 2**40))
    found = missing(torch.device("cuda:0"), dtype, texts)
    assert (found is None) if words is None else re.search(words, str(found)), found


def test_without_triton_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(kernels, "fused", raising=False)
    monkeypatch.setitem(sys.modules, "medclip_lab.losses.kernels.fused", None)
    assert "Triton cannot be imported" in str(missing(torch.device("cuda:0"), torch.bfloat16, 8))


def test_one_loud_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PairLoss, "_half", lambda *_: (None, "the GPU is too old"))
    inputs = draw(SigLipLoss(), 1100, 4).to(torch.float32)
    loss = SigLipLoss()
    with pytest.warns(UserWarning, match="SigLipLoss runs without its fused kernels: the GPU is too old") as told:
        loss(**inputs.leaves)
    assert [told[0].filename] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(**inputs.leaves)
    small = draw(SigLipLoss(), 8, 4).to(torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SigLipLoss()(**small.leaves)  # the matrix is small: nobody needs kernels


@settings(max_examples=100, deadline=None)
@given(data=st.data(), rows=st.integers(0, 30), labels=st.integers(1, 3), clash=st.booleans())
def test_label_vectors_are_told_apart(data: st.DataObject, rows: int, labels: int, clash: bool) -> None:
    some = st.lists(st.sampled_from([0.0, 1.0, -1.0, 0.5]), min_size=rows * labels, max_size=rows * labels)
    values, known = (torch.tensor(data.draw(some)).reshape(rows, labels) for _ in range(2))
    with pytest.MonkeyPatch.context() as patch:
        if clash:  # the number that stands for a row is the same for all
            patch.setattr(Tensor, "sin", lambda values: torch.zeros_like(values))
        found, which = targets.distinct(values, known)
    assert found.known is not None
    assert torch.equal(found.values[which], values)
    assert torch.equal(found.known[which], known)
    both = torch.cat([values, known], 1)
    assert len(found) == (len(both.unique(dim=0)) if rows else 0)
    assert torch.equal(found.counts, torch.bincount(which, minlength=len(found)).double())
