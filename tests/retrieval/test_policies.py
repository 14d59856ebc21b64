"""The least score of an answer, by itself and with another policy."""

import pytest

from medclip_lab.errors import UserError
from medclip_lab.retrieval.policies import AtLeast, FixedK, Ratio

SCORES = [0.8, 0.5, 0.5, 0.25, -0.5]


def test_at_least_keeps_what_reaches_the_score() -> None:
    assert [AtLeast(score).keep(SCORES) for score in (-1, -0.5, 0.5, 0.8, 1)] == [5, 5, 3, 1, 0]
    assert AtLeast(0.5, FixedK(2)).keep(SCORES) == 2
    assert AtLeast(0.5, Ratio(10)).keep(SCORES) == 3
    assert AtLeast(0.5).keep([]) == 0


def test_a_score_is_a_cosine() -> None:
    for score in (1.1, -2, float("nan")):
        with pytest.raises(UserError, match="between -1 and 1"):
            AtLeast(score)
