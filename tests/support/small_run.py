"""Starts programs as processes, and a training run small enough for tests; see conftest.py."""

import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import IO

ROOT = pathlib.Path(__file__).parents[2]
HELDOUT = 6  # more than the policy has slots
# Every part of a run is as small as it can be. The transcripts' replies just fit, so that commands
# run in sandboxes, although a model of two layers of 32 learns nothing from them.
SETTINGS = dict(
    num_steps=6,
    group_size=2,
    batch=dict(groups=2, micro_rows=4, seq_len=480),
    protocol=dict(
        max_turns=4,
        max_turn_tokens=72,
        max_total_tokens=480,
        max_context_tokens=480,
        max_prompt_tokens=200,
    ),
    model=dict(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        head_dim=16,
    ),
    policy=dict(slots=4),
    sandbox=dict(at_once=4),
    tasks=dict(train_count=40, heldout_count=HELDOUT),
    warm_start=dict(
        steps=6, explore_steps=3, rollouts=4, explorations=6, demonstrations=6, save_every=2
    ),
    eval=dict(every=2, tasks=3),
    checkpoint=dict(every=2),
)
NO_WARM_START = ('--config.warm_start.steps=0', '--config.warm_start.explore_steps=0')
SUMMARY = (  # and env_ce_output_WHEN, if held-out rollouts have OUTPUT
    *('solve_rate_before', 'solve_rate_low_before', 'solve_rate_high_before'),
    *('env_ce_before', 'imagined_before'),
    *('solve_rate_after', 'solve_rate_low_after', 'solve_rate_high_after'),
    *('env_ce_after', 'imagined_after'),
    *('steps', 'rollouts', 'train_minutes'),
)


def config_flags(settings: dict, prefix: str = '--config') -> list[str]:
    flags = []
    for key, value in settings.items():
        name = f'{prefix}.{key}'
        flags += config_flags(value, name) if isinstance(value, dict) else [f'{name}={value}']
    return flags


class Programs:
    """Starts programs in processes of their own, and finds those that they leave behind."""

    def __init__(self, cache: pathlib.Path):
        """`cache` is a folder for compiled XLA modules, which the processes share."""
        # Sandboxes inherit PATH. A folder in it that nobody else has marks the processes as ours.
        self._mark = str(cache / 'marks-the-processes-of-these-tests')
        # vLLM's processes write their titles over their environment.
        self._title = f'vLLM-of-{os.getpid()}'
        self.environment = os.environ | {
            'JAX_PLATFORMS': 'cpu',
            'WANDB_MODE': 'offline',
            'JAX_COMPILATION_CACHE_DIR': str(cache),
            'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
            'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
            'PATH': os.environ['PATH'] + os.pathsep + self._mark,
            'VLLM_PROCESS_NAME_PREFIX': self._title,
        }
        self.environment.pop('XLA_FLAGS', None)
        self._started: list[subprocess.Popen] = []

    def start(
        self,
        program: str | pathlib.Path,
        *flags: str,
        python: str | os.PathLike = sys.executable,
        output: int | IO = subprocess.PIPE,
        **environment: str,
    ) -> subprocess.Popen:
        """`program` is a file, or the name of one of echo_jax's programs."""
        what = [program] if isinstance(program, pathlib.Path) else ['-m', f'echo_jax.{program}']
        process = subprocess.Popen(
            [python, *what, *flags],
            cwd=ROOT,
            env=self.environment | environment,
            stdout=output,
            stderr=output,
            text=True,
        )
        self._started.append(process)
        return process

    def close(self) -> None:
        """Ends what still runs and closes its pipes, which tests that kill a process leave open."""
        for process in self._started:
            process.kill()
            process.wait()
            for pipe in (process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()

    def run(self, program: str, *flags: str, **environment: str) -> subprocess.CompletedProcess:
        process = self.start(program, *flags, **environment)
        try:
            stdout, stderr = process.communicate(timeout=480)
        finally:
            process.kill()
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    def train_flags(
        self,
        workdir: pathlib.Path,
        *flags: str,
        recipe: str = 'configs/tiny.py',
        variant: str = '',
        without: Sequence[str] = (),
    ) -> list[str]:
        """`without`: keys of SETTINGS, or sections, that `flags` leave without an effect."""
        config = f'--config={recipe}{variant}'
        inert = tuple(f'--config.{key}' for key in without)
        settings = [flag for flag in config_flags(SETTINGS) if not flag.startswith(inert)]
        return [config, f'--workdir={workdir}', *settings, *flags]

    def train(
        self,
        workdir: pathlib.Path,
        *flags: str,
        recipe: str = 'configs/tiny.py',
        variant: str = '',
        without: Sequence[str] = (),
        **environment: str,
    ) -> None:
        """A run to its end; raises if it does not get there."""
        flags = self.train_flags(workdir, *flags, recipe=recipe, variant=variant, without=without)
        done = self.run('train', *flags, **environment)
        assert done.returncode == 0, (done.returncode, done.stdout[-2000:], done.stderr)

    def fails(self, program: str, *flags: str, **environment: str) -> str:
        """Runs a program that must refuse. Returns the one line that it leaves on stderr."""
        done = self.run(program, *flags, **environment)
        assert done.returncode == 1, (done.returncode, done.stderr)
        assert done.stderr.count('\n') == 1 and done.stderr.endswith('\n'), done.stderr
        return done.stderr.strip()

    def interrupt(
        self, workdir: pathlib.Path, signal_number: int, moment: Callable[[], bool]
    ) -> tuple[int, str]:
        """Trains until `moment()`, then sends the signal. Returns the exit code and stderr."""
        process = self.start('train', *self.train_flags(workdir))
        try:
            wait_for(lambda: moment() or process.poll() is not None, poll=0.001)
            assert process.poll() is None, (
                f'the run ended before the moment to signal: {process.stderr.read()}'
            )
            process.send_signal(signal_number)
            _, stderr = process.communicate(timeout=240)
        finally:
            process.kill()
        wait_for(lambda: not self.alive())
        return process.returncode, stderr

    def alive(self) -> list[int]:
        """The process ids of these programs, of their sandboxes and engines."""
        found = []
        for entry in pathlib.Path('/proc').glob('[0-9]*'):
            try:
                is_titled = (entry / 'cmdline').read_bytes().startswith(f'{self._title}::'.encode())
                if is_titled or self._mark.encode() in (entry / 'environ').read_bytes():
                    found.append(int(entry.name))
            except OSError:  # ended meanwhile, or somebody else's
                continue
        return found


def wait_for(condition: Callable[[], bool], poll: float = 0.02, seconds: float = 480) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f'waited {seconds} s in vain'
        time.sleep(poll)


def metrics(workdir: pathlib.Path, name: str = 'metrics.jsonl') -> list[dict]:
    """The rows without what the clock and the machine decide, which differs from run to run."""
    rows = [json.loads(line) for line in (workdir / name).read_text().splitlines()]
    measured = ('time/', 'system/')
    return [{k: v for k, v in row.items() if not k.startswith(measured)} for row in rows]


def summary(workdir: pathlib.Path) -> dict:
    document = json.loads((workdir / 'summary.json').read_text())
    return {key: value for key, value in document.items() if key != 'train_minutes'}
