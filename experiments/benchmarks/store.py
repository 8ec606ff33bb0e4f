"""MB/s of both stores next to plain np.save and np.load of the same arrays on the same disk.

    python experiments/benchmarks/store.py --directory=/some/disk

Rollouts: one group of 16 x 8,192 tokens, Zipf-distributed token ids, roles in runs of 64,
exponential log-probabilities on the actions; np.save writes its five columns as five files.
Weights: 50M bfloat16 parameters in 12 layer-stacked arrays; np.save writes twelve files. MB are
those of the arrays in memory. All ways alternate within each round and the median of the rounds is
printed; np.save is timed as it is and with an fsync of each file, which is what the stores do.
Reads come from the page cache. A ratio above 1 means that the store is faster. One JSON line.
"""

import argparse
import json
import os
import pathlib
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable

import ml_dtypes
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from echo_jax.store.rollouts import RolloutStore
from echo_jax.store.weights import WeightStore
from echo_jax.types import Rollout, Status

COLUMNS = ('tokens', 'roles', 'rollout_logprobs', 'policy_versions', 'turn_starts')


def make_group(rollouts: int = 16, length: int = 8192) -> list[Rollout]:
    rng = np.random.default_rng(0)
    group = []
    for sample_id in range(rollouts):
        roles = np.repeat(rng.integers(0, 7, length // 64), 64).astype(np.uint8)
        action = roles == 1
        group.append(
            Rollout(
                tokens=np.minimum(rng.zipf(1.2, length), 151_000).astype(np.int32),
                roles=roles,
                rollout_logprobs=np.where(action, -rng.exponential(size=length), 0).astype('f4'),
                policy_versions=np.where(action, 100, -1).astype(np.int32),
                turn_starts=np.flatnonzero(np.diff(action.astype('i1')) == 1).astype(np.int32),
                reward=1.0,
                status=Status.OK,
                task_id='benchmark',
                group_id=0,
                sample_id=sample_id,
                metrics={'turns': 10.0},
            )
        )
    return group


def make_params(millions: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    layers = max(1, round(millions * 1e6 / (12 * 1024 * 512)))
    block = rng.normal(0, 0.02, (1024, 512)).astype(ml_dtypes.bfloat16)
    return {f'w{i}': np.stack([np.roll(block, i + n) for n in range(layers)]) for i in range(12)}


def save_plain(folder: pathlib.Path, arrays: dict[str, np.ndarray], sync: bool) -> None:
    folder.mkdir()
    for name, array in arrays.items():
        with open(folder / f'{name}.npy', 'wb') as file:
            np.save(file, array.view(np.uint16) if array.dtype == ml_dtypes.bfloat16 else array)
            if sync:
                file.flush()
                os.fsync(file.fileno())


def load_plain(folder: pathlib.Path, names: Iterable[str]) -> list[np.ndarray]:
    return [np.load(folder / f'{name}.npy') for name in names]


def seconds(call: Callable[..., object], *args) -> float:
    start = time.perf_counter()
    call(*args)
    return time.perf_counter() - start


def measure(
    arrays: dict[str, np.ndarray],
    write: Callable[[pathlib.Path], object],
    read: Callable[[pathlib.Path], object],
    directory: pathlib.Path,
    repeats: int,
) -> dict[str, float]:
    """MB/s by way, and the stores' ratios; each round writes to fresh folders."""
    megabytes = sum(array.nbytes for array in arrays.values()) / 1e6
    times = {way: [] for way in ('write', 'npy_write', 'npy_fsync_write', 'read', 'npy_read')}
    for _ in range(repeats):
        folders = [directory / name for name in ('store', 'npy', 'npy_fsync')]
        store, npy, npy_fsync = folders
        times['write'].append(seconds(write, store))
        times['npy_write'].append(seconds(save_plain, npy, arrays, False))
        times['npy_fsync_write'].append(seconds(save_plain, npy_fsync, arrays, True))
        times['read'].append(seconds(read, store))
        times['npy_read'].append(seconds(load_plain, npy, arrays))
        stored = sum(file.stat().st_size for file in store.rglob('*') if file.is_file())
        for folder in folders:
            shutil.rmtree(folder)
    speed = {f'{way}_MB_s': megabytes / statistics.median(t) for way, t in times.items()}
    ratios = {
        'write_ratio': speed['write_MB_s'] / speed['npy_write_MB_s'],
        'write_ratio_fsync': speed['write_MB_s'] / speed['npy_fsync_write_MB_s'],
        'read_ratio': speed['read_MB_s'] / speed['npy_read_MB_s'],
    }
    result = {'MB': megabytes, 'stored_fraction': stored / megabytes / 1e6, **speed, **ratios}
    return {key: float(f'{value:.3g}') for key, value in result.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--directory', help='disk to measure; default: the temporary directory')
    parser.add_argument('--repeats', type=int, default=7)
    parser.add_argument('--millions', type=int, default=50, help='parameters of the weights')
    args = parser.parse_args()
    group, params = make_group(), make_params(args.millions)
    columns = {name: np.concatenate([getattr(r, name) for r in group]) for name in COLUMNS}
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        rollouts = measure(
            columns,
            lambda folder: RolloutStore(folder).write_group(group),
            lambda folder: RolloutStore(folder).read_groups([0]),
            pathlib.Path(directory),
            3 * args.repeats,
        )
        weights = measure(
            params,
            lambda folder: WeightStore(folder).publish(params, 0),
            lambda folder: WeightStore(folder).read(0),
            pathlib.Path(directory),
            args.repeats,
        )
    print(json.dumps({'benchmark': 'store', 'rollouts': rollouts, 'weights': weights}))


if __name__ == '__main__':
    main()
