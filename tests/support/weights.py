"""Published weights for tests: arrays of random bits, learner hosts without JAX, stored bytes."""

import types

import ml_dtypes
import numpy as np
from hypothesis.extra import numpy as hnp

from echo_jax.store.weights import WeightStore

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


def unsigned(array):
    return array.view({2: np.uint16, 4: np.uint32}[array.dtype.itemsize])


def changed(params, rng, share=0.3):
    """Some of the values get other bits, any at all: NaN payloads, infinities, -0.0, denormals."""
    later = {}
    for name, array in params.items():
        flips = rng.integers(0, 256, array.nbytes, np.uint8)
        flips *= rng.random(array.nbytes) < share
        raw = np.frombuffer(array.tobytes(), np.uint8) ^ flips
        later[name] = np.frombuffer(raw.tobytes(), array.dtype).reshape(array.shape)
    return later


def manifest(store: WeightStore, version: int) -> dict:
    return store.published.get(version)


def kvstore(store: WeightStore):
    """What lies under the store's URL, also of a store in memory."""
    return store.published.kvstore


def kinds(store):
    return {version: manifest(store, version)['kind'] for version in store.versions()}


def keys(store, part):
    return [key for key in kvstore(store).list().result() if part.encode() in key]


def stored_bytes(store, version):
    found = keys(store, f'data/{version:010d}/')
    return sum(len(kvstore(store).read(key).result().value) for key in found)


def publish_all(store, params, versions, seed=0):
    """{version: params}, each a change of the one before."""
    rng, sent = np.random.default_rng(seed), {}
    for version in versions:
        sent[version] = params = changed(params, rng)
        assert store.publish(params, version)
    return sent
