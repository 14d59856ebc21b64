"""Does a loss keep this package's contract? One call answers.

    from medclip_lab.losses.testing import check_loss

    if __name__ == "__main__":  # other processes import this file
        check_loss(MyLoss())

The value is the loss of the global batch and every gradient is the gradient of that value, whatever the number of
ranks, the precision and the layout of the inputs. See `check_loss` for what is tried.
"""

import copy
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

LABELS = 5
SCALE, BIAS = 9.0, -3.0
REPEATS = 20
Maker = Callable[[int, int, torch.Generator], dict[str, Tensor]]
"""From rows, dim and a generator to the inputs a loss takes beside features, scale and bias."""
Runner = Callable[[Callable[..., Any], tuple[Any, ...]], list[Any]]
"""Runs a function on every rank and returns the answers in the order of ranks."""


@dataclass(frozen=True)
class Inputs:
    """What a loss is called with."""

    leaves: dict[str, Tensor]
    """Features, scale and bias: what has a gradient."""
    extra: dict[str, Tensor]

    def map(self, change: Callable[[Tensor], Tensor]) -> "Inputs":
        """The same with every feature matrix changed."""
        leaves = {name: change(value) if value.ndim == 2 else value for name, value in self.leaves.items()}
        return replace(self, leaves=leaves)

    def to(self, dtype: torch.dtype) -> "Inputs":
        """Features in `dtype`; scale and bias too, but never below float32."""
        wide = torch.promote_types(dtype, torch.float32)
        return replace(
            self, leaves={name: value.to(dtype if value.ndim else wide) for name, value in self.leaves.items()}
        )

    def share(self, shares: Sequence[int], rank: int) -> "Inputs":
        """The rows of one rank."""
        start = sum(shares[:rank])

        def own(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: v[start : start + shares[rank]] if v.ndim else v for name, v in values.items()}

        return Inputs(own(self.leaves), own(self.extra))


@dataclass(frozen=True)
class Outcome:
    """Value of a loss and its gradients by name."""

    value: Tensor
    gradients: dict[str, Tensor]


def draw(loss: nn.Module, rows: int, dim: int, seed: int = 0, make_inputs: Maker | None = None) -> Inputs:
    """Random float64 inputs of a loss, some texts repeated, some labels missing.

    Raises:
        ValueError: the loss wants an input nobody knows how to make.
    """
    generator = torch.Generator().manual_seed(seed)

    def unit() -> Tensor:
        return F.normalize(torch.randn(rows, dim, generator=generator, dtype=torch.float64), dim=1)

    leaves = {
        "image_features": unit(),
        "text_features": unit(),
        "logit_scale": torch.tensor(SCALE, dtype=torch.float64),
        "logit_bias": torch.tensor(BIAS, dtype=torch.float64),
    }
    extra: dict[str, Tensor] = {}
    if make_inputs is not None:
        extra = make_inputs(rows, dim, generator)
    else:
        for name in (*getattr(loss, "inputs", ()), *getattr(loss, "optional_inputs", ())):
            if name.endswith("_features"):
                leaves[name] = unit()
            elif name.endswith("_labels"):
                states = torch.tensor([0.0, 1.0, -1.0, math.nan], dtype=torch.float64)
                odds = torch.tensor([0.4, 0.3, 0.1, 0.2])
                chosen = torch.multinomial(odds, rows * LABELS, replacement=True, generator=generator)
                extra[name] = states[chosen].reshape(rows, LABELS)
            elif name.endswith("_mask"):
                extra[name] = torch.rand(rows, LABELS, generator=generator) < 0.8
            elif name.endswith("_ids"):
                extra[name] = torch.randint(-1, max(2, rows // 2), (rows,), generator=generator)
            else:
                raise ValueError(f"{type(loss).__name__} wants {name}: pass make_inputs to say what that is")
    return Inputs(leaves, extra)


def outcome(
    loss: nn.Module,
    inputs: Inputs,
    *,
    grad_output: float = 1.0,
    frozen: Sequence[str] = (),
    times: int = 1,
    autocast: bool = False,
) -> Outcome:
    """Value and gradients of a loss; `frozen` inputs ask for none, `times` backwards go over one graph."""
    loss.zero_grad()
    leaves = {name: value.detach().requires_grad_(name not in frozen) for name, value in inputs.leaves.items()}
    # The backward stands outside, as torch wants it.
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        value = loss(**leaves, **inputs.extra)
    for _ in range(times):
        value.backward(torch.full_like(value, grad_output), retain_graph=times > 1)
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    gradients |= {name: p.grad.clone() for name, p in loss.named_parameters() if p.grad is not None}
    return Outcome(value.detach(), gradients)


def check_loss(
    loss: nn.Module,
    *,
    reference: nn.Module | None = None,
    make_inputs: Maker | None = None,
    rows: Sequence[int] = (1, 2, 7),
    dims: Sequence[int] = (8,),
    world_sizes: Sequence[int] = (2,),
    ranks: Callable[[int], Runner] | None = None,
    compiles: bool = True,
) -> None:
    """Try a loss in every way its users will, in float64 against differences of its own values wherever that decides.

    Value and every gradient, those of the loss's own parameters too: by central differences (float64); the same for
    `grad_output` 1e-3 and 65,536, with any of the inputs frozen, for transposed, strided and expanded features, after a
    second backward, for all texts identical, under autocast and `torch.compile`, and bitwise the same in 20 runs;
    float32 within 1e-5, bfloat16 within its own rounding; NaN and infinity come out; W ranks, with even and uneven
    shares and with an empty one, give what one process gives: the value on every rank, and gradients whose average (or
    sum, if the loss has `grad_reduction="sum"`) over ranks is the gradient.

    Args:
        loss: called as open_clip calls its losses; it must be picklable, as other processes run it too.
        reference: another loss whose float64 values and gradients must be the same, such as the dense formula.
        make_inputs: makes what the loss takes beside features, scale and bias; by default made from the names in its
            attributes `inputs` and `optional_inputs`.
        rows, dims: sizes of the batches.
        world_sizes: numbers of gloo processes; empty leaves them out.
        ranks: gives a runner for a world size; by default processes are started here (some seconds each).
        compiles: try `torch.compile`; it traces and runs without a compiler's code.

    Raises:
        AssertionError: says what was tried, and what came out instead.
    """
    loss = copy.deepcopy(loss).double()
    reference = None if reference is None else copy.deepcopy(reference).double()
    for count in rows:
        for dim in dims:
            inputs = draw(loss, count, dim, make_inputs=make_inputs)
            where = f"{count} rows, dim {dim}"
            expected = outcome(loss, inputs)
            if reference is not None:
                _same(outcome(loss, inputs), outcome(reference, inputs), f"{where}: against the reference", 1e-9)
            _check_precision(loss, inputs, expected, where)
    count, dim = max((n for n in rows if n <= 16), default=rows[0]), dims[0]
    inputs = draw(loss, count, dim, make_inputs=make_inputs)
    expected = outcome(loss, inputs)
    _check_value(loss, inputs, expected)
    _check_differences(loss, inputs, expected)
    _check_gradients(loss, inputs, expected)
    _check_layouts(loss, inputs)
    _check_not_finite(loss, inputs)
    if compiles:
        _check_compile(loss, inputs, expected)
    for world in world_sizes:
        if ranks is not None:
            check_ranks(loss, world, ranks(world), dim, make_inputs)
        else:
            with processes(world) as run:
                check_ranks(loss, world, run, dim, make_inputs)


def _check_value(loss: nn.Module, inputs: Inputs, expected: Outcome) -> None:
    value = expected.value
    assert value.ndim == 0, f"the loss must be a scalar, got shape {tuple(value.shape)}"
    assert value.isfinite(), f"the loss of ordinary inputs is {value.item()}"
    told = loss(**inputs.leaves, **inputs.extra, output_dict=True)
    assert isinstance(told, dict), "output_dict=True must give a dict"
    assert "contrastive_loss" in told, f"output_dict=True must give 'contrastive_loss', got {list(told)}"
    _close(told["contrastive_loss"].detach(), value, "with output_dict: value", 1e-12)
    leaves = {name: value for name, value in inputs.leaves.items() if name != "logit_bias"}
    assert loss(**leaves, **inputs.extra).isfinite(), "without a logit_bias the loss is not finite"
    with torch.no_grad():
        quiet = loss(**inputs.leaves, **inputs.extra)
    _close(quiet, value, "under no_grad: value", 1e-12)


def _check_differences(loss: nn.Module, inputs: Inputs, expected: Outcome) -> None:
    """The gradients against central differences, each along its own direction and along a random one."""
    generator = torch.Generator().manual_seed(1)
    for name, leaf in inputs.leaves.items():
        found = expected.gradients.get(name, torch.zeros_like(leaf))
        chance = torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype)
        for direction in (chance, found):

            def along(step: Tensor, name: str = name, leaf: Tensor = leaf) -> float:
                with torch.no_grad():
                    return float(loss(**{**inputs.leaves, name: leaf + step}, **inputs.extra))

            _check_slope(along, found, direction, name)
    for name, parameter in loss.named_parameters():
        if not parameter.requires_grad:
            continue
        found = expected.gradients.get(name, torch.zeros_like(parameter))
        start = parameter.detach().clone()
        for direction in (torch.randn(start.shape, generator=generator, dtype=start.dtype), found):

            def moved(step: Tensor, parameter: Tensor = parameter, start: Tensor = start) -> float:
                with torch.no_grad():
                    parameter.copy_(start + step)
                    value = float(loss(**inputs.leaves, **inputs.extra))
                    parameter.copy_(start)
                return value

            _check_slope(moved, found, direction, name)


def _check_slope(at: Callable[[Tensor], float], gradient: Tensor, direction: Tensor, name: str) -> None:
    """`at` a step from where the gradient was taken the loss must be what the gradient says."""
    if not direction.any():
        return
    step = 1e-5 * direction / direction.norm()
    slope, told = (at(step) - at(-step)) / 2, float((gradient * step).sum())
    assert abs(slope - told) <= 1e-5 * float(gradient.norm() * step.norm()) + 1e-13, (
        f"gradient of {name}: along {'its own' if direction is gradient else 'a random'} direction the loss "
        f"changes by {slope:.8g}, the gradient says {told:.8g}"
    )


def _check_gradients(loss: nn.Module, inputs: Inputs, expected: Outcome) -> None:
    for factor in (1e-3, 65536.0):
        scaled = {name: factor * value for name, value in expected.gradients.items()}
        found = outcome(loss, inputs, grad_output=factor)
        _same(found, Outcome(expected.value, scaled), f"grad_output {factor:g}", 1e-10)
    twice = {name: 2 * value for name, value in expected.gradients.items()}
    _same(outcome(loss, inputs, times=2), Outcome(expected.value, twice), "two backwards over one graph", 1e-10)
    names = list(inputs.leaves)
    for frozen in ([name] for name in names):
        found = outcome(loss, inputs, frozen=frozen)
        kept = {name: value for name, value in expected.gradients.items() if name not in frozen}
        _same(found, Outcome(expected.value, kept), f"{frozen[0]} frozen", 1e-10)
    towers = [name for name in names if name.endswith("_features")]
    scalars = [name for name in names if name not in towers]
    for frozen in (towers, scalars):
        found = outcome(loss, inputs, frozen=frozen)
        kept = {name: value for name, value in expected.gradients.items() if name not in frozen}
        _same(found, Outcome(expected.value, kept), f"{', '.join(frozen)} frozen", 1e-10)
    first = outcome(loss, inputs.to(torch.float32))
    for _ in range(REPEATS):
        again = outcome(loss, inputs.to(torch.float32))
        assert torch.equal(first.value, again.value), "the same inputs give another value in another run"
        for name, value in first.gradients.items():
            assert torch.equal(value, again.gradients[name]), f"the gradient of {name} differs from run to run"


def _check_precision(loss: nn.Module, inputs: Inputs, expected: Outcome, where: str) -> None:
    # What float32 features and a float64 formula give is the truth for float32.
    for dtype, value_within, within in ((torch.float32, 1e-5, 1e-5), (torch.bfloat16, 1e-5, 5e-3)):
        rounded = inputs.to(dtype)
        truth = outcome(loss, rounded.to(torch.float64))
        low = copy.deepcopy(loss).float()
        found = outcome(low, rounded)
        _same(found, truth, f"{where}: {dtype}", within, value_within, rounded)
        mixed = outcome(low, rounded, autocast=True)
        _same(mixed, found, f"{where}: {dtype} under autocast", within, value_within, rounded)
    assert expected.value.isfinite(), f"{where}: the loss is {expected.value.item()}"


def _check_layouts(loss: nn.Module, inputs: Inputs) -> None:
    expected = outcome(loss, inputs)

    def strided(value: Tensor) -> Tensor:
        wide = torch.zeros(2 * len(value), 2 * value.shape[1], dtype=value.dtype)
        wide[::2, ::2] = value
        return wide[::2, ::2]

    _same(outcome(loss, inputs.map(lambda value: value.t().contiguous().t())), expected, "transposed features", 1e-10)
    _same(outcome(loss, inputs.map(strided)), expected, "strided features", 1e-10)
    first = inputs.leaves["text_features"][:1]
    count = len(inputs.leaves["text_features"])
    alike = replace(inputs, leaves={**inputs.leaves, "text_features": first.expand(count, -1)})
    plain = replace(inputs, leaves={**inputs.leaves, "text_features": first.repeat(count, 1)})
    _same(outcome(loss, alike), outcome(loss, plain), "all texts identical, expanded", 1e-10)


def _check_not_finite(loss: nn.Module, inputs: Inputs) -> None:
    # An infinite scale may be clamped to the range a loss allows; what is not a number may not be made one.
    features, both = (name for name in inputs.leaves if name.endswith("_features")), (math.nan, math.inf)
    for name, bads in (*((name, both) for name in features), ("logit_scale", (math.nan,))):
        for bad in bads:
            value = inputs.leaves[name].clone()
            value.view(-1)[0] = bad
            with torch.no_grad():
                found = loss(**{**inputs.leaves, name: value}, **inputs.extra)
            assert not found.isfinite(), f"{bad} in {name} is hidden: the loss is {found.item()}"


def _check_compile(loss: nn.Module, inputs: Inputs, expected: Outcome) -> None:
    torch.compiler.reset()
    loss.zero_grad()
    compiled = torch.compile(loss, backend="aot_eager")
    turned = inputs.map(lambda value: value.t().contiguous().t())  # a wrong layout in an operator's fake shows here
    leaves = {name: value.detach().requires_grad_() for name, value in turned.leaves.items()}
    value = compiled(**leaves, **inputs.extra)
    value.backward()
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    gradients |= {name: p.grad.clone() for name, p in loss.named_parameters() if p.grad is not None}
    _same(Outcome(value.detach(), gradients), expected, "under torch.compile", 1e-10)


def shares_of(world: int) -> list[list[int]]:
    """Rows a rank, in ways that differ: even, uneven, with an empty rank."""
    even = [2] * world
    uneven = [1 + 2 * rank for rank in range(world)]
    empty = [3] * (world - 1) + [0]
    return [even, uneven, empty]


def check_ranks(loss: nn.Module, world: int, run: Runner, dim: int = 8, make_inputs: Maker | None = None) -> None:
    """The part of `check_loss` that is about ranks; arguments as there, `run` for a group of `world`."""
    summed = getattr(loss, "grad_reduction", "mean") == "sum"
    for shares in shares_of(world):
        inputs = draw(loss, sum(shares), dim, make_inputs=make_inputs)
        expected = outcome(loss, inputs)
        answers: list[Outcome] = run(_on_rank, (loss, inputs, shares))
        where = f"{world} ranks with {shares} rows"
        for rank, answer in enumerate(answers):
            _close(answer.value, expected.value, f"{where}: value on rank {rank}", 1e-9)
        for name, gradient in expected.gradients.items():
            parts = [answer.gradients[name] for answer in answers]
            rows = name in inputs.leaves and gradient.ndim == 2
            total = torch.cat(parts) if rows else torch.stack(parts).sum(0)
            kind = "sum" if summed else "mean"
            found = total if summed else total / world
            _close(found, gradient, f"{where}: {kind} over ranks of the gradient of {name}", 1e-9)


def _on_rank(loss: nn.Module, inputs: Inputs, shares: Sequence[int]) -> Outcome:
    own = inputs.share(shares, dist.get_rank())
    # Each rank's memory lies another way: what ranks send must not depend on it.
    return outcome(loss, own if dist.get_rank() % 2 else own.map(lambda value: value.t().contiguous().t()))


@contextmanager
def processes(world: int) -> Iterator[Runner]:
    """A gloo group of `world` new processes that run functions of importable modules."""
    import torch.multiprocessing as mp

    context = mp.get_context("spawn")
    queue = context.Queue()
    for rank in range(world):
        queue.put(rank)
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        with context.Pool(world, initializer=_join, initargs=(queue, store, world)) as pool:

            def run(function: Callable[..., Any], arguments: tuple[Any, ...]) -> list[Any]:
                # Each function meets the others in a collective, so no worker can take two of the calls.
                calls = [(function, arguments)] * world
                answers: dict[int, Any] = {}
                arriving = pool.imap_unordered(_answer, calls, chunksize=1)
                for _ in range(world):
                    rank, answer, error = arriving.next(timeout=120)
                    if error is not None:
                        pool.terminate()  # the others may wait for this one for ever
                        raise AssertionError(f"on rank {rank} of {world}: {error}")
                    answers[rank] = answer
                return [answers[rank] for rank in range(world)]

            yield run


def _join(ranks: Any, store: str, world: int) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=ranks.get(), world_size=world)


def _answer(call: tuple[Callable[..., Any], tuple[Any, ...]]) -> tuple[int, Any, str | None]:
    function, arguments = call
    try:
        answer = function(*arguments)
    except Exception as error:
        return dist.get_rank(), None, f"{type(error).__name__}: {error}"
    dist.barrier()
    return dist.get_rank(), answer, None


def _same(
    found: Outcome,
    expected: Outcome,
    what: str,
    within: float,
    value_within: float | None = None,
    inputs: Inputs | None = None,
) -> None:
    _close(found.value, expected.value, f"{what}: value", value_within or within)
    missing = [name for name, value in expected.gradients.items() if name not in found.gradients and value.any()]
    assert not missing, f"{what}: no gradient of {', '.join(missing)}"
    surplus = [name for name, value in found.gradients.items() if name not in expected.gradients and value.any()]
    assert not surplus, f"{what}: a gradient of {', '.join(surplus)}, which asked for none"
    for name, value in expected.gradients.items():
        if name in found.gradients:
            # A gradient is a sum whose terms may cancel; its accuracy is that of the terms.
            terms = 0.0
            if inputs is not None:
                rows = len(inputs.leaves["image_features"])
                terms = float(inputs.leaves["logit_scale"]) / rows**0.5 if value.ndim else 1.0
            _close(found.gradients[name], value, f"{what}: gradient of {name}", within, terms)


def _close(found: Tensor, expected: Tensor, what: str, within: float, terms: float = 0.0) -> None:
    """Relative error of a tensor as a whole, by its norm."""
    error = float((found.double() - expected.double()).norm())
    size = max(float(expected.double().norm()), terms)
    assert error <= within * size + 1e-12, (
        f"{what}: off by {error / size if size else error:.3g}, allowed {within:g} "
        f"(norm {float(found.double().norm()):.8g}, should be {float(expected.double().norm()):.8g})"
    )
