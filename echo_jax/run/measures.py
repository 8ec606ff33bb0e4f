"""What a set of rollouts says of a policy: solve rate, pass@k, environment cross-entropy."""

import math
from collections.abc import Callable, Mapping, Sequence

import ml_collections
import numpy as np
from numpy.typing import ArrayLike

from echo_jax.learner import batching
from echo_jax.learner.targets import target_mask
from echo_jax.types import ENV_TARGETS, OBSERVATION_ROLES, Batch, Rollout


def pass_at_k(solved: Sequence[bool], k: int) -> float:
    """The unbiased estimate 1 - C(n - c, k) / C(n, k) for one task (arXiv 2107.03374, eq. 1)."""
    n, c = len(solved), sum(solved)
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def env_ce(
    score: Callable[[Batch], ArrayLike],
    rollouts: Sequence[Rollout],
    config: ml_collections.ConfigDict,
) -> dict[str, float]:
    """The mean of -log p at temperature 1 over environment tokens, in nats a token.

    `score(batch) -> [R, T]` gives the log-probability of every token. 'all' is the mean over
    the tokens of `loss.targets` in all rollouts; the other keys are the roles of these tokens and
    of observations, in lower case. A role that no rollout has is left out. No limit, filter or rule
    takes any of them out, so that runs which differ in these can be compared.
    """
    targets = ENV_TARGETS[config.loss.targets]
    roles = tuple(dict.fromkeys(OBSERVATION_ROLES + targets))
    sums = dict.fromkeys(roles, 0.0)
    counts = dict.fromkeys(roles, 0)
    size = config.batch.groups * config.group_size
    for start in range(0, len(rollouts), size):
        part = rollouts[start : start + size]
        masks = [
            target_mask(rollout, config.loss.targets) | np.isin(rollout.roles, OBSERVATION_ROLES)
            for rollout in part
        ]
        batch = batching.make_supervised_batch(part, config, masks=masks)
        logprobs = np.asarray(score(batch), np.float64)
        for role in roles:
            chosen = (batch.roles == role) & (batch.env_weight > 0)
            sums[role] -= logprobs[chosen].sum()
            counts[role] += int(chosen.sum())
    total = max(sum(counts[role] for role in targets), 1)
    means = {role.name.lower(): sums[role] / counts[role] for role in roles if counts[role]}
    return {'all': sum(sums[role] for role in targets) / total, **means}


def imagined(rollouts: Sequence[Rollout]) -> float:
    """The share of turns in which the agent wrote an observation itself, a mean over rollouts.

    A rollout without turns, as one of a failed sandbox, counts as 0.
    """
    return float(np.mean([r.metrics.get('imagined', 0.0) for r in rollouts]))


def seconds_under_time(values: dict[str, float]) -> dict[str, float]:
    """The metrics with `rollout/seconds_NAME` renamed to `time/episode_NAME`.

    Seconds differ from run to run; everything outside `time/` repeats exactly.
    """
    mark = 'rollout/seconds_'
    return {
        f'time/episode_{name.removeprefix(mark)}' if name.startswith(mark) else name: value
        for name, value in values.items()
    }


def headline(values: Mapping[str, float]) -> dict[str, float]:
    """The two metrics of a step that its progress line shows; NaN if a step has none."""
    names = {'reward': 'rollout/reward', 'env_ce': 'train/env_ce'}
    return {name: values.get(key, float('nan')) for name, key in names.items()}
