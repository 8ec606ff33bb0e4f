"""A small Harbor task, which shows one habit of Harbor's, and how it is written to a folder.

The tests of most tasks look at what the solution did, so that doing nothing earns 0.
"""

import pathlib
from collections.abc import Iterable
from typing import NamedTuple

BASE = 'debian:bookworm-slim'
DONE = 'echo ok > done.txt'
IS_DONE = '[ -f done.txt ]'


class Habit(NamedTuple):
    """One task. Its solution and its tests are bash, unless they begin with '#!' themselves."""

    name: str
    solve: str = DONE
    check: str = IS_DONE  # a condition, for reward 1
    test: str = ''  # instead of `check`: the whole test.sh
    dockerfile: str = f'FROM {BASE}\nWORKDIR /app\n'
    top: str = ''  # lines of task.toml before its sections
    environment: str = ''  # lines of [environment]
    toml: str = ''  # sections after that
    files: tuple[tuple[str, str, int], ...] = ()  # (path, text, mode) of other files
    instruction: str = 'Do it.\n'
    oracle: float = 1.0  # the reward of the solution
    nop: float = 0.0  # and of doing nothing
    needs: str = ''  # what Task.needs_harbor names; no other backend runs it
    local: bool = True  # whether a sandbox with one account and no image can do it
    network: bool = False  # whether the sandbox has a network
    builds_online: bool = False  # whether its image, or its solution, needs a mirror of Debian


def image(*lines: str) -> str:
    """A Dockerfile with these lines after the working directory."""
    return f'FROM {BASE}\nWORKDIR /app\n' + ''.join(f'{text}\n' for text in lines)


def write(habit: Habit, folder: pathlib.Path) -> pathlib.Path:
    """Writes the task into `folder`; returns its directory."""
    path = folder / habit.name
    network = '' if habit.network else 'network_mode = "no-network"\n'
    solve = habit.solve if habit.solve.startswith('#!') else f'#!/bin/bash\n{habit.solve}\n'
    test = habit.test or (
        f'#!/bin/bash\nr=0\nif {habit.check}; then r=1; fi\necho $r > /logs/verifier/reward.txt\n'
    )
    environment = f'[environment]\n{network}{habit.environment}'
    toml = f'version = "1.0"\n{habit.top}\n{environment}\n{habit.toml}'
    files = [
        ('task.toml', toml, 0o644),
        ('environment/Dockerfile', habit.dockerfile, 0o644),
        *habit.files,
    ]
    if not habit.needs.startswith('[[steps'):
        files += [
            ('instruction.md', habit.instruction, 0o644),
            ('solution/solve.sh', solve, 0o644),  # no script need be executable
            ('tests/test.sh', test, 0o644),
        ]
    for name, text, mode in files:
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text.encode())
        file.chmod(mode)
    return path


def write_all(folder: pathlib.Path, habits: Iterable[Habit]) -> pathlib.Path:
    for habit in habits:
        write(habit, folder)
    return folder
