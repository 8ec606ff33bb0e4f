"""Kills the parts of one run at random, and proves that it lost nothing and did nothing twice.

    .venv/bin/python -m experiments.chaos --folder=FOLDER [--seed=0] [--kills=30] [--staleness=0]

A small run of a learner, two workers with vLLM and containers of an engine of its own, for root.
Every few seconds one of them gets SIGKILL: the learner, a worker, a container, or the engine. What
has died is started again by the same command, as a supervisor would. When the run has ended:

* each of its steps has one row in metrics.jsonl, and its last checkpoint is that of its last step;
* every group was trained on once: with --staleness=0 by its number and with the numbers of an
  undisturbed run (FOLDER/undisturbed, made first), above that by groups.jsonl;
* every group is whole, and no token older than --staleness versions;
* no process, container, volume or unfinished file is left.

It prints one JSON line, or ends with what was wrong.
"""

import argparse
import collections
import contextlib
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import docker
import numpy as np

from echo_jax.learner.checkpoint import open_saved
from echo_jax.run.workdir import Workdir
from echo_jax.store.rollouts import RolloutStore
from experiments.proof import expect
from tests.support import docker_engine
from tests.support.small_run import NO_WARM_START, ROOT, Programs, metrics, wait_for

_ROLLOUT_PYTHON = ROOT / '.venv-rollout' / 'bin' / 'python'
_VICTIMS = {'learner': 3, 'worker 0': 2, 'worker 1': 2, 'container': 3, 'engine': 1}
_MADE = {'label': 'echo_jax.run'}
_PAUSE = 4.0, 20.0  # seconds between two kills
_EQUAL = 1e-3  # of metrics of two runs: vLLM sums in another order if other turns run beside


class Run:
    """The processes of a run, each of which is started again when it has died."""

    def __init__(self, programs: Programs, workdir: pathlib.Path, daemon, flags: list[str]):
        self.workdir, self.daemon = workdir, daemon
        self._programs, self._flags = programs, flags
        self._alive: dict[str, subprocess.Popen] = {}
        self._log = workdir.with_suffix('.log').open('a')
        self.client = docker.DockerClient(daemon.url, timeout=60)

    def keep_up(self) -> bool:
        """Starts what is not running; False when all have ended by themselves."""
        for name in ('learner', 'worker 0', 'worker 1'):
            process = self._alive.get(name)
            if process is None or process.poll() not in (None, 0):
                self._alive[name] = self._start(name)
        return any(process.poll() is None for process in self._alive.values())

    def kill(self, victim: str) -> bool:
        """Whether there was something to kill."""
        if victim == 'engine':
            self.daemon.kill()
            self.daemon.start()
            return True
        if victim == 'container':
            # One that tests run in may have been killed by the agent: that is a reward of 0.
            found = [name for name in self._containers() if not name.endswith('-tests')]
            for name in found[:1]:
                try:
                    self.client.api.kill(name, signal.SIGKILL)
                except docker.errors.APIError:  # it has just ended
                    return False
            return bool(found)
        process = self._alive[victim]
        process.kill()
        return process.wait() == -signal.SIGKILL

    def left(self) -> list[str]:
        """What a run must not leave behind."""
        names = [f'container {name}' for name in self._containers(all=True)]
        names += [f'volume {each.name}' for each in self.client.volumes.list(filters=_MADE)]
        for pid in self._programs.alive():
            with contextlib.suppress(OSError):  # it ends just now
                command = pathlib.Path(f'/proc/{pid}/cmdline').read_bytes().split(b'\0')
                words = b' '.join(command).decode(errors='replace')[:200]
                names.append(f'process {pid}: {words}')
        for pattern in ('*.partial*', 'taking-*', '*.__lock', '*.orbax-checkpoint-tmp*'):
            names += [str(file) for file in self.workdir.rglob(pattern)]
        return names

    def _containers(self, **options: bool) -> list[str]:
        # Not `client.containers.list`, which looks at each again and fails if one has ended.
        found = self.client.api.containers(filters=_MADE, **options)
        return [each['Names'][0].removeprefix('/') for each in found]

    def _start(self, name: str) -> subprocess.Popen:
        options = dict(output=self._log, DOCKER_HOST=self.daemon.url)
        if name == 'learner':
            return self._programs.start('train', *self._flags, **options)
        flags = [*self._flags, f'--name={name.replace(" ", "-")}']
        return self._programs.start('worker', *flags, python=_ROLLOUT_PYTHON, **options)


def main() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends all, as Ctrl-C does
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--folder', type=pathlib.Path, required=True)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--kills', type=int, default=30)
    parser.add_argument('--staleness', type=int, default=0)
    parser.add_argument('--steps', type=int, default=20)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    programs = Programs(options.folder / 'xla')
    with contextlib.closing(programs), docker_engine.running() as daemon:
        expect(daemon.process, f'{daemon.url} is no engine to kill: set DOCKER_HOST=unix:///none')
        undisturbed = options.folder / 'undisturbed'
        if options.staleness == 0 and not (undisturbed / 'summary.json').exists():
            disturb(programs, undisturbed, daemon, options, kills=0)
        name = f'k{options.staleness}-seed{options.seed}'
        killed, seconds = disturb(programs, options.folder / name, daemon, options, options.kills)
    trained = prove(options.folder / name, options)
    if options.staleness == 0:
        compare(options.folder / name, undisturbed)
    told = {'run': name, 'kills': killed, 'minutes': round(seconds / 60, 1), 'groups': trained}
    print(json.dumps(told))


def disturb(
    programs: Programs, workdir: pathlib.Path, daemon, options: argparse.Namespace, kills: int
) -> tuple[dict[str, int], float]:
    """Runs it to its end, with so many kills; returns how often what was killed, and seconds."""
    settings = {
        'num_steps': options.steps,
        'max_staleness': options.staleness,
        'policy.backend': 'vllm',
        'policy.lease_sec': 10.0,
        'model.head_dim': 32,
        'sandbox.backend': 'docker',
        'checkpoint.every': 3,
    }
    flags = [f'--config.{key}={value}' for key, value in settings.items()]
    flags = programs.train_flags(workdir, *NO_WARM_START, *flags, without=['warm_start'])
    run, dice = Run(programs, workdir, daemon, flags), random.Random(options.seed)
    killed: collections.Counter[str] = collections.Counter()
    started = time.monotonic()
    next_kill = started + dice.uniform(*_PAUSE)
    while run.keep_up():
        time.sleep(0.2)
        if time.monotonic() > next_kill and killed.total() < kills:
            victim = dice.choices([*_VICTIMS], [*_VICTIMS.values()])[0]
            if run.kill(victim):
                killed[victim] += 1
                print(
                    f'{workdir.name}: kill {killed.total()} of {kills}, {victim}', file=sys.stderr
                )
            next_kill = time.monotonic() + dice.uniform(*_PAUSE)
    seconds = time.monotonic() - started
    if killed.total() < kills:
        sys.exit(
            f'{workdir}: it ended after {killed.total()} of {kills} kills; give it more --steps'
        )
    try:
        wait_for(lambda: not run.left(), seconds=60)
    except AssertionError:
        sys.exit(f'{workdir}: left behind: {"; ".join(run.left())}')
    return dict(killed), seconds


def prove(workdir: pathlib.Path, options: argparse.Namespace) -> int:
    """Ends the program unless every group was trained on once; returns how many there are."""
    work, steps = Workdir.open(workdir), options.steps
    config = work.config
    expect([row['step'] for row in metrics(workdir)] == [*range(1, steps + 1)], 'rows of metrics')
    checkpointer, last = open_saved(work.url('checkpoints', 'train'), None)
    checkpointer.close()
    expect(last == steps, f'the last checkpoint is of step {last}')
    if options.staleness:
        lines = (workdir / 'groups.jsonl').read_text().splitlines()
        taken = {row['step']: row['groups'] for row in map(json.loads, lines)}
        expect(len(lines) == len(taken) == steps, 'steps of groups.jsonl')
    else:
        size = config.batch.groups
        taken = {step: [*range((step - 1) * size, step * size)] for step in range(1, steps + 1)}
    trained = [group for groups in taken.values() for group in groups]
    expect(len(trained) == len({*trained}) == steps * config.batch.groups, 'groups trained on')
    store = RolloutStore(work.url('rollouts', 'train'))
    for step, groups in taken.items():
        for group in store.read_groups(groups):
            expect([r.sample_id for r in group] == [*range(config.group_size)], 'a whole group')
            for rollout in group:
                ages = step - 1 - rollout.action_versions
                expect(not len(ages) or 0 <= ages.min() <= ages.max() <= options.staleness, 'ages')
    return len(trained)


def compare(workdir: pathlib.Path, undisturbed: pathlib.Path) -> None:
    """Ends the program unless two runs logged the same numbers, but for times."""
    for mine, theirs in zip(metrics(workdir), metrics(undisturbed), strict=True):
        for name in mine.keys() & theirs.keys():
            equal = np.isclose(mine[name], theirs[name], rtol=_EQUAL, atol=_EQUAL, equal_nan=True)
            expect(bool(equal), f'{name} of step {mine["step"]}: {mine[name]}, {theirs[name]}')


if __name__ == '__main__':
    os.environ.setdefault('JAX_PLATFORMS', 'cpu')
    main()
