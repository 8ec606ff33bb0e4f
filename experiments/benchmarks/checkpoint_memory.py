"""Resident memory of a learner that saves its state again and again, asynchronously.

    python experiments/benchmarks/checkpoint_memory.py [--saves 50] [--million 100] [--pause 0.5]

A state of --million parameters with AdamW's two moments for each (12 bytes in all) is saved through
the learner's Checkpointer, which keeps the last two on disk. A jitted update changes the state in
place before each save, and for --pause seconds while it is being saved. Resident memory is read
when a save is done, because until then it holds copies of the state. The first --warm_up saves do
not count: they allocate what is allocated once. The result, in MiB: `first` and `last` are medians
of the first and the last tenth of the saves that count, `last_by_first` should be below 1.03,
`largest` is the largest of them, and `peak` is the process's at any time. Every save's memory is
printed to stderr. Needs Linux. Prints one JSON line.
"""

import argparse
import json
import os
import pathlib
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import optax
from flax import nnx

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from echo_jax.learner.checkpoint import Checkpointer
from echo_jax.learner.step import TrainState, init_state

ARRAYS, WIDTH = 8, 1024  # about those of a model whose layers are stacked


def make_state(million: float) -> TrainState:
    shape = round(million * 1e6 / ARRAYS / WIDTH), WIDTH
    arrays = {f'w{i}': nnx.Param(jnp.full(shape, 0.01 * i)) for i in range(ARRAYS)}
    params = nnx.State(arrays)
    return init_state(params, optax.adamw(1e-3))


def memory_by_save(directory: str, state: TrainState, saves: int, pause: float) -> Iterator[float]:
    """MiB of resident memory after each of `saves` saves, with updates while one is under way."""

    def add_one(state):
        return jax.tree.map(lambda x: x + 1, state)

    update = jax.jit(add_one, donate_argnums=0)
    checkpointer = Checkpointer(directory, keep=2)
    for number in range(1, saves + 1):
        state = update(state)
        checkpointer.save(number, state, {})
        until = time.monotonic() + pause
        while time.monotonic() < until:
            state = jax.block_until_ready(update(state))
        checkpointer.wait()
        pages = int(pathlib.Path('/proc/self/statm').read_text().split()[1])
        yield pages * resource.getpagesize() / 2**20
    checkpointer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--saves', type=int, default=50)
    parser.add_argument('--warm_up', type=int, default=5)
    parser.add_argument('--million', type=float, default=100)
    parser.add_argument('--pause', type=float, default=0.5)
    args = parser.parse_args()
    state, resident = make_state(args.million), []
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 2**20
    with tempfile.TemporaryDirectory() as directory:
        for mib in memory_by_save(directory, state, args.warm_up + args.saves, args.pause):
            resident.append(mib)
            print(f'save {len(resident)}: {mib:.0f} MiB', file=sys.stderr)
    counted = resident[args.warm_up :]
    tenth = max(1, len(counted) // 10)
    first, last = statistics.median(counted[:tenth]), statistics.median(counted[-tenth:])
    result = {
        'benchmark': 'checkpoint_memory',
        'state_mib': round(size),
        'saves': len(counted),
        'first': round(first),
        'last': round(last),
        'largest': round(max(counted)),
        'last_by_first': round(last / first, 4),
        'peak': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        'load': round(os.getloadavg()[0], 1),
    }
    print(json.dumps(result))


if __name__ == '__main__':
    main()
