"""How long the local sandbox takes to start, to run a command, to reset and to stop.

    python experiments/benchmarks/sandbox.py [--sandboxes 1 64] [--commands 200] [--rounds 5]

Prints one JSON line of medians, in milliseconds, for each backend that works here and each number
of sandboxes at once. All of them live in one asyncio loop and do the same thing at the same time,
so at 64 a number is what one sandbox waits for while 63 others want the processor; `wall_ms` is one
command of every sandbox, all together. `true` is a builtin, `cat file` a process. Round 0 is not
counted.
"""

import argparse
import asyncio
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from echo_jax import types
from echo_jax.agent.sandbox import SandboxError, local, namespaces


async def timed(awaitable) -> float:
    """Milliseconds."""
    start = time.perf_counter()
    await awaitable
    return (time.perf_counter() - start) * 1e3


async def command(sandbox: local.LocalSandbox, text: str, times: int) -> float:
    """Median milliseconds of `times` runs in one sandbox."""
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        result = await sandbox.run(text, 60)
        taken.append((time.perf_counter() - start) * 1e3)
        if result.exit_code != 0:
            raise RuntimeError(f'{text} ended with {result}')
    return statistics.median(taken)


async def measure(backend: str, count: int, commands: int, rounds: int) -> dict[str, float]:
    samples: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as directory:
        task = types.Task('benchmark', pathlib.Path(directory), '')
        for number in range(rounds + 1):
            boxes = [local.LocalSandbox(task, backend=backend) for _ in range(count)]
            try:
                taken = {'start_ms': await asyncio.gather(*(timed(b.start()) for b in boxes))}
                await asyncio.gather(*(b.run('echo text > file', 60) for b in boxes))
                for name, text in (('true', 'true'), ('cat', 'cat file')):
                    times = max(commands // count, 3)
                    start = time.perf_counter()
                    taken[f'{name}_ms'] = await asyncio.gather(
                        *(command(b, text, times) for b in boxes)
                    )
                    taken[f'{name}_wall_ms'] = [(time.perf_counter() - start) * 1e3 / times]
                taken['reset_ms'] = await asyncio.gather(*(timed(b.reset()) for b in boxes))
            finally:
                stops = await asyncio.gather(*(timed(b.stop()) for b in boxes))
            taken['stop_ms'] = stops
            for name, values in taken.items() if number else ():
                samples.setdefault(name, []).extend(values)
    return {name: round(statistics.median(values), 3) for name, values in samples.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--sandboxes', type=int, nargs='+', default=[1, 64], help='at once')
    parser.add_argument('--commands', type=int, default=200, help='a round, over all sandboxes')
    parser.add_argument('--rounds', type=int, default=5)
    arguments = parser.parse_args()
    results: dict[str, object] = {}
    for backend in namespaces.BACKENDS:
        try:
            local.check(backend)
        except SandboxError as error:
            results[backend] = str(error)
            continue
        results[backend] = {
            str(count): asyncio.run(
                measure(backend, count, arguments.commands, arguments.rounds if count < 8 else 2)
            )
            for count in arguments.sandboxes
        }
    load = os.getloadavg()[0]
    print(json.dumps({'benchmark': 'sandbox', 'cpus': os.cpu_count(), 'load': load, **results}))


if __name__ == '__main__':
    main()
