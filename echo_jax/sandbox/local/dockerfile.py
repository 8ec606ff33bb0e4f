"""What a local sandbox does to follow a Dockerfile: commands, copies, variables, directories.

All stages would run on the one host system, which is the image here whatever FROM names. So only
the last stage and those that it is built FROM are followed, and copies out of other stages or
images are refused, like everything else that cannot be had here (docs/protocol.md#tasks).
Reads and decides; sandbox.py copies and runs. Lines and words are read by ../dockerfiles/.
"""

import pathlib
import platform
import re
from collections.abc import Callable
from typing import NamedTuple

from echo_jax.sandbox import PATH, UID
from echo_jax.sandbox.dockerfiles import lexer, parser

_WITHOUT_EFFECT = ('CMD', 'EXPOSE', 'LABEL', 'MAINTAINER', 'STOPSIGNAL')  # on what a task sees
_REFUSED = {
    'USER': 'it has one account',
    'ENTRYPOINT': 'nothing runs there beside the commands',
    'HEALTHCHECK': 'it has no engine to run it; write it as [environment.healthcheck] in task.toml',
    'VOLUME': 'it has no volumes',
    'ONBUILD': 'nothing is built from it',
}
_OWNERS = ('root', '0', 'agent', str(UID))  # all are the one account, which owns every copy anyway
_ARCHITECTURE = {'x86_64': 'amd64', 'aarch64': 'arm64'}.get(platform.machine(), platform.machine())
_PLATFORM_ARGS = {  # what BuildKit gives to an ARG of this name
    f'{where}{what}': value
    for where in ('TARGET', 'BUILD')
    for what, value in (
        ('OS', 'linux'),
        ('ARCH', _ARCHITECTURE),
        ('PLATFORM', f'linux/{_ARCHITECTURE}'),
    )
}


class Run(NamedTuple):
    """A command of a RUN."""

    where: str  # file and line, for messages
    argv: tuple[str, ...]
    workdir: str
    env: dict[str, str]
    empty: tuple[str, ...] = ()  # directories that are empty for it and gone after it


class Copy(NamedTuple):
    """A COPY, or an ADD of plain files."""

    where: str
    sources: tuple[str, ...]  # paths and patterns in the context
    texts: tuple[tuple[str, str], ...]  # (name, content) of heredocs
    target: str  # absolute; ends with a slash if it is a directory for sure
    mode: int | None  # by --chmod
    is_add: bool


class Directory(NamedTuple):
    """The directory of a WORKDIR, which is made if it is missing."""

    path: str


Step = Run | Copy | Directory


class Dockerfile(NamedTuple):
    """What a Dockerfile asks for: steps in order, and the WORKDIR and ENV that it ends with."""

    steps: tuple[Step, ...]
    workdir: str
    env: dict[str, str]


def read_dockerfile(path: pathlib.Path) -> Dockerfile:
    """Reads `path`. Raises ValueError, with line and reason, for what cannot be followed."""
    parsed = parser.parse(path)
    stage = _Stage(path, parsed.escape, {})
    stages: list[tuple[str, str, list[parser.Command]]] = []  # base, name, instructions
    for command in parsed.commands:
        if command.name == 'FROM':
            stages.append((*stage.base(command), []))
        elif stages:
            stages[-1][2].append(command)
        elif command.name == 'ARG':
            stage.follow(command)
        else:
            raise ValueError(f'{path}:{command.line}: {command.name} comes before FROM')
    if not stages:
        raise ValueError(f'{path} has no FROM')
    stage = _Stage(path, parsed.escape, stage.args)
    for commands in _lineage(stages):
        stage.args = {}  # those of a stage end with it
        for command in commands:
            stage.follow(command)
    return Dockerfile(tuple(stage.steps), stage.workdir, stage.env)


def _lineage(stages: list[tuple[str, str, list[parser.Command]]]) -> list[list[parser.Command]]:
    """The instructions of the last stage, after those of the stages that it is built from."""
    base, _, commands = stages[-1]
    found = [commands]
    for name_of_base, name, commands in reversed(stages[:-1]):
        if name and name == base.lower():
            found.insert(0, commands)
            base = name_of_base
    return found


class _Stage:
    """A stage as it stands after each instruction."""

    def __init__(self, path: pathlib.Path, escape: str, globals_: dict[str, str]):
        self._path, self._escape, self._globals = path, escape, globals_
        self.steps: list[Step] = []
        self.workdir = '/'
        self.env: dict[str, str] = {}
        self.args: dict[str, str] = {}
        self._shell = ['/bin/sh', '-c']
        self._where = ''

    def base(self, command: parser.Command) -> tuple[str, str]:
        """What a FROM names: the image or stage, and the name of the new stage or ''."""
        self._where = f'{self._path}:{command.line}'
        words = [self._expand(word) for word in command.rest.split()]
        if len(words) not in (1, 3) or (len(words) == 3 and words[1].lower() != 'as'):
            raise ValueError(f'{self._where}: FROM {command.rest}: expected FROM IMAGE [AS NAME]')
        return words[0], words[2].lower() if len(words) == 3 else ''

    def follow(self, command: parser.Command) -> None:
        self._where = f'{self._path}:{command.line}'
        followed: dict[str, Callable[[parser.Command], None]] = {
            'ADD': self._copy,
            'ARG': self._arg,
            'COPY': self._copy,
            'ENV': self._set_env,
            'RUN': self._run,
            'SHELL': self._set_shell,
            'WORKDIR': self._set_workdir,
        }
        if command.name in followed:
            followed[command.name](command)
        elif command.name in _WITHOUT_EFFECT or self._is_reset(command):
            return
        elif command.name in _REFUSED:
            raise self._refusal(command.name, _REFUSED[command.name])
        else:
            raise ValueError(f'{self._where}: {command.name} is no instruction of a Dockerfile')

    @staticmethod
    def _is_reset(command: parser.Command) -> bool:
        """Whether it takes something away that the local sandbox does not have anyway."""
        written = (command.name, command.rest.upper())
        return written in (('HEALTHCHECK', 'NONE'), ('ENTRYPOINT', '[]'))

    def _refusal(self, what: str, reason: str) -> ValueError:
        return ValueError(
            f'{self._where}: {what} is not followed by the local sandbox: {reason}; '
            "leave it out or set sandbox.backend to 'docker'"
        )

    def _expand(self, text: str, quotes: bool = True) -> str:
        try:
            # ENV hides an ARG of its name, whichever comes first.
            env = {'PATH': PATH} | self.args | self.env
            return lexer.expand(text, env, self._escape, quotes)
        except ValueError as error:
            raise ValueError(f'{self._where}: {error}') from None

    def _words(self, command: parser.Command) -> list[str]:
        words = command.json()
        return [self._expand(word) for word in (command.rest.split() if words is None else words)]

    def _set_workdir(self, command: parser.Command) -> None:
        text = self._expand(command.rest)
        if not text:
            raise ValueError(f'{self._where}: WORKDIR {command.rest}: expected a directory')
        self.workdir = self._inside(text).rstrip('/') or '/'
        self.steps.append(Directory(self.workdir))

    def _inside(self, path: str) -> str:
        """`path`, taken from the working directory, without `..`; a slash at its end is kept."""
        parts: list[str] = []
        for part in f'{self.workdir}/{path}'.split('/') if path[:1] != '/' else path.split('/'):
            if part == '..':
                parts = parts[:-1]
            elif part not in ('', '.'):
                parts.append(part)
        is_directory = path.endswith('/') or path.split('/')[-1] in ('.', '..')
        return '/' + '/'.join(parts) + ('/' if is_directory and parts else '')

    def _set_env(self, command: parser.Command) -> None:
        words = lexer.split_words(command.rest, self._escape)
        if words and '=' not in words[0]:  # the old form: ENV NAME the whole rest
            words = ['='.join(re.split(r'\s+', command.rest, maxsplit=1))]
        if not words or not all('=' in word for word in words):
            raise ValueError(f'{self._where}: ENV {command.rest}: expected ENV NAME=VALUE ...')
        pairs = [word.partition('=') for word in words]
        # All of one line see the variables from before that line.
        self.env |= {self._name(name): self._expand(value) for name, _, value in pairs}

    def _arg(self, command: parser.Command) -> None:
        for word in lexer.split_words(command.rest, self._escape):
            name, given, value = word.partition('=')
            name = self._name(name)
            if given:
                self.args[name] = self._expand(value)
            elif name in (known := _PLATFORM_ARGS | self._globals):
                self.args[name] = known[name]

    def _name(self, text: str) -> str:
        name = self._expand(text)
        if not re.fullmatch(r'[A-Za-z_]\w*', name, re.ASCII):
            raise ValueError(f'{self._where}: {name!r} is no name for a variable')
        return name

    def _set_shell(self, command: parser.Command) -> None:
        words = command.json()
        if not words:
            raise ValueError(f'{self._where}: SHELL {command.rest}: expected ["PROGRAM", "-c"]')
        self._shell = words

    def _run(self, command: parser.Command) -> None:
        empty: list[str] = []
        for flag in command.flags:
            parts = [part.partition('=') for part in flag.partition('=')[2].split(',')]
            options = {name: value for name, _, value in parts}
            target = options.get('target') or options.get('dst') or options.get('destination')
            if flag.startswith('--mount=') and options.get('type') in ('tmpfs', 'cache') and target:
                if options.get('from'):
                    raise self._refusal(f'RUN {flag}', 'it has no other images or stages')
                empty.append(self._inside(self._expand(target)).rstrip('/'))
            elif flag not in ('--network=none', '--network=default', '--security=sandbox'):
                raise self._refusal(f'RUN {flag}', 'only mounts of type tmpfs and cache are known')
        words = command.json()
        argv = words if words is not None else _script(command, self._shell)
        if not argv or not argv[-1]:
            raise ValueError(f'{self._where}: RUN without a command')
        env = self.args | self.env
        self.steps.append(Run(self._where, tuple(argv), self.workdir, env, tuple(empty)))

    def _copy(self, command: parser.Command) -> None:
        mode = None
        for flag in command.flags:
            name, _, value = flag.partition('=')
            value = self._expand(value)
            if name == '--chmod' and re.fullmatch('[0-7]{3,4}', value):
                mode = int(value, 8)
            elif name == '--from':
                reason = 'all stages are its one system, and it has no other images'
                raise self._refusal(f'{command.name} {flag}', reason)
            elif name == '--chown' and not set(value.split(':')) <= set(_OWNERS):
                raise self._refusal(f'{command.name} {flag}', 'it has one account')
            elif name not in ('--chown', '--link'):
                raise self._refusal(f'{command.name} {flag}', 'this option is not known')
        *sources, target = self._words(command) or ['']
        if not sources or not target:
            what = f'{command.name} {command.rest}'
            raise ValueError(f'{self._where}: {what}: expected {command.name} SOURCE... TARGET')
        texts = tuple(self._text(heredoc) for heredoc in command.heredocs)
        paths = tuple(source for source in sources if not re.match(r'\d*<<', source))
        for path in paths if command.name == 'ADD' else ():
            if re.match(r'\w+://|git@', path):
                raise self._refusal(f'ADD {path}', 'it has no network')
        target = self._inside(target)
        if len(sources) > 1 and not target.endswith('/'):
            what = f'{command.name} {command.rest}'
            raise ValueError(f'{self._where}: {what}: several sources need a target that ends in /')
        self.steps.append(Copy(self._where, paths, texts, target, mode, command.name == 'ADD'))

    def _text(self, heredoc: parser.Heredoc) -> tuple[str, str]:
        text = heredoc.text()
        return heredoc.name, self._expand(text, quotes=False) if heredoc.is_expanded else text


_AS_FILE = (
    'f=$(mktemp) && printf %s "$1" >"$f" && chmod +x "$f" && { "$f"; s=$?; rm "$f"; exit $s; }'
)


def _script(command: parser.Command, shell: list[str]) -> list[str]:
    """What a RUN starts: its shell with the line, with its one heredoc, or with line and heredocs.

    A single heredoc that begins with `#!` is a program of its own.
    """
    if not command.heredocs:
        return [*shell, command.rest] if command.rest else []
    if re.fullmatch(r'\d*<<-?(\S+|(["\']).*\2)', command.rest):
        text = command.heredocs[0].text()
        return ['/bin/sh', '-c', _AS_FILE, 'sh', text] if text.startswith('#!') else [*shell, text]
    documents = ''.join(f'\n{heredoc.content}{heredoc.name}' for heredoc in command.heredocs)
    return [*shell, command.rest + documents]
