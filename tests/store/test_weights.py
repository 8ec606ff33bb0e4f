"""Weight versions: exact, sharded over hosts, whole or invisible under SIGKILL, never damaged."""

import itertools
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from echo_jax.store import shards as shards_module
from echo_jax.store.kvstore import CorruptError, MissingError, seal, unseal
from echo_jax.store.versions import Versions
from echo_jax.store.weights import UNREADABLE, WeightStore
from tests.support.weights import arrays, assert_equal, kvstore, make_params

processes = multiprocessing.get_context('forkserver')
processes.set_forkserver_preload(['echo_jax.store.weights'])


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
        chunk = shards_module.chunk_shape(tuple(shape), 2)
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


def test_a_version_whose_manifest_is_damaged_is_published_again(tmp_path):
    store = WeightStore(tmp_path)
    sent = make_params()
    store.publish(sent, 3)
    assert store.is_sound(3) and store.newest() != (3, UNREADABLE)
    (tmp_path / 'manifests' / '0000000003').write_bytes(b'?')
    assert store.newest() == (3, UNREADABLE) and not store.is_sound(3)
    again = WeightStore(tmp_path)  # a learner that was started again
    assert again.publish(sent, 3) and not again.publish(sent, 3)
    assert_equal(store.read(3), sent)


def test_rewind_forgets_what_came_after():
    store = WeightStore('memory://', keep=3)
    for version in (4, 5, 6):
        store.publish(make_params(version), version)
    store.rewind(4)
    assert store.versions() == [4]
    assert all(b'/0000000004' in key for key in kvstore(store).list().result())
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
    chunks = [key for key in kvstore(store).list().result() if b'/0000/c.' in key]
    for key in chunks:
        if not key.endswith(b'c.0.0'):
            kvstore(store).write(key, None).result()
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
    kvstore(store).write('manifests/0000000001', seal({'kind': 'xor'})).result()
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
    assert unseal((tmp_path / 'data/0000000001/attempt').read_bytes())['bases'] == []


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
    look_up = Versions.get

    def look_up_slowly(versions, version):
        manifest = look_up(versions, version)
        if version == 1:
            learner.publish(make_params(2), 2)
        return manifest

    monkeypatch.setattr(Versions, 'get', look_up_slowly)
    with pytest.raises(MissingError, match='retry'):
        worker.read(1)
    assert_equal(worker.read(worker.latest()), make_params(2))


def constant_params(version, life):
    """Every element says which version and which life of the learner wrote it."""
    value = np.float32(version * 100 + life)
    return {f'w{i}': np.full((100, 700), value) for i in range(6)}


def publish_forever(url, first, life, ready):
    store = WeightStore(url, keyframe_every=1 + 2 * (life % 2))
    ready.set()
    for version in itertools.count(first):
        store.publish(constant_params(version, life), version)


@pytest.mark.slow
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
