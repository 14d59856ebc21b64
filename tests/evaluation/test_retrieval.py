from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score

from medclip_lab.evaluation import retrieval as rooms
from medclip_lab.evaluation.metrics import patient_weights
from medclip_lab.evaluation.retrieval import both_ways, overlap_retrieval, retrieval
from medclip_lab.losses.testing import Runner
from tests.evaluation.on_a_rank import both_retrievals

KS = (1, 2, 5)


@st.composite
def galleries(draw: Any) -> Any:
    """Whole-numbered features, so that ties are many and exact; groups of any size, some on one side only."""
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    queries, items, groups = draw(st.integers(2, 30)), draw(st.integers(2, 30)), draw(st.integers(1, 30))
    left, right = rng.integers(-2, 3, (queries, 3)), rng.integers(-2, 3, (items, 3))
    return (
        left.astype(np.float32),
        right.astype(np.float32),
        rng.integers(0, groups, queries),
        rng.integers(0, groups, items),
    )


def by_hand(left: Any, right: Any, of_left: Any, of_right: Any, same: bool) -> Any:
    """Rank of the best positive, every tie lost, from the whole matrix; 0 for a query without a positive."""
    ranks, tied = [], []
    for row, scores in enumerate(left @ right.T):
        others = np.ones(len(right), bool)
        if same:
            others[row] = False
        positive = others & (of_right == of_left[row])
        if not positive.any():
            ranks.append(0)
            tied.append(0)
            continue
        best = scores[positive].max()
        negative = others & ~positive
        ranks.append(1 + int((scores[negative] >= best).sum()))
        tied.append(int((scores[negative] == best).sum()))
    return np.array(ranks), np.array(tied)


@given(galleries(), st.booleans())
@settings(deadline=None)
def test_ranks_equal_the_whole_matrix(case: Any, same: bool) -> None:
    left, right, of_left, of_right = case
    if same:
        right, of_right = left, of_left
    found = both_ways(left, right, of_left, of_right, exclude_self=same)
    for ranks, side in zip(found, ((left, right, of_left, of_right), (right, left, of_right, of_left)), strict=True):
        expected, tied = by_hand(*side, same)
        np.testing.assert_array_equal(ranks.asked, expected > 0)
        np.testing.assert_array_equal(ranks.pessimistic(), expected[expected > 0])
        np.testing.assert_array_equal(ranks.tied[ranks.asked], tied[expected > 0])


@given(galleries())
@settings(deadline=None)
def test_small_blocks_change_nothing(case: Any) -> None:
    left, right, of_left, of_right = case
    whole = both_ways(left, right, of_left, of_right)
    with pytest.MonkeyPatch.context() as patch:
        for name, size in (("ROWS", 3), ("COLUMNS", 4), ("HELD", 5)):
            patch.setattr(rooms, name, size)
        parts = both_ways(left, right, of_left, of_right)
    for one, other in zip(whole, parts, strict=True):
        for name in ("greater", "tied", "tied_positives", "positives"):
            np.testing.assert_array_equal(getattr(one, name)[one.asked], getattr(other, name)[one.asked], err_msg=name)


@given(galleries())
@settings(deadline=None, max_examples=30)
def test_shared_ties_and_precision_are_means_over_orders(case: Any) -> None:
    left, right, of_left, of_right = case
    groups = [str(group) for group in of_left], [str(group) for group in of_right]
    if not np.isin(of_left, of_right).any():
        with pytest.raises(ValueError, match="no query has a positive"):
            retrieval(left, right, *groups)
        return
    found = retrieval(left, right, *groups, ks=KS)[0]
    rng, scores = np.random.default_rng(0), left @ right.T
    hits, shares = np.zeros(len(KS)), np.zeros(len(KS))
    asked, orders = np.flatnonzero(np.isin(of_left, of_right)), 200
    for _ in range(orders):
        noise = rng.random(scores.shape)
        for row in asked:
            first = (of_right == of_left[row])[np.lexsort((noise[row], -scores[row]))]
            for place, k in enumerate(KS):
                hits[place] += first[:k].any()
                shares[place] += first[:k].mean()
    for place, k in enumerate(KS):
        assert found.recall_ties_shared[k] == pytest.approx(hits[place] / orders / len(asked), abs=0.15)
        assert found.precision[k] == pytest.approx(shares[place] / orders / len(asked), abs=0.15)
        assert found.recall[k] <= found.recall_ties_shared[k] + 1e-12


def test_ties_by_hand() -> None:
    """A positive tied with two negatives is first in a third of all orders, and among the first two in two thirds."""
    query, gallery = np.array([[1.0, 0.0]]), np.array([[1.0, 0.0]] * 3 + [[0.0, 1.0]])
    found = retrieval(query, gallery, ["a"], ["a", "b", "c", "d"], ks=(1, 2, 3))[0]
    assert found.recall == {1: 0.0, 2: 0.0, 3: 1.0}
    assert found.recall_ties_shared == pytest.approx({1: 1 / 3, 2: 2 / 3, 3: 1.0})
    assert found.precision == pytest.approx({1: 1 / 3, 2: 1 / 3, 3: 1 / 3})
    assert (found.tied_queries, found.mrr) == (1, pytest.approx(1 / 3))


def test_retrieval_by_hand() -> None:
    gallery = np.eye(4)
    query = np.array([[0.9, 0.1, 0.0, 0.0], [0.9, 0.1, 0.0, 0.0], [0.0, 0.3, 0.2, 0.1]])
    found, back = retrieval(query, gallery, ["a", "b", "d"], ["a", "b", "c", "d"], ks=(1, 2, 3))
    assert found.recall == {1: 1 / 3, 2: 2 / 3, 3: 1.0}  # ranks 1, 2, 3
    assert found.median_rank == 2
    assert found.mrr == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)
    assert found.chance == pytest.approx({1: 0.25, 2: 0.5, 3: 0.75})
    assert (back.queries, back.without_positive, back.gallery) == (3, 1, 3)
    assert back.recall == {1: 1 / 3, 2: 2 / 3, 3: 1.0}  # "a" ties with query b and loses; "b" is behind d; "d" leads


def test_same_text_is_a_positive() -> None:
    features = np.eye(3)
    groups = ["normal", "normal", "x"]
    found = retrieval(features[[1, 0, 2]], features, groups, groups, ks=(1, 2))[0]
    assert found.recall[1] == 1.0
    assert found.chance[1] == pytest.approx((2 / 3 + 2 / 3 + 1 / 3) / 3)
    assert found.precision[2] == pytest.approx((0.75 + 0.75 + 0.5) / 3)  # e2 and the other "normal" share second place


def test_an_item_is_no_answer_to_itself() -> None:
    features = np.array([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [0.6, 0.8]])
    groups = ["a", "b", "b", "a"]
    found = retrieval(features, features, groups, groups, ks=(1, 3), exclude_self=True)[0]
    assert found.gallery == 3
    assert found.recall[1] == 0.0
    assert retrieval(features, features, groups, groups, ks=(1,))[0].recall[1] == 1.0, "which is no finding"


def test_order_and_scale_of_the_gallery_do_not_matter() -> None:
    rng = np.random.default_rng(0)
    query, gallery = rng.normal(size=(30, 6)), rng.normal(size=(30, 6))
    groups = [str(number // 2) for number in range(30)]
    order = rng.permutation(30)
    one = retrieval(query, gallery, groups, groups)
    other = retrieval(query, gallery[order], groups, [groups[row] for row in order])
    assert one[0] == other[0]
    assert one[1].recall == other[1].recall


def test_rounding_is_no_rank() -> None:
    """A negative that differs from the positive by what the order of a sum can change is a tie."""
    query = np.array([[1.0, 0.0]], dtype=np.float32)
    gallery = np.array([[0.5, 0.1], [0.5 + 3e-8, 0.2]], dtype=np.float32)
    found = both_ways(query, gallery, np.array([0]), np.array([0, 1]))[0]
    assert (found.greater.tolist(), found.tied.tolist()) == ([0], [1])


def test_intervals_of_recall() -> None:
    rng = np.random.default_rng(0)
    left = rng.normal(size=(200, 8))
    right = left + rng.normal(size=(200, 8))
    groups = [str(number) for number in range(200)]
    weights = patient_weights([str(number // 2) for number in range(200)], 200, 0)
    found, back = retrieval(left, right, groups, groups, weights=(weights, None))
    assert found.recall_interval is not None
    for k, (low, high) in found.recall_interval.items():
        assert low <= found.recall[k] <= high
    assert found.recall_interval[1][1] - found.recall_interval[1][0] < 0.25
    assert back.recall_interval is None


@given(st.integers(0, 10_000), st.booleans())
@settings(deadline=None, max_examples=30)
def test_overlap_equals_scikit_learn(seed: int, tied: bool) -> None:
    rng = np.random.default_rng(seed)
    query, gallery = rng.normal(size=(9, 4)), rng.normal(size=(25, 4))
    if tied:
        query, gallery = np.round(query), np.round(gallery)
    findings = rng.random((9, 3)) < 0.5, rng.random((25, 3)) < 0.5
    both = (findings[0][:, None] & findings[1]).sum(2)
    either = (findings[0][:, None] | findings[1]).sum(2)
    gains = np.where(either == 0, 1.0, both / np.maximum(either, 1))
    if (gains.max(1) == 0).any():
        return  # scikit-learn counts such a query as 0, we leave it out
    found = overlap_retrieval(query.astype(np.float32), gallery.astype(np.float32), *findings, ks=(1, 4, 10))
    for k in (1, 4, 10):
        expected = ndcg_score(gains, (query.astype(np.float32) @ gallery.astype(np.float32).T), k=k)
        assert found["ndcg"][k] == pytest.approx(expected, abs=1e-6)
    assert found["mean_gain_chance"] == pytest.approx(gains.mean(), abs=1e-6)


def test_overlap_without_itself() -> None:
    features = np.eye(4, dtype=np.float32)
    findings = np.array([[True, False], [True, False], [False, True], [False, True]])
    found = overlap_retrieval(features, features, findings, findings, ks=(1,), exclude_self=True)
    assert found["gallery"] == 3
    assert found["ndcg"][1] == pytest.approx(1 / 3)  # what is left is tied, and one in three of it shares the finding
    assert found["chance"][1] == pytest.approx(1 / 3)
    assert overlap_retrieval(features, features, findings, findings, ks=(1,))["ndcg"][1] == 1.0


def test_ranks_share_the_work_and_agree(ranks: Runner) -> None:
    alone = both_retrievals(0)
    for found in ranks(both_retrievals, (0,)):
        assert found[0] == alone[0]
        for name in ("ndcg", "chance", "mean_gain"):
            assert found[1][name] == pytest.approx(alone[1][name])


def test_the_last_of_many() -> None:
    """Counts along a side of a block are as large as the block."""
    angles = np.linspace(0, 1, 700)
    gallery = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    query = np.array([[1.0, 0.0]], dtype=np.float32)
    groups = [str(number) for number in range(700)]
    found, _ = retrieval(query, gallery, ["699"], groups)
    assert found.median_rank == 700
    _, back = retrieval(gallery, query, groups, ["699"])
    assert back.median_rank == 700
