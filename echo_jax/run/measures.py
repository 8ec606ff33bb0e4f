"""What a set of rollouts says of a policy: solve rate, pass@k, environment cross-entropy."""

import math
from collections.abc import Sequence

import numpy as np

from echo_jax.learner import batching
from echo_jax.types import ENV_TARGETS, SOLVED_REWARD, Rollout


def solve_rate(rollouts: Sequence[Rollout]) -> float:
    """The share of rollouts whose reward is at least 0.5; one without a reward is unsolved."""
    return float(np.mean([r.reward >= SOLVED_REWARD for r in rollouts]))


def pass_at_k(solved: Sequence[bool], k: int) -> float:
    """The unbiased estimate 1 - C(n - c, k) / C(n, k) for one task (arXiv 2107.03374, eq. 1)."""
    n, c = len(solved), sum(solved)
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def env_ce(score, params, rollouts: Sequence[Rollout], config) -> dict[str, float]:
    """Mean of -log p at temperature 1, nats a token, over the environment's tokens, and per role.

    `score(params, batch) -> [R, T]` is `learner.step.make_score`'s. The mean is over the tokens of
    `loss.targets` of all the rollouts; a role that none of them has is left out.
    """
    roles = ENV_TARGETS[config.loss.targets]
    sums, counts = {role: 0.0 for role in roles}, {role: 0 for role in roles}
    size = config.batch.groups * config.group_size
    for start in range(0, len(rollouts), size):
        batch = batching.make_supervised_batch(rollouts[start : start + size], config, roles)
        logprobs = np.asarray(score(params, batch), np.float64)
        for role in roles:
            chosen = (batch.roles == role) & (batch.env_weight > 0)
            sums[role] -= logprobs[chosen].sum()
            counts[role] += int(chosen.sum())
    total = max(sum(counts.values()), 1)
    means = {role.name.lower(): sums[role] / counts[role] for role in roles if counts[role]}
    return {'all': sum(sums.values()) / total, **means}


def summarize(results: list[dict], samples: int) -> dict[str, float]:
    """{'1': pass@1, '2': ..., up to the samples a task has, in powers of two}."""
    by_task: dict[str, list[bool]] = {}
    for result in results:
        by_task.setdefault(result['task_id'], []).append(result['correct'])
    ks = [2**i for i in range(samples.bit_length())]
    return {str(k): float(np.mean([pass_at_k(s, k) for s in by_task.values()])) for k in ks}
