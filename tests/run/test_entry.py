"""The entry that all programs share, with a program of a few lines."""

import os
import pathlib
import re
import socket
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = '--config=configs/tiny.py'
# Its flag `raises` is what it does; the config proves that it was read.
PROGRAM = """
from absl import flags
from ml_collections import config_flags
from echo_jax.run import entry
from echo_jax.sandbox import SandboxError

class OurError(RuntimeError): pass
class AnotherError(RuntimeError): pass

def main(argv):
    if raises.value:
        raise eval(raises.value)
    print(config.value.num_steps)
    if entry.overrides() != ['num_steps']:
        print(config.value.sandbox.memory_mb, entry.overrides())

config = config_flags.DEFINE_config_file('config')
raises = flags.DEFINE_string('raises', '', 'An error.')
flags.mark_flag_as_required('config')
entry.run(main, OurError)
"""

# It logs by both libraries, in several threads and lines.
LOGS = """
import logging, threading
from absl import flags
from absl import logging as absl_logging
from echo_jax.run import entry
from echo_jax.run.report import CONSOLE

def main(argv):
    logging.warning('of %s', 'the root')
    absl_logging.error('of absl')
    entry.label_logs(worker='w-0')
    thread = threading.Thread(target=logging.getLogger('a.module').error, args=('two\\nlines',))
    thread.start()
    thread.join()
    try:
        1 / 0
    except ZeroDivisionError:
        logging.exception('a bug')
    CONSOLE.print('for a person')

flags.DEFINE_list('workdir', [], '')
entry.run(main)
"""


# Its threads fail after the program does, as Orbax's do if the disk is full.
THREADS = """
import logging, threading, time
from echo_jax.run import entry

def fails():
    time.sleep(0.5)
    raise OSError('in a thread')

def logs():
    time.sleep(0.5)
    logging.getLogger('asyncio').error('Task exception was never retrieved')

def main(argv):
    for target in (fails, logs):
        threading.Thread(target=target).start()
    raise ValueError('the reason')

entry.run(main)
"""


def run(*flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, '-c', PROGRAM, *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def fails(*flags: str) -> str:
    """The one line on stderr."""
    done = run(*flags)
    assert (done.returncode, done.stdout) == (1, '')
    assert done.stderr.count('\n') == 1, done.stderr
    return done.stderr.removesuffix('\n')


def test_a_program_that_goes_well():
    done = run(CONFIG, '--config.num_steps=7')
    assert (done.returncode, done.stdout, done.stderr) == (0, '7\n', '')


def test_a_key_may_be_none_again():
    done = run(CONFIG, '--config.num_steps=7', '--config.sandbox.memory_mb=None')
    assert done.stdout == "7\nNone ['num_steps', 'sandbox.memory_mb']\n", done.stderr
    line = fails('--config.sandbox.memory_mb=None')
    assert 'Flag --config must have a value' in line or 'give its --config' in line
    # A key that is never None is not touched.
    assert '--config.num_steps=None: invalid literal' in fails(CONFIG, '--config.num_steps=None')


def test_nothing_is_said_after_the_error():
    command = [sys.executable, '-c', THREADS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, 'error: the reason\n')


@pytest.mark.slow
@pytest.mark.parametrize(
    'flags, says',
    [
        ([CONFIG, '--config.nope=1'], "--config.nope=1 names no key of the config: 'nope'"),
        ([CONFIG, '--config.num_step=1'], 'Did you mean "num_steps"'),
        ([CONFIG, '--config.loss.nope=1'], '--config.loss.nope=1 names no key'),
        ([CONFIG, '--config.seed.nope=1'], '--config.seed.nope=1 names no key'),
        ([CONFIG, '--config.num_steps=many'], '--config.num_steps=many: invalid literal for int()'),
        ([CONFIG, '--nope'], "Unknown command line flag 'nope'"),
        ([CONFIG, 'stray'], "unexpected argument 'stray'"),
        ([], 'Flag --config must have a value'),
        (['--config=configs/none.py'], "No such file or directory: 'configs/none.py'"),
        (['--config=configs/tiny.py:nope'], "the variants 'echo' and 'grpo', not 'nope'"),
        (['--config=README.md'], 'README.md, line'),
    ],
)
def test_wrong_flags(flags, says):
    line = fails(*flags)
    assert line.startswith('error: ') and says in line


@pytest.mark.parametrize(
    'raised, says',
    [
        ("ValueError('rows is 3; expected 4')", 'rows is 3; expected 4'),
        ("ValueError('one\\n  two')", 'one two'),
        ("FileNotFoundError(2, 'No such file', 'x')", "[Errno 2] No such file: 'x'"),
        ("OSError(28, 'No space')", 'No space left on device; make room on its disk, then give'),
        ("PermissionError(13, 'no', '/x')", 'Permission denied: /x; let this user read and write'),
        (
            """ValueError('RESOURCE: "k" in "/x": "/x/y": no space [os_error_code=\\'28\\'] at')""",
            'No space left on device: /x/y; make room on its disk, then',
        ),
        (
            "RuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\\nmore')",
            'the devices have too little memory (RESOURCE_EXHAUSTED: Out of memory allocating 9 b',
        ),
        ('TimeoutError()', 'TimeoutError'),  # an OSError without words
        ("OurError('ours')", 'ours'),
        ("ExceptionGroup('g', [ExceptionGroup('h', [SandboxError('no bwrap')])])", 'no bwrap'),
        ("ValueError('\\x1b]0;title\\x07 \\u202e')", '\N{REPLACEMENT CHARACTER}]0;title'),
    ],
)
def test_expected_errors(raised, says):
    line = fails(CONFIG, f'--raises={raised}')
    assert line.startswith(f'error: {says}')
    assert line.isprintable()


@pytest.mark.parametrize(
    'raised',
    [
        "AnotherError('a bug')",
        "RuntimeError('a bug')",
        "TypeError('a bug')",
        "ExceptionGroup('g', [TypeError('a bug')])",
    ],
)
def test_a_bug_keeps_its_traceback(raised):
    done = run(CONFIG, f'--raises={raised}')
    assert done.returncode == 1
    assert 'Traceback' in done.stderr and 'a bug' in done.stderr


def test_traceback_on_request():
    for flags in (['--config.nope=1'], ["--raises=ValueError('rows')"]):
        done = run(CONFIG, '--traceback', *flags)
        assert done.returncode == 1 and 'Traceback' in done.stderr


def test_ctrl_c():
    assert fails(CONFIG, '--raises=KeyboardInterrupt') == 'stopped'


@pytest.mark.slow
@pytest.mark.parametrize(
    'flags, runs',
    [
        (['--workdir=/a/tiny'], 'run=tiny '),
        (['--workdir=gs://bucket/runs/tiny/,.'], f'run=tiny,{ROOT.name} '),
        ([], ''),
    ],
)
def test_every_line_of_the_log_says_whose_it_is(flags, runs):
    process = subprocess.Popen(
        [sys.executable, '-c', LOGS, *flags],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, 'for a person\n')
    whose = f'{runs}host={socket.gethostname()} process={process.pid}'
    form = re.compile(r'([EW])\d{4} [\d:.]+ +\d+ [\w<>]+(\.py)?:\d+\] (.*)')
    found = [form.fullmatch(line) for line in err.splitlines()]
    assert None not in found, err
    said = [(match[1], match[3]) for match in found]
    assert said[:4] == [
        ('W', f'{whose}: of the root'),
        ('E', f'{whose}: of absl'),
        ('E', f'{whose} worker=w-0: two'),
        ('E', f'{whose} worker=w-0: lines'),
    ]
    assert said[4] == ('E', f'{whose} worker=w-0: a bug')
    assert said[-1] == ('E', f'{whose} worker=w-0: ZeroDivisionError: division by zero')
    assert all(text.startswith(f'{whose} worker=w-0: ') for _, text in said[4:])


def test_a_process_of_rays_logs_the_same_lines():
    """It is started by none of the programs, and has no flags."""
    script = (
        'import logging\n'
        'from echo_jax.run import entry\n'
        "entry.label_logs('/a/tiny', worker='ray-0')\n"
        "logging.warning('lost')"
    )
    command = [sys.executable, '-c', script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    whose = rf'run=tiny host={re.escape(socket.gethostname())} process=\d+ worker=ray-0'
    assert re.fullmatch(rf'W.* <string>:4\] {whose}: lost\n', done.stderr), done.stderr


@pytest.mark.slow
def test_no_import_order_lets_transformers_ask_for_pytorch():
    script = (
        'import os, sys\n'
        'import echo_jax.agent.protocol\n'
        'assert "transformers" in sys.modules\n'
        'print(os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"])'
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith('TRANSFORMERS_')}
    done = subprocess.run(
        [sys.executable, '-c', script], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, '1\n'), done.stderr
