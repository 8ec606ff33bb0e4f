"""Bytes and seconds of a published version, as a delta and whole, next to plain safetensors.

    python experiments/benchmarks/weight_sync.py --directory=/some/disk [--learning-rate=1e-6]

A Qwen3 of 50M parameters, freshly drawn, takes ten steps of the learner (learner.step.Programs, the
optimizer of configs/tiny.py at a constant rate without warm-up) on random rollouts, new ones each
step. After each its bfloat16 values are published to `file://`, and read back by a reader that
followed; a second store takes them whole; safetensors.numpy writes and loads them too, as it does
and with an fsync, which is what the store does. The four alternate, starting with another one each
step. Loads come from the page cache. Every version read is compared with what was sent, bit by bit.
Last, `catch_up` is the load of the newest version by a reader that holds nothing: the key frame and
all deltas. Means of the bytes, medians of the seconds. A table, and one JSON line.
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
from echo_jax.learner.step import Programs
from echo_jax.model import params as model_params
from echo_jax.store.weights import WeightStore

Arrays = dict[str, np.ndarray]


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
    programs = Programs.of(config)
    step, _, initial_state = programs.step(config.optimizer)
    cast = jax.jit(lambda params: jax.tree.map(lambda p: p.astype(jnp.bfloat16), params))
    state = initial_state(programs.random_params())
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
        batch = sharding.put_batch(make_batch(rollouts, config), programs.mesh)
        state, _ = step(state, batch, config.loss.env_coef, None)
        yield model_params.flatten(cast(state.params))


def save_plain(arrays: Arrays, path: pathlib.Path, sync: bool) -> None:
    safetensors.numpy.save_file(arrays, path)
    if sync:
        with open(path, 'rb') as file:
            os.fsync(file.fileno())


def seconds(call: Callable[..., Arrays | None], *args) -> tuple[float, Arrays | None]:
    start = time.perf_counter()
    result = call(*args)
    return time.perf_counter() - start, result


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
    times = {way: {'publish': [], 'load': []} for way in ways}
    sizes, moved, wrong, before = [], [], 0, None
    for version, params in enumerate(train(config, steps)):
        jax.block_until_ready(params)
        sent = {name: np.asarray(array) for name, array in params.items()}
        for way in [*ways[version % 4 :], *ways[: version % 4]]:
            file = directory / f'{way}.safetensors'
            if way in stores:
                publish, _ = seconds(stores[way].publish, params, version)
                load, found = seconds(readers[way].read, version)
            else:
                publish, _ = seconds(save_plain, sent, file, plain[way])
                load, found = seconds(safetensors.numpy.load_file, file)
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
    catch_up, found = seconds(stores['delta'].read, steps)
    wrong += differing(found, before)
    count = sum(array.size for array in before.values())
    medians = {
        way: {what: round(statistics.median(values), 3) for what, values in both.items()}
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
        'seconds': medians,
        'catch_up_seconds': round(catch_up, 3),
    }


def table(result: dict) -> str:
    share = dict.fromkeys(result['seconds'], 1.0)
    share |= {'delta': result['delta_share'], 'key_frame': result['key_frame_share']}
    rows = [('way', 'share of the bf16 bytes', 'publish or save, s', 'load, s')]
    for way, taken in result['seconds'].items():
        rows.append((way, f'{share[way]:.2%}', f'{taken["publish"]:.3f}', f'{taken["load"]:.3f}'))
    rows.append(('catch_up', '', '', f'{result["catch_up_seconds"]:.3f}'))
    rows.insert(1, ('---',) * 4)
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
