"""Bytes and seconds of a published version, as a delta and whole, next to plain safetensors.

    python experiments/benchmarks/weight_sync.py --directory=/some/disk [--learning-rate=1e-6]

A Qwen3 of 50M parameters, freshly drawn, takes ten steps of the learner (learner.step.ShardedModel,
the optimizer of configs/tiny.py at a constant rate without warm-up) on random rollouts, new ones
each step. After each its bfloat16 values are published to `file://`, and read back by a reader that
followed; a second store takes them whole; safetensors.numpy writes and loads them too, as it does
and with an fsync, which is what the store does. The four alternate, starting with another one each
step. Loads come from the page cache. Every version read is compared with what was sent, bit by bit.
Last, `catch_up` is the load of the newest version by a reader that holds nothing: the key frame and
all deltas. Means of the bytes, medians of the seconds and of the CPU seconds of all threads, which
are steadier on a machine that others use. A table, and one JSON line.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from learner import draw_rollouts

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from configs import tiny
from echo_jax.learner import sharding
from echo_jax.learner.batching import make_batch
from echo_jax.learner.step import ShardedModel
from echo_jax.model import params as model_params
from echo_jax.store.weights import WeightStore

Arrays = dict[str, np.ndarray]
WHAT = ('publish', 'load')


def make_config(learning_rate: float):
    config = tiny.get_config()
    config.group_size, config.batch.groups = 4, 2
    config.batch.seq_len, config.batch.micro_rows = 256, 4
    config.model.update(
        vocab_size=24_576,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        initializer_range=0.02,
    )
    config.optimizer.learning_rate, config.optimizer.warmup_steps = learning_rate, 0
    return config


def train(config, steps: int) -> Iterator[dict[str, jax.Array]]:
    """The bfloat16 parameters before the first step and after each."""
    sharded = ShardedModel.of(config)
    step, _, initial_state = sharded.step(config.optimizer)
    cast = jax.jit(lambda params: jax.tree.map(lambda p: p.astype(jnp.bfloat16), params))
    state = initial_state(sharded.random_params())
    yield model_params.flatten(cast(state.params))
    for number in range(steps):
        rng = np.random.default_rng(number)
        rollouts = [
            dataclasses.replace(
                rollout,
                tokens=rng.integers(0, config.model.vocab_size, len(rollout.tokens), np.int32),
                reward=float(rng.integers(2)),
            )
            for rollout in draw_rollouts(config, config.batch.seq_len)
        ]
        batch = sharding.put_batch(make_batch(rollouts, config), sharded.mesh)
        state, _ = step(state, batch, config.loss.env_coef, None)
        yield model_params.flatten(cast(state.params))


def save_plain(arrays: Arrays, path: pathlib.Path, sync: bool) -> None:
    safetensors.numpy.save_file(arrays, path)
    if sync:
        with open(path, 'rb') as file:
            os.fsync(file.fileno())


def timed(call: Callable[..., Arrays | None], *args) -> tuple[np.ndarray, Arrays | None]:
    """([seconds, CPU seconds of all threads], what the call returned)."""
    start = np.array([time.perf_counter(), time.process_time()])
    result = call(*args)
    return np.array([time.perf_counter(), time.process_time()]) - start, result


def differing(found: Arrays, sent: Arrays) -> int:
    """Values of `sent` that were found with other bits; ValueError where names or types differ."""
    if {name: (a.shape, a.dtype) for name, a in found.items()} != {
        name: (a.shape, a.dtype) for name, a in sent.items()
    }:
        raise ValueError('the arrays that were read are not those that were sent')
    return sum(int((found[n].view(np.uint16) != a.view(np.uint16)).sum()) for n, a in sent.items())


def stored(folder: pathlib.Path, version: int) -> int:
    files = [*(folder / 'data' / f'{version:010d}').rglob('*')]
    files.append(folder / 'manifests' / f'{version:010d}')
    return sum(file.stat().st_size for file in files if file.is_file())


def measure(config, steps: int, directory: pathlib.Path) -> dict:
    stores = {
        'delta': WeightStore(directory / 'delta', keyframe_every=steps + 1),
        'key_frame': WeightStore(directory / 'full'),
    }
    readers = {name: store.reader() for name, store in stores.items()}
    plain = {'safetensors': False, 'safetensors_fsync': True}
    ways = [*stores, *plain]
    times = {way: {what: [] for what in WHAT} for way in ways}
    sizes, moved, wrong, before = [], [], 0, None
    for version, params in enumerate(train(config, steps)):
        jax.block_until_ready(params)
        sent = {name: np.asarray(array) for name, array in params.items()}
        for way in [*ways[version % 4 :], *ways[: version % 4]]:
            file = directory / f'{way}.safetensors'
            if way in stores:
                publish, _ = timed(stores[way].publish, params, version)
                load, found = timed(readers[way].read, version)
            else:
                publish, _ = timed(save_plain, sent, file, plain[way])
                load, found = timed(safetensors.numpy.load_file, file)
                file.unlink()
            wrong += differing(found, sent)
            del found
            if version:
                times[way]['publish'].append(publish)
                times[way]['load'].append(load)
        sizes.append(stored(directory / 'delta', version))
        if before:
            moved.append(differing(before, sent))
        before = sent
    catch_up, found = timed(stores['delta'].read, steps)
    wrong += differing(found, before)
    count = sum(array.size for array in before.values())
    medians = {
        way: {what: np.median(values, axis=0).round(3).tolist() for what, values in both.items()}
        for way, both in times.items()
    }
    return {
        'parameters': count,
        'bf16_MB': round(2 * count / 1e6, 1),
        'delta_share': round(statistics.mean(sizes[1:]) / (2 * count), 4),
        'delta_share_by_step': [round(size / (2 * count), 4) for size in sizes[1:]],
        'key_frame_share': round(sizes[0] / (2 * count), 4),
        'values_changed': round(statistics.mean(moved) / count, 4),
        'differing_values': wrong,
        'seconds_and_cpu': medians | {'catch_up': {'load': catch_up.round(3).tolist()}},
    }


def table(result: dict) -> str:
    share = {'delta': result['delta_share'], 'key_frame': result['key_frame_share']}
    rows = [('way', 'share of the bf16 bytes', 'publish or save, s (CPU s)', 'load, s (CPU s)')]
    rows.append(('---',) * 4)
    for way, taken in result['seconds_and_cpu'].items():
        cells = ('{:.3f} ({:.3f})'.format(*taken[w]) if w in taken else '' for w in WHAT)
        rows.append((way, f'{share[way]:.2%}' if way in share else '', *cells))
    return '\n'.join('| ' + ' | '.join(row) + ' |' for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--directory', help='disk to measure; default: the temporary directory')
    parser.add_argument('--steps', type=int, default=10)
    parser.add_argument('--learning-rate', type=float, default=1e-6)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        result = measure(make_config(args.learning_rate), args.steps, pathlib.Path(directory))
    print(table(result))
    load = round(os.getloadavg()[0], 1)
    about = {'benchmark': 'weight_sync', 'learning_rate': args.learning_rate, 'steps': args.steps}
    print(json.dumps(about | result | {'load': load}))


if __name__ == '__main__':
    main()
