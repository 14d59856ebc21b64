"""What is said of a plan is what a run of it does."""

from pathlib import Path

import pytest

from medclip_lab.cli import main
from medclip_lab.data.manifest import Manifest
from medclip_lab.data.order import Plan, SourceOrder
from medclip_lab.data.simulate import Case, simulate, table


@pytest.mark.parametrize(("ranks", "lanes"), [(1, 1), (4, 4), (4, 16), (16, 4)])
def test_shards_opened_are_those_that_a_rank_reads(ranks: int, lanes: int) -> None:
    case = Case(10_000, 50, ranks, batch_size=64, lanes=lanes, window=300)
    figures = simulate(case)
    plan = Plan({"source": SourceOrder(case.counts(), "source", 0, lanes, 300)}, [1.0], 64, 0)
    rows = [row for step in range(10_000 // 64) for row in plan.rows(step, 0, ranks)]
    read = {row.place.shard for row in rows}
    # A rank that shares its lane with others may miss a shard of few samples there.
    assert len(read) <= figures["shards_opened_per_rank"] <= len(read) + lanes
    assert figures["samples_left_out"] == 10_000 % lanes
    assert figures["lanes_per_rank"] == max(1, lanes // ranks)


def test_more_lanes_and_larger_windows_mix_better() -> None:
    def met(lanes: int, window: int) -> float:
        value: float = simulate(Case(100_000, 100, 8, 256, lanes, window))["shards_in_a_batch"]
        return value

    assert met(1, 500) < met(8, 500) < met(8, 5000) < met(64, 5000)
    full = simulate(Case(100_000, 100, 8, 256, 1, 100_000))
    assert full["shards_in_a_batch"] == pytest.approx(full["in_a_full_shuffle"], rel=0.03)


def test_a_billion_samples_on_a_thousand_ranks() -> None:
    case = Case(10**9, 1000, 1024, 32_768, 1024, 10_000)
    figures = simulate(case)
    assert figures["shards_opened_per_rank"] <= 10**6 / 1024 + 2
    assert figures["shards_open_at_once"] <= 12
    assert figures["samples_left_out"] < 1024
    assert "1,000,000,000 in 1,000,000 shards of 1,000" in table(case, figures)


def test_of_shards_that_are_there(toy_shards: Manifest, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shards", "plan", "--shards", toy_shards.folder, "--batch-size", "8"]) == 0
    text = capsys.readouterr().out
    shards = toy_shards.of_split("train")
    assert f"{toy_shards.count('train')} in {len(shards)} shards" in " ".join(text.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samples", "0"], "samples must be at least 1, got 0"),
        (["--samples", "100", "--lanes", "3"], "a batch of 256 rows cannot be dealt to 3 lanes"),
        (["--samples", "100", "--lanes", "128"], "100 samples do not fill 128 lanes"),
        (["--samples", "100", "--ranks", "512"], "a batch of 256 has no row for each of 512 ranks"),
        (["--shards", "nowhere"], "no such folder: nowhere"),
    ],
)
def test_what_cannot_be_planned(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["shards", "plan", *arguments]) == 2
    assert message in capsys.readouterr().err
