"""What the study says of its runs: paired differences, intervals, tests, speed.

Two runs of one seed are compared task by task, because they solve the same held-out tasks from the
same warm start. Arms are compared seed by seed, because seeds differ more than arms do.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats


class Paired(NamedTuple):
    """One run against another one of the same seed, over the held-out tasks."""

    difference: float  # of the solve rates
    error: float  # its standard error, of the paired differences
    only_first: int  # tasks that the first run alone solved
    only_second: int
    p: float  # exact sign test over the tasks that one alone solved, two-sided (McNemar's)


def paired(first: Sequence[int], second: Sequence[int]) -> Paired:
    """`first` and `second` say of each task, in one order, whether it was solved: 1 or 0."""
    differences = np.subtract(first, second, dtype=float)
    only_first, only_second = int((differences > 0).sum()), int((differences < 0).sum())
    return Paired(
        float(differences.mean()),
        float(stats.sem(differences)),
        only_first,
        only_second,
        sign_test(differences),
    )


def sign_test(differences: Sequence[float]) -> float:
    """The two-sided p-value of as many differences of one sign, if both signs are as likely.

    Differences of 0 say nothing and are left out; 1 if no other is there.
    """
    positive, negative = np.sum(np.greater(differences, 0)), np.sum(np.less(differences, 0))
    if not positive + negative:
        return 1.0
    return float(stats.binomtest(int(positive), int(positive + negative)).pvalue)


def smoothed(values: Sequence[float], window: int) -> np.ndarray:
    """The means of `window` consecutive values, or of all if they are fewer.

    The first mean is that of step `window`, the last that of the last step.
    """
    window = min(window, len(values))
    return np.convolve(values, np.full(window, 1 / window), 'valid')


def steps_to_last(rewards: Sequence[float], of: Sequence[float], window: int = 10) -> int | None:
    """The step at which the mean of the last `window` rewards reaches that at the end of `of`.

    Both are training rewards, one a step. None if it is never reached.
    """
    means = smoothed(rewards, window)
    reached = np.flatnonzero(means >= smoothed(of, window)[-1])
    return len(rewards) - len(means) + int(reached[0]) + 1 if len(reached) else None


def by_count(values: Sequence[int], counts: Sequence[int]) -> list[float]:
    """The mean of the values of tasks with one tool, with two, with three."""
    return [float(np.mean(np.compress(np.equal(counts, n), values))) for n in sorted({*counts})]
