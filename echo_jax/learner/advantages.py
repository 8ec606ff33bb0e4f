"""Advantages from the rewards of a group, in NumPy on the host. No tokens, no batches."""

import numpy as np

ESTIMATORS = ('grpo', 'dr_grpo', 'rloo', 'maxrl')
# The released code's constant, which bounds the advantages of rewards that hardly differ. It is
# added to the standard deviation; added to the variance, it would act like 1e-3.
STD_EPSILON = 1e-6


def group_advantages(rewards: np.ndarray, valid: np.ndarray, estimator: str) -> np.ndarray:
    """Advantages of `rewards` [groups, K] within each group, float32 [groups, K].

    `valid` is bool [groups, K]: the other rewards may be anything, and their advantage is 0. With n
    valid rewards r in a group, their mean m and their unbiased (n - 1) standard deviation s:

    - 'grpo': (r - m) / (s + 1e-6), ECHO's released code;
    - 'dr_grpo': r - m (arXiv 2503.20783);
    - 'rloo': r - the mean of the other n - 1 rewards = (r - m) n / (n - 1) (arXiv 2402.14740);
    - 'maxrl': (r - m) / m (MaxRL, arXiv 2602.02710), 0 if no reward is above 0. With rewards of 0
      and 1 this is the gradient of the logarithm of the rate of success instead of the rate's, so
      a rare success counts more. With rewards between, it is that of the logarithm of the mean
      reward. A reward below 0 counts as 0, since a logarithm has no place for it; then no
      advantage is above n - 1.

    A group with fewer than two valid rewards, or with equal ones, gives exactly 0: there is nothing
    to compare. (Some codes give a lone sample its bare reward, which has no baseline.)
    """
    rewards = np.asarray(rewards, np.float64)
    valid = np.asarray(valid, bool)
    if estimator not in ESTIMATORS:
        raise ValueError(f'loss.advantages is {estimator!r}; expected one of {ESTIMATORS}')
    if rewards.ndim != 2 or rewards.shape != valid.shape:
        raise ValueError(
            f'rewards {rewards.shape} and valid {valid.shape} must both be [groups, K]'
        )
    if not np.isfinite(rewards[valid]).all():
        raise ValueError(
            'a valid reward is not finite; an episode with no finite reward '
            'is a VERIFIER_ERROR with reward 0'
        )
    rewards = np.where(valid, rewards, 0.0)
    if estimator == 'maxrl':
        # Else a mean near 0 between rewards of both signs would divide without a bound.
        rewards = np.maximum(rewards, 0.0)
    count = valid.sum(axis=1, keepdims=True)
    low = np.min(rewards, axis=1, keepdims=True, where=valid, initial=np.inf)
    high = np.max(rewards, axis=1, keepdims=True, where=valid, initial=-np.inf)
    # The rewards themselves are compared, not r - m: the mean of equal rewards is rounded, and the
    # 1e-17 that may be left, divided by 1e-6, would be a gradient from nothing.
    informative = valid & (count >= 2) & (high > low)
    others = np.maximum(count - 1, 1)
    centred = rewards - rewards.sum(axis=1, keepdims=True) / np.maximum(count, 1)
    centred = np.where(informative, centred, 0.0)
    if estimator == 'grpo':
        std = np.sqrt(np.square(centred).sum(axis=1, keepdims=True) / others)
        centred = centred / (std + STD_EPSILON)
    elif estimator == 'rloo':
        centred = centred * count / others
    elif estimator == 'maxrl':
        # Where rewards differ, and all are 0 or more, their mean is above 0.
        mean = rewards.sum(axis=1, keepdims=True) / np.maximum(count, 1)
        centred = centred / np.where(mean > 0, mean, 1.0)
    return centred.astype(np.float32)
