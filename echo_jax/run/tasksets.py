"""The tasks that a run can use, of the sets that it names; every program reads them here.

Reads what tasks/sources.py can, puts the recipe's limits in, and leaves out what the recipe's
sandboxes do not have. The learner and its workers read the same files by the same recipe, so they
have the same tasks.
"""

import collections
import os
from collections.abc import Sequence
from typing import NamedTuple

import ml_collections

from echo_jax.tasks import sources
from echo_jax.tasks.sources import LeftOut, TaskSet, with_limits
from echo_jax.types import Task

LIMITS = ('cpus', 'memory_mb', 'disk_mb', 'agent_timeout', 'verifier_timeout')


class Read(NamedTuple):
    """What the named sets hold for a run."""

    tasks: list[Task]
    left_out: list[LeftOut]  # not readable, or not for the sandboxes of the recipe


def read(
    named: str | os.PathLike, config: ml_collections.ConfigDict, cache: str | os.PathLike
) -> Read:
    """The tasks of `sources.load_sources` that sandboxes of the recipe can run, by its limits.

    Warns once of what is left out. Raises ValueError if nothing is left.
    """
    sets = sources.load_sources(named, cache)
    chosen = choose(sets, config)
    total = len(chosen.tasks) + len(chosen.left_out)
    sources.warn_left_out(', '.join(str(one.path) for one in sets), chosen.left_out, total)
    for one in sets:
        sources.warn_ignored(one)
    return chosen


def choose(sets: Sequence[TaskSet], config: ml_collections.ConfigDict) -> Read:
    """What is left of the sets for sandboxes of the recipe; see `read`. Warns of nothing."""
    tasks: list[Task] = []
    left_out: list[LeftOut] = []
    for one in sets:
        left_out += one.left_out
        for task in one.tasks:
            reason = '' if config.sandbox.backend == 'harbor' else needs(task)
            if reason:
                left_out.append(LeftOut(task.task_id, reason))
            else:
                tasks.append(limited(task, config))
    if not tasks:
        causes = collections.Counter(reason for _, reason in left_out)
        counted = [f'{count}: {reason}' for reason, count in causes.most_common()]
        paths = ', '.join(str(one.path) for one in sets)
        raise ValueError(
            f'{paths}: none of {len(left_out)} tasks can be run; {sources.shortened(counted, "; ")}'
        )
    return Read(tasks, left_out)


def needs(task: Task) -> str:
    """What the task asks for that only Harbor's own sandboxes have, with advice; or ''."""
    if not task.needs_harbor:
        return ''
    return f"needs {', '.join(task.needs_harbor)}; sandbox.backend='harbor' runs it"


def limited(task: Task, config: ml_collections.ConfigDict) -> Task:
    """The task with the limits that the recipe names in the place of its own."""
    return with_limits(task, **{name: config.sandbox[name] for name in LIMITS})
