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
        peers = np.array([x for x, k in zip(rewards, kept) if k.group_id == r.group_id])
        advantage = 0.0
        if len(set(peers)) > 1:
            advantage = reward - peers.mean()
            if c.advantages == 'grpo':
                advantage /= peers.std(ddof=1) + 1e-6
            elif c.advantages == 'rloo':
                advantage *= len(peers) / (len(peers) - 1)
        if c.reduction == 'sequence_mean':
            divide_policy = len(kept) * acting.sum()
            chosen = observed if c.env_normalization == 'full_observation' else target
            divide_env = len(kept) * chosen.sum()
        elif c.reduction == 'token_mean':
            divide_policy = sum(m[0].sum() for m in masks)
            divide_env = sum(m[1].sum() for m in masks)
        else:
            divide_policy = divide_env = len(kept) * config.protocol.max_total_tokens
        b = r.rollout_logprobs if sampler is None else sampler[r.tokens]
        before = {'current': current, 'recomputed': old}.get(c.old_logprobs, current)[r.tokens]
        if c.old_logprobs == 'rollout':
            before = b
        for t in np.flatnonzero(acting):
            match c.mismatch:
                case 'none':
                    weight = 1.0
                case 'token':
                    weight = min(np.exp(before[t] - b[t]), c.mismatch_cap)
                case 'sequence':
                    weight = min(np.exp((before - b)[acting].sum()), c.mismatch_cap)
                case 'mask':
                    d = np.exp(before[t] - b[t])
                    weight = float(1 / c.mismatch_cap <= d <= c.mismatch_cap)
            token = r.tokens[t]
            ratio = np.exp(current[token] - before[t])
            plain = ratio * advantage
            held = np.clip(ratio, 1 - c.clip_low, 1 + c.clip_high) * advantage
            total -= weight * min(plain, held) / divide_policy
            if plain <= held:
                gradient[token] -= weight * plain / divide_policy
            if c.kl_coef:
                x = frozen[token] - current[token]
                total += c.kl_coef * (np.exp(x) - x - 1) / divide_policy
                gradient[token] += c.kl_coef * (1 - np.exp(x)) / divide_policy
        for t in np.flatnonzero(target):
            total -= env_coef * current[r.tokens[t]] / divide_env
            gradient[r.tokens[t]] -= env_coef / divide_env
    return total, gradient
