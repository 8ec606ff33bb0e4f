"""Several learner hosts publish one version: they meet in the store, and none is mixed with a past.

Most hosts here are threads without JAX; the last test starts two processes of JAX.
"""

import json
import os
import socket
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest

from echo_jax.store.kvstore import MissingError, seal, unseal
from echo_jax.store.weights import WeightStore
from tests.support.processes import soon
from tests.support.weights import (
    SHARDED,
    HostView,
    assert_equal,
    bfloat16,
    changed,
    kinds,
    kvstore,
    publish_as,
)


@pytest.mark.parametrize('first', [0, 1, 2])
def test_hosts_meet_in_the_store_whoever_comes_first(tmp_path, first):
    results, threads, there = {}, [], set()
    for host in [first, *{0, 1, 2} - {first}]:
        assert WeightStore(tmp_path).versions() == []
        args = (WeightStore(tmp_path), SHARDED, 7, host, 3, results)
        threads.append(threading.Thread(target=publish_as, args=args))
        threads[-1].start()
        # The next one comes when all that are there have done what they can without it: process 0
        # has begun an attempt, and after that the others have written their markers.
        there.add(host)
        if 0 in there:
            assert soon((tmp_path / 'data' / '0000000007' / 'attempt').exists, 60)
            for other in there - {0}:
                assert soon(lambda name=f'host.{other}': [*tmp_path.glob(f'data/*/*/{name}')], 60)
    for thread in threads:
        thread.join(60)
    assert WeightStore(tmp_path).versions() == [7]
    assert results == {0: True, 1: True, 2: True}
    assert_equal(WeightStore(tmp_path).read(7), SHARDED)


@pytest.mark.parametrize('first', [0, 1])
def test_leftovers_of_a_killed_learner_are_not_mixed_in(tmp_path, first):
    """Host 1 did its part of an attempt that process 0 died in; both return, `first` first."""
    old = {name: array + 100 for name, array in SHARDED.items()}
    results, attempt = {}, 'feedfacefeedface'
    store = WeightStore(tmp_path)
    begun = tmp_path / 'data' / '0000000007' / 'attempt'
    kvstore(store).write('data/0000000007/attempt', seal({'attempt': attempt})).result()
    publish_as(store, old, 7, 1, 2, results, timeout=0.3)
    assert 'waited in vain for process 0' in str(results[1])
    marker = begun.parent / attempt / 'host.1'
    marker.unlink()
    threads = []
    for host in (first, 1 - first):
        assert store.latest() is None
        args = (WeightStore(tmp_path), SHARDED, 7, host, 2, results)
        threads.append(threading.Thread(target=publish_as, args=args))
        threads[-1].start()
        if host == 0:
            assert soon(lambda: unseal(begun.read_bytes())['attempt'] != attempt, 60)
        elif first == 1:  # it begins on the dead attempt
            assert soon(marker.exists, 60)
    for thread in threads:
        thread.join(60)
    assert store.latest() == 7
    assert results == {0: True, 1: True}
    assert_equal(store.read(7), SHARDED)


def test_version_without_all_hosts_stays_invisible(tmp_path):
    store, results = WeightStore(tmp_path), {}
    publish_as(store, SHARDED, 1, 0, 2, results, timeout=0.3)
    assert 'waited in vain for process 1' in str(results[0])
    publish_as(store, SHARDED, 1, 1, 2, results, timeout=0.3)
    assert 'waited in vain for process 0' in str(results[1])  # nobody commits the shards
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
    thread = threading.Thread(target=publish_as, args=(store, SHARDED, 2, 0, 2, results))
    thread.start()
    assert soon((tmp_path / 'data' / '0000000002' / 'attempt').exists, 60)
    publish_as(WeightStore(tmp_path), other, 2, 1, 2, results, timeout=0.3)
    thread.join(60)
    assert 'process 1 publishes version 2 with other names' in str(results[0])
    assert store.versions() == []


class Learner:
    """Several hosts, each with a store of its own that remembers what it published."""

    def __init__(self, url, hosts):
        self.url, self.stores = url, [WeightStore(url, 2, 9) for _ in range(hosts)]

    def restart(self, host):
        self.stores[host] = WeightStore(self.url, 2, 9)

    def publish(self, params, version):
        results, hosts = {}, len(self.stores)

        def one(host):
            view = {name: HostView(array, host, hosts) for name, array in params.items()}
            results[host] = self.stores[host].publish(view, version, host, hosts, timeout=60)

        threads = [threading.Thread(target=one, args=(host,)) for host in range(hosts)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert results == dict.fromkeys(range(hosts), True)


@pytest.mark.slow
@pytest.mark.parametrize('restarted', [[0], [1], [2], [1, 2], [0, 1, 2]])
def test_a_host_that_restarts_makes_the_next_version_a_key_frame(tmp_path, restarted):
    learner, reader = Learner(tmp_path, 3), WeightStore(tmp_path).reader()
    params = SHARDED
    for version in range(5):
        if version == 3:
            for host in restarted:
                learner.restart(host)
        params = changed(params, np.random.default_rng(version))
        learner.publish(params, version)
        expected = 'full' if version in (0, 3) else 'delta'
        assert kinds(learner.stores[0])[version] == expected
        assert_equal(reader.read(version), params)
        assert_equal(WeightStore(tmp_path).read(version), params)


def test_a_host_on_another_base_is_not_believed(tmp_path):
    """Host 1 published version 1 of a life that is over; the others hold another version 1."""
    old, new = Learner(tmp_path, 2), Learner(tmp_path, 2)
    for version in (0, 1):
        old.publish(changed(SHARDED, np.random.default_rng(version)), version)
    new.stores[0].rewind(0)
    params = changed(SHARDED, np.random.default_rng(7))
    new.publish(params, 1)
    new.stores[1] = old.stores[1]
    params = changed(params, np.random.default_rng(8))
    new.publish(params, 2)
    store = WeightStore(tmp_path)
    assert kinds(store) == {1: 'full', 2: 'full'}
    assert_equal(store.read(2), params)


def test_a_host_holds_only_what_was_committed(tmp_path):
    """Process 0 of a life that is over commits an attempt that this host had no part in."""
    store, results = WeightStore(tmp_path, 2, 9), {}
    kvstore(store).write('data/0000000000/attempt', seal({'attempt': 'new'})).result()
    args = (store, SHARDED, 0, 1, 2, results)
    thread = threading.Thread(target=publish_as, args=args)
    thread.start()
    marker = tmp_path / 'data' / '0000000000' / 'new' / 'host.1'
    assert soon(marker.exists, 60)
    old = {'kind': 'full', 'version': 0, 'attempt': 'old', 'bases': [], 'arrays': {}}
    kvstore(store).write('manifests/0000000000', seal(old)).result()
    thread.join(30)
    assert results == {1: True}
    begun = {'attempt': 'next', 'bases': [[0, 'old']]}  # a delta to that: it cannot
    kvstore(store).write('data/0000000001/attempt', seal(begun)).result()
    publish_as(store, SHARDED, 1, 1, 2, results, timeout=0.3)
    marker = tmp_path / 'data' / '0000000001' / 'next' / 'host.1'
    assert unseal(marker.read_bytes())['written'] is None


HOST = """
    import json, sys
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
    from echo_jax.store.versions import Versions
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
        done.append(store.publish(params, version, index, 2, timeout=200))
        params = {name: array * 3 for name, array in params.items()}
    kinds = [Versions(url).get(version)['kind'] for version in (1, 2, 3)]
    print(json.dumps({'mine': mine, 'done': done, 'kinds': kinds}))
"""


@pytest.mark.slow
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
    try:
        for host in hosts:
            out, err = host.communicate(timeout=240)
            assert host.returncode == 0, err[-3000:]
            # Neither host had the whole array: 16 x 32 elements, half each.
            expected = {'mine': 256, 'done': [True] * 3, 'kinds': ['full', 'delta', 'delta']}
            assert json.loads(out.splitlines()[-1]) == expected
    finally:
        for host in hosts:
            host.kill()  # nothing, unless the other one failed
            host.communicate()
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
