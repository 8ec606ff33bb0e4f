"""What a set of rollouts says of a policy: solve rate, pass@k, environment cross-entropy."""

import math
from collections.abc import Callable, Mapping, Sequence

import ml_collections
import numpy as np

from echo_jax.learner import batching
from echo_jax.learner.targets import target_mask
from echo_jax.types import ENV_TARGETS, OBSERVATION_ROLES, SOLVED_REWARD, Rollout


def solve_rate(rollouts: Sequence[Rollout]) -> float:
    """The share of rollouts whose reward is at least 0.5; one without a reward is unsolved."""
    return float(np.mean([r.reward >= SOLVED_REWARD for r in rollouts]))


def pass_at_k(solved: Sequence[bool], k: int) -> float:
    """The unbiased estimate 1 - C(n - c, k) / C(n, k) for one task (arXiv 2107.03374, eq. 1)."""
    n, c = len(solved), sum(solved)
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def pass_rates(results: Sequence[dict], samples: int) -> dict[str, float]:
    """{'1': pass@1, '2': pass@2, '4': ...}, in powers of two up to `samples`, means over tasks.

    `results` hold 'task_id' and 'correct', one for each of the `samples` samples of every task.
    """
    by_task: dict[str, list[bool]] = {}
    for result in results:
        by_task.setdefault(result['task_id'], []).append(result['correct'])
    ks = [2**i for i in range(samples.bit_length())]
    return {str(k): float(np.mean([pass_at_k(s, k) for s in by_task.values()])) for k in ks}


def env_ce(
    score: Callable, params, rollouts: Sequence[Rollout], config: ml_collections.ConfigDict
) -> dict[str, float]:
    """The mean of -log p at temperature 1 over environment tokens, in nats a token.

    `score(params, batch) -> [R, T]` is what `learner.step.make_score` makes. 'all' is the mean over
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
        logprobs = np.asarray(score(params, batch), np.float64)
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


def heldout(when: str, rollouts: Sequence[Rollout], ce: Mapping[str, float]) -> dict[str, float]:
    """What summary.json says of held-out rollouts, `when` 'before' or 'after', and of `env_ce`."""
    values = {'solve_rate': solve_rate(rollouts), 'env_ce': ce['all']}
    values |= {'env_ce_output': ce['output']} if 'output' in ce else {}
    values['imagined'] = imagined(rollouts)
    return {f'{name}_{when}': value for name, value in values.items()}


def seconds_under_time(values: dict[str, float]) -> dict[str, float]:
    """The metrics with `rollout/seconds_NAME` renamed to `time/episode_NAME`.

    Seconds differ from run to run; everything outside `time/` repeats exactly.
    """
    mark = 'rollout/seconds_'
    return {
        f'time/episode_{name.removeprefix(mark)}' if name.startswith(mark) else name: value
        for name, value in values.items()
    }


def eval_metrics(ce: Mapping[str, float]) -> dict[str, float]:
    """What `env_ce` gives, as metrics of a step: `eval/env_ce` and `eval/env_ce/ROLE`."""
    return {f'eval/env_ce/{role}'.removesuffix('/all'): value for role, value in ce.items()}


def headline(values: Mapping[str, float]) -> dict[str, float]:
    """The two metrics of a step that its progress line shows; NaN if a step has none."""
    names = {'reward': 'rollout/reward', 'env_ce': 'train/env_ce'}
    return {name: values.get(key, float('nan')) for name, key in names.items()}
