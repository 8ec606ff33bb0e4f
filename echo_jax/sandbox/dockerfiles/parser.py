"""Splits a Dockerfile into its instructions as BuildKit does: continued lines, comments, heredocs.

By hand, for want of a package that fits. dockerfile-parse 2.0.1 (pure Python, last released in
2023) takes the lines of a heredoc for instructions, keeps a byte order mark, ends an instruction at
an empty line within it, and knows no ${NAME:-word}. dockerfile 3.4.0 is BuildKit's own parser and
right in all of this, but has no wheel for Linux on ARM, needs Go to be built, and starts Go's
runtime in the process; the tests compare this module with it. What the instructions mean is for
those who read them: local/dockerfile.py follows them, docker/contexts.py looks for the images.
Source: github.com/moby/buildkit, frontend/dockerfile/parser.
"""

import json
import pathlib
import re
from collections.abc import Iterator
from typing import NamedTuple

from echo_jax.sandbox.dockerfiles import lexer

_DIRECTIVE = re.compile(r'#\s*([a-zA-Z][a-zA-Z0-9]*)\s*=\s*(.+?)\s*')
_HEREDOC = re.compile(r'(\d*)<<(-?)([^<]+)')
_FLAG = re.compile(r"""--(?:[^\s"'\\]|\\.|"(?:[^"\\]|\\.)*"|'[^']*')*""")


class Heredoc(NamedTuple):
    """One `<<NAME` of an instruction."""

    name: str
    content: str
    is_expanded: bool  # no part of the name was quoted
    is_chomped: bool  # `<<-`: leading tabs do not count

    def text(self) -> str:
        return (
            re.sub(r'^\t+', '', self.content, flags=re.MULTILINE)
            if self.is_chomped
            else self.content
        )


class Command(NamedTuple):
    """One instruction as it is written."""

    line: int  # its first, counted from 1
    name: str  # in capitals
    flags: tuple[str, ...]  # '--chmod=0644'
    rest: str  # what follows the flags
    heredocs: tuple[Heredoc, ...]

    def json(self) -> list[str] | None:
        """The words of the form ["a", "b"]; None if `rest` is no such list of texts."""
        if not self.rest.startswith('['):
            return None
        try:
            words = json.loads(self.rest)
        except ValueError:
            return None
        return words if all(isinstance(word, str) for word in words) else None


class Parsed(NamedTuple):
    commands: list[Command]
    escape: str  # the escape character, '\\' unless the file says '# escape=`'
    syntax: str | None  # the image of another builder, by '# syntax=IMAGE'


def parse(path: pathlib.Path, errors: str = 'strict') -> Parsed:
    """The instructions of a Dockerfile. Raises ValueError, naming file and line.

    `errors` says what becomes of bytes that are no UTF-8, as in `bytes.decode`.
    """
    try:
        text = path.read_bytes().decode('utf-8-sig', errors)
    except UnicodeDecodeError as error:
        raise ValueError(f'{path} is not UTF-8 ({error}); save it as UTF-8') from None
    # Not splitlines(), which splits at more. A \r goes later, since heredocs keep theirs.
    lines = text.split('\n')
    directives = _directives(lines)
    escape = directives.get('escape', '\\')
    if escape not in ('\\', '`'):
        raise ValueError(f'{path}: escape={escape}: expected \\ or `')
    return Parsed(list(_commands(lines, escape, path)), escape, directives.get('syntax'))


def _directives(lines: list[str]) -> dict[str, str]:
    """What comments of the form `# NAME=VALUE` in the very first lines say."""
    found: dict[str, str] = {}
    for line in lines:
        directive = _DIRECTIVE.fullmatch(line.rstrip())
        if not directive:
            break
        found.setdefault(directive[1].lower(), directive[2])
    return found


def _commands(lines: list[str], escape: str, path: pathlib.Path) -> Iterator[Command]:
    mark = re.escape(escape)
    continued = re.compile(rf'(^|[^{mark}]){mark}[ \t]*$')
    numbered = iter(enumerate(lines, 1))
    for start, raw in numbered:
        line = raw.strip()
        if not line or line.startswith('#'):
            continue
        whole, continues = continued.subn(r'\1', raw.lstrip().rstrip('\r'))
        for _, raw in numbered if continues else ():
            if not raw.strip() or raw.lstrip().startswith('#'):
                continue
            more, continues = continued.subn(r'\1', raw.rstrip('\r'))
            whole += more
            if not continues:
                break
        if not whole.strip():
            continue
        name, _, rest = re.sub(r'[\t\v\f\r ]+', ' ', whole.strip(), count=1).partition(' ')
        flags, rest = _flags(rest.strip())
        command = Command(start, name.upper(), flags, rest, ())
        if command.name in ('RUN', 'COPY', 'ADD') and command.json() is None:
            heredocs = [_heredoc(m, numbered, f'{path}:{start}') for m in _openings(rest, escape)]
            command = command._replace(heredocs=tuple(heredocs))
        yield command


def _flags(rest: str) -> tuple[tuple[str, ...], str]:
    flags = []
    while (flag := _FLAG.match(rest)) and flag[0] != '--':
        flags.append(lexer.expand(flag[0].replace('$', '\\$'), {}))
        rest = rest[flag.end() :].lstrip()
    return tuple(flags), rest.removeprefix('-- ').lstrip()


def _openings(rest: str, escape: str) -> list[re.Match]:
    """The words `<<NAME` of an instruction; here-strings (`<<<`) are none."""
    if '<<' not in rest:
        return []
    found = [_HEREDOC.fullmatch(word) for word in lexer.split_words(rest, escape)]
    return [match for match in found if match]


def _heredoc(opening: re.Match, numbered: Iterator[tuple[int, str]], where: str) -> Heredoc:
    _, dash, quoted = opening.groups()
    name = re.sub(r'[\'"\\]', '', quoted)
    content = ''
    for _, line in numbered:
        bare = line.rstrip('\r')
        if (bare.lstrip('\t') if dash else bare) == name:
            return Heredoc(name, content, is_expanded=name == quoted, is_chomped=bool(dash))
        content += line + '\n'
    raise ValueError(f'{where}: the heredoc {opening[0]} never ends; expected a line {name}')
