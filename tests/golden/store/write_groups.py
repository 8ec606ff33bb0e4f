"""Writes rollout groups beside it with whatever code is on the path.

The folder `echogrp1` was written so by the code at commit e4a4c7a, the last that wrote format 1,
and `echogrp2` by the code at commit e7dab4b, the last that wrote format 2:

    git worktree add ../old e4a4c7a
    PYTHONPATH=../old python tests/golden/store/write_groups.py echogrp1

In format 1 `environment_only` was a metric. Group 12 has it set, group 13 has it at 0, and group 14
was written by code that did not know it. In format 2 it is a field, and these are plain metrics.
"""

import pathlib
import sys

import numpy as np

from echo_jax.store.rollouts import RolloutStore
from echo_jax.types import Rollout, Status

METRICS = {12: {'environment_only': 1.0}, 13: {'environment_only': 0.0}, 14: {}}


def make_rollout(group_id: int, sample_id: int) -> Rollout:
    """Roles prompt, prompt, action, action, feedback, output; every value says where it belongs."""
    return Rollout(
        tokens=np.arange(6, dtype=np.int32) + 100 * group_id + 10 * sample_id,
        roles=np.array([0, 0, 1, 1, 4, 6], np.uint8),
        rollout_logprobs=np.array([0, 0, -0.5, -0.25 * (1 + sample_id), 0, 0], np.float32),
        policy_versions=np.array([-1, -1, 7, 8, -1, -1], np.int32),
        turn_starts=np.array([2], np.int32),
        reward=sample_id / 2,
        status=[Status.OK, Status.INFRA_ERROR][sample_id],
        task_id=f'task-{group_id}',
        group_id=group_id,
        sample_id=sample_id,
        metrics={'turns': 1.0, **METRICS[group_id], 'seconds_sampling': 0.1 * group_id},
    )


if __name__ == '__main__':
    store = RolloutStore(pathlib.Path(__file__).parent / sys.argv[1])
    for group_id in METRICS:
        store.write_group([make_rollout(group_id, sample_id) for sample_id in (0, 1)])
