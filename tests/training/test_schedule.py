import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medclip_lab.training.optim import OptimConfig
from medclip_lab.training.schedule import Schedule, count, shared_steps


def schedule(kind: str = "cosine", steps: int = 100, warmup: int = 10, **more: Any) -> Schedule:
    return Schedule(kind=kind, steps=steps, warmup=warmup, **more)  # type: ignore[arg-type]


def test_cosine() -> None:
    rate = schedule(final_lr=0.01)
    assert [rate(step) for step in (0, 4, 9)] == [0.1, 0.5, 1.0]
    assert rate(10) == pytest.approx(1.0)
    assert rate(55) == pytest.approx(0.505)
    assert rate(100) == pytest.approx(0.01)
    values = [rate(step) for step in range(10, 101)]
    assert values == sorted(values, reverse=True)


def test_constant_and_root() -> None:
    assert {schedule("constant")(step) for step in range(9, 100)} == {1.0}
    rate = schedule("rsqrt")
    assert rate(9) == rate(4) * 2 == 1.0
    assert rate(39) == pytest.approx(0.5)
    assert rate(89) == pytest.approx(1 / 3)


@pytest.mark.parametrize("kind", ["wsd", "rsqrt"])
def test_decay_at_the_end(kind: str) -> None:
    rate = schedule(kind, decay=20, final_lr=0.1)
    stable = schedule("constant" if kind == "wsd" else "rsqrt", steps=1000)
    assert [rate(step) for step in range(81)] == [stable(step) for step in range(81)], "until the decay nothing is less"
    assert rate(85) == pytest.approx(0.1 + (rate(80) - 0.1) * 0.5), "a quarter of the steps is half of the way"
    assert rate(100) == pytest.approx(0.1)
    assert all(rate(step) > rate(step + 1) for step in range(80, 100))


@given(
    kind=st.sampled_from(["cosine", "constant", "rsqrt", "wsd"]),
    steps=st.integers(1, 300),
    parts=st.tuples(st.floats(0, 0.4), st.floats(0.01, 0.4), st.floats(0, 0.9)),
    final_lr=st.floats(0, 1),
)
def test_a_rate_is_a_share_of_the_peak(kind: str, steps: int, parts: tuple[float, ...], final_lr: float) -> None:
    start = count(steps, parts[2])
    warmup, decay = (count(steps - start, part) for part in parts[:2])
    rate = schedule(kind, steps, warmup, decay=decay if kind in ("rsqrt", "wsd") else 0, final_lr=final_lr, start=start)
    values = [rate(step) for step in range(steps + 1)]
    assert all(value == 0 for value in values[:start])
    assert all(
        0 < value <= 1 + 1e-12 or (final_lr == 0 and step == steps) for step, value in enumerate(values[start:], start)
    )
    assert values[: start + 1] == [0.0] * start + [1 / max(1, warmup)]
    assert all(math.isfinite(value) for value in values)


def test_before_its_decay_a_run_is_a_longer_one() -> None:
    """What makes a cool-down from any checkpoint possible."""
    long, short = (schedule("wsd", steps, decay=10) for steps in (1000, 60))
    assert shared_steps(long, short) == 51, "the decay begins at full rate, with step 50"
    assert shared_steps(schedule("cosine", 1000), schedule("cosine", 60)) == 11
    assert shared_steps(long, schedule("wsd", 60, warmup=11, decay=10)) == 0
    assert shared_steps(long, long) == 1000


def test_frozen_at_first_it_starts_anew_where_it_thaws() -> None:
    rate = schedule(steps=60, start=20, stop=50)
    assert [rate(step) for step in (0, 19, 50, 59)] == [0] * 4
    assert [rate(step) for step in (20, 29, 40)] == [schedule(steps=40)(step) for step in (0, 9, 20)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warmup": -0.1}, r"optim\.warmup is a share of the steps in \[0, 1\) or a whole number of them, got -0.1"),
        ({"warmup": 1.5}, r"optim\.warmup .* got 1.5"),
        ({"schedule": "wsd", "decay": 0}, "'wsd' is 'constant': call it so"),
        ({"final_lr": 2}, "final_lr is a share"),
        ({"clip_norm": -1}, "clip_norm not negative"),
        ({"lr": 0}, "lr must be positive"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimConfig(**settings)


def test_a_decay_longer_than_the_run() -> None:
    with pytest.raises(ValueError, match="20 steps of warmup and 90 of decay from step 0 on are more than the 100"):
        schedule("wsd", warmup=20, decay=90)
    assert count(200, 0.1) == count(1000, 20) == 20
