"""Which tokens of a step's rollouts the environment term learns (docs/design.md#targets).

Everything follows from roles, tokens and rewards: which tokens `loss.targets` names, which of a
turn's come first (`loss.max_env_tokens`), which rollouts take no part (filters.py), and which
tokens a rule takes out. What a target weighs is batching.py's. It needs only NumPy.
"""

import collections
from collections.abc import Callable, Sequence
from typing import NamedTuple

import ml_collections
import numpy as np

from echo_jax.learner import eligibility
from echo_jax.learner.filters import REASONS, filter_reasons
from echo_jax.types import ENV_TARGETS, OBSERVATION_ROLES, Role, Rollout

ENV_NORMALIZATIONS = ('full_observation', 'selected', 'token_mean')
# A rule that takes targets out: the tokens of a rollout that are not to be learned, bool [T].
Rule = Callable[[Rollout], np.ndarray]


class Targets(NamedTuple):
    """Of one rollout: what the environment term trains on, and what it would have without rules."""

    chosen: np.ndarray  # bool [T], the targets
    dropped: np.ndarray  # bool [T], targets that a rule or their surprise took out; not in `chosen`


def choose_targets(
    rollouts: Sequence[Rollout], config: ml_collections.ConfigDict, rule: Rule | None = None
) -> tuple[list[Targets], dict[str, float]]:
    """The targets of each rollout, and counts of what was taken out, by names of metrics.

    `rollouts` are all of a step, because the filters compare those of a group. `rule` is what
    `loss.drop_unpredictable` asks for. Only options that are on have a count.

    Raises ValueError for an unknown `loss.targets`, and for a rule that is missing.
    """
    loss = config.loss
    if loss.drop_unpredictable and rule is None:
        raise ValueError(
            'loss.drop_unpredictable reads the text of tokens, and no rule was given; pass '
            'learner.unpredictable.Unpredictable(tokenizer)'
        )
    counted = [eligibility.counts(r, loss) for r in rollouts]
    reasons = iter(
        filter_reasons([r for r, counts in zip(rollouts, counted) if counts], loss.env_filter)
    )
    targets, capped = [], 0
    taken_out = collections.Counter()
    for rollout, counts in zip(rollouts, counted):
        nothing = np.zeros(len(rollout.tokens), bool)
        reason = next(reasons) if counts else ''
        taken_out[reason] += 1
        if not counts or reason or _teaches_bad_calls(rollout):
            targets.append(Targets(nothing, nothing))
            continue
        by_role = target_mask(rollout, loss.targets)
        first = first_of_turns(by_role, rollout.roles, loss.max_env_tokens)
        out = first & rule(rollout) if rule is not None else nothing
        capped += (by_role & ~first).sum()
        targets.append(Targets(first & ~out, out))
    metrics = {}
    if any(loss.env_filter.values()):
        metrics = {f'env_filtered/{reason}': float(taken_out[reason]) for reason in REASONS}
    if loss.max_env_tokens:
        metrics['env_dropped/capped'] = float(capped)
    if rule is not None:
        metrics['env_dropped/unpredictable'] = float(sum(t.dropped.sum() for t in targets))
    return targets, metrics


def target_mask(rollout: Rollout, targets: str) -> np.ndarray:
    """bool [T]: the tokens that `targets`, a value of `loss.targets`, names, but for the first.

    Nothing predicts a rollout's first token.
    """
    if targets not in ENV_TARGETS:
        raise ValueError(f'loss.targets is {targets!r}; expected one of {tuple(ENV_TARGETS)}')
    mask = np.isin(rollout.roles, ENV_TARGETS[targets])
    if Role.SCAFFOLD in ENV_TARGETS[targets]:
        mask &= message_mask(rollout)
    mask[:1] = False
    return mask


def message_mask(rollout: Rollout) -> np.ndarray:
    """bool [T]: the whole messages that observations are, with the chat template around them.

    A message goes from the token that opens it to the one that opens the generation prompt. Both
    are the token that opens the prompt too, `<|im_start|>` in ChatML, so the rollout itself says
    which it is. Left out are the end of the agent's turn that the harness had to add, which ends
    that turn, and the generation prompt, which begins the next. If a template opens messages in
    another way, all that stands between two turns is taken.
    """
    roles, tokens = rollout.roles, rollout.tokens
    mask = np.zeros(len(tokens), bool)
    content = np.isin(roles, OBSERVATION_ROLES)
    for start, end in runs(~np.isin(roles, (Role.PROMPT, Role.ACTION))):
        inside = start + np.flatnonzero(content[start:end])
        if len(inside):
            is_opening = (tokens[start:end] == tokens[0]) & (roles[start:end] == Role.SCAFFOLD)
            openings = start + np.flatnonzero(is_opening)
            before, after = openings[openings < inside[0]], openings[openings > inside[-1]]
            mask[before[-1] if len(before) else start : after[0] if len(after) else end] = True
    return mask


def first_of_turns(mask: np.ndarray, roles: np.ndarray, limit: int) -> np.ndarray:
    """bool [T]: of the tokens in `mask`, the first `limit` that follow each turn; 0 is no limit."""
    if not limit:
        return mask
    turns = turn_numbers(roles)
    kept = np.zeros_like(mask)
    for turn in np.unique(turns[mask]):
        kept[np.flatnonzero(mask & (turns == turn))[:limit]] = True
    return kept


def turn_numbers(roles: np.ndarray) -> np.ndarray:
    """int [T]: the turn that a token belongs to, or that its observation answers; the prompt's 0.

    A turn begins with an ACTION token behind another role.
    """
    acting = roles == Role.ACTION
    return np.cumsum(acting & ~np.r_[False, acting[:-1]])


def runs(mask: np.ndarray) -> list[tuple[int, int]]:
    """(start, end) of each run of True."""
    edges = np.flatnonzero(np.diff(np.r_[False, mask, False]))
    return [(int(start), int(end)) for start, end in edges.reshape(-1, 2)]


def target_counts(targets: Sequence[Targets], config: ml_collections.ConfigDict) -> np.ndarray:
    """The targets of each rollout as denominators count them, float64 [rollouts].

    Those that a rule dropped count unless `loss.count_dropped` is False; those that
    `loss.max_env_tokens` leaves out are no targets.
    """
    keep = config.loss.count_dropped
    return np.array([t.chosen.sum() + keep * t.dropped.sum() for t in targets], np.float64)


def sequence_denominators(
    rollouts: Sequence[Rollout], targets: Sequence[Targets], config: ml_collections.ConfigDict
) -> np.ndarray:
    """What divides the environment term of each rollout by sequence, float64 [rollouts].

    With N rollouts, by `loss.env_normalization`: 'full_observation', N times the rollout's
    observation tokens, whatever is chosen of them; 'selected', N times its targets; 'token_mean',
    the targets of all rollouts. Targets count as `target_counts` says, and with
    `loss.count_dropped` False the dropped ones are no observation tokens either.
    """
    n, counts = len(rollouts), target_counts(targets, config)
    match config.loss.env_normalization:
        case 'full_observation':
            content = [np.isin(r.roles, OBSERVATION_ROLES) for r in rollouts]
            observed = np.array([mask[1:].sum() for mask in content], np.float64)
            if not config.loss.count_dropped:
                observed -= [(t.dropped & mask).sum() for t, mask in zip(targets, content)]
            return n * observed
        case 'selected':
            return n * counts
        case 'token_mean':
            return np.full(n, counts.sum())
        case other:
            raise ValueError(
                f'loss.env_normalization is {other!r}; expected one of {ENV_NORMALIZATIONS}'
            )


def _teaches_bad_calls(rollout: Rollout) -> bool:
    """Whether it would teach the format of a call that was not valid, with no reward against it."""
    return rollout.environment_only and bool((rollout.roles == Role.FEEDBACK).any())
