"""Writes drafts as Harbor task directories, and reads demonstrations back from them."""

import fcntl
import json
import os
import pathlib
import random
import shlex
import shutil
from collections.abc import Sequence

from echo_jax.tasks.generate.drafts import FAMILIES, Draft
from echo_jax.tasks.generate.explore import explore
from echo_jax.tasks.generate.machine import MACHINE_FAMILIES
from echo_jax.tasks.generate.machine import draft as draft_on_machine
from echo_jax.tasks.generate.words import NUMBERS, SPLITS, WORDS
from echo_jax.types import Task


def draft_task(
    seed: int, split: str, index: int, families: Sequence[str] = tuple(FAMILIES)
) -> tuple[str, Draft]:
    """The task id and the draft of one task; families take turns by index.

    `families` are of FAMILIES and MACHINE_FAMILIES. `split` is 'train', 'heldout' (words disjoint
    from training's) or 'explore', the sessions, which are alike in all FAMILIES. Raises ValueError
    for another split or family.
    """
    if split not in (*SPLITS, 'explore'):
        raise ValueError(f"split {split!r} is unknown; take 'train', 'heldout' or 'explore'")
    unknown = set(families) - {*FAMILIES, *MACHINE_FAMILIES}
    if unknown or not families:
        known = [*FAMILIES, *MACHINE_FAMILIES]
        raise ValueError(f'families {sorted(unknown)} are unknown; take some of {known}')
    family = families[index % len(families)]
    name = 'session' if split == 'explore' else family
    if family in MACHINE_FAMILIES:
        return f'{split}-{index:05d}-{name}', draft_on_machine(seed, split, index, family)
    rng = random.Random(f'{seed}/{split}/{name}/{index}')
    part = 'train' if split == 'explore' else split
    words, numbers = rng.sample(WORDS[part], 8), rng.sample(NUMBERS[part], 3)
    draft = (explore if split == 'explore' else FAMILIES[name])(rng, words, numbers)
    return f'{split}-{index:05d}-{name}', draft


_TASK_TOML = """\
version = "1.0"

[metadata]
family = "{family}"

[agent]
timeout_sec = 60.0

[verifier]
timeout_sec = 20.0

[environment]
build_timeout_sec = 60.0
cpus = 1
memory_mb = 256
allow_internet = false
workdir = "/app"
"""
_DOCKERFILE = 'FROM debian:bookworm-slim\nWORKDIR /app\nCOPY files/ /app/\n'
_TOOLS = 'COPY tools/ /usr/local/bin/\n'
_TEST_SH = """\
#!/bin/bash
# Reward 1 if /app is as the task asks, else 0. Builtins alone: no process but this one.
holds() {{  # FILE TEXT: a plain file of this text, with or without a newline at the end
  local got=
  [[ -f $1 && ! -L $1 ]] && {{ IFS= read -r -N 4096 got < "$1"; [[ ${{got%$'\\n'}} == "$2" ]]; }}
}}
absent() {{ [[ ! -e $1 && ! -L $1 ]]; }}
reward=0
cd /app &&
{checks}
  reward=1
echo $reward > /logs/verifier/reward.txt
"""


def _checks(draft: Draft) -> str:
    # A session has no goal, so nothing that is done in it earns a reward.
    checks = [] if draft.changes else ['false']
    for path, text in sorted({**draft.files, **draft.changes}.items()):
        quoted = shlex.quote(path)
        checks.append(f'absent {quoted}' if text is None else f'holds {quoted} {shlex.quote(text)}')
    return '\n'.join(f'  {check} &&' for check in checks)


def write_task(directory: pathlib.Path, family: str, draft: Draft) -> None:
    """Writes one Harbor task directory; `directory` must not exist."""
    texts = {
        'task.toml': _TASK_TOML.format(family=family),
        'instruction.md': draft.instruction + '\n',
        'environment/Dockerfile': _DOCKERFILE + (_TOOLS if draft.tools else ''),
        'solution/solve.sh': '#!/bin/bash\n' + ''.join(f'{line}\n' for line in draft.commands),
        'tests/test.sh': _TEST_SH.format(checks=_checks(draft)),
    }
    texts |= {f'environment/files/{path}': f'{text}\n' for path, text in draft.files.items()}
    tools = {f'environment/tools/{name}': script for name, script in draft.tools.items()}
    texts |= tools
    for folder in sorted({os.path.dirname(path) for path in texts}):
        (directory / folder).mkdir(parents=True, exist_ok=True)
    for path, text in texts.items():
        (directory / path).write_text(text, encoding='utf-8')
        if path in tools or path.endswith('.sh'):
            (directory / path).chmod(0o755)


def generate_tasks(
    output: str | os.PathLike,
    *,
    split: str,
    count: int,
    seed: int = 0,
    families: Sequence[str] = tuple(FAMILIES),
) -> pathlib.Path:
    """Writes `count` task directories to `output`, all or none; returns `output`.

    A finished set has a file generated.json, and is left as it is if it is asked for again. What a
    killed call left behind is written anew by the next one. Two calls at once take turns.

    Raises ValueError if `output` holds anything but this very set.
    """
    output = pathlib.Path(output)
    if count < 1:
        raise ValueError(f'count is {count}; generate at least one task')
    stamp = dict(format=1, split=split, count=count, seed=seed, families=list(families))
    output.parent.mkdir(parents=True, exist_ok=True)
    with open(output.with_name(f'.{output.name}.lock'), 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the system takes it back from a killed process
        if output.exists():
            _check_stamp(output, stamp)
            return output
        partial = output.with_name(f'.{output.name}.partial')
        shutil.rmtree(partial, ignore_errors=True)
        for index in range(count):
            task_id, draft = draft_task(seed, split, index, families)
            write_task(partial / task_id, task_id.rpartition('-')[2], draft)
        (partial / 'generated.json').write_text(json.dumps(stamp) + '\n')
        partial.rename(output)
    return output


def _check_stamp(output: pathlib.Path, stamp: dict) -> None:
    path = output / 'generated.json'
    got = json.loads(path.read_text()) if path.is_file() else None
    if got != stamp:
        raise ValueError(f'{output} holds {got or "other files"}, not {stamp}; name a new folder')


_THOUGHTS = {
    'echo': 'Write it.',
    'sed': 'Change it.',
    'mv': 'Move it.',
    'cp': 'Copy it.',
    'rm': 'Delete it.',
    'mkdir': 'Make it.',
}


def demonstration(task: Task) -> list[tuple[str, str | None, bool]]:
    """The turns (thought, command, done) of `solution/solve.sh`, then a turn that only says done.

    Every line is taken for one command, as this module writes them; a script with longer commands
    would be torn apart. Raises ValueError if there is no command.
    """
    path = task.path / 'solution' / 'solve.sh'
    lines = path.read_text(encoding='utf-8').splitlines() if path.is_file() else []
    commands = [line for line in lines if line.strip() and not line.startswith('#')]
    if not commands:
        raise ValueError(f'{path} has no command; a demonstration needs one command a line')
    other = 'Seal it.' if (task.path / 'environment' / 'tools').is_dir() else 'Look first.'
    turns = [(_THOUGHTS.get(line.split()[0], other), line, False) for line in commands]
    return [*turns, ('Done.', None, True)]


def usage(task: Task) -> tuple[str, str] | None:
    """A command that calls the task's first tool, and the usage line that a wrong call prints.

    None if the machine of the task has no tools of its own.
    """
    if not (task.path / 'environment' / 'tools').is_dir():
        return None
    _, command, _ = demonstration(task)[0]
    assert command is not None  # a solution begins with one
    name, option, _ = command.split()
    return command, f'usage: {name} {option} FILE\n'


def practice(task: Task, habit: str) -> list[tuple[str, str | None, bool]]:
    """The turns of somebody who goes about a task in a certain way, as `demonstration` gives them.

    'solve' is the demonstration. 'guess' is the same without its first command, the look, so that
    whoever imitates it can only guess. 'leave' looks and then gives up. Raises ValueError for
    another habit.
    """
    turns = demonstration(task)
    ways = {'solve': turns, 'guess': turns[1:], 'leave': [turns[0], turns[-1]]}
    if habit not in ways:
        raise ValueError(f'warm_start.habits names {habit!r}; choose among {tuple(ways)}')
    return ways[habit]
