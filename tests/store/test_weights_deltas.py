"""Deltas: the same bits as whole versions, for every reader, whoever of the learner restarts."""

import itertools
import threading
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from echo_jax.store import shards as shards_module
from echo_jax.store import weights as weights_module
from echo_jax.store.kvstore import CorruptError, MissingError, inside
from echo_jax.store.versions import Versions
from echo_jax.store.weights import WeightStore
from tests.support.weights import (
    SHARDED,
    HostView,
    arrays,
    assert_equal,
    bfloat16,
    changed,
    keys,
    kinds,
    kvstore,
    make_params,
    manifest,
    publish_all,
    stored_bytes,
    unsigned,
)


@settings(max_examples=40, deadline=None)
@given(
    params=st.dictionaries(st.text(max_size=5), arrays, max_size=3),
    max_chunk=st.integers(8, 200),
    keep=st.integers(1, 3),
    keyframe_every=st.integers(0, 5),
    reads=st.lists(st.booleans(), min_size=8, max_size=8),
    pending=st.sampled_from([0, 64, 1 << 30]),
    seed=st.integers(0, 9),
)
def test_every_kept_version_is_exact(params, max_chunk, keep, keyframe_every, reads, pending, seed):
    store = WeightStore('memory://', keep, keyframe_every)
    reader, rng, sent = store.reader(), np.random.default_rng(seed), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards_module, 'MAX_CHUNK', max_chunk)
        patch.setattr(shards_module, 'MAX_PENDING', pending)
        for version, follow in enumerate(reads):
            sent[version] = params = changed(params, rng)
            assert store.publish(params, version)
            kept = [*range(version + 1)][-keep:]
            assert store.versions() == kept
            if follow:  # the others it misses
                for v in rng.permutation(kept):
                    assert_equal(reader.read(v), sent[v])
                    assert reader.version == v
            for v in kept:
                assert_equal(store.read(v), sent[v])
                full = keyframe_every < 2 or v % keyframe_every == 0
                assert manifest(store, v)['kind'] == ('full' if full else 'delta')


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_parts_of_deltas_are_exact(data):
    """Names and slices, across the borders of chunks, for a reader that stays and one that asks."""
    store, params = WeightStore('memory://', 2, 9), make_params()
    ranges = {
        name: tuple(
            slice(*sorted(data.draw(st.tuples(*[st.integers(0, n)] * 2)))) for n in array.shape
        )
        for name, array in params.items()
    }
    names = data.draw(st.lists(st.sampled_from(sorted(params)), unique=True, min_size=1))
    sliced = data.draw(st.lists(st.sampled_from(names), unique=True))
    slices = {name: ranges[name] for name in sliced}
    reader = store.reader(names, slices)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards_module, 'MAX_CHUNK', data.draw(st.sampled_from([300, 1000, 9000])))
        for version in range(3):
            params = changed(params, np.random.default_rng(version))
            store.publish(params, version)
            expected = {name: params[name][slices.get(name, ...)] for name in names}
            assert_equal(reader.read(version), expected)
            assert_equal(store.read(version, names, slices), expected)


def test_a_small_change_takes_few_bytes(tmp_path):
    """Two in a hundred values move by one bit in the last place, about what AdamW does at 1e-6."""
    store, rng = WeightStore(tmp_path, 2, 9), np.random.default_rng(0)
    params = {'w': rng.normal(0, 0.02, (4, 512, 512)).astype(bfloat16)}
    store.publish(params, 0)
    bits = unsigned(params['w']) ^ (rng.random(params['w'].shape) < 0.02)
    store.publish({'w': bits.astype(np.uint16).view(bfloat16)}, 1)
    assert (unsigned(store.read(1)['w']) == bits).all()
    whole = params['w'].nbytes
    assert whole < stored_bytes(store, 0) < 1.01 * whole
    # 0.14 bits a value is what a coin of 0.02 needs, 0.9% of 16.
    assert 0.009 * whole < stored_bytes(store, 1) < 0.025 * whole


def test_a_reader_fetches_the_deltas_it_lacks_and_nothing_else():
    store = WeightStore('memory://', 2, 9)
    reader, params = store.reader(), make_params()
    sent = publish_all(store, params, [0, 1])
    first = reader.read(1)
    assert_equal(first, sent[1])
    with pytest.raises(ValueError, match='read-only'):
        first['norm'][0] = 0
    sent |= publish_all(store, sent[1], [2, 3])
    for version in (0, 1):  # the key frame is lost, and the delta that the reader has
        kvstore(store).delete_range(inside(f'data/{version:010d}')).result()
    assert_equal(reader.read(3), sent[3])
    assert_equal(reader.read(3), sent[3])
    with pytest.raises(CorruptError, match='version 3 in'):
        store.read(3)
    with pytest.raises(CorruptError, match='version 2 in'):
        reader.read(2)  # older than what it holds
    assert reader.version is None
    sent |= publish_all(store, sent[3], [9])
    with pytest.raises(CorruptError):  # it holds nothing any more, and believes so
        reader.read(9)


def test_a_reader_that_missed_a_key_frame_starts_from_it():
    store = WeightStore('memory://', 2, 3)
    reader = store.reader()
    sent = publish_all(store, make_params(), range(2))
    assert_equal(reader.read(1), sent[1])
    sent |= publish_all(store, sent[1], range(2, 6))
    assert kinds(store) == {4: 'delta', 5: 'delta'}
    assert not keys(store, 'data/0000000001/')
    assert_equal(reader.read(5), sent[5])
    with pytest.raises(MissingError, match='retry'):
        reader.read(1)
    assert reader.version == 5  # it lost nothing by asking


@pytest.mark.parametrize('change', ['names', 'shape', 'dtype', 'shards'])
def test_other_arrays_begin_with_a_key_frame(tmp_path, change):
    store = WeightStore(tmp_path, 2, 9)
    params = {'a': SHARDED['a'], 'b': np.ones((6, 2), bfloat16)}
    reader = store.reader()
    for version in (0, 1):
        store.publish(params, version)
        assert_equal(reader.read(version), params)
    later = {
        'names': {'a': params['a'], 'c': params['b']},
        'shape': params | {'b': np.ones((2, 6), bfloat16)},
        'dtype': params | {'b': np.ones((6, 2), np.float16)},
        'shards': params,
    }[change]
    view = later
    if change == 'shards':  # the same chunks, and other shards in them
        view = dict(later)
        view['a'] = HostView(later['a'], 0, 2)
        view['a'].sharding.shard_shape = lambda shape: shape
        other = types.SimpleNamespace(index=(slice(6, 12),), data=later['a'][6:], replica_id=0)
        view['a'].addressable_shards.append(other)
    store.publish(view, 2)
    assert kinds(store) == {1: 'delta', 2: 'full'}
    assert_equal(reader.read(2), later)
    store.publish(view, 3)
    assert kinds(store) == {2: 'full', 3: 'delta'}
    assert_equal(reader.read(3), later)


def test_what_the_caller_does_to_its_arrays_later_does_not_matter():
    store, params = WeightStore('memory://', 2, 9), make_params()
    for version in range(3):
        store.publish(params, version)
        sent = {name: array.copy() for name, array in params.items()}
        assert_equal(store.read(version), sent)
        for array in params.values():
            array += 1
    assert kinds(store) == {1: 'delta', 2: 'delta'}


def test_about_travels_with_the_version(tmp_path):
    store, about = WeightStore(tmp_path, 2, 9), {'probe': [-0.1, -2.5], 'names': {'a': 'b'}}
    store.publish(make_params(), 0, about=about)
    store.publish(make_params(), 1)
    assert (store.about(0), store.about(1)) == (about, {})
    with pytest.raises(MissingError, match='version 2'):
        store.about(2)
    file = tmp_path / 'manifests' / '0000000000'
    file.write_bytes(file.read_bytes().replace(b'-2.5', b'-3.5'))
    with pytest.raises(CorruptError, match='version 0'):
        store.about(0)


class Killed(BaseException):
    """Where SIGKILL would end the process."""


def die(*_):
    raise Killed


def test_a_learner_killed_before_its_manifest(tmp_path, monkeypatch):
    """All shards of version 1 are written; the next life has another version 1."""
    dead, params = WeightStore(tmp_path, 2, 9), make_params()
    sent = publish_all(dead, params, [0])
    reader = WeightStore(tmp_path).reader()
    assert_equal(reader.read(0), sent[0])
    with monkeypatch.context() as patch:
        patch.setattr(weights_module, 'write_once', die)
        with pytest.raises(Killed):
            dead.publish(changed(sent[0], np.random.default_rng(5)), 1)
    assert dead.versions() == [0]
    alive = WeightStore(tmp_path, 2, 9)
    alive.rewind(0)
    sent |= publish_all(alive, sent[0], [1, 2], seed=1)
    assert kinds(alive) == {1: 'full', 2: 'delta'}
    assert_equal(reader.read(2), sent[2])
    assert_equal(alive.read(1), sent[1])


def test_an_attempt_that_failed_leaves_the_base_as_it_was(tmp_path, monkeypatch):
    store = WeightStore(tmp_path, 2, 9)
    sent = publish_all(store, make_params(), [0])
    with monkeypatch.context() as patch:
        patch.setattr(weights_module, 'write_once', die)
        with pytest.raises(Killed):
            store.publish(changed(sent[0], np.random.default_rng(5)), 1)
    sent |= publish_all(store, sent[0], [1], seed=1)
    assert kinds(store) == {0: 'full', 1: 'delta'}
    assert_equal(store.read(1), sent[1])


def test_a_base_that_was_replaced_is_no_base(tmp_path):
    """Two lives of a learner publish version 1; nobody mixes them, writer or reader."""
    old, new = WeightStore(tmp_path, 3, 9), WeightStore(tmp_path, 3, 9)
    sent = publish_all(old, make_params(), [0, 1])
    reader, lost = WeightStore(tmp_path).reader(), WeightStore(tmp_path).reader()
    for each in (reader, lost):
        assert_equal(each.read(1), sent[1])
    new.rewind(0)
    with pytest.raises(MissingError):
        reader.read(1)
    sent |= publish_all(new, sent[0], [1, 2], seed=1)
    assert kinds(new) == {0: 'full', 1: 'full', 2: 'delta'}
    assert_equal(reader.read(2), sent[2])
    assert_equal(lost.read(1), sent[1])  # the same number, another attempt
    sent |= publish_all(old, sent[2], [3], seed=2)  # it holds the version 1 that is no more
    assert kinds(new)[3] == 'full'
    sent |= publish_all(new, sent[3], [4], seed=3)  # to version 2, past the other's 3
    assert kinds(new)[4] == 'delta'
    for version in new.versions():
        assert_equal(reader.read(version), sent[version])


def test_after_a_rewind_the_next_version_is_a_key_frame():
    store = WeightStore('memory://', 3, 9)
    sent = publish_all(store, make_params(), [0, 1, 2])
    store.rewind(1)
    sent |= publish_all(store, sent[1], [2, 3], seed=1)
    assert kinds(store) == {1: 'delta', 2: 'full', 3: 'delta'}
    for version in store.versions():
        assert_equal(store.read(version), sent[version])
    store.publish(sent[1], 0)  # older than what it holds
    assert kinds(store)[0] == 'full'


def test_damage_to_a_delta_is_never_data(tmp_path):
    store = WeightStore(tmp_path, 2, 9)
    sent = publish_all(store, make_params(), range(4))
    reader = store.reader()
    assert_equal(reader.read(2), sent[2])
    rng = np.random.default_rng(0)
    for file in tmp_path.glob('data/0000000003/*/*/*'):
        whole = file.read_bytes()
        for place in {0, len(whole) - 1, *rng.integers(0, len(whole), 10).tolist()}:
            flipped = bytearray(whole)
            flipped[place] ^= 1 << (place % 8)
            for data in (bytes(flipped), whole[:place]):
                file.write_bytes(data)
                with pytest.raises(CorruptError, match=r'version 3 in .* is corrupt.*rewind\(2\)'):
                    store.read(3)
        with pytest.raises(CorruptError, match=r'version 3 in .* is corrupt'):
            reader.read(3)
        file.unlink()  # a lost chunk must not read as zeros
        with pytest.raises(CorruptError):
            store.read(3)
        file.write_bytes(whole)
        assert_equal(reader.read(2), sent[2])
    assert_equal(reader.read(3), sent[3])


def test_the_remedy_for_a_damaged_base_helps(tmp_path):
    store = WeightStore(tmp_path, 2, 9)
    sent = publish_all(store, make_params(), range(4))
    for file in tmp_path.glob('data/0000000001/*/*/*'):
        file.write_bytes(b'?' + file.read_bytes()[1:])
    with pytest.raises(CorruptError, match=r'version 3 in .*rewind\(0\)'):
        store.read(3)
    store.rewind(0)
    assert store.publish(sent[3], 3)
    assert_equal(store.read(3), sent[3])


def test_publishing_goes_on_over_a_damaged_manifest(tmp_path):
    store = WeightStore(tmp_path, 2, 9)
    sent = publish_all(store, make_params(), [0, 1])
    (tmp_path / 'manifests' / '0000000001').write_bytes(b'?')
    sent |= publish_all(store, sent[1], [2, 3])
    assert kinds(store) == {2: 'full', 3: 'delta'}
    assert_equal(store.read(3), sent[3])


def test_reader_overtaken_by_collection_may_retry(tmp_path, monkeypatch):
    """Between the manifest and the chunks, everything that it lists is collected."""
    learner, worker = WeightStore(tmp_path, 1, 2), WeightStore(tmp_path)
    reader = worker.reader()
    sent = publish_all(learner, make_params(), [0])
    assert_equal(reader.read(0), sent[0])
    sent |= publish_all(learner, sent[0], [1])
    look_up = Versions.get

    def look_up_slowly(versions, version):
        manifest = look_up(versions, version)
        if version == 1:
            sent.update(publish_all(learner, sent[1], [2]))
        return manifest

    monkeypatch.setattr(Versions, 'get', look_up_slowly)
    with pytest.raises(MissingError, match=r'version 1 .*retry'):
        reader.read(1)
    assert_equal(reader.read(2), sent[2])


def test_a_reader_beside_a_learner_that_never_waits(tmp_path):
    """Version v holds v in every element: a read is whole and right, or it is missing."""
    learner, worker, stop = WeightStore(tmp_path, 1, 3), WeightStore(tmp_path), threading.Event()
    make = lambda v: {f'w{i}': np.full((40, 30), v, np.float32) for i in range(5)}  # noqa: E731
    learner.publish(make(0), 0)

    def publish():
        for version in itertools.count(1):
            if stop.is_set():
                return
            learner.publish(make(version), version)

    thread = threading.Thread(target=publish)
    thread.start()
    reader, seen = worker.reader(), set()
    try:
        while len(seen) < 12:
            version = worker.latest()
            for read in (reader.read, worker.read):
                try:
                    params = read(version)
                except MissingError:
                    continue
                assert {float(x) for array in params.values() for x in array.flat} == {version}
                seen.add(version)
    finally:
        stop.set()
        thread.join(60)
