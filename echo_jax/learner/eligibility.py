"""Which rollouts of a batch have a part in the policy term: docs/design.md#eligibility.

It is decided here, once, for the whole batch; batching.py makes weights of it. NumPy on the host.
"""

import collections
from collections.abc import Sequence
from typing import NamedTuple

import ml_collections
import numpy as np

from echo_jax.types import Rollout, Status

EQUAL_GROUPS = ('keep', 'drop', 'redraw')
TRUNCATED = (Status.TRUNCATED, Status.AGENT_TIMEOUT)


class Part(NamedTuple):
    """What a rollout does in the policy term. In the environment term it is as it would be."""

    compares: bool  # its reward is among those of its group
    counts: bool  # it is among the N rollouts that the term is divided by
    trains: bool  # its ACTION tokens have weight


def counts(rollout: Rollout, loss: ml_collections.ConfigDict) -> bool:
    """Whether it has any part in the batch: an INFRA_ERROR only if the recipe counts it."""
    return loss.count_infra_errors or rollout.status != Status.INFRA_ERROR


def policy_parts(rollouts: Sequence[Rollout], loss: ml_collections.ConfigDict) -> list[Part]:
    """The part of each of the rollouts that count; `loss` is the recipe's.

    They have to be those of the whole batch: whether a group's rewards are equal is not to be
    judged by the rollouts of a mini-batch.
    """
    dropped = equal_groups(rollouts, loss) if loss.equal_groups == 'drop' else set()
    parts = []
    for r in rollouts:
        is_masked = _is_masked(r, loss)
        compares = loss.count_truncated or not is_masked
        divides = compares and r.group_id not in dropped
        trains = divides and not is_masked and not r.environment_only
        parts.append(Part(compares, divides, trains))
    return parts


def equal_groups(rollouts: Sequence[Rollout], loss: ml_collections.ConfigDict) -> set[int]:
    """The numbers of the groups that give the policy term nothing, having no two unequal rewards.

    Rollouts that take no part in their group are left out, so a group of which none is left is
    among them. A group that is `environment_only` is not: its rewards do not matter.
    """
    if loss.equal_groups not in EQUAL_GROUPS:
        raise ValueError(
            f'loss.equal_groups is {loss.equal_groups!r}; expected one of {EQUAL_GROUPS}'
        )
    rewards = collections.defaultdict(set)
    for r in rollouts:
        if r.environment_only:
            continue
        group = rewards[r.group_id]
        if counts(r, loss) and (loss.count_truncated or not _is_masked(r, loss)):
            group.add(reward_of(r))
    return {group_id for group_id, values in rewards.items() if len(values) < 2}


def reward_of(rollout: Rollout) -> float:
    """Its reward in the batch: an INFRA_ERROR, if it counts, has 0, whatever it says itself."""
    return 0.0 if rollout.status == Status.INFRA_ERROR else rollout.reward


def eligibility_metrics(
    rollouts: Sequence[Rollout], loss: ml_collections.ConfigDict
) -> dict[str, float]:
    """Metrics `rollout/...` of what the recipe's rules took out of the policy term."""
    values = {}
    if loss.equal_groups == 'drop':
        values['rollout/dropped_groups'] = float(len(equal_groups(rollouts, loss)))
    if loss.mask_truncated:
        masked = [_is_masked(r, loss) for r in rollouts if not r.environment_only]
        values['rollout/masked_truncated'] = float(np.sum(masked))
    return values


def _is_masked(rollout: Rollout, loss: ml_collections.ConfigDict) -> bool:
    return bool(loss.mask_truncated) and rollout.status in TRUNCATED
