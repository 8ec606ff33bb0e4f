import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from echo_jax.learner.advantages import ESTIMATORS, group_advantages


def test_by_hand():
    rewards = np.array([[1.0, 0.0, 0.0, 1.0]])
    valid = np.ones((1, 4), bool)
    # mean 1/2; unbiased variance (4 * 1/4) / 3 = 1/3, std 0.5773503; 0.5 / 0.5773513 = 0.8660239
    np.testing.assert_allclose(
        group_advantages(rewards, valid, 'grpo'),
        [[0.8660239, -0.8660239, -0.8660239, 0.8660239]],
        rtol=1e-6,
    )
    np.testing.assert_array_equal(
        group_advantages(rewards, valid, 'dr_grpo'), [[0.5, -0.5, -0.5, 0.5]]
    )
    # a 1 against the mean of 0, 0, 1: 2/3
    np.testing.assert_allclose(
        group_advantages(rewards, valid, 'rloo'), [[2 / 3, -2 / 3, -2 / 3, 2 / 3]], rtol=1e-6
    )


def test_maxrl_by_hand():
    rewards = np.array(
        [
            [1.0, 0.0, 0.0, 1.0],  # mean 1/2: (1 - 1/2) / (1/2) = 1
            [1.0, 0.0, 0.0, 0.0],  # mean 1/4: 3, the largest that 4 rollouts can have
            [0.5, 0.25, 0.0, 0.25],  # mean 1/4, of rewards that are neither 0 nor 1
            [1.0, -1.0, 0.0, -0.5],  # as 1, 0, 0, 0; the mean of these would be -1/8
            [-1.0, -0.5, 0.0, -2.0],  # as 0, 0, 0, 0: no success
            [1e-320, 0.0, 0.0, 0.0],  # so small that dividing would lose it
        ]
    )
    expected = [[1, -1, -1, 1], [3, -1, -1, -1], [1, 0, -1, 0], [3, -1, -1, -1], [0] * 4]
    advantages = group_advantages(rewards, np.ones((6, 4), bool), 'maxrl')
    np.testing.assert_allclose(advantages[:5], expected, rtol=1e-6)
    assert np.isfinite(advantages).all() and (np.abs(advantages) <= 3.001).all()


def test_invalid_samples_take_no_part():
    # The valid two are 3 and 1: mean 2. The 100 and the NaN are nobody's reward.
    rewards = np.array([[3.0, 100.0, 1.0, np.nan]])
    valid = np.array([[True, False, True, False]])
    np.testing.assert_array_equal(
        group_advantages(rewards, valid, 'dr_grpo'), [[1.0, 0.0, -1.0, 0.0]]
    )
    # std = sqrt(((1)^2 + (-1)^2) / 1) = 1.4142136; 1 / 1.4142146 = 0.7071063
    np.testing.assert_allclose(
        group_advantages(rewards, valid, 'grpo'), [[0.7071063, 0.0, -0.7071063, 0.0]], rtol=1e-6
    )


@pytest.mark.parametrize('estimator', ESTIMATORS)
def test_nothing_to_compare_is_exactly_zero(estimator):
    # Three times 0.1: the float64 mean differs from 0.1 by 1.4e-17, which 1e-6 would not hide.
    rewards = np.array([[0.1, 0.1, 0.1], [5.0, 2.0, 2.0], [1.0, 0.0, 1.0]])
    valid = np.array([[True, True, True], [True, False, False], [False, False, False]])
    advantages = group_advantages(rewards, valid, estimator)
    assert advantages.dtype == np.float32
    np.testing.assert_array_equal(advantages, np.zeros((3, 3)))
    assert group_advantages(np.zeros((0, 0)), np.zeros((0, 0), bool), estimator).shape == (0, 0)


def test_errors():
    with pytest.raises(ValueError, match="'reinforce'; expected one of"):
        group_advantages(np.ones((1, 2)), np.ones((1, 2), bool), 'reinforce')
    with pytest.raises(ValueError, match='not finite'):
        group_advantages(np.array([[1.0, np.inf]]), np.ones((1, 2), bool), 'grpo')
    with pytest.raises(ValueError, match='both be'):
        group_advantages(np.ones(2), np.ones(2, bool), 'grpo')


@given(
    rewards=hnp.arrays(np.float64, (4, 5), elements=st.floats(-10, 10, width=32)),
    valid=hnp.arrays(bool, (4, 5)),
    estimator=st.sampled_from(ESTIMATORS),
)
def test_each_group_alone_and_centred(rewards, valid, estimator):
    advantages = group_advantages(rewards, valid, estimator)
    assert (advantages[~valid] == 0).all()
    np.testing.assert_allclose(advantages.sum(axis=1), 0, atol=1e-4)
    for row, mask, values in zip(rewards, valid, advantages):
        kept = row[mask]
        expected = np.zeros(len(kept))
        if len(set(kept)) > 1:
            expected = {
                'grpo': lambda r: (r - r.mean()) / (r.std(ddof=1) + 1e-6),
                'dr_grpo': lambda r: r - r.mean(),
                'rloo': lambda r: np.array([r[i] - np.delete(r, i).mean() for i in range(len(r))]),
                'maxrl': lambda r: r / r.mean() - 1 if r.any() else 0 * r,
            }[estimator](np.maximum(kept, 0) if estimator == 'maxrl' else kept)
        np.testing.assert_allclose(values[mask], expected, rtol=1e-5, atol=1e-6)
