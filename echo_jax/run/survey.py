"""What a set of tasks needs: which backend can run how many of its tasks, and why not the others.

Reads task.toml and Dockerfiles. It builds nothing and runs nothing, so it cannot know that an image
cannot be built, or that a command of a Dockerfile does not work on this machine.
"""

import collections
import re
from collections.abc import Sequence
from typing import Any

from echo_jax.run import tasksets
from echo_jax.sandbox import local
from echo_jax.sandbox.local import dockerfile
from echo_jax.tasks.sources import SHOWN, TaskSet, shortened
from echo_jax.types import Task

BACKENDS = ('local', 'docker', 'harbor')


def rows(sets: Sequence[TaskSet]) -> list[dict[str, Any]]:
    """One object a task: its set, id and path, and for each backend '' or why not."""
    found = []
    for one in sets:
        for task in one.tasks:
            refused = dict.fromkeys(BACKENDS, '')
            refused['docker'] = tasksets.needs(task)
            refused['local'] = refused['docker'] or _local_refusal(task)
            found.append(_row(one, task.task_id, str(task.path), refused))
        found += [
            _row(one, task_id, None, dict.fromkeys(BACKENDS, reason))
            for task_id, reason in one.left_out
        ]
    return found


def _row(one: TaskSet, task_id: str, path: str | None, refused: dict[str, str]) -> dict[str, Any]:
    return {'set': str(one.path), 'task_id': task_id, 'path': path, 'refused': refused}


def describe(one: TaskSet, table: Sequence[dict[str, Any]], verbose: bool = False) -> list[str]:
    """Lines for a person about a set, whose rows are in `table`."""
    mark = ', environment only' if one.tasks[0].environment_only else ''
    without = f', {len(one.left_out)} left out' if one.left_out else ''
    lines = [f'{one.path}: {len(one.tasks)} tasks{without}{mark}']
    shown = len(one.left_out) if verbose else SHOWN
    lines += [f'  {task_id}: {reason}' for task_id, reason in one.left_out[:shown]]
    if len(one.left_out) > shown:
        lines.append(f'  and {len(one.left_out) - shown} more')
    if one.ignored:
        names = [f'{name} ({count})' for name, count in one.ignored.items()]
        lines.append(f'  not known to Harbor, which reads past them: {shortened(names)}')
    readable = [row for row in table if row['set'] == str(one.path) and row['path']]
    for backend in BACKENDS:
        reasons = {row['task_id']: row['refused'][backend] for row in readable}
        counted = collections.Counter(_kind(reason) for reason in reasons.values() if reason)
        lines.append(f'  {backend}: {len(readable) - counted.total()} of {len(readable)}')
        if verbose:
            lines += [f'    {name}: {reason}' for name, reason in reasons.items() if reason]
            continue
        causes = [f'    not {count}: {reason}' for reason, count in counted.most_common()]
        lines += causes[:SHOWN]
        if len(causes) > SHOWN:
            lines.append(f'    and {len(causes) - SHOWN} more reasons; see --verbose')
    return lines


def _local_refusal(task: Task) -> str:
    """Why the local sandbox cannot follow the task, by its Dockerfile; '' if it may."""
    file = task.path / 'environment' / 'Dockerfile'
    try:
        local.LocalSandbox(task)
        if file.exists():
            dockerfile.read_dockerfile(file)
    except ValueError as error:
        return ' '.join(str(error).split())
    return ''


def _kind(reason: str) -> str:
    """The reason without the place, so that the same ones can be counted."""
    reason = re.sub(r'^\S+:\d+: ', '', reason)
    return reason if len(reason) <= 80 else f'{reason[:80]}...'
