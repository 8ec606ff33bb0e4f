"""Reads one Harbor task directory (docs/protocol.md#tasks); schema.py has its keys."""

import os
import pathlib
import re
from typing import NamedTuple

from echo_jax.tasks.schema import read_toml
from echo_jax.types import Task

TASK_FILES = ('task.toml', 'instruction.md', 'tests/test.sh')

_CANARY = re.compile(r'<!--.*canary.*-->|#.*canary.*', re.IGNORECASE)


class Reading(NamedTuple):
    """A task, and the names in its task.toml that neither Harbor nor we know, and read past."""

    task: Task
    ignored: tuple[str, ...]


def load_task(path: str | os.PathLike, task_id: str = '') -> Task:
    """The task of `read_task`."""
    return read_task(path, task_id).task


def read_task(path: str | os.PathLike, task_id: str = '') -> Reading:
    """Reads one task directory; the task's id is the directory's name if none is given.

    Raises ValueError in one line, naming the file, if one is missing, malformed or cannot be read,
    and if a variable of a template is not set. The files in tests/ and solution/ are not looked at:
    what is wrong with them is found when a sandbox gets them, and `--check` finds it beforehand.
    """
    path = pathlib.Path(path)
    try:
        return _reading(path, task_id)
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f'{error.filename or path} cannot be read ({reason})') from error


def _reading(path: pathlib.Path, task_id: str) -> Reading:
    toml = path / 'task.toml'
    try:
        said = read_toml(_read(toml))
    except ValueError as error:
        raise ValueError(f'{toml}: {str(error).removeprefix(f"{toml}: ")}') from error
    except RecursionError as error:  # of tomllib, or of repr() for a message
        raise ValueError(f'{toml} has too many values within values; make it flatter') from error
    folder = path / 'steps' / said.first_step if said.first_step else path
    instruction = _instruction(folder / 'instruction.md')
    test = path / 'tests' / 'test.sh'
    if said.has_own_tests and not test.is_file():
        raise ValueError(f'{test} is missing or no file; a task needs {", ".join(TASK_FILES)}')
    task = Task(
        task_id=task_id or path.name,
        path=path,
        instruction=instruction,
        needs_harbor=(*_needs_of_files(path), *said.needs_harbor),
        **said.fields,
    )
    return Reading(task, said.ignored)


def _needs_of_files(path: pathlib.Path) -> list[str]:
    """What a task asks for by the files that it has, and only Harbor provides."""
    needs = []
    if (path / 'environment' / 'docker-compose.yaml').exists():
        needs.append('environment/docker-compose.yaml')
    for folder in ('tests', 'solution'):  # says which files are not uploaded
        if next((path / folder).rglob('.harborignore'), None):
            needs.append(f'.harborignore in {folder}/')
    if (path / 'trajectory.json').exists():  # turns that the agent is to go on from
        needs.append('trajectory.json')
    return needs


def _instruction(file: pathlib.Path) -> str:
    """The instruction without the marks that warn crawlers, which agents do not get to see."""
    lines = _read(file).removeprefix('\ufeff').split('\n')
    while lines and _CANARY.fullmatch(lines[0].strip()):
        del lines[0]
    instruction = '\n'.join(lines).strip()
    if not instruction:
        raise ValueError(f'{file} is empty; write what the agent shall do')
    return instruction


def _read(path: pathlib.Path) -> str:
    try:
        return path.read_text(encoding='utf-8')
    except UnicodeDecodeError as error:
        raise ValueError(f'{path} is not UTF-8 ({error}); save it as UTF-8') from error
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        problem = f'{path} is missing or no file; a task needs {", ".join(TASK_FILES)}'
        raise ValueError(problem) from error
