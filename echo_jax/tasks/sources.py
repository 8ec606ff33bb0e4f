"""Reads sets of tasks: folders with Harbor tasks in them, .parquet files, and Harbor's registries.

One odd task does not make a set unreadable: it is left out, with its reason. Reading needs neither
grain nor JAX. This module builds no sandbox and runs nothing.
"""

import collections
import dataclasses
import logging
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from echo_jax.tasks import registry
from echo_jax.tasks.harbor import TASK_FILES, read_task
from echo_jax.types import Task

log = logging.getLogger(__name__)

SHOWN = 8  # names that a warning lists; it counts the others
_MARK = ':environment_only'  # ends a source whose tasks train the environment term alone


class LeftOut(NamedTuple):
    """A task that takes no part, and why, in one line."""

    task_id: str
    reason: str


class TaskSet(NamedTuple):
    """What one source holds."""

    path: pathlib.Path
    tasks: list[Task]  # sorted by id; at least one
    left_out: list[LeftOut]
    ignored: Mapping[str, int]  # how many tasks have a name that Harbor reads past, by that name


def load_tasks(sources: str | os.PathLike, cache: str | os.PathLike | None = None) -> list[Task]:
    """The tasks of `load_sources`, in one list; warns of what is left out or read past."""
    sets = load_sources(sources, cache)
    for one in sets:
        warn_left_out(str(one.path), one.left_out, len(one.tasks) + len(one.left_out))
        warn_ignored(one)
    return [task for one in sets for task in one.tasks]


def load_sources(
    sources: str | os.PathLike, cache: str | os.PathLike | None = None
) -> list[TaskSet]:
    """What one source holds, or several with commas between them.

    A source is a task directory, a folder with task directories at any depth below it, a .parquet
    file, whose rows are unpacked into `cache` (parquet.py), or a registry.json of Harbor's.
    `:environment_only` after it marks its tasks. If the whole text is a path that exists, it is one
    source, even if it holds commas.

    A task that cannot be read is left out with its reason. Raises ValueError for a source of which
    no task can be read, and for an id that two tasks have.
    """
    loaded: list[TaskSet] = []
    owners: dict[str, pathlib.Path] = {}
    for path, environment_only in _parse(sources):
        one = _load_source(path, cache)
        tasks = [
            dataclasses.replace(t, environment_only=environment_only, source=str(path))
            for t in one.tasks
        ]
        for task in tasks:
            owner = owners.setdefault(task.task_id, path)
            if owner is not path:
                raise ValueError(
                    f'{path} and {owner} both have a task {task.task_id!r}; results go by the id: '
                    'rename one, or leave one out'
                )
        loaded.append(one._replace(tasks=tasks))
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


def warn_ignored(one: TaskSet) -> None:
    """Warns of the names in a set's task.toml that Harbor reads past, and in how many tasks."""
    if one.ignored:
        names = [f'{name} ({count})' for name, count in one.ignored.items()]
        log.warning('%s: Harbor does not know, and reads past: %s', one.path, shortened(names))


def warn_left_out(name: str, left_out: Sequence[LeftOut], total: int) -> None:
    """Warns of the tasks that are left out of the `total` of `name`; says nothing if none are."""
    if left_out:
        reasons = shortened([f'{task_id} ({reason})' for task_id, reason in left_out], '; ')
        log.warning('%s: %d of %d tasks left out: %s', name, len(left_out), total, reasons)


def shortened(names: Sequence[str], between: str = ', ') -> str:
    """The first names, and how many more there are."""
    more = f' and {len(names) - SHOWN} more' if len(names) > SHOWN else ''
    return between.join(names[:SHOWN]) + more


def _parse(sources: str | os.PathLike) -> list[tuple[pathlib.Path, bool]]:
    """(path, environment_only) of each source in 'DIR,FILE.parquet:environment_only'."""
    text = os.fspath(sources)
    if text and os.path.exists(text):
        return [(pathlib.Path(text), False)]
    items = [item.strip() for item in text.split(',') if item.strip()]
    if not items:
        raise ValueError(f'{text!r} names no tasks; name a directory or a .parquet file')
    return [(pathlib.Path(item.removesuffix(_MARK)), item.endswith(_MARK)) for item in items]


def _load_source(path: pathlib.Path, cache: str | os.PathLike | None) -> TaskSet:
    if path.suffix == '.parquet' and not path.is_dir():
        return _load_parquet(path, cache)
    if path.suffix == '.json' and path.is_file():
        return _read_all(path, *registry.read_registry(path))
    if not path.is_dir():
        raise ValueError(f'{path} is no directory; name one that holds task directories')
    if (path / 'task.toml').exists():
        return _read_all(path, {path.absolute().name: path}, {})
    found, broken = _find(path)
    if not found and not broken:
        if (path / 'registry.json').is_file():
            return _load_source(path / 'registry.json', cache)
        if (path / 'dataset.toml').is_file():
            raise registry.only_references(path / 'dataset.toml')
        raise ValueError(f'{path} holds no tasks: a task is a folder with {", ".join(TASK_FILES)}')
    ids = _ids(path, [*found, *broken])
    return _read_all(path, {ids[p]: p for p in found}, {ids[p]: why for p, why in broken.items()})


def _load_parquet(path: pathlib.Path, cache: str | os.PathLike | None) -> TaskSet:
    if not path.is_file():
        raise ValueError(f'{path} is not there; name a directory of tasks or a .parquet file')
    if cache is None:
        raise ValueError(f'{path} has to be unpacked; say where to with --workdir')
    # Imported here because it imports pyarrow, which is slow to load and not needed otherwise.
    from echo_jax.tasks import parquet

    left_out: dict[str, str] = {}
    readings = parquet.read_parquet(path, pathlib.Path(cache), left_out)
    ignored = collections.Counter(name for reading in readings for name in reading.ignored)
    return _checked(path, [reading.task for reading in readings], left_out, ignored)


def _read_all(
    path: pathlib.Path, found: Mapping[str, pathlib.Path], left_out: Mapping[str, str]
) -> TaskSet:
    """The set of the task directories `found`, by id; `left_out` are those without one."""
    tasks, reasons = [], dict(left_out)
    ignored: collections.Counter[str] = collections.Counter()
    for task_id, folder in found.items():
        try:
            reading = read_task(folder, task_id)
        except ValueError as error:
            reasons[task_id] = str(error)
            continue
        tasks.append(reading.task)
        ignored.update(reading.ignored)
    return _checked(path, tasks, reasons, ignored)


def _checked(
    path: pathlib.Path, tasks: list[Task], left_out: Mapping[str, str], ignored: Mapping[str, int]
) -> TaskSet:
    if not tasks:
        reasons = shortened([f'{name} ({why})' for name, why in sorted(left_out.items())], '; ')
        raise ValueError(f'{path}: none of {len(left_out)} tasks can be read: {reasons}')
    ordered = sorted(tasks, key=lambda task: task.task_id)
    return TaskSet(path, ordered, [LeftOut(*item) for item in sorted(left_out.items())], ignored)


def _find(top: pathlib.Path) -> tuple[list[pathlib.Path], dict[pathlib.Path, str]]:
    """(task directories, why a folder is none) at any depth below.

    The second are folders with some files of a task but no task.toml, and folders that cannot be
    read, in which there may be tasks. A task directory is not searched for others. Hidden folders
    are not read, and a folder that links lead to several times is read once.
    """
    found: list[pathlib.Path] = []
    broken: dict[pathlib.Path, str] = {}
    seen: set[str] = set()

    def visit(folder: pathlib.Path) -> Iterator[pathlib.Path]:
        real = os.path.realpath(folder)
        if real in seen:
            return
        seen.add(real)
        try:
            if folder != top and (folder / 'task.toml').exists():
                found.append(folder)
                return
            if folder != top and any((folder / file).exists() for file in TASK_FILES):
                broken[folder] = f'task.toml is missing; a task needs {", ".join(TASK_FILES)}'
            inner = [p for p in folder.iterdir() if p.is_dir() and not p.name.startswith('.')]
        except OSError as error:  # such as a mounted disk's lost+found
            broken[folder] = f'{folder} cannot be read ({error.strerror or error})'
            return
        # Links come last, so that a folder goes by its own name.
        yield from sorted(inner, key=lambda path: (path.is_symlink(), path.name))

    folders = collections.deque([top])
    while folders:
        folders.extend(visit(folders.popleft()))
    return found, broken


def _ids(top: pathlib.Path, folders: Sequence[pathlib.Path]) -> dict[pathlib.Path, str]:
    """The ids: a task directory's name, or its path below the set if others have the same name.

    Raises ValueError for two folders with one id, such as a__b and, beside another b, a/b.
    """
    counts = collections.Counter(folder.name for folder in folders)
    ids = {
        folder: folder.name
        if counts[folder.name] == 1
        else '__'.join(folder.relative_to(top).parts)
        for folder in folders
    }
    owners: dict[str, pathlib.Path] = {}
    for folder, task_id in ids.items():
        owner = owners.setdefault(task_id, folder)
        if owner is not folder:
            raise ValueError(
                f'{owner} and {folder} would both be the task {task_id!r}; results go by the id: '
                'rename one'
            )
    return ids
