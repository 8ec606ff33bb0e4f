"""Estimates of the KL divergence to the frozen model, as a loss or within the reward.

An estimate is a function of x = log q/p of a token that was sampled from p, the policy, with q the
frozen model; its mean is KL(p, q) or near it (J. Schulman, Approximating KL divergence, 2020,
http://joschu.net/blog/kl-approx.html). `xp` is jax.numpy in the step, and numpy on the host.
"""

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import numpy as np

from echo_jax.learner.ratios import MAX_LOG_RATIO


def k1(log_ratio, xp: ModuleType):
    """-x = log p/q. Unbiased; negative for many samples."""
    del xp
    return -log_ratio


def k2(log_ratio, xp: ModuleType):
    """x**2 / 2. Nonnegative and biased; its gradient is that of KL(p, q), if p is sampled from."""
    return xp.square(log_ratio) / 2


def k3(log_ratio, xp: ModuleType):
    """exp(x) - 1 - x. Unbiased and nonnegative, as in GRPO (arXiv 2402.03300, eq. 4)."""
    # expm1, because in float32 exp(x) - 1 loses most digits of an x of 1e-4, which is usual here.
    return xp.expm1(log_ratio) - log_ratio


KL_ESTIMATORS: Mapping[str, Callable[[Any, ModuleType], Any]] = {'k1': k1, 'k2': k2, 'k3': k3}


def reward_less_kl(
    reward: float,
    logprobs: np.ndarray,
    reference_logprobs: np.ndarray,
    acting: np.ndarray,
    *,
    kl: str,
    kl_coef: float,
) -> float:
    """A rollout's `reward` less `kl_coef` times its KL, summed over its tokens, in float64.

    This is `loss.kl_in` 'reward'. `logprobs` [T] are of the policy that sampled the rollout and
    `reference_logprobs` [T] of the frozen model, nats at the sampling temperature, and `acting`,
    bool [T], its ACTION tokens. The others may hold anything, NaN too.

    run/learning.py calls it before advantages are made of the rewards.
    """
    log_ratio = np.where(acting, reference_logprobs, 0.0) - np.where(acting, logprobs, 0.0)
    log_ratio = np.clip(log_ratio.astype(np.float64), -MAX_LOG_RATIO, MAX_LOG_RATIO)
    return reward - kl_coef * float(KL_ESTIMATORS[kl](log_ratio, np).sum())
