"""Reads one Harbor task directory (docs/protocol.md#tasks). Runs nothing."""

import math
import os
import pathlib
import re
import tomllib
from collections.abc import Callable
from typing import Any

from echo_jax.types import Task

TASK_FILES = ('task.toml', 'instruction.md', 'tests/test.sh')


# Section and key of task.toml, the field of Task that they fill, and the kind of value.
_KEYS = (
    ('agent', 'timeout_sec', 'agent_timeout_sec', 'number'),
    ('verifier', 'timeout_sec', 'verifier_timeout_sec', 'number'),
    ('environment', 'build_timeout_sec', 'build_timeout_sec', 'number'),
    ('environment', 'docker_image', 'docker_image', 'text'),
    ('environment', 'cpus', 'cpus', 'number'),
    ('environment', 'memory_mb', 'memory_mb', 'count'),
    ('environment', 'allow_internet', 'network', 'bool'),
    ('environment', 'workdir', 'workdir', 'path'),
    ('environment', 'env', 'env', 'texts'),
)
# type() and not isinstance(), since True is an int.
_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    'number': (
        'a finite number above 0',
        lambda value: type(value) in (int, float) and 0 < value < math.inf,
    ),
    'count': ('a whole number above 0', lambda value: type(value) is int and value > 0),
    'bool': ('true or false', lambda value: type(value) is bool),
    'text': ('a text that is not empty', lambda value: isinstance(value, str) and value != ''),
    'path': ('an absolute path', lambda value: isinstance(value, str) and value.startswith('/')),
    'texts': (
        'a table of texts',
        lambda value: isinstance(value, dict) and all(isinstance(x, str) for x in value.values()),
    ),
}


def load_task(path: str | os.PathLike) -> Task:
    """Reads one task directory, whose name is the task's id.

    Keys of task.toml that Task has no field for are left alone: Harbor's format has more of them
    than we use. Raises ValueError, naming the file, if one is missing or malformed.
    """
    path = pathlib.Path(path)
    texts = {file: _read(path / file) for file in TASK_FILES}
    fields = _fields(path / 'task.toml', texts['task.toml'])
    workdir = _dockerfile_workdir(path)
    if workdir:
        fields.setdefault('workdir', workdir)
    instruction = texts['instruction.md'].strip()
    if not instruction:
        raise ValueError(f'{path / "instruction.md"} is empty; write what the agent shall do')
    return Task(task_id=path.name, path=path, instruction=instruction, **fields)


def _fields(file: pathlib.Path, text: str) -> dict[str, Any]:
    """What a task.toml says of Task's fields."""
    try:
        config = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f'{file} is not TOML ({error}); correct it') from error
    fields = {}
    for section, key, field, kind in _KEYS:
        table = config.get(section, {})
        if not isinstance(table, dict):
            raise ValueError(f'{file}: {section} is {table!r}, expected a table; correct it')
        if key in table:
            expected, accepts = _KINDS[kind]
            if not accepts(table[key]):
                got = f'[{section}] {key} = {table[key]!r}'
                raise ValueError(f'{file}: {got}, expected {expected}; correct it')
            fields[field] = table[key]
    return fields


def _read(path: pathlib.Path) -> str:
    try:
        return path.read_text(encoding='utf-8')
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        problem = f'{path} is missing or no file; a task needs {", ".join(TASK_FILES)}'
        raise ValueError(problem) from error
    except UnicodeDecodeError as error:
        raise ValueError(f'{path} is not UTF-8 ({error}); save it as UTF-8') from error


def _dockerfile_workdir(path: pathlib.Path) -> str | None:
    """The last absolute WORKDIR of the task's Dockerfile, in which a container's shell starts."""
    dockerfile = path / 'environment' / 'Dockerfile'
    if not dockerfile.is_file():
        return None
    text = dockerfile.read_text(encoding='utf-8', errors='replace')
    found = re.findall(r'^\s*WORKDIR\s+["\']?(/[^\s"\']*)', text, re.MULTILINE | re.IGNORECASE)
    return found[-1] if found else None
