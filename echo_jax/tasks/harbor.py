"""Reads one Harbor task directory (PROTOCOL 15). Runs nothing."""

import math
import os
import pathlib
import re
import tomllib
from collections.abc import Callable

from echo_jax.types import Task

TASK_FILES = ('task.toml', 'instruction.md', 'tests/test.sh')


def load_task(path: str | os.PathLike) -> Task:
    """One task directory; its name is the task's id. Raises ValueError naming the bad file."""
    path = pathlib.Path(path)
    texts = {file: _read(path / file) for file in TASK_FILES}
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
        problem = f'{path} is missing or no file; a task needs {", ".join(TASK_FILES)}'
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
