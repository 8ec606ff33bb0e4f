"""Reads sets of tasks: directories of Harbor tasks, and .parquet files of them.

Reading needs neither grain nor JAX. This module builds no sandbox and runs nothing.
"""

import dataclasses
import logging
import os
import pathlib

from echo_jax.tasks.harbor import TASK_FILES, load_task
from echo_jax.types import Task

log = logging.getLogger(__name__)

_MARK = ':environment_only'  # ends a source whose tasks train the environment term alone


def load_tasks(sources: str | os.PathLike, cache: str | os.PathLike | None = None) -> list[Task]:
    """The tasks of `load_sources`, in one list."""
    return [task for _, tasks in load_sources(sources, cache) for task in tasks]


def load_sources(
    sources: str | os.PathLike, cache: str | os.PathLike | None = None
) -> list[tuple[pathlib.Path, list[Task]]]:
    """(path, its tasks sorted by id) of one source, or of several with commas between them.

    A source is a directory of task directories or a .parquet file, whose rows are unpacked into
    `cache` (parquet.py). `:environment_only` after it marks its tasks. If the whole text is a path
    that exists, it is one source, even if it holds commas. Raises ValueError for a source without
    tasks, a malformed task, and an id that two sources have.
    """
    loaded: list[tuple[pathlib.Path, list[Task]]] = []
    owners: dict[str, pathlib.Path] = {}
    for path, environment_only in _parse(sources):
        tasks = [
            dataclasses.replace(task, environment_only=environment_only)
            for task in _load_source(path, cache)
        ]
        for task in tasks:
            owner = owners.setdefault(task.task_id, path)
            if owner is not path:
                raise ValueError(
                    f'{path} and {owner} both have a task {task.task_id!r}; results go by the id: '
                    'rename one, or leave one out'
                )
        loaded.append((path, tasks))
    return loaded


def with_limits(
    task: Task,
    *,
    cpus: float | None = None,
    memory_mb: int | None = None,
    disk_mb: int | None = None,
    agent_timeout: float | None = None,
    verifier_timeout: float | None = None,
) -> Task:
    """The task with limits of a recipe in the place of its own; None leaves the task's."""
    return dataclasses.replace(
        task,
        cpus=task.cpus if cpus is None else cpus,
        memory_mb=task.memory_mb if memory_mb is None else memory_mb,
        storage_mb=task.storage_mb if disk_mb is None else disk_mb,
        agent_timeout_sec=task.agent_timeout_sec if agent_timeout is None else agent_timeout,
        verifier_timeout_sec=(
            task.verifier_timeout_sec if verifier_timeout is None else verifier_timeout
        ),
    )


def _parse(sources: str | os.PathLike) -> list[tuple[pathlib.Path, bool]]:
    """(path, environment_only) of each source in 'DIR,FILE.parquet:environment_only'."""
    text = os.fspath(sources)
    if text and os.path.exists(text):
        return [(pathlib.Path(text), False)]
    items = [item.strip() for item in text.split(',') if item.strip()]
    if not items:
        raise ValueError(f'{text!r} names no tasks; name a directory or a .parquet file')
    return [(pathlib.Path(item.removesuffix(_MARK)), item.endswith(_MARK)) for item in items]


def _load_source(path: pathlib.Path, cache: str | os.PathLike | None) -> list[Task]:
    if path.is_dir() or path.suffix != '.parquet':
        return _load_directory(path)
    if not path.is_file():
        raise ValueError(f'{path} is not there; name a directory of tasks or a .parquet file')
    if cache is None:
        raise ValueError(f'{path} has to be unpacked; say where to with --workdir')
    # Imported here because it imports pyarrow, which is slow to load and not needed otherwise.
    from echo_jax.tasks import parquet

    return parquet.read_parquet(path, pathlib.Path(cache))


def _load_directory(directory: pathlib.Path) -> list[Task]:
    """The tasks of a directory of task directories, sorted by id.

    A folder that holds none of a task's files is left out, with a warning that names it. Hidden
    folders are not read.
    """
    if not directory.is_dir():
        raise ValueError(f'{directory} is no directory; name one that holds task directories')
    paths = sorted(p for p in directory.iterdir() if p.is_dir() and not p.name.startswith('.'))
    others = [p.name for p in paths if not any((p / file).exists() for file in TASK_FILES)]
    tasks = [load_task(p) for p in paths if p.name not in others]
    shown = ', '.join(others[:8]) + (f' and {len(others) - 8} more' if len(others) > 8 else '')
    if not tasks:
        found = f'its folders ({shown}) are none' if others else 'it has no folders'
        raise ValueError(f'{directory} holds no tasks: {found}; a task holds {TASK_FILES}')
    if others:
        log.warning('%s: not tasks, left out: %s', directory, shown)
    return tasks
