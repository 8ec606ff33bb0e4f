"""The entry of every program: from its flags to its exit code.

It turns an expected error into one line on stderr, signals into a request to stop, and has every
line that is logged say whose it is. It knows no program: what a program expects to go wrong besides
EXPECTED, the program says itself.
"""

import asyncio
import contextlib
import dataclasses
import errno
import logging
import os
import pathlib
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Generator, Sequence
from typing import Any, NoReturn, TypeVar

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from echo_jax.run.inert import base_values
from echo_jax.sandbox import SandboxError
from echo_jax.store.kvstore import MissingError

EXPECTED = (ValueError, OSError, FloatingPointError, SandboxError, MissingError)
# What absl and ml_collections raise while they parse flags. A flag that names no key of the config
# raises one of the last three.
_FLAG_ERRORS = (flags.Error, ValueError, OSError, SyntaxError)
_KEY_ERRORS = (AttributeError, LookupError, TypeError)
_EXIT_SECONDS = 20.0  # after an error, before the process ends without its threads
_ROOM, _RIGHTS = 'make room on its disk', 'let this user read and write there'
_LESS = (
    'use more devices, or lower policy.slots or batch.micro_rows (python -m echo_jax.plan says '
    'what a recipe needs)'
)
_ADVICE = {
    **{errno.ENOSPC: _ROOM, errno.EDQUOT: _ROOM},
    **{errno.EACCES: _RIGHTS, errno.EPERM: _RIGHTS, errno.EROFS: _RIGHTS},
}
T = TypeVar('T')
_nones: list[str] = []  # keys that flags have set to None
_labels: dict[str, object] = {}  # of this process; see label_logs


def run(main: Callable[[Sequence[str]], None], *expected: type[Exception]) -> None:
    """Parses the flags, runs `main(argv)` and ends the process.

    A wrong flag, Ctrl-C, and an error of EXPECTED or `expected`, alone or in an exception group,
    become one line on stderr and exit code 1. `--traceback` shows where an error came from instead.
    """
    flags.DEFINE_bool('traceback', False, 'Show where an error came from.')

    def guarded(argv):
        place = flags.FLAGS['workdir'].value if 'workdir' in flags.FLAGS else None
        label_logs(*([place] if isinstance(place, str) else place or []))
        with _one_line(*EXPECTED, *expected):
            main(argv)

    app.run(guarded, flags_parser=_parse)


def label_logs(*workdirs: str, **labels: object) -> None:
    """Has every line that this process logs, by absl or by `logging`, say whose it is:

        W1129 10:55:17.123456 17 episode.py:296] run=tiny host=box process=4711 worker=box-0: ...

    workdirs: of the runs, which are named by their last parts. labels: others, in addition to those
    of earlier calls. `process` is the process's id, unless its program says that it is one of
    several. What a program prints for the person who started it is no log, and stays as it is.
    """
    own = {'run': '', 'host': socket.gethostname(), 'process': os.getpid()}
    runs = ','.join(os.path.basename(os.path.abspath(place)) for place in workdirs)
    _labels.update(own | _labels | ({'run': runs} if runs else {}) | labels)
    if not flags.FLAGS.is_parsed():  # in a process of Ray's, which has none; absl would complain
        flags.FLAGS.mark_as_parsed()
    absl_logging.use_absl_handler()
    absl_logging.get_absl_handler().setFormatter(_Labelled())
    absl_logging.get_absl_handler().addFilter(_is_news)


def log_label() -> str:
    """What every line begins with, once `label_logs` was called."""
    named = (f'{name}={value}' for name, value in _labels.items() if value != '')
    return printable(f'{" ".join(named)}:')


def _is_news(record: logging.LogRecord) -> bool:
    """False for an error that Orbax logs with its traceback, because it raises it too."""
    return not (record.exc_info and 'orbax' in record.pathname)


class _Labelled(logging.Formatter):
    """absl's prefix and the labels of the process, in every line of what is logged."""

    def format(self, record: logging.LogRecord) -> str:
        start = f'{absl_logging.get_absl_log_prefix(record)}{log_label()} '
        return '\n'.join(start + line for line in super().format(record).split('\n'))


def printable(text: str) -> str:
    """`text` with every character that a terminal would obey replaced; newlines stay."""
    return ''.join(c if c.isprintable() or c == '\n' else '\N{REPLACEMENT CHARACTER}' for c in text)


def overrides() -> list[str]:
    """The keys of the config that flags name, as 'batch.groups' of --config.batch.groups=8."""
    return [*config_flags.get_override_values(flags.FLAGS['config']), *_nones]


def _let_recipes_import(argv: Sequence[str]) -> None:
    """Lets a recipe say `from configs import base`, whatever folder the program is started in."""
    for flag, value in zip(argv, [*argv[1:], '']):
        name, _, file = flag.partition('=')
        if name.lstrip('-') == 'config':
            folder = pathlib.Path((file or value).partition(':')[0]).absolute().parent
            if folder.name == 'configs' and str(folder.parent) not in sys.path:
                sys.path.append(str(folder.parent))


def _parse(argv: list[str]) -> list[str]:
    _let_recipes_import(argv)
    try:
        rest = flags.FLAGS(_without_nones(argv))
        for key in _nones:
            if flags.FLAGS['config'].value is None:
                raise ValueError(f'--config.{key}=None changes a recipe; give its --config')
            flags.FLAGS['config'].value.update_from_flattened_dict({key: None})
    except (*_FLAG_ERRORS, *_KEY_ERRORS) as error:
        if '--traceback' in argv:
            raise
        # The message may hold a whole traceback; its last line says what was wrong.
        reason = str(error).strip().rpartition('\n')[2].strip()
        if isinstance(error, _KEY_ERRORS):
            given = ' '.join(argument for argument in argv if argument.startswith('--config.'))
            if not given:  # the recipe itself is wrong
                raise
            reason = f'{given} names no key of the config: {_innermost(error)}'
        sys.exit(f'error: {printable(reason)}')
    if len(rest) > 1:
        sys.exit(f'error: unexpected argument {rest[1]!r}; flags begin with --')
    return rest


def _without_nones(argv: Sequence[str]) -> list[str]:
    """The arguments without those that set a key to None; puts the keys into _nones.

    ml_collections would read 'None' as a number or a text. A key may be None if it is in
    configs/base.py.
    """
    _nones.clear()
    defaults, rest = base_values(), []
    for argument in argv:
        name, _, value = argument.partition('=')
        key = name.lstrip('-').removeprefix('config.')
        if value == 'None' and key in defaults and defaults[key] is None:
            _nones.append(key)
        else:
            rest.append(argument)
    return rest


def _innermost(error: Exception) -> str:
    """The words of an error that was raised with another error as its message."""
    words: object = error
    while isinstance(words, Exception):
        words = words.args[0] if words.args else ''
    return ' '.join(str(words).split())


@contextlib.contextmanager
def _one_line(*expected: type[Exception]) -> Generator[None]:
    try:
        yield
    except KeyboardInterrupt:
        _end('stopped')
    except Stopped:
        _end('stopped; the same command goes on from here')
    except (*expected, RuntimeError, ExceptionGroup) as error:
        cause: Exception = error
        while isinstance(cause, ExceptionGroup):  # the first of the tasks that failed
            cause = cause.exceptions[0]
        fault = of_disk(cause) or of_memory(cause)
        if flags.FLAGS.traceback or not (fault or isinstance(cause, expected)):
            raise
        # A thread of a library may wait for another that has failed: Orbax's, on a closed disk, do
        # for ten minutes and more.
        late = threading.Timer(_EXIT_SECONDS, os._exit, (1,))
        late.daemon = True
        late.start()
        words = ' '.join(str(cause).split()) or type(cause).__name__
        reason = f'{fault}, then give the same command again' if fault else words
        _end(f'error: {printable(reason)}')


def _end(line: str) -> NoReturn:
    """Ends the process with exit code 1 and the line, the last one on stderr: what threads that
    still run have to say of the same fault is said by it.
    """
    logging.disable()
    threading.excepthook = lambda _: None
    sys.exit(line)


def of_disk(error: Exception) -> str:
    """What is wrong with which disk, and what to do, if the error is of one; else ''."""
    number, place = getattr(error, 'errno', None), getattr(error, 'filename', None)
    if of_tensorstore := re.search(r"\[os_error_code='(\d+)'\]", str(error)):
        places = re.findall('"(/[^"]*)"', str(error))
        number, place = int(of_tensorstore[1]), places[-1] if places else None
    if number not in _ADVICE:
        return ''
    return f'{os.strerror(number)}{f": {place}" if place else ""}; {_ADVICE[number]}'


def of_memory(error: BaseException | None) -> str:
    """What a device had no memory for, and what to do, if the error is, or comes of, that; else ''.

    XLA's errors are RuntimeErrors, which programs without JAX know as well.
    """
    while error is not None:
        if isinstance(error, RuntimeError) and 'RESOURCE_EXHAUSTED' in str(error):
            said = str(error).partition('\n')[0][:200]
            return f'the devices have too little memory ({said}); {_LESS}'
        error = error.__cause__
    return ''


class Stopped(Exception):
    """The program was asked to stop. It is raised at a point where the state is whole."""


class Stop:
    """Turns Ctrl-C and SIGTERM into a request, which the program answers when it can."""

    def __init__(self) -> None:
        self.requested = False
        self._cancel: Callable[[], object] | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def _on_signal(self, *_) -> None:
        self.requested = True
        if self._cancel:
            self._cancel()

    def check(self) -> None:
        """Raises Stopped if a stop was requested."""
        if self.requested:
            raise Stopped

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """What `work` returns. If a stop is requested, cancels it and raises Stopped."""

        async def cancellable():
            task = asyncio.ensure_future(work)
            loop = asyncio.get_running_loop()
            self._cancel = lambda: loop.call_soon_threadsafe(task.cancel)
            if self.requested:  # before there was anything to cancel
                task.cancel()
            try:
                return await task
            finally:
                self._cancel = None

        try:
            result = asyncio.run(cancellable())
        except asyncio.CancelledError:
            self.check()
            raise
        self.check()
        return result


@dataclasses.dataclass
class Clock:
    """Counts the seconds that a run has taken, including those before it was resumed."""

    started: float = dataclasses.field(default_factory=time.monotonic)
    before: float = 0.0

    def resume(self, seconds: float) -> None:
        self.before, self.started = seconds, time.monotonic()

    def seconds(self) -> float:
        return self.before + time.monotonic() - self.started
