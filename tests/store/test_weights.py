"""Weight versions: exact, sharded over hosts, whole or invisible under SIGKILL, never damaged."""

import itertools
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import types

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from echo_jax.store import shards as shards_module
from echo_jax.store.kvstore import CorruptError, MissingError, seal
from echo_jax.store.weights import WeightStore

processes = multiprocessing.get_context('forkserver')
processes.set_forkserver_preload(['echo_jax.store.weights'])

bfloat16 = np.dtype(ml_dtypes.bfloat16)


def make_params(seed=0):
    rng = np.random.default_rng(seed)
    return {
        'embed': rng.normal(size=(64, 48)).astype(bfloat16),
        'layers/../mlp up': rng.normal(size=(3, 32, 40)).astype(bfloat16),
        'norm': rng.normal(size=32).astype(np.float32),
        'zeros': np.zeros((8, 8), np.float32),
        'scale': np.array(0.5, np.float32),
    }


def assert_equal(actual, expected):
    assert sorted(actual) == sorted(expected)
    for name, y in expected.items():
        x = actual[name]
        assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes()), name


def bits(dtype, unsigned):
    shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=9)
    return hnp.arrays(unsigned, shapes).map(lambda a: a.view(dtype))


arrays = bits(bfloat16, np.uint16) | bits(np.float16, np.uint16) | bits(np.float32, np.uint32)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text(max_size=10), arrays, max_size=4), st.integers(8, 200))
def test_round_trip_is_exact(params, max_chunk):
    store = WeightStore('memory://')
    whole, shards_module.MAX_CHUNK = shards_module.MAX_CHUNK, max_chunk
    try:
        assert store.publish(params, 3)
    finally:
        shards_module.MAX_CHUNK = whole
    assert_equal(store.read(3), params)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 60), max_size=4), st.integers(1, 4000))
def test_chunks_divide_the_shard_and_are_small(shape, max_bytes):
    whole, shards_module.MAX_CHUNK = shards_module.MAX_CHUNK, max_bytes
    try:
        chunk = shards_module._chunk_shape(tuple(shape), 2)
    finally:
        shards_module.MAX_CHUNK = whole
    assert all(c >= 1 and n % c == 0 for n, c in zip(shape, chunk))
    assert np.prod(chunk) * 2 <= max(2, max_bytes)


def test_versions_appear_in_order_and_old_ones_go(tmp_path):
    store = WeightStore(f'file://{tmp_path}/weights', keep=2)
    assert (store.latest(), store.versions()) == (None, [])
    for version in (0, 1, 2, 5):
        assert store.publish(make_params(version), version) is True
    assert (store.latest(), store.versions()) == (5, [2, 5])
    assert_equal(WeightStore(tmp_path / 'weights').read(2), make_params(2))
    assert sorted(os.listdir(tmp_path / 'weights' / 'data')) == ['0000000002', '0000000005']
    with pytest.raises(MissingError, match=r'version 1 is not in .* which has \[2, 5\].*retry'):
        store.read(1)


def test_publishing_again_changes_nothing(tmp_path):
    store = WeightStore(tmp_path)
    store.publish(make_params(1), 1)
    assert store.publish(make_params(2), 1) is False
    assert_equal(store.read(1), make_params(1))


def test_rewind_forgets_what_came_after():
    store = WeightStore('memory://', keep=3)
    for version in (4, 5, 6):
        store.publish(make_params(version), version)
    store.rewind(4)
    assert store.versions() == [4]
    assert all(b'/0000000004' in key for key in store._kvstore.list().result())
    assert store.publish(make_params(50), 5) is True
    assert_equal(store.read(5), make_params(50))


def test_reads_names_and_slices(monkeypatch):
    monkeypatch.setattr(shards_module, 'MAX_CHUNK', 300)
    store = WeightStore('memory://')
    params = make_params()
    store.publish(params, 1)
    assert_equal(store.read(1, ['norm']), {'norm': params['norm']})
    part = (slice(None), slice(10, 30), slice(39, 40))
    read = store.read(1, ['layers/../mlp up', 'embed'], {'layers/../mlp up': part})
    expected = {'layers/../mlp up': params['layers/../mlp up'][part], 'embed': params['embed']}
    assert_equal(read, expected)
    # A slice fetches its own chunks alone: with every other one deleted it still reads.
    chunks = [key for key in store._kvstore.list().result() if b'/0000/c.' in key]
    for key in chunks:
        if not key.endswith(b'c.0.0'):
            store._kvstore.write(key, None).result()
    row = (slice(0, 1),)
    assert_equal(store.read(1, ['embed'], {'embed': row}), {'embed': params['embed'][row]})
    with pytest.raises(ValueError, match=r"no arrays \['absent'\]"):
        store.read(1, ['absent'])


@pytest.mark.parametrize('array', [np.zeros(3), np.zeros(3, np.int32), np.array(['a'])])
def test_other_dtypes_are_refused(array):
    with pytest.raises(ValueError, match='expected one of bfloat16'):
        WeightStore('memory://').publish({'a': array}, 1)


def test_a_kind_of_the_future_is_refused():
    store = WeightStore('memory://')
    store._kvstore.write('manifests/0000000001', seal({'kind': 'xor'})).result()
    with pytest.raises(ValueError, match=r"kind 'xor'.*update"):
        store.read(1)


def test_what_a_killed_writer_left_under_the_locks_is_no_part_of_the_next_version(tmp_path):
    for key in ('manifests/0000000001', 'data/0000000001/attempt'):
        left = tmp_path / f'{key}.__lock'  # where TensorStore writes before it renames
        left.parent.mkdir(parents=True)
        left.write_bytes(b'7' * (1 << 20))
    store, params = WeightStore(tmp_path), make_params()
    assert store.publish(params, 1)
    assert_equal(store.read(1), params)
    store._wait('data/0000000001/attempt', 0.0, 'an attempt')


def test_damage_is_never_data(tmp_path):
    store = WeightStore(tmp_path)
    params = make_params()
    store.publish(params, 1)
    files = [file for file in tmp_path.rglob('*') if file.is_file() and file.name != 'attempt']
    assert len(files) == 1 + len(params)
    rng = np.random.default_rng(0)
    for file in files:
        whole = file.read_bytes()
        for place in {0, len(whole) - 1, *rng.integers(0, len(whole), 25).tolist()}:
            flipped = bytearray(whole)
            flipped[place] ^= 1 << (place % 8)
            for data in (bytes(flipped), whole[:place]):
                file.write_bytes(data)
                with pytest.raises(CorruptError, match=r'version 1 in .* is corrupt.*rewind'):
                    store.read(1)
        file.write_bytes(whole)
    for file in files[1:]:
        if file.parent.name != 'manifests':  # a lost chunk must not read as zeros
            file.rename(file.with_suffix('.lost'))
            with pytest.raises(CorruptError):
                store.read(1)
            file.with_suffix('.lost').rename(file)
    assert_equal(store.read(1), params)


def test_reader_overtaken_by_collection_may_retry(tmp_path, monkeypatch):
    learner, worker = WeightStore(tmp_path, keep=1), WeightStore(tmp_path)
    learner.publish(make_params(1), 1)
    look_up = worker._manifest

    def look_up_slowly(version):
        manifest = look_up(version)
        if version == 1:
            learner.publish(make_params(2), 2)
        return manifest

    monkeypatch.setattr(worker, '_manifest', look_up_slowly)
    with pytest.raises(MissingError, match='retry'):
        worker.read(1)
    assert_equal(worker.read(worker.latest()), make_params(2))


# One learner host of several, without JAX: what the store reads of a jax.Array and nothing more.
class HostView:
    def __init__(self, whole, host, hosts):
        self.shape, self.dtype = whole.shape, whole.dtype
        rows = whole.shape[0] // hosts
        shard_shape = (rows, *whole.shape[1:])
        self.sharding = types.SimpleNamespace(shard_shape=lambda shape: shard_shape)
        mine = (slice(host * rows, (host + 1) * rows),)
        copy = types.SimpleNamespace(index=(slice(0, rows),), data=whole[:rows] * 0, replica_id=1)
        own = types.SimpleNamespace(index=mine, data=whole[mine], replica_id=0)
        self.addressable_shards = [copy, own]


def publish_as(store, params, version, host, hosts, results, **kwargs):
    view = {name: HostView(array, host, hosts) for name, array in params.items()}
    try:
        results[host] = store.publish(view, version, host, hosts, **kwargs)
    except (ValueError, TimeoutError) as error:
        results[host] = error


SHARDED = {'a': np.arange(48, dtype=np.float32).reshape(12, 4), 'b': np.ones((6, 2), bfloat16)}


@pytest.mark.parametrize('first', [0, 1, 2])
def test_hosts_meet_in_the_store_whoever_comes_first(tmp_path, first):
    results, threads = {}, []
    order = [first, *{0, 1, 2} - {first}]
    for host in order:
        args = (WeightStore(tmp_path), SHARDED, 7, host, 3, results)
        threads.append(threading.Thread(target=publish_as, args=args))
        threads[-1].start()
        time.sleep(0.25)
        assert WeightStore(tmp_path).versions() == ([7] if host == order[-1] else [])
    for thread in threads:
        thread.join(30)
    assert results == {0: True, 1: True, 2: True}
    assert_equal(WeightStore(tmp_path).read(7), SHARDED)


@pytest.mark.parametrize('first', [0, 1])
def test_leftovers_of_a_killed_learner_are_not_mixed_in(tmp_path, first):
    """Host 1 did its part of an attempt that process 0 died in; both return, `first` first."""
    old = {name: array + 100 for name, array in SHARDED.items()}
    results, attempt = {}, 'feedfacefeedface'
    store = WeightStore(tmp_path)
    store._kvstore.write('data/0000000007/attempt', seal({'attempt': attempt})).result()
    publish_as(store, old, 7, 1, 2, results, timeout=0.3)
    assert 'no commit by process 0' in str(results[1])
    assert (tmp_path / 'data' / '0000000007' / attempt / 'host.1').exists()
    threads = []
    for host in (first, 1 - first):  # host 1, where it comes first, begins on the dead attempt
        args = (WeightStore(tmp_path), SHARDED, 7, host, 2, results)
        threads.append(threading.Thread(target=publish_as, args=args))
        threads[-1].start()
        time.sleep(0.3)
        assert store.latest() == (None if host == first else 7)
    for thread in threads:
        thread.join(30)
    assert results == {0: True, 1: True}
    assert_equal(store.read(7), SHARDED)


def test_version_without_all_hosts_stays_invisible(tmp_path):
    store, results = WeightStore(tmp_path), {}
    publish_as(store, SHARDED, 1, 0, 2, results, timeout=0.3)
    assert 'waited in vain for process 1' in str(results[0])
    publish_as(store, SHARDED, 1, 1, 2, results, timeout=0.3)
    assert 'no commit by process 0' in str(results[1])  # all shards are there, nobody to commit
    assert store.versions() == []
    with pytest.raises(MissingError):
        store.read(1)


def test_shards_that_do_not_make_up_the_array_are_refused(tmp_path):
    store = WeightStore(tmp_path)
    half = {name: HostView(array, 0, 2) for name, array in SHARDED.items()}
    with pytest.raises(
        ValueError, match='wrote 24 elements of a; expected 48: check process_count'
    ):
        store.publish(half, 1)
    results = {}
    other = {'a': SHARDED['a'], 'c': SHARDED['b']}
    args = (WeightStore(tmp_path), other, 1, 1, 2, results)
    thread = threading.Thread(target=publish_as, args=args, kwargs={'timeout': 1})
    thread.start()
    publish_as(store, SHARDED, 1, 0, 2, results, timeout=5)
    thread.join(30)
    assert 'process 1 publishes version 1 with other names' in str(results[0])
    assert store.versions() == []


def constant_params(version, life):
    """Every element says which version and which life of the learner wrote it."""
    value = np.float32(version * 100 + life)
    return {f'w{i}': np.full((100, 700), value) for i in range(6)}


def publish_forever(url, first, life, ready):
    store = WeightStore(url, keyframe_every=1 + 2 * (life % 2))
    ready.set()
    for version in itertools.count(first):
        store.publish(constant_params(version, life), version)


def test_killed_learner_leaves_whole_versions_or_none(tmp_path):
    store, seen = WeightStore(tmp_path), {}
    reads = itertools.cycle([store.read, store.reader().read])
    rng = np.random.default_rng(0)
    pace = None  # seconds that three versions take on this machine now
    torn = 0  # lives that ended in the middle of a publish
    for life in range(40):
        ready = processes.Event()
        args = (str(tmp_path), max(seen, default=0), life, ready)
        learner = processes.Process(target=publish_forever, args=args, daemon=True)
        learner.start()
        assert ready.wait(60)
        start = time.monotonic()
        stop = start + (60 if pace is None else rng.uniform(0, pace))
        while time.monotonic() < stop and (pace or len(seen) < 3):
            check_latest(store, next(reads), seen)
        pace = pace or time.monotonic() - start
        os.kill(learner.pid, signal.SIGKILL)
        learner.join()
        check_latest(store, next(reads), seen)
        begun = {int(folder.name) for folder in (tmp_path / 'data').iterdir()}
        torn += max(begun) > store.latest()
        if life >= 12 and torn >= 3:
            break
    assert torn >= 3 and len(seen) > 3
    last = store.latest() + 1
    assert store.publish(constant_params(last, 99), last)
    check_latest(store, next(reads), seen)
    assert seen[last] == 99


def check_latest(store, read, seen):
    version = store.latest()
    if version is None:
        return
    try:
        params = read(version)
    except MissingError:  # overtaken: what a worker would retry
        return
    values = {float(value) for array in params.values() for value in np.unique(array)}
    assert len(params) == 6 and len(values) == 1, values
    found, life = divmod(int(values.pop()), 100)
    assert found == version
    assert seen.setdefault(version, life) == life, 'a published version changed'


HOST = """
    import json, sys
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
    from echo_jax.store.weights import WeightStore

    url, port, index = sys.argv[1], sys.argv[2], int(sys.argv[3])
    jax.distributed.initialize(f'localhost:{port}', 2, index, local_device_ids=range(4))
    assert jax.device_count() == 8 and jax.local_device_count() == 4
    # The last axis spans the hosts, so that both hold parts of every row block.
    devices = np.array(jax.devices()).reshape(2, 4).T
    mesh = Mesh(devices, ('fsdp', 'tensor'))

    def spread(array, spec):
        sharding = NamedSharding(mesh, spec)
        return jax.make_array_from_callback(array.shape, sharding, lambda i: array[i])

    wide = np.arange(16 * 32, dtype=np.float32).reshape(16, 32)
    params = {
        'both': spread(wide, P('fsdp', 'tensor')),
        'swapped': spread(wide.astype(jnp.bfloat16), P('tensor', 'fsdp')),
        'fsdp only': spread(-wide, P('fsdp')),
        'tensor only': spread(wide * 2, P(None, 'tensor')),
        'one axis': spread(wide * 3, P(('tensor', 'fsdp'))),
        'replicated': spread(wide[0].astype(jnp.bfloat16), P()),
        'scalar': spread(np.float32(7) * np.ones((), np.float32), P()),
        'numpy': wide + 0.5,
    }
    mine = sum(s.data.size for s in params['both'].addressable_shards if s.replica_id == 0)
    store = WeightStore(url, keep=3, keyframe_every=9)
    done = []
    for version in (1, 2, 3):
        done.append(store.publish(params, version, index, 2, timeout=60))
        params = {name: array * 3 for name, array in params.items()}
    kinds = [store._manifest(version)['kind'] for version in (1, 2, 3)]
    print(json.dumps({'mine': mine, 'done': done, 'kinds': kinds}))
"""


def test_two_jax_hosts_publish_their_shards(tmp_path):
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = free.getsockname()[1]
    env = os.environ | {
        'JAX_PLATFORMS': 'cpu',
        'PYTHONPATH': os.pathsep.join(sys.path),
        'XLA_FLAGS': '--xla_force_host_platform_device_count=4',
    }
    hosts = [
        subprocess.Popen(
            [sys.executable, '-c', textwrap.dedent(HOST), str(tmp_path), str(port), str(index)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    for host in hosts:
        out, err = host.communicate(timeout=120)
        assert host.returncode == 0, err[-3000:]
        # Neither host had the whole array: 16 x 32 elements, half each.
        expected = {'mine': 256, 'done': [True] * 3, 'kinds': ['full', 'delta', 'delta']}
        assert json.loads(out.splitlines()[-1]) == expected
    wide = np.arange(16 * 32, dtype=np.float32).reshape(16, 32)
    expected = {
        'both': wide,
        'swapped': wide.astype(bfloat16),
        'fsdp only': -wide,
        'tensor only': wide * 2,
        'one axis': wide * 3,
        'replicated': wide[0].astype(bfloat16),
        'scalar': np.array(7, np.float32),
        'numpy': wide + 0.5,
    }
    part = (slice(3, 9), slice(1, 30))
    for version in (1, 2, 3):
        assert_equal(WeightStore(tmp_path).read(version), expected)
        read = WeightStore(tmp_path).read(version, ['both'], {'both': part})
        assert_equal(read, {'both': expected['both'][part]})
        expected = {name: array * array.dtype.type(3) for name, array in expected.items()}
