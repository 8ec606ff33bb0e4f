"""Reads sets of Harbor tasks (PROTOCOL 15) and hands them out in a seeded order that resumes.

Reading tasks needs neither grain nor JAX; only `task_iterator` imports grain. This module builds
no sandbox and runs nothing; `parquet.py` unpacks what is no directory yet.
"""

import dataclasses
import hashlib
import logging
import math
import os
import pathlib
import re
import tomllib
from collections.abc import Callable, Iterator, Sequence

from echo_jax.types import Task

log = logging.getLogger(__name__)

_TASK_FILES = ('task.toml', 'instruction.md', 'tests/test.sh')
_MARK = ':environment_only'  # after a source


def load_tasks(sources: str | os.PathLike, cache: str | os.PathLike | None = None) -> list[Task]:
    """The tasks of `load_sources`, in one list."""
    return [task for _, tasks in load_sources(sources, cache) for task in tasks]


def load_sources(
    sources: str | os.PathLike, cache: str | os.PathLike | None = None
) -> list[tuple[pathlib.Path, list[Task]]]:
    """(path, its tasks sorted by id) of one source or of several, with commas between them.

    A source is a directory of task directories or a .parquet file, whose rows are unpacked into
    `cache` (parquet.py); `:environment_only` after it marks its tasks. A path that exists is taken
    as it is spelled, commas and all. Raises ValueError for a source without tasks, a malformed
    task, an id that two sources have.
    """
    loaded, owners = [], {}
    for path, environment_only in parse_sources(sources):
        tasks = [
            dataclasses.replace(task, environment_only=environment_only)
            for task in _load_source(path, cache)
        ]
        for task in tasks:
            if (owner := owners.setdefault(task.task_id, path)) is not path:
                raise ValueError(
                    f'{path} and {owner} both have a task {task.task_id!r}; results go by the id: '
                    'rename one, or leave one out'
                )
        loaded.append((path, tasks))
    return loaded


def parse_sources(sources: str | os.PathLike) -> list[tuple[pathlib.Path, bool]]:
    """(path, environment_only) of each source in 'DIR,FILE.parquet:environment_only'."""
    text = os.fspath(sources)
    if text and os.path.exists(text):
        return [(pathlib.Path(text), False)]
    items = [item.strip() for item in text.split(',') if item.strip()]
    if not items:
        raise ValueError(f'{text!r} names no tasks; name a directory or a .parquet file')
    return [(pathlib.Path(x.removesuffix(_MARK)), x.endswith(_MARK)) for x in items]


def _load_source(path: pathlib.Path, cache: str | os.PathLike | None) -> list[Task]:
    if path.is_dir() or path.suffix != '.parquet':
        return _load_directory(path)
    if not path.is_file():
        raise ValueError(f'{path} is not there; name a directory of tasks or a .parquet file')
    if cache is None:
        raise ValueError(f'{path} has to be unpacked; say where, by --workdir')
    # Here, not above: it imports this module, and pyarrow, which directories do not need.
    from echo_jax.agent import parquet

    return parquet.read_parquet(path, pathlib.Path(cache))


def _load_directory(directory: pathlib.Path) -> list[Task]:
    """The tasks of a directory of task directories, sorted by id.

    A folder that holds none of a task's files is no task: it is left out, with a warning that names
    it. Hidden ones are not read.
    """
    if not directory.is_dir():
        raise ValueError(f'{directory} is no directory; name one that holds task directories')
    paths = sorted(p for p in directory.iterdir() if p.is_dir() and not p.name.startswith('.'))
    others = [p.name for p in paths if not any((p / file).exists() for file in _TASK_FILES)]
    tasks = [load_task(p) for p in paths if p.name not in others]
    shown = ', '.join(others[:8]) + (f' and {len(others) - 8} more' if len(others) > 8 else '')
    if not tasks:
        found = f'its folders ({shown}) are none' if others else 'it has no folders'
        raise ValueError(f'{directory} holds no tasks: {found}; a task holds {_TASK_FILES}')
    if others:
        log.warning('%s: not tasks, left out: %s', directory, shown)
    return tasks


def load_task(path: str | os.PathLike) -> Task:
    """One task directory; its name is the task's id. Raises ValueError naming the bad file."""
    path = pathlib.Path(path)
    texts = {file: _read(path / file) for file in _TASK_FILES}
    return make_task(path, texts['task.toml'], texts['instruction.md'])


def make_task(path: pathlib.Path, task_toml: str, instruction: str) -> Task:
    """A Task from the texts of its two files; `path` is where its other files lie.

    Keys that Task does not have are left alone: Harbor's format has more of them than we use.
    """
    source = path / 'task.toml'
    try:
        config = tomllib.loads(task_toml)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f'{source} is not TOML ({error}); correct it') from error
    fields = {}
    for section, key, field, kind in _KEYS:
        table = config.get(section, {})
        if not isinstance(table, dict):
            raise ValueError(f'{source}: {section} is {table!r}, expected a table; correct it')
        if key in table:
            expected, accepts = _KINDS[kind]
            if not accepts(table[key]):
                got = f'[{section}] {key} = {table[key]!r}'
                raise ValueError(f'{source}: {got}, expected {expected}; correct it')
            fields[field] = table[key]
    if 'workdir' not in fields and (workdir := _dockerfile_workdir(path)):
        fields['workdir'] = workdir
    if not instruction.strip():
        raise ValueError(f'{path / "instruction.md"} is empty; write what the agent shall do')
    return Task(task_id=path.name, path=path, instruction=instruction.strip(), **fields)


_KEYS = (  # section and key of task.toml, field of Task, kind of value
    ('agent', 'timeout_sec', 'agent_timeout_sec', 'number'),
    ('verifier', 'timeout_sec', 'verifier_timeout_sec', 'number'),
    ('environment', 'build_timeout_sec', 'build_timeout_sec', 'number'),
    ('environment', 'docker_image', 'docker_image', 'text'),
    ('environment', 'cpus', 'cpus', 'number'),
    ('environment', 'memory_mb', 'memory_mb', 'count'),
    ('environment', 'allow_internet', 'allow_internet', 'bool'),
    ('environment', 'workdir', 'workdir', 'path'),
    ('environment', 'env', 'env', 'texts'),
)


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


_KINDS: dict[str, tuple[str, Callable[[object], bool]]] = {
    'number': ('a finite number above 0', _is_number),
    'count': ('a whole number above 0', lambda v: type(v) is int and v > 0),
    'bool': ('true or false', lambda v: type(v) is bool),
    'text': ('a text that is not empty', lambda v: isinstance(v, str) and v != ''),
    'path': ('an absolute path', lambda v: isinstance(v, str) and v.startswith('/')),
    'texts': (
        'a table of texts',
        lambda v: isinstance(v, dict) and all(isinstance(x, str) for x in v.values()),
    ),
}


def _read(path: pathlib.Path) -> str:
    try:
        return path.read_text(encoding='utf-8')
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        problem = f'{path} is missing or no file; a task needs {", ".join(_TASK_FILES)}'
        raise ValueError(problem) from error
    except UnicodeDecodeError as error:
        raise ValueError(f'{path} is not UTF-8 ({error}); save it as UTF-8') from error


def _dockerfile_workdir(path: pathlib.Path) -> str | None:
    """The last absolute WORKDIR of the task's Dockerfile: where a container's shell starts."""
    dockerfile = path / 'environment' / 'Dockerfile'
    if not dockerfile.is_file():
        return None
    text = dockerfile.read_text(encoding='utf-8', errors='replace')
    found = re.findall(r'^\s*WORKDIR\s+["\']?(/[^\s"\']*)', text, re.MULTILINE | re.IGNORECASE)
    return found[-1] if found else None


class TaskSource(Sequence[Task]):
    """Random access to tasks, for grain. Prompts that are too long are dropped, and counted.

    `count_tokens(instruction)` gives the tokens of a whole prompt, template included. Raises
    ValueError where no task is left.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        count_tokens: Callable[[str], int] | None = None,
        max_prompt_tokens: int | None = None,
    ):
        if (count_tokens is None) != (max_prompt_tokens is None):
            raise ValueError('count_tokens and max_prompt_tokens go together; give both or neither')
        self.tasks = list(tasks)
        if count_tokens is not None:
            self.tasks = [t for t in tasks if count_tokens(t.instruction) <= max_prompt_tokens]
        self.dropped = len(tasks) - len(self.tasks)  # prompts over max_prompt_tokens
        if not self.tasks:
            raise ValueError(
                f'none of {len(tasks)} tasks is left, {self.dropped} prompts are over '
                f'max_prompt_tokens={max_prompt_tokens}; raise it or read other tasks'
            )

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, index):
        return self.tasks[index]

    def fingerprint(self) -> str:
        """Names the tasks and their order: a saved position means nothing over other tasks."""
        text = '\n'.join(f'{t.task_id}\t{t.instruction}' for t in self.tasks)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class TaskIterator(Iterator[list[Task]]):
    """Endless lists of `groups` tasks; every epoch is shuffled anew, from the seed alone.

    `get_state` is a dict for JSON; `set_state` goes on exactly there, mid-epoch too.
    """

    def __init__(self, source: TaskSource, *, seed: int, groups: int):
        # Here, not above: grain imports JAX where it is installed, and workers read tasks too.
        import grain

        if groups < 1:
            raise ValueError(f'groups is {groups}; draw at least one task a step')
        dataset = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
        # drop_remainder: grain's length of an endless dataset overflows without it.
        dataset = dataset.batch(groups, drop_remainder=True, batch_fn=list)
        # Tasks are small and in memory: reading ahead would only cost threads.
        options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        self._iterator = iter(dataset.to_iter_dataset(options))
        self._identity = {'tasks': source.fingerprint(), 'seed': seed, 'groups': groups}

    def __next__(self) -> list[Task]:
        return next(self._iterator)

    def get_state(self) -> dict:
        return {**self._identity, 'position': self._iterator.get_state()}

    def set_state(self, state: dict) -> None:
        got = {key: state.get(key) for key in self._identity}
        if got != self._identity:
            raise ValueError(
                f'the saved position is in {got}, this run reads {self._identity}; '
                'resume with the same tasks, seed and groups, or start a new workdir'
            )
        self._iterator.set_state(state['position'])


def task_iterator(tasks: Sequence[Task], *, seed: int, groups: int) -> TaskIterator:
    """An endless, resumable iterator over lists of `groups` tasks; `tasks` may be a TaskSource."""
    source = tasks if isinstance(tasks, TaskSource) else TaskSource(tasks)
    return TaskIterator(source, seed=seed, groups=groups)
