"""Reads the part of a task's Dockerfile that a sandbox without images can follow.

FROM is ignored (the host system is the image); WORKDIR, ENV, COPY and RUN are returned; any other
instruction is refused by name. Nothing is copied or run here: see `sandbox.py`. By hand, since the
four instructions need less than a parser's result would: their words, with variables put in.
"""

import json
import pathlib
import re
import shlex
from collections.abc import Iterator
from typing import NamedTuple


class Instruction(NamedTuple):
    """One COPY or RUN with the WORKDIR and ENV that hold at its line."""

    name: str  # 'COPY' or 'RUN'
    arguments: tuple[str, ...]  # COPY: sources, then the target; RUN: one shell command
    workdir: str
    env: dict[str, str]


class Dockerfile(NamedTuple):
    """What a Dockerfile asks for: instructions in order, and the WORKDIR and ENV it ends with."""

    instructions: tuple[Instruction, ...]
    workdir: str | None  # None if no WORKDIR was given
    env: dict[str, str]


def read_dockerfile(path: pathlib.Path, workdir: str, env: dict[str, str]) -> Dockerfile:
    """Reads `path`; `workdir` and `env` hold before its first line.

    Raises ValueError, with the line and the instruction, for what a local sandbox cannot follow.
    """
    instructions: list[Instruction] = []
    here, env, given = workdir, dict(env), None
    for number, line in _logical_lines(path.read_text()):
        where = f'{path}:{number}'
        name, _, rest = line.partition(' ')
        name, rest = name.upper(), rest.strip()
        if name == 'FROM':
            continue
        if name == 'WORKDIR':
            here = given = str(pathlib.PurePosixPath(here) / _expand(_unquote(rest, where), env))
        elif name == 'ENV':
            env |= _env(rest, env, where)
        elif name == 'COPY':
            words = tuple(_expand(word, env) for word in _words(rest, where))
            if len(words) < 2 or words[0].startswith(('--', '<<')):
                raise ValueError(
                    f'{where}: COPY {rest}: expected COPY SOURCE... TARGET, no options'
                )
            instructions.append(Instruction(name, words, here, dict(env)))
        elif name == 'RUN':
            if rest.startswith(('--', '<<')):
                raise ValueError(f'{where}: RUN {rest}: options and heredocs are not followed')
            command = shlex.join(_words(rest, where)) if rest.startswith('[') else rest
            instructions.append(Instruction(name, (command,), here, dict(env)))
        else:
            raise ValueError(
                f'{where}: {name} is not followed by the local sandbox, only FROM, WORKDIR, COPY, '
                "ENV and RUN; leave it out or set sandbox.backend to 'docker'"
            )
    return Dockerfile(tuple(instructions), given, env)


def copy_sources(
    instruction: Instruction, environment: pathlib.Path
) -> list[tuple[pathlib.Path, str]]:
    """(host path, absolute target) of each source of a COPY. ValueError if one leads outside.

    As in Docker, a directory's content is copied, and several sources need a target with a `/`.
    """
    *sources, target = instruction.arguments
    into_directory = target.endswith('/') or target in ('.', '..') or len(sources) > 1
    target = str(pathlib.PurePosixPath(instruction.workdir) / target)
    root, pairs = environment.resolve(), []
    for source in sources:
        relative = source.lstrip('/')
        found = sorted(root.glob(relative)) if re.search(r'[*?[]', relative) else [root / relative]
        for path in found:
            if not path.resolve().is_relative_to(root):
                raise ValueError(f'COPY {source} leads outside {environment}')
            if not path.exists():
                raise ValueError(f'COPY {source}: there is no such file in {environment}')
            inside = into_directory and not path.is_dir()
            pairs.append((path, f'{target.rstrip("/")}/{path.name}' if inside else target))
    return pairs


def _logical_lines(text: str) -> Iterator[tuple[int, str]]:
    """(number of the first line, text) of each instruction, with continuation lines joined and
    comments left out.
    """
    start, parts = 0, []
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith('#') or not line.strip():
            continue
        start = start if parts else number
        continued = line.rstrip().endswith('\\')
        parts.append(line.rstrip()[:-1] if continued else line)
        if not continued:
            yield start, ' '.join(parts).strip()
            parts = []
    if parts:
        yield start, ' '.join(parts).strip()


def _words(text: str, where: str) -> list[str]:
    """The words of an instruction in its JSON or its plain form."""
    try:
        return json.loads(text) if text.startswith('[') else shlex.split(text)
    except ValueError as error:  # JSONDecodeError is one
        raise ValueError(f'{where}: cannot read {text!r}: {error}') from None


def _unquote(text: str, where: str) -> str:
    words = _words(text, where)
    if len(words) != 1:
        raise ValueError(f'{where}: expected one directory, got {text!r}')
    return words[0]


def _env(text: str, env: dict[str, str], where: str) -> dict[str, str]:
    words = _words(text, where)
    if words and '=' not in words[0]:  # the old form: ENV NAME the whole rest
        words = [f'{words[0]}={text.partition(" ")[2].strip()}']
    found = {}
    for word in words:
        name, _, value = word.partition('=')
        if not re.fullmatch(r'[A-Za-z_]\w*', name):
            raise ValueError(f'{where}: {name!r} is no variable name')
        found[name] = _expand(value, env)
    return found


def _expand(text: str, env: dict[str, str]) -> str:
    """Puts in $NAME and ${NAME} from earlier ENV lines; an unknown one is empty, as in Docker."""
    return re.sub(r'\$(?:(\w+)|\{(\w+)\})', lambda m: env.get(m[1] or m[2], ''), text)
