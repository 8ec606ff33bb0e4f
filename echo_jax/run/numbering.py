"""Which numbers the groups of a step have. No JAX, for those that only look at a run."""

import ml_collections


def groups_of_step(config: ml_collections.ConfigDict) -> int:
    """How many numbers of groups a step has: its tasks, and those that it may draw anew."""
    redraws = config.loss.redraw_limit if config.loss.equal_groups == 'redraw' else 0
    return config.batch.groups + redraws


def step_of_group(config: ml_collections.ConfigDict, group_id: int) -> int:
    """The step, from 1, that a group of the store `train` belongs to."""
    return group_id // groups_of_step(config) + 1
