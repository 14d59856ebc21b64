"""What the benchmark measures is the same on both sides; how fast it is, is no test."""

import pytest

from medclip_lab.bench.evaluate import bench_bootstrap, bench_classifier, bench_evaluate, bench_retrieval, table
from medclip_lab.errors import UserError


def test_both_ways_of_ranking_agree() -> None:
    result = bench_retrieval(300, 16)  # asserts that the recalls are those of the peer
    assert 0.1 < result["image_to_text"]["recall"][1] < 0.99
    assert result["peer_seconds"] >= 0


def test_both_builders_agree() -> None:
    result = bench_classifier(2)
    assert (result["classes"], result["templates"]) == (2, 80)
    assert result["largest_difference"] < 1e-5


def test_parts_by_name() -> None:
    assert bench_bootstrap(300, 2, 50)["samples"] == 300
    result = bench_evaluate(100, 8, only=["retrieval"])
    assert "bootstrap" not in result
    assert table(result).startswith("retrieval")
    with pytest.raises(UserError, match="at least 100 samples"):
        bench_evaluate(10)
