"""How long a sandbox takes to start, to run a command, to reset and to stop.

    python experiments/benchmarks/sandbox.py [--sandboxes 1 64] [--commands 200] [--rounds 5] \
        [--docker_image debian:bookworm-slim]

Prints one JSON line of medians, in milliseconds, for each backend that works here and each number
of sandboxes at once; Docker is measured if an engine answers at DOCKER_HOST and an image is named,
in both hardenings ('docker' and 'strict', where the agent is user 1000).
All sandboxes live in one asyncio loop and do the same thing at the same time, so at 64 a number is
what one sandbox waits for while 63 others want the processor; `wall_ms` is what one command of
every sandbox takes, all together. `first` is the first command, `true` a builtin, `cat file` a
process, `apart` a bash of its own; `paced` is `true` as agents send it, each some 0.2 s (drawn at
random) after the last; `verify` is all that an episode ends with: a reset or a container for the
tests, the upload of a test, its run, the reward. Round 0 is not counted.
"""

import argparse
import asyncio
import contextlib
import functools
import itertools
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from random import Random

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from echo_jax import types
from echo_jax.sandbox import UID, Sandbox, SandboxError, local
from echo_jax.sandbox.local import namespaces

DOCKER = ('docker', 'strict')  # hardenings
TEST = '#!/bin/bash\necho 1 > /logs/verifier/reward.txt\n'


async def timed(awaitable) -> float:
    """The milliseconds that `awaitable` takes."""
    start = time.perf_counter()
    await awaitable
    return (time.perf_counter() - start) * 1e3


async def command(sandbox: Sandbox, text: str, times: int, pauses: Iterator[float]) -> float:
    """Median milliseconds of `times` runs in one sandbox, each after a pause in seconds."""
    taken = []
    for _ in range(times):
        await asyncio.sleep(next(pauses))
        start = time.perf_counter()
        result = await sandbox.run(text, 60)
        taken.append((time.perf_counter() - start) * 1e3)
        if result.exit_code != 0:
            raise RuntimeError(f'{text} ended with {result}')
    return statistics.median(taken)


async def verified(task: types.Task, sandbox: Sandbox) -> None:
    verdict = await sandbox.verify()
    if verdict.reward != 1:
        raise RuntimeError(f'the test gave {verdict}')


async def measure(
    make: Callable[[types.Task], Sandbox], image: str, count: int, commands: int, rounds: int
) -> dict[str, float]:
    samples: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as directory:
        task = types.Task('benchmark', pathlib.Path(directory), '', docker_image=image)
        (task.path / 'tests').mkdir()
        (task.path / 'tests' / 'test.sh').write_text(TEST)
        for number in range(rounds + 1):
            boxes = [make(task) for _ in range(count)]
            try:
                start = time.perf_counter()
                taken = {'start_ms': await asyncio.gather(*(timed(b.start()) for b in boxes))}
                taken['start_wall_ms'] = [(time.perf_counter() - start) * 1e3]
                firsts = (timed(b.run('echo text > file', 60)) for b in boxes)
                taken['first_ms'] = await asyncio.gather(*firsts)
                times = max(commands // count, 3)
                at_once = itertools.repeat(0.0)
                for name, text in (
                    ('true', 'true'),
                    ('cat', 'cat file'),
                    ('apart', 'bash -c true'),
                ):
                    start = time.perf_counter()
                    taken[f'{name}_ms'] = await asyncio.gather(
                        *(command(b, text, times, at_once) for b in boxes)
                    )
                    taken[f'{name}_wall_ms'] = [(time.perf_counter() - start) * 1e3 / times]
                random = Random(number)
                pauses = (random.uniform(0.1, 0.3) for _ in itertools.count())
                taken['paced_ms'] = await asyncio.gather(
                    *(command(b, 'true', min(times, 20), pauses) for b in boxes)
                )
                taken['reset_ms'] = await asyncio.gather(*(timed(b.reset()) for b in boxes))
                taken['verify_ms'] = await asyncio.gather(
                    *(timed(verified(task, b)) for b in boxes)
                )
            finally:
                stops = await asyncio.gather(*(timed(b.stop()) for b in boxes))
            taken['stop_ms'] = stops
            for name, values in taken.items() if number else ():
                samples.setdefault(name, []).extend(values)
    return {name: round(statistics.median(values), 3) for name, values in samples.items()}


@contextlib.contextmanager
def opened(backend: str, image: str | None):
    """Yields what makes a sandbox of a task. SandboxError if the backend does not work here."""
    if backend not in DOCKER:
        local.check(backend)
        yield functools.partial(local.LocalSandbox, backend=backend)
        return
    if image is None:
        raise SandboxError('no --docker_image')
    from echo_jax.sandbox import docker
    from echo_jax.sandbox.docker import engine, images

    used = engine.Engine(run='benchmark')
    is_strict = backend == 'strict'
    made = images.Images(used, user=UID if is_strict else None)
    try:
        make = docker.StrictSandbox if is_strict else docker.PlainSandbox
        yield functools.partial(make, images=made)
    finally:
        made.close()
        used.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--sandboxes', type=int, nargs='+', default=[1, 64], help='at once')
    parser.add_argument('--commands', type=int, default=200, help='a round, over all sandboxes')
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--docker_image', help="the image of Docker's rows; none without it")
    arguments = parser.parse_args()
    results: dict[str, object] = {}
    for backend in (*namespaces.BACKENDS, *DOCKER):
        try:
            with opened(backend, arguments.docker_image) as make:
                results[backend] = {
                    str(count): asyncio.run(
                        measure(
                            make,
                            arguments.docker_image,
                            count,
                            arguments.commands,
                            arguments.rounds if count < 8 else 2,
                        )
                    )
                    for count in arguments.sandboxes
                }
        except SandboxError as error:
            results[backend] = str(error)
    load = os.getloadavg()[0]
    print(json.dumps({'benchmark': 'sandbox', 'cpus': os.cpu_count(), 'load': load, **results}))


if __name__ == '__main__':
    main()
