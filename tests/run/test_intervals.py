"""Intervals by hand, against simulation, and the paired difference."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from echo_jax.run.intervals import mean_difference, mean_of_shares
from echo_jax.run.measures import pass_at_k


def test_the_interval_of_shares_by_hand():
    # 4 tasks, 1 solved: mean 1/4, variance of the values 1/4, of the mean 1/16. So the effective
    # number of tasks is (3/16) / (1/16) = 3, and t of 3 degrees of freedom is 3.1824.
    t = 3.182446305284263
    scale = 1 + t**2 / 3
    center = (1 / 4 + t**2 / 6) / scale
    half = t / scale * math.sqrt(3 / 16 / 3 + t**2 / 36)
    found = mean_of_shares([1.0, 0.0, 0.0, 0.0])
    assert found == pytest.approx((1 / 4, center - half, center + half))


def test_equal_shares_have_a_width():
    # All of n tasks solved: Wilson's lower end is n / (n + t^2), and the upper one is 1.
    t = stats.t.ppf(0.975, 9)
    assert mean_of_shares([1.0] * 10) == pytest.approx((1.0, 10 / (10 + t**2), 1.0))
    assert mean_of_shares([0.0] * 10) == pytest.approx((0.0, 0.0, 1 - 10 / (10 + t**2)))
    assert mean_of_shares([0.5]) == (0.5, 0.0, 1.0)


@pytest.mark.parametrize(
    'tasks, samples, a, b',
    [(89, 8, 0.5, 0.5), (89, 1, 1.0, 3.0), (200, 4, 0.2, 2.0), (100, 8, 8.0, 1.0)],
)
def test_intervals_hold_the_truth_95_times_in_100(tasks, samples, a, b):
    """2,000 sets of tasks whose chances of success are drawn from Beta(a, b)."""
    rng = np.random.default_rng(0)
    chances = rng.beta(a, b, (2000, tasks))
    shares = rng.binomial(samples, chances) / samples
    truth = a / (a + b)
    found = [mean_of_shares(one) for one in shares]
    covered = np.mean([low <= truth <= high for _, low, high in found])
    assert 0.93 <= covered <= 0.97
    assert all(0 <= low <= mean <= high <= 1 for mean, low, high in found)


def test_differences_hold_the_truth_95_times_in_100():
    """2,000 pairs of evaluations, 89 tasks of 8 samples; the second is better by 0.05 on each."""
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(2000):
        chances = rng.beta(1, 2, 89) * 0.95
        first, second = (rng.binomial(8, p) / 8 for p in (chances + 0.05, chances))
        names = [f'task{i}' for i in range(89)]
        found = mean_difference(dict(zip(names, first)), dict(zip(names, second)))
        hits += found.low <= 0.05 <= found.high
    assert 0.93 <= hits / 2000 <= 0.97


def test_the_difference_by_hand():
    first = {'a': 1.0, 'b': 0.5, 'c': 0.0, 'd': 0.25}
    second = {'d': 0.25, 'c': 0.5, 'b': 0.0, 'a': 0.0}
    # Differences 1, 1/2, -1/2, 0: mean 1/4; squares of the rest 9/16, 1/16, 9/16, 1/16, sum 5/4, so
    # the variance is 5/12, and the standard error sqrt(5/48).
    error = math.sqrt(5 / 48)
    found = mean_difference(first, second)
    assert found[:3] == pytest.approx(
        (0.25, 0.25 - 3.182446305284263 * error, 0.25 + 3.182446305284263 * error)
    )
    assert (found.gained, found.lost) == (['a', 'b'], ['c']) and found.is_noise
    assert mean_difference(first, first)[:3] == (0, 0, 0)  # not NaN, though nothing varies
    better = mean_difference({'a': 1.0, 'b': 0.9, 'c': 1.0}, {'a': 0.0, 'b': 0.1, 'c': 0.1})
    assert not better.is_noise


def test_other_tasks_are_refused_by_name():
    with pytest.raises(ValueError, match=r'1 are only here \(b\), 2 only there \(c, d\)'):
        mean_difference({'a': 1, 'b': 1}, {'a': 1, 'c': 1, 'd': 1})


@pytest.mark.parametrize('k', [1, 2, 3, 5])
def test_pass_at_k_is_the_average_over_all_choices(k):
    for solved in itertools.product([False, True], repeat=6):
        choices = itertools.combinations(solved, k)
        assert pass_at_k(solved, k) == pytest.approx(np.mean([any(c) for c in choices]))
