"""The environment term's weight over the steps, its balance by gradients, and surprise: by hand."""

import ml_collections
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from echo_jax.learner.env_coef import adapted, is_traced, scheduled
from echo_jax.learner.surprise import drop_by_surprise, select_by_surprise
from echo_jax.learner.targets import Targets
from tests.support.random_rollouts import small_config


def loss(coef=0.05, **schedule):
    options = small_config(env_coef=coef).loss
    options.env_schedule.update(schedule)
    return options


@pytest.mark.parametrize(
    ('options', 'expected'),
    [
        (loss(), {0: 0.05, 3: 0.05, 9: 0.05}),
        # Ten steps from 0.05 to 0: a tenth of it less in each, and 0 only after the last.
        (loss(name='linear'), {0: 0.05, 1: 0.045, 5: 0.025, 9: 0.005, 10: 0, 20: 0}),
        (loss(name='linear', end=0.1), {0: 0.05, 2: 0.06, 10: 0.1}),
        # One transition.
        (loss(name='steps', steps=(4,), coefs=(0.01,)), {0: 0.05, 3: 0.05, 4: 0.01, 9: 0.01}),
        (
            loss(name='steps', steps=(0, 3, 7), coefs=(0.2, 0.1, 0.0)),
            {0: 0.2, 2: 0.2, 3: 0.1, 6: 0.1, 7: 0, 9: 0},
        ),
    ],
)
def test_schedules_by_hand(options, expected):
    found = {step: scheduled(options, step, 10) for step in expected}
    assert found == pytest.approx(expected)
    assert is_traced(options) == (options.env_schedule.name != 'constant')


def test_an_unknown_schedule():
    with pytest.raises(ValueError, match=r"env_schedule\.name is 'cosine'; expected one of"):
        scheduled(loss(name='cosine'), 0, 10)


def adaptive(**options):
    found = ml_collections.ConfigDict(dict(target=0.1, smoothing=0.5, low=0.0, high=0.2, every=1))
    found.update(options)
    return found


def test_the_coefficient_moves_to_the_ratio_of_the_norms_by_hand():
    # Wanted: 0.1 x 3 / 2 = 0.15; from 0.05, half of the way.
    assert adapted(0.05, 3.0, 2.0, adaptive()) == pytest.approx(0.1)
    assert adapted(0.05, 3.0, 2.0, adaptive(smoothing=0.0)) == pytest.approx(0.15)
    # Where the ratio holds, it stays: 0.15 x 2 = 0.1 x 3.
    assert adapted(0.15, 3.0, 2.0, adaptive()) == pytest.approx(0.15)
    assert adapted(0.05, 300.0, 2.0, adaptive()) == 0.2
    assert adapted(0.05, 0.001, 2.0, adaptive(low=0.04)) == 0.04
    # A batch with no advantage, or with no target, says nothing.
    assert adapted(0.05, 0.0, 2.0, adaptive()) == 0.05
    assert adapted(0.05, 3.0, 0.0, adaptive()) == 0.05


def test_it_arrives():
    coef = 0.01
    for _ in range(40):
        coef = adapted(coef, 4.0, 8.0, adaptive(smoothing=0.8))
    assert coef * 8.0 == pytest.approx(0.1 * 4.0, rel=1e-3)


# -------------------------------------------------------------------------------------- surprise


@pytest.mark.parametrize(
    ('ce', 'top', 'bottom', 'kept'),
    [
        ([1, 2, 3, 4, 5], 0.2, 0.0, [1, 1, 1, 1, 0]),
        ([5, 1, 4, 2, 3], 0.2, 0.4, [0, 0, 1, 0, 1]),
        ([1, 2, 3, 4, 5], 0.19, 0.0, [1, 1, 1, 1, 1]),  # less than one token
        ([2, 2, 2, 1], 0.5, 0.0, [1, 1, 1, 1]),  # equal values stay together
        ([2, 2, 3, 1], 0.5, 0.0, [1, 1, 0, 1]),
        ([2, 2, 3, 1], 0.0, 0.5, [1, 1, 1, 0]),
        ([7], 0.9, 0.0, [1]),
        ([7, 8], 0.5, 0.5, [0, 0]),
        ([], 0.5, 0.1, []),
    ],
)
def test_selection_by_hand(ce, top, bottom, kept):
    ce, kept = np.array(ce, float), np.array(kept, bool)
    found = select_by_surprise(ce, np.ones(len(ce), bool), top, bottom)
    np.testing.assert_array_equal(found, kept)


def test_only_the_mask_is_looked_at():
    ce = np.array([np.nan, 1.0, np.inf, 2.0, 3.0])
    mask = np.array([False, True, False, True, True])
    np.testing.assert_array_equal(select_by_surprise(ce, mask, 0.4, 0), [0, 1, 0, 1, 0])
    assert not select_by_surprise(ce, np.zeros(5, bool), 0.4, 0.4).any()


@given(
    values=st.lists(st.integers(0, 4), max_size=20),
    top=st.sampled_from([0, 0.1, 0.29, 0.5]),
    bottom=st.sampled_from([0, 0.2, 0.49]),
    data=st.data(),
)
def test_the_order_of_tokens_plays_no_part(values, top, bottom, data):
    ce = np.array(values, float)
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=len(ce), max_size=len(ce))), bool)
    kept = select_by_surprise(ce, mask, top, bottom)
    assert not (kept & ~mask).any()
    order = np.array(data.draw(st.permutations(range(len(ce)))), int)
    again = select_by_surprise(ce[order], mask[order], top, bottom)
    np.testing.assert_array_equal(again, kept[order])
    n = mask.sum()
    assert n - kept.sum() <= n * top + n * bottom + 1e-9
    if len(set(ce[mask])) == n:  # exactly, if no two are equal
        assert n - kept.sum() == int(n * top + 1e-9) + int(n * bottom + 1e-9)


def test_the_share_is_of_a_whole_step():
    nothing = np.zeros(3, bool)
    targets = [
        Targets(np.array([False, True, True]), np.array([True, False, False])),
        Targets(nothing, nothing),
        Targets(np.array([True, True]), nothing[:2]),
    ]
    logprobs = [np.array([-9.0, -1.0, -2.0]), np.full(3, -9.0), np.array([-3.0, -4.0])]
    # Of four targets, the two that surprise most are both the third rollout's.
    found = drop_by_surprise(targets, logprobs, 0.5, 0.0)
    assert [t.chosen.tolist() for t in found] == [[False, True, True], [False] * 3, [False] * 2]
    assert [t.dropped.tolist() for t in found] == [[True, False, False], [False] * 3, [True] * 2]
    assert drop_by_surprise([], [], 0.5, 0.0) == []
