"""Which rollouts have no part in the environment term, by the released code's three filters.

Roles and rewards say it all. A rollout that is taken out still counts in N and keeps its policy
term. NumPy only.
"""

import collections
from collections.abc import Sequence

import ml_collections
import numpy as np

from echo_jax.learner.eligibility import reward_of
from echo_jax.types import SOLVED_REWARD, Role, Rollout

REASONS = ('parsed', 'clean', 'correct')


def turn_shares(roles: np.ndarray) -> tuple[float, float]:
    """(share of turns that parsed, share that also had no warning); 0 without a turn.

    A turn that did not parse, or whose call was refused, is answered by FEEDBACK; one with a
    warning, by WARNING. A turn that nothing answers, as the last with `done`, parsed.
    """
    acting = roles == Role.ACTION
    turns = np.cumsum(acting & ~np.r_[False, acting[:-1]])
    count = int(turns[-1]) if len(turns) else 0
    if not count:
        return 0.0, 0.0
    bad = set(turns[roles == Role.FEEDBACK].tolist()) - {0}
    warned = set(turns[roles == Role.WARNING].tolist()) - {0}
    return (count - len(bad)) / count, (count - len(bad | warned)) / count


def filter_reasons(rollouts: Sequence[Rollout], options: ml_collections.ConfigDict) -> list[str]:
    """Why each rollout has no part in the environment term, '' if it has one.

    `options` is `loss.env_filter`; a value of 0 turns its filter off. In this order:

    - 'parsed': fewer than `min_parsed` of its turns parsed, or it has none;
    - 'clean': fewer than `min_clean` of its turns parsed without a warning;
    - 'correct': of those that are left in its group, the correct ones (reward of at least 0.5) are
      to be `min_correct` or more, so of the others only the first, by sample_id, are kept. In a
      group without a correct one none is. `environment_only` rollouts have no reward, and this
      filter leaves them alone.
    """
    if not (options.min_parsed or options.min_clean or options.min_correct):
        return [''] * len(rollouts)
    reasons = []
    groups = collections.defaultdict(list)
    for i, rollout in enumerate(rollouts):
        parsed, clean = turn_shares(rollout.roles)
        has_turns = bool((rollout.roles == Role.ACTION).any())
        if not has_turns or parsed < options.min_parsed:
            reasons.append('parsed')
        elif clean < options.min_clean:
            reasons.append('clean')
        else:
            reasons.append('')
            if not rollout.environment_only:
                groups[rollout.group_id].append(i)
    if options.min_correct:
        for members in groups.values():
            for i in _too_many_incorrect(rollouts, members, options.min_correct):
                reasons[i] = 'correct'
    return reasons


def _too_many_incorrect(
    rollouts: Sequence[Rollout], members: Sequence[int], min_correct: float
) -> list[int]:
    """Those of a group's members that would make the share of correct ones less than that."""
    incorrect = [i for i in members if reward_of(rollouts[i]) < SOLVED_REWARD]
    correct = len(members) - len(incorrect)
    # c / (c + k) >= share. A billionth, because 3 * (1 - 0.3) / 0.3 is 7 and not 6.9999999.
    room = int(correct * (1.0 - min_correct) / min_correct + 1e-9)
    return sorted(incorrect, key=lambda i: rollouts[i].sample_id)[room:]
