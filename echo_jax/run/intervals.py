"""Means over tasks with 95% intervals, and the difference of two evaluations of the same tasks.

A task is the unit: its samples are not independent of each other, so only the values of tasks, one
each, are counted. An interval says how far the mean might be off with other tasks of the same kind
and other samples of each.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

_CONFIDENCE = 0.95


class Estimate(NamedTuple):
    """A mean and its 95% interval."""

    mean: float
    low: float
    high: float


class Difference(NamedTuple):
    """One evaluation less another of the same tasks, paired by task."""

    mean: float
    low: float
    high: float
    gained: list[str]  # tasks with a higher value in the first, by name
    lost: list[str]

    @property
    def is_noise(self) -> bool:
        """Whether the interval holds 0, so that the difference may be chance alone."""
        return self.low <= 0 <= self.high


def mean_of_shares(shares: Sequence[float]) -> Estimate:
    """The mean of values between 0 and 1, one a task, such as a task's solve rate.

    Wilson's interval for as many tasks as would have the variance of this mean if each were solved
    or not, with Student's quantile (Korn and Graubard 1998, Survey Methodology 24(2)). Unlike the
    mean with its standard error it stays within 0 and 1, and has a width if all values are equal.
    """
    n, mean = len(shares), float(np.mean(shares))
    if n < 2:
        return Estimate(mean, 0.0, 1.0)
    t = float(stats.t.ppf((1 + _CONFIDENCE) / 2, n - 1))
    variance = float(np.var(shares, ddof=1)) / n
    effective = mean * (1 - mean) / variance if variance > 0 else n
    scale = 1 + t**2 / effective
    center = (mean + t**2 / (2 * effective)) / scale
    half = t / scale * math.sqrt(mean * (1 - mean) / effective + (t / (2 * effective)) ** 2)
    return Estimate(mean, max(center - half, 0.0), min(center + half, 1.0))


def mean_of_values(values: Sequence[float]) -> Estimate:
    """The mean of any values, with Student's interval, whose ends are NaN for a single value."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return Estimate(mean, math.nan, math.nan)
    # Not stats.t.interval, which gives NaN if all values are equal.
    half = float(stats.t.ppf((1 + _CONFIDENCE) / 2, len(values) - 1) * stats.sem(values))
    return Estimate(mean, mean - half, mean + half)


def mean_difference(first: Mapping[str, float], second: Mapping[str, float]) -> Difference:
    """The mean over tasks of first less second, each {task: share}, with Student's interval; that
    of a single task is all that a difference of shares can be.

    Raises ValueError if they are not of the same tasks.
    """
    check_same_tasks(first, second)
    differences = {task: first[task] - second[task] for task in first}
    mean, low, high = mean_of_values(list(differences.values()))
    if len(differences) < 2:
        low, high = -1.0, 1.0
    return Difference(
        mean,
        low,
        high,
        gained=[task for task, value in differences.items() if value > 0],
        lost=[task for task, value in differences.items() if value < 0],
    )


def check_same_tasks(first: Iterable[str], second: Iterable[str]) -> None:
    """Raises ValueError, with some of their names, if one has a task that the other has not."""
    here, there = sorted({*first} - {*second}), sorted({*second} - {*first})
    if here or there:
        raise ValueError(
            f'not of the same tasks: {len(here)} are only here{_named(here)}, '
            f'{len(there)} only there{_named(there)}'
        )


def _named(tasks: Sequence[str]) -> str:
    return f' ({", ".join(tasks[:3])}{", ..." if len(tasks) > 3 else ""})' if tasks else ''
