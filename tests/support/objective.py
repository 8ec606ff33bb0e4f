"""docs/design.md#objective written again for the tests: NumPy, without a batch or weights.

The tokens of a list of rollouts are all different (random_rollouts.py), so a table that is indexed
by token says what a model gives to each of them.
"""

import numpy as np

from echo_jax.types import ENV_TARGETS, OBSERVATION_ROLES, Role, Status

VOCABULARY = 300  # more tokens than random_rollouts.py draws in one list


def reference(rollouts, config, env_coef, current, old, frozen, sampler=None):
    """The loss, a rollout at a time in float64, and its gradient by token, [VOCABULARY].

    `current`, `old`, `frozen` and `sampler` are tables [VOCABULARY] of log-probabilities. Without
    `sampler`, those of the rollouts are used.
    """
    c, gradient, total = config.loss, np.zeros(VOCABULARY), 0.0
    kept = [r for r in rollouts if c.count_infra_errors or r.status != Status.INFRA_ERROR]
    masks = []
    for r in kept:
        predicted = np.arange(len(r.tokens)) > 0
        masks.append(
            (
                (r.roles == Role.ACTION) & predicted,
                np.isin(r.roles, ENV_TARGETS[c.targets]) & predicted,
                np.isin(r.roles, OBSERVATION_ROLES) & predicted,
            )
        )
    rewards = [0.0 if r.status == Status.INFRA_ERROR else r.reward for r in kept]
    for r, reward, (acting, target, observed) in zip(kept, rewards, masks):
        together = [k.group_id == r.group_id for k in kept]
        advantage = advantage_of(reward, np.array(rewards)[together], c.advantages)
        if c.reduction == 'sequence_mean':
            divide_policy = len(kept) * acting.sum()
            chosen = observed if c.env_normalization == 'full_observation' else target
            divide_env = len(kept) * chosen.sum()
        elif c.reduction == 'token_mean':
            divide_policy = sum(m[0].sum() for m in masks)
            divide_env = sum(m[1].sum() for m in masks)
        elif c.reduction == 'prompt_mean':
            groups = len({k.group_id for k in kept})
            divide_policy = groups * sum(m[0].sum() for m, same in zip(masks, together) if same)
            divide_env = groups * sum(m[1].sum() for m, same in zip(masks, together) if same)
        else:
            divide_policy = divide_env = len(kept) * config.protocol.max_total_tokens
        b = r.rollout_logprobs if sampler is None else sampler[r.tokens]
        before = {'current': current, 'recomputed': old}.get(c.old_logprobs, current)[r.tokens]
        if c.old_logprobs == 'rollout':
            before = b
        at = np.flatnonzero(acting)
        weights = mismatch_weights((before - b)[at], c) / divide_policy if len(at) else []
        tokens = r.tokens[at]
        value, slope = surrogate(current[tokens], before[at], advantage, weights, c)
        total -= value
        gradient[tokens] -= slope
        if c.kl_coef and c.kl_in == 'loss':
            x = frozen[tokens] - current[tokens]
            estimate, change = {
                'k1': (-x, np.ones(len(x))),
                'k2': (x**2 / 2, -x),
                'k3': (np.exp(x) - x - 1, 1 - np.exp(x)),
            }[c.kl]
            if len(at):
                total += c.kl_coef * estimate.sum() / divide_policy
                gradient[tokens] += c.kl_coef * change / divide_policy
        for t in np.flatnonzero(target):
            total -= env_coef * current[r.tokens[t]] / divide_env
            gradient[r.tokens[t]] -= env_coef / divide_env
    return total, gradient


def advantage_of(reward, peers, estimator):
    if estimator == 'maxrl':
        reward, peers = max(reward, 0.0), np.maximum(peers, 0.0)
    if len(set(peers)) < 2:
        return 0.0
    advantage = reward - peers.mean()
    if estimator == 'grpo':
        advantage /= peers.std(ddof=1) + 1e-6
    elif estimator == 'rloo':
        advantage *= len(peers) / (len(peers) - 1)
    elif estimator == 'maxrl':
        advantage /= peers.mean()
    return advantage


def mismatch_weights(d, c):
    """One rollout's corrections, of the log-ratios of its ACTION tokens."""
    cap, near = c.mismatch_cap, abs(d) <= np.log(c.mismatch_cap)
    match c.mismatch:
        case 'none':
            return np.ones(len(d))
        case 'token':
            return np.minimum(np.exp(d), cap)
        case 'sequence':
            return np.full(len(d), min(np.exp(d.sum()), cap))
        case 'mask':
            return near.astype(float)
        case 'icepop':
            return np.exp(d) * near
        case 'geometric':
            return np.full(len(d), float(abs(d.mean()) <= np.log(cap)))


def surrogate(current, before, advantage, weights, c):
    """One rollout's weighted sum, and its derivative by each log-probability in `current`."""
    low, high = 1 - c.clip_low, 1 + c.clip_high
    value, slope = 0.0, np.zeros(len(current))
    geometric = np.exp(np.mean(current - before)) if len(current) else 1.0
    for t, (logprob, old, weight) in enumerate(zip(current, before, weights)):
        ratio = geometric if c.policy == 'gspo' else np.exp(logprob - old)
        plain, held = ratio * advantage, np.clip(ratio, low, high) * advantage
        moves = plain <= held  # no bound acts
        gain = min(plain, held)
        if c.policy == 'dual_clip' and advantage < 0 and gain < c.dual_clip * advantage:
            gain, moves = c.dual_clip * advantage, False
        if c.policy == 'dppo':
            away = (advantage > 0 and ratio > 1) or (advantage < 0 and ratio < 1)
            moves = not (away and abs(np.exp(logprob) - np.exp(old)) > c.dppo_tv)
            gain = plain if moves else 0.0
        if c.policy == 'cispo':
            value += weight * held * logprob
            slope[t] += weight * held
            continue
        value += weight * gain
        if moves and c.policy == 'gspo':
            slope += weight * plain / len(current)
        elif moves:
            slope[t] += weight * plain
    return value, slope
