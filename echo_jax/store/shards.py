"""One host's shards of a version as zarr3 chunks: values, or their bits XOR those of the base.

It knows arrays, shards and chunks, and nothing of manifests (versions.py) or of hosts that meet
(weights.py). An update at a small learning rate leaves most bfloat16 values as they are and moves
the rest by an ulp or two: the XOR of the bits is zero in most places and has few low bits in the
others. blosc sorts it into byte planes and zstd packs them. XOR is exact for every bit pattern, and
its own inverse.

The checksum is the last codec, over the packed bytes. Chunks of zeros are stored like any other, so
that a chunk that is not there is an error, never zeros.
"""

import collections
import dataclasses
import functools
import itertools
import json
import math
import types
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import tensorstore as ts

from echo_jax.store.kvstore import open_array

Index = tuple[slice | types.EllipsisType, ...]
# Arrays by name, each a np.ndarray or a jax.Array. The type cannot say so, because nothing here
# imports JAX.
Params = Mapping[str, Any]
Job = tuple[int, Callable[[], object]]  # bytes under way, and what finishes it

MAX_CHUNK = 16 << 20  # bytes
MAX_PENDING = 1 << 30  # bytes under way at once: the host memory of a publish, or of a delta read
_UINT16, _UINT32 = np.dtype(np.uint16), np.dtype(np.uint32)
_BITS = {'bfloat16': _UINT16, 'float16': _UINT16, 'float32': _UINT32}


@dataclasses.dataclass(frozen=True)
class Part:
    """One host's part of a version: a description of all arrays, and its own shards of each."""

    arrays: dict[str, dict]  # name, in order: shape, dtype, chunk
    shards: dict[str, list[tuple[Index, Any]]]  # values, as in Params; bits (NumPy) in a copy

    @classmethod
    def of(cls, params: Params, process_index: int) -> 'Part':
        arrays, shards = {}, {}
        for name in sorted(params):
            array = params[name]
            if array.dtype.name not in _BITS:
                raise ValueError(f'{name} is {array.dtype}; expected one of {", ".join(_BITS)}')
            if isinstance(array, np.ndarray):  # whole on every host, and process 0 writes it
                shard_shape = array.shape
                shards[name] = [((), array)] if process_index == 0 else []
            else:  # each part of a jax.Array is replica 0 on exactly one host
                shard_shape = array.sharding.shard_shape(array.shape)
                mine = [shard for shard in array.addressable_shards if shard.replica_id == 0]
                shards[name] = [(shard.index, shard.data) for shard in mine]
            arrays[name] = {
                'shape': list(array.shape),
                'dtype': array.dtype.name,
                'chunk': chunk_shape(shard_shape, array.dtype.itemsize),
            }
        return cls(arrays, shards)

    def matches(self, other: 'Part') -> bool:
        """Whether both are the same shards of the same arrays, whatever their values."""
        return self.arrays == other.arrays and self._places() == other._places()

    def digest(self) -> int:
        """The same on every host that publishes the same arrays."""
        return zlib.crc32(json.dumps(self.arrays).encode())

    def elements(self) -> list[int]:
        """How many elements of each array this host has."""
        return [sum(math.prod(s.shape) for _, s in shards) for shards in self.shards.values()]

    def copy(self, over: 'Part | None') -> 'Part':
        """The bits, in memory of their own: that of the earlier copy `over`, if it matches.

        Memory is taken again because a copy is as large as the shards: a new one beside the old
        would double what a host needs, just while it publishes.
        """
        if over is None or not self.matches(over):
            empty = {
                name: [(index, np.empty(s.shape, _BITS[s.dtype.name])) for index, s in shards]
                for name, shards in self.shards.items()
            }
            over = Part(self.arrays, empty)
        for name, shards in self.shards.items():
            for (_, shard), (_, copy) in zip(shards, over.shards[name]):
                np.copyto(copy, _bits(np.asarray(shard)))
        return over

    def write(self, open_named: Callable[[str], ts.TensorStore], base: 'Part | None') -> None:
        """Writes the values, or the differences to the copy `base`, to arrays by name."""

        def jobs() -> Iterator[Job]:
            for name, shards in self.shards.items():
                for number, (index, shard) in enumerate(shards):
                    old = base.shards[name][number][1] if base else None
                    yield from _write(open_named(name)[index or ...], np.asarray(shard), old)

        run(jobs())

    def _places(self) -> list[list[Index]]:
        return [[index for index, _ in shards] for shards in self.shards.values()]


def open_part(folder: ts.KvStore, array: dict, delta: bool) -> ts.TensorStore:
    """The array in `folder` that holds the values, or differences, of what `array` describes."""
    dtype, pack = array['dtype'], []
    if delta:
        bits = _BITS[dtype]
        dtype = bits.name
        # Of real steps' differences: bit planes take a quarter more, level 3 takes 3% less in
        # twice the time, lz4 twice the bytes; blosc's own choice of a smaller block 5% more.
        blosc = {'cname': 'zstd', 'clevel': 1, 'shuffle': 'shuffle', 'blocksize': 1 << 20}
        pack = [{'name': 'blosc', 'configuration': blosc | {'typesize': bits.itemsize}}]
    return open_array(folder, array['shape'], dtype, array['chunk'], [*pack, {'name': 'crc32c'}])


def apply(source: ts.TensorStore, array: np.ndarray) -> Iterator[Job]:
    """Changes `array` in place by the differences in `source`, chunk by chunk.

    By chunk, so that the differences of an array never lie in memory all at once beside it. The XOR
    is of integers: as floats, a NaN would lose its payload and two zeros would be equal.
    """
    bits = _bits(array)
    for part, chunk in _chunks(source):
        yield bits[part].nbytes, functools.partial(_xor_into, bits[part], chunk.read())


def run(jobs: Iterable[Job]) -> None:
    """Starts jobs ahead of those that finish, at most MAX_PENDING bytes of them.

    A job starts when the iterator yields it, so this loop is what bounds the memory: without it all
    reads or writes of a model would be under way at once.
    """
    pending, size = collections.deque(), 0
    for job in jobs:
        pending.append(job)
        size += job[0]
        while size > MAX_PENDING:
            nbytes, finish = pending.popleft()
            finish()
            size -= nbytes
    for _, finish in pending:
        finish()


def _write(target: ts.TensorStore, data: np.ndarray, base: np.ndarray | None) -> Iterator[Job]:
    if base is None:
        yield data.nbytes, target.write(data).result
        return
    bits = _bits(data)
    for part, chunk in _chunks(target):  # one is packed while the next is made
        difference = bits[part] ^ base[part]
        yield difference.nbytes, chunk.write(difference).result


def _xor_into(part: np.ndarray, difference: ts.Future) -> None:
    np.bitwise_xor(part, difference.result(), out=part)


def _bits(array: np.ndarray) -> np.ndarray:
    """The same memory as unsigned integers of its width."""
    return array.view(_BITS[array.dtype.name])


def _chunks(view: ts.TensorStore) -> Iterator[tuple[Index, ts.TensorStore]]:
    """The parts of a view that lie in one chunk each, with their indices, which count from 0.

    A part of two chunks would fetch and unpack both again for its neighbour.
    """
    # A view keeps the indices of the whole array, unlike the NumPy array that is read from it.
    view = view[ts.d[:].translate_to[0]]
    grid, axes = view.chunk_layout.read_chunk_template, []
    for size, origin, length in zip(view.shape, grid.origin, grid.shape):
        # A view may begin inside a chunk, so the first border above 0 is the end of that one.
        borders = [0, *range(origin % length or length, size, length), size]
        axes.append([slice(a, b) for a, b in itertools.pairwise(borders) if a < b])
    for part in itertools.product(*axes):
        yield (*part, ...), view[(*part, ...)]


def chunk_shape(shape: tuple[int, ...], itemsize: int) -> list[int]:
    """The shape of the equal chunks of a shard, of at most MAX_CHUNK bytes, leading axes cut first.

    Leading axes, because layers are stacked on them and a chunk stays one run of memory. Each
    length divides the shard's, so that the chunk grid meets every shard's border.
    """
    chunk = [max(1, length) for length in shape]
    for axis, length in enumerate(chunk):
        # A count that does not divide the length would leave chunks that two shards share, and
        # two hosts that write one chunk lose what the other wrote.
        divisors = (n for n in itertools.count(1) if length % n == 0)
        while math.prod(chunk) * itemsize > MAX_CHUNK and chunk[axis] > 1:
            chunk[axis] = length // next(divisors)
    return chunk
