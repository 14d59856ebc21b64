"""The fused kernels, run by Triton's interpreter on the CPU: `test_fused.py` starts this file with TRITON_INTERPRET=1.

Features are bfloat16 in the products; the interpreter's slopes stay float32, as it would cut where the hardware rounds.
So values and gradients must be those of float64 up to float32's rounding.
"""

import gc
import math
import os
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medclip_lab.losses import ClipLoss, SigLipLoss, SoftTargetClipLoss
from medclip_lab.losses.testing import Inputs, Outcome, draw, outcome, processes

from .test_contract import KINDS, Kind, relabelled

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="runs under TRITON_INTERPRET=1")
TOLERANCE = 2e-6


@pytest.fixture(params=[90, 80], ids=["sm_90", "sm_80"])
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Tile loads and stores as on this capability."""
    from medclip_lab.losses.kernels import fused

    monkeypatch.setattr(fused, "capability", lambda _: request.param)
    return int(request.param)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles small enough that a small batch has many of them."""
    shrink(monkeypatch)


def shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    from medclip_lab.losses.kernels import fused, shapes, targets

    monkeypatch.setattr(targets, "TABLE_SHARE", 1)
    tile = shapes.Shape(16, 32, 16, 4)
    monkeypatch.setattr(fused, "SHAPES", {key: dict.fromkeys(kinds, tile) for key, kinds in shapes.SHAPES.items()})


def rounded(inputs: Inputs) -> Inputs:
    """float32 features whose values are those of bfloat16."""
    return inputs.to(torch.bfloat16).to(torch.float32)


def compare(loss: nn.Module, reference: nn.Module, inputs: Inputs, within: float = 1e-6, **how: object) -> Outcome:
    inputs = rounded(inputs)
    expected = outcome(reference, inputs.to(torch.float64), **how)  # type: ignore[arg-type]
    found = outcome(loss, inputs, autocast=True, **how)  # type: ignore[arg-type]
    assert abs(found.value - expected.value) <= within * abs(expected.value) + 1e-7
    assert set(found.gradients) == set(expected.gradients)
    rows = len(inputs.leaves["image_features"])
    for name, gradient in expected.gradients.items():
        # A gradient is a sum whose terms may cancel; its accuracy is that of the terms.
        terms = how.get("grad_output", 1.0) * float(inputs.leaves["logit_scale"]) / rows**0.5  # type: ignore[operator]
        error = float((found.gradients[name].double() - gradient).norm())
        assert error <= TOLERANCE * max(float(gradient.norm()), terms), (name, error)
    return found


@pytest.mark.usefixtures("level", "small")
@pytest.mark.parametrize("kind", [kind for name, kind in KINDS.items() if name != "multi-view"])
@pytest.mark.parametrize("rows, dim, chunk", [(1, 8, None), (33, 24, None), (50, 40, 32)])
def test_is_the_reference(kind: Kind, rows: int, dim: int, chunk: int | None) -> None:
    compare(kind(impl="fused", chunk_size=chunk), kind(impl="reference"), draw(kind(), rows, dim))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    "name, labels",
    [
        *(("soft", labels) for labels in ("masked", "known", "few", "many")),
        *(("soft-ignore", labels) for labels in ("masked", "few")),
        ("soft-dot", "few"),
    ],
)
@pytest.mark.parametrize("table", [True, False], ids=["table", "no table"])
def test_label_vectors(name: str, labels: str, table: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few and many, with and without masks; with a table of their targets, or formed where they are wanted."""
    from medclip_lab.losses.kernels import fused, targets

    if not table:
        monkeypatch.setattr(targets, "TABLE_BYTES", 0)
    monkeypatch.setattr(fused, "LABEL_TILE", 16)
    monkeypatch.setattr(fused, "LABEL_ROWS", 32)
    kind = KINDS[name]
    for rows, chunk in ((3, None), (70, 32)):
        inputs = relabelled(draw(kind(), rows, 24), labels)
        compare(kind(impl="fused", chunk_size=chunk), kind(impl="reference"), inputs)
        low = rounded(inputs)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            found = kind(impl="fused", chunk_size=chunk)(**low.leaves, **low.extra, output_dict=True)
        wide = low.to(torch.float64)
        expected = kind(impl="reference")(**wide.leaves, **wide.extra, output_dict=True)["excess_loss"]
        torch.testing.assert_close(found["excess_loss"].double(), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize(
    "name", ["clip", "siglip", "siglip-ids", "multi-positive", "soft", "soft-ignore", "soft-table"]
)
def test_shipped_shapes_are_the_reference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "soft-table":
        from medclip_lab.losses.kernels import targets

        name = "soft"
        monkeypatch.setattr(targets, "TABLE_SHARE", 1)
    compare(KINDS[name](impl="fused"), KINDS[name](impl="reference"), draw(KINDS[name](), 129, 72))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", ["clip", "clip-smooth", "siglip", "siglip-ids", "multi-positive", "soft"])
def test_frozen_scaled_and_without_gradients(name: str) -> None:
    inputs = draw(KINDS[name](), 37, 16)
    fused, reference = KINDS[name](impl="fused"), KINDS[name](impl="reference")
    for frozen in (["image_features"], ["text_features"], ["image_features", "text_features"], ["logit_scale"]):
        compare(fused, reference, inputs, frozen=frozen)
    for factor in (1e-3, 65536.0):
        compare(fused, reference, inputs, grad_output=factor)
    inputs = rounded(inputs)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        value = fused(**inputs.leaves, **inputs.extra)
        told = fused(**inputs.leaves, **inputs.extra, output_dict=True)
    wide = inputs.to(torch.float64)
    expected = reference(**wide.leaves, **wide.extra, output_dict=True)
    assert abs(value - expected["contrastive_loss"]) <= 1e-6 * abs(expected["contrastive_loss"])
    for term, number in expected.items():
        torch.testing.assert_close(told[term].double(), number.detach(), rtol=2e-6, atol=2e-7)


@pytest.mark.usefixtures("small")
def test_good_pairs_keep_the_digits_of_their_gradient() -> None:
    """At scale 100 a log-sum-exp rounded to float32 would cost half a digit."""
    torch.manual_seed(0)
    texts = F.normalize(torch.randn(64, 64, dtype=torch.float64), dim=1)
    images = F.normalize(texts + 0.25 * torch.randn(64, 64, dtype=torch.float64), dim=1)
    inputs = draw(ClipLoss(), 64, 64)
    inputs.leaves.update(image_features=images, text_features=texts, logit_scale=torch.tensor(100.0).double())
    inputs = rounded(inputs)
    expected = outcome(ClipLoss(impl="reference"), inputs.to(torch.float64))
    found = outcome(ClipLoss(impl="fused"), inputs, autocast=True)
    dense = outcome(ClipLoss(impl="reference"), inputs)
    for leaf in ("image_features", "text_features"):
        truth = expected.gradients[leaf]
        errors = [float((got.gradients[leaf].double() - truth).norm() / truth.norm()) for got in (found, dense)]
        assert errors[0] <= 2 * errors[1] + 1e-7, (leaf, errors)


@pytest.mark.usefixtures("small", "level")
@pytest.mark.parametrize("cosine", [0.3, 0.0, -0.2, -0.9])
def test_texts_far_below_the_best_pair_of_their_tile_keep_their_sums(cosine: float) -> None:
    """At scale 100 they are up to 274 powers of two below, and float32 ends at 126."""
    torch.manual_seed(0)
    axis = F.normalize(torch.randn(24, dtype=torch.float64), dim=0)
    aside = torch.randn(40, 24, dtype=torch.float64)
    aside = F.normalize(aside - (aside @ axis)[:, None] * axis, dim=1)
    images = F.normalize(axis + 0.05 * aside, dim=1)
    share = torch.where(torch.arange(40) % 3 == 0, 1.0, cosine)[:, None].double()
    texts = F.normalize(share * axis + (1 - share.square()).sqrt() * aside.flip(0), dim=1)
    for first, second in ((images, texts), (texts, images)):
        inputs = draw(ClipLoss(), 40, 24)
        inputs.leaves.update(image_features=first, text_features=second, logit_scale=torch.tensor(100.0).double())
        compare(ClipLoss(impl="fused"), ClipLoss(impl="reference"), inputs)


@pytest.mark.usefixtures("small", "level")
@pytest.mark.parametrize("name", ["clip", "clip-smooth", "multi-positive", "soft"])
def test_rows_whose_every_logit_is_far_below_0(name: str) -> None:
    """What is past the edge has logit 0, and stands 144 powers of two above their best text."""
    torch.manual_seed(0)
    texts = F.normalize(torch.ones(40, 24).double() + 0.01 * torch.randn(40, 24).double(), dim=1)
    inputs = draw(KINDS[name](), 40, 24)
    inputs.leaves.update(image_features=-texts, text_features=texts, logit_scale=torch.tensor(100.0).double())
    compare(KINDS[name](impl="fused"), KINDS[name](impl="reference"), inputs, within=1e-5)


@pytest.mark.usefixtures("small", "level")
def test_labels_that_agree_with_no_other() -> None:
    from medclip_lab.losses.kernels import targets

    torch.manual_seed(0)
    kind = Kind(SoftTargetClipLoss, {"similarity": "dot", "absent": -1.0, "target_temperature": 0.1})
    inputs = draw(kind(), 12, 24)
    labels = (torch.rand(12, 40) < 0.1).double()
    labels[0] = 1.0
    inputs.extra.clear()
    inputs.extra.update(image_labels=labels, text_labels=(torch.rand(12, 40) < 0.1).double())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(targets, "TABLE_BYTES", 0)
        compare(kind(impl="fused"), kind(impl="reference"), inputs)


@pytest.mark.usefixtures("small")
def test_a_table_of_wider_features() -> None:
    """Texts of float64 make the targets float64; tiles read float32."""
    inputs = relabelled(draw(KINDS["soft"](), 40, 16), "few").to(torch.bfloat16).to(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = KINDS["soft"](impl="fused")(**inputs.leaves, **inputs.extra)
        texts = inputs.leaves["text_features"].double()
        wide = KINDS["soft"](impl="fused")(**{**inputs.leaves, "text_features": texts}, **inputs.extra)
    torch.testing.assert_close(wide, narrow, rtol=1e-6, atol=0.0, check_dtype=False)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", ["clip", "siglip", "soft"])
def test_chunks_are_freed_when_a_step_ends(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not when the garbage collector comes."""
    from medclip_lab.losses.kernels import fused

    made: list[weakref.ref[fused.Engine]] = []
    begin = fused.Engine.__init__

    def noted(engine: fused.Engine, *args: Any) -> None:
        made.append(weakref.ref(engine))
        begin(engine, *args)

    monkeypatch.setattr(fused.Engine, "__init__", noted)
    gc.disable()
    try:
        outcome(KINDS[name](impl="fused"), rounded(draw(KINDS[name](), 40, 16)), autocast=True)
        assert [engine() for engine in made] == [None]
    finally:
        gc.enable()


@pytest.mark.parametrize("tiles, length", [(1, 1), (32, 33), (70, 45)])
def test_the_sums_of_many_tiles_become_one(tiles: int, length: int) -> None:
    from medclip_lab.losses.kernels import fused

    tops, sums = 200 * torch.randn(tiles, length), 1 + 9 * torch.rand(tiles, length)
    engine = fused.Engine(torch.zeros(1, 16, dtype=torch.bfloat16), torch.ones(()), [1], 1)
    expected = (tops.double() * math.log(2) + sums.double().log()).logsumexp(0)
    torch.testing.assert_close(engine._combine(tops, sums), expected, rtol=1e-7, atol=1e-6)


@pytest.mark.usefixtures("small")
def test_small_terms_are_not_lost() -> None:
    """Where every pair is clear, its loss is near exp(-18): log(1 + e) would lose 7 % of it."""
    texts = torch.eye(48, dtype=torch.float64)
    leaves = {"image_features": texts, "text_features": texts}
    scalars = {"logit_scale": torch.tensor(36.0).double(), "logit_bias": torch.tensor(-18.0).double()}
    compare(SigLipLoss(impl="fused"), SigLipLoss(impl="reference"), Inputs(leaves | scalars, {}))
    value = outcome(SigLipLoss(impl="fused"), rounded(Inputs(leaves | scalars, {})), autocast=True).value
    expected = 48 * torch.tensor(-18.0).double().exp().log1p()
    assert abs(value - expected) <= 1e-6 * expected


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["clip", "siglip", "multi-positive", "soft"])
def test_what_is_not_finite_comes_out(name: str, bad: float) -> None:
    inputs = rounded(draw(KINDS[name](), 40, 16))
    for leaf in ("image_features", "text_features"):
        value = inputs.leaves[leaf].clone()
        value[20, 3] = bad
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            found = KINDS[name](impl="fused")(**{**inputs.leaves, leaf: value}, **inputs.extra)
        assert not found.isfinite()


@pytest.mark.usefixtures("small")
def test_the_same_bits_every_time() -> None:
    for name in ("clip", "siglip", "soft"):
        inputs = rounded(draw(KINDS[name](), 40, 16))
        first, second = (outcome(KINDS[name](impl="fused"), inputs, autocast=True) for _ in range(2))
        assert torch.equal(first.value, second.value)
        for leaf, gradient in first.gradients.items():
            assert torch.equal(gradient, second.gradients[leaf])


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", ["clip", "siglip-ids", "soft"])
def test_under_compile(name: str) -> None:
    inputs = rounded(draw(KINDS[name](), 20, 16))
    expected = outcome(KINDS[name](impl="fused"), inputs, autocast=True)
    torch.compiler.reset()
    found = outcome(torch.compile(KINDS[name](impl="fused"), backend="aot_eager"), inputs, autocast=True)  # type: ignore[arg-type]
    assert torch.equal(found.value, expected.value)
    for leaf, gradient in expected.gradients.items():
        assert torch.equal(found.gradients[leaf], gradient)


def _share(loss: nn.Module, inputs: Inputs, shares: list[int], table: bool) -> Outcome:
    from medclip_lab.losses.kernels import targets

    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        if not table:
            patch.setattr(targets, "TABLE_BYTES", 0)
        return outcome(loss, inputs.share(shares, torch.distributed.get_rank()), autocast=True)


def test_ranks_are_one_process() -> None:
    with processes(2) as run:
        for name, table in (
            ("clip", True),
            ("siglip-ids", True),
            ("multi-positive", True),
            ("soft", True),
            ("soft", False),
        ):
            inputs = rounded(draw(KINDS[name](), 40, 16))
            expected = outcome(KINDS[name](impl="reference"), inputs.to(torch.float64))
            for shares in ([3, 37], [40, 0]):
                answers: list[Outcome] = run(_share, (KINDS[name](impl="fused", chunk_size=16), inputs, shares, table))
                for answer in answers:
                    assert abs(answer.value - expected.value) <= 1e-6 * abs(expected.value)
                for leaf, gradient in expected.gradients.items():
                    parts = [answer.gradients[leaf] for answer in answers]
                    found: Tensor = (torch.cat(parts) if gradient.ndim == 2 else torch.stack(parts).sum(0)) / 2
                    scale = max(float(gradient.norm()), 9.0 / 40**0.5)
                    assert float((found.double() - gradient).norm()) <= TOLERANCE * scale, leaf


def test_wants_16_bits() -> None:
    inputs = draw(ClipLoss(), 4, 8).to(torch.float32)
    with pytest.raises(ValueError, match="impl='fused': features of 16 bits are needed"):
        ClipLoss(impl="fused")(**inputs.leaves)
