"""Draws groups of other tasks in the place of those whose rewards are all equal.

docs/design.md#eligibility says why. `loss.equal_groups = 'redraw'` asks for it, and
`loss.redraw_limit` bounds it.
"""

from collections.abc import Mapping, Sequence

import ml_collections
import numpy as np

from echo_jax.learner.eligibility import equal_groups
from echo_jax.run.ahead import due_groups
from echo_jax.run.numbering import groups_of_step
from echo_jax.run.sources import Source
from echo_jax.types import Rollout, Task


def redraw_equal(
    rollouts: list[Rollout],
    source: Source,
    splits: Mapping[str, Sequence[Task]],
    config: ml_collections.ConfigDict,
    done: int,
) -> tuple[list[Rollout], dict[str, float]]:
    """The rollouts of the step after the first `done`, and metrics of what was drawn anew.

    As long as groups have equal rewards and `loss.redraw_limit` tasks are not spent, as many tasks
    are drawn as there are such groups, and those of unequal rewards take their places. What is
    still equal then stays: the environment term learns from it.

    Tasks and numbers of groups depend on the step alone, so a resumed run finds in the store what
    it drew before it was killed, and draws the rest. Raises Stopped if a stop is requested.
    """
    if config.loss.equal_groups != 'redraw':
        return rollouts, {}
    groups: dict[int, list[Rollout]] = {}
    for rollout in rollouts:
        groups.setdefault(rollout.group_id, []).append(rollout)
    tasks = other_tasks(splits['train'], {r.task_id for r in rollouts}, config, done)
    first = done * groups_of_step(config) + config.batch.groups
    drawn = 0
    while (equal := sorted(equal_groups(_all(groups), config.loss))) and drawn < len(tasks):
        count = min(len(equal), len(tasks) - drawn)
        due = due_groups(config, tasks[drawn : drawn + count], first + drawn, version=done)
        source.post(due)
        anew = [g for g in source.wait(due) if not equal_groups(g, config.loss)]
        for place, group in zip(equal, anew):
            del groups[place]
            groups[group[0].group_id] = group
        drawn += count
    return _all(groups), {
        'rollout/redrawn_groups': float(drawn),
        'rollout/equal_groups': float(len(equal)),
    }


def other_tasks(
    tasks: Sequence[Task], taken: set[str], config: ml_collections.ConfigDict, done: int
) -> list[str]:
    """The ids of `loss.redraw_limit` tasks with rewards, in a seeded order, without those `taken`.

    They come in addition to the order in which training goes through its tasks, which stays.
    """
    ids = [t.task_id for t in tasks if not t.environment_only and t.task_id not in taken]
    order = np.random.default_rng([config.seed, done, 0, 1]).permutation(len(ids))
    return [ids[i] for i in order[: config.loss.redraw_limit]]


def _all(groups: Mapping[int, list[Rollout]]) -> list[Rollout]:
    return [rollout for group in groups.values() for rollout in group]
