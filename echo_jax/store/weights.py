"""Published weights, from every learner host to every worker, through any store TensorStore opens.

Not a checkpoint: no optimizer, no step, and old versions go. It imports no JAX; an array is a NumPy
array or anything with the `sharding` and `addressable_shards` of a `jax.Array`.

    manifests/0000000007                the commit: kind, attempt, and each array's shape and dtype
    data/0000000007/attempt             names the attempt that is under way; process 0 writes it
    data/0000000007/ATTEMPT/0012/c.0.3  one zarr3 chunk of array 12 (in order of name), with CRC-32C
    data/0000000007/ATTEMPT/host.3      process 3 has written its shards

The hosts meet in the store, so publishing needs no collective. Process 0 draws a new attempt each
time it starts on a version: what a killed learner left behind is never mixed in, and a host that
began on an attempt of the past begins again. The manifest is written, once, when the markers of all
hosts are there and together cover every element. Metadata is in the manifest and nowhere else, so a
read costs one GET and then the chunks. Chunks are aligned with the shards, hence no two hosts touch
the same one, and at most 16 MiB, so that a slice reads little besides itself; they are not
compressed (bfloat16 weights shrink by a fifth at ten times the cost). A manifest's kind is 'full';
other kinds (a delta to another version) are refused by a reader that does not know them.
"""

import itertools
import json
import math
import pathlib
import re
import secrets
import time
import zlib
from collections.abc import Iterator, Mapping

import numpy as np
import tensorstore as ts

from echo_jax.store.kvstore import (
    CorruptError,
    MissingError,
    open_kvstore,
    seal,
    unseal,
    write_once,
)

Index = tuple[slice, ...]
Params = Mapping[str, np.ndarray]  # or jax.Array

DTYPES = ('bfloat16', 'float16', 'float32')
MAX_CHUNK = 16 << 20  # bytes
_MAX_PENDING = 1 << 30  # bytes on their way to the store at once: the host memory of a publish
_POLL_SECONDS = 0.1


class WeightStore:
    """Versions of the weights under `url`: a path, or a `file://`, `gs://`, `s3://` URL.

    keep: versions that stay when newer ones are published; 2 lets a worker finish reading one
        while the next arrives.
    """

    def __init__(self, url: str | pathlib.Path, keep: int = 2):
        if keep < 1:
            raise ValueError(f'keep is {keep}; expected at least 1 version')
        self.url = str(url)
        self.keep = keep
        self._kvstore = open_kvstore(url)

    def publish(
        self,
        params: Params,
        version: int,
        process_index: int = 0,
        process_count: int = 1,
        timeout: float = 600.0,
    ) -> bool:
        """Publishes `params` as `version`; True if this call did, False if it was there already.

        Every host of the learner calls it with the same names, and writes those shards of each
        `jax.Array` that it holds (replica 0 of each); NumPy arrays are the same on every host and
        process 0 writes them. Returns when the version is readable; then process 0 collects old
        versions. Arrays are bfloat16, float16 or float32, of any shape.

        Raises TimeoutError where other hosts have not done their part after `timeout` seconds, and
        ValueError where the shards of all hosts do not make up the arrays.
        """
        _check(params, version)
        deadline = time.monotonic() + timeout
        if self._committed(version):
            return False
        if process_index == 0:
            done = self._lead(params, version, process_count, deadline)
            self._collect(version)
            return done
        return self._follow(params, version, process_index, deadline)

    def versions(self) -> list[int]:
        """The published versions, ascending."""
        found = self._kvstore.list(ts.KvStore.KeyRange('manifests/', 'manifests0')).result()
        matches = (re.fullmatch(rb'manifests/(\d{10})', key) for key in found)
        return sorted(int(match[1]) for match in matches if match)

    def latest(self) -> int | None:
        """The newest published version; None where there is none yet."""
        return max(self.versions(), default=None)

    def read(
        self,
        version: int,
        names: list[str] | None = None,
        slices: Mapping[str, Index] | None = None,
    ) -> dict[str, np.ndarray]:
        """The arrays of a version, in the dtypes that were published.

        names: only these arrays. slices: for some of them, only this part, for instance
            {'mlp/up': (slice(None), slice(0, 1024))}; nothing else is fetched but the rest of the
            chunks that it touches.

        Raises MissingError where the version was collected, before or during the read (take
        `latest()` and retry), and CorruptError where its bytes are damaged.
        """
        manifest = self._manifest(version)
        arrays = manifest['arrays']
        names = list(arrays) if names is None else names
        slices = slices or {}
        unknown = [name for name in {*names, *slices} if name not in arrays]
        if unknown or not {*slices} <= {*names}:
            raise ValueError(
                f'version {version} in {self.url} has no arrays {unknown}; it has {list(arrays)}; '
                f'slices are of arrays in names'
            )
        parts = {name: self._open(version, manifest, name)[slices.get(name, ...)] for name in names}
        try:
            futures = {name: part.read() for name, part in parts.items()}
            return {name: future.result() for name, future in futures.items()}
        except ValueError as error:
            if version not in self.versions() or self._manifest(version) != manifest:
                raise self._missing(version) from error
            raise self._corrupt(version, error) from error

    def rewind(self, version: int) -> None:
        """Forgets the versions after `version`: for a learner that resumes before them."""
        for later in [later for later in self.versions() if later > version]:
            self._kvstore.write(_manifest_key(later), None).result()
        beyond = ts.KvStore.KeyRange(f'data/{version + 1:010d}', 'data0')
        self._kvstore.delete_range(beyond).result()

    def _lead(self, params: Params, version: int, process_count: int, deadline: float) -> bool:
        """Process 0's part: opens an attempt, waits for the other hosts, commits."""
        attempt = secrets.token_hex(8)
        self._kvstore.write(_attempt_key(version), seal({'attempt': attempt})).result()
        layout, written = self._write_shards(params, version, attempt, 0)
        for process_index in range(1, process_count):
            key = _host_key(version, attempt, process_index)
            marker = self._wait(key, deadline, f'process {process_index} to publish {version}')
            if marker['layout'] != _digest(layout):
                raise ValueError(
                    f'process {process_index} publishes version {version} with other names, '
                    f'shapes, dtypes or shards than process 0; give every process the same arrays'
                )
            written = [a + b for a, b in zip(written, marker['written'])]
        for (name, array), count in zip(layout.items(), written):
            if count != math.prod(array['shape']):
                raise ValueError(
                    f'{process_count} processes wrote {count} elements of {name}; expected '
                    f'{math.prod(array["shape"])}: check process_count, and that arrays are global'
                )
        manifest = {'kind': 'full', 'version': version, 'attempt': attempt, 'arrays': layout}
        return write_once(self._kvstore, _manifest_key(version), seal(manifest))

    def _follow(self, params: Params, version: int, process_index: int, deadline: float) -> bool:
        """Another process's part, again for each attempt that it sees, until one is committed."""
        mine = None
        while not self._committed(version):
            attempt = self._wait(_attempt_key(version), deadline, 'process 0 to begin')['attempt']
            if attempt == mine:
                time.sleep(_POLL_SECONDS)
                if time.monotonic() > deadline:
                    raise TimeoutError(f'version {version} in {self.url}: no commit by process 0')
                continue
            layout, written = self._write_shards(params, version, attempt, process_index)
            marker = {'layout': _digest(layout), 'written': written}
            key = _host_key(version, attempt, process_index)
            self._kvstore.write(key, seal(marker)).result()
            mine = attempt
        return mine is not None

    def _write_shards(
        self, params: Params, version: int, attempt: str, process_index: int
    ) -> tuple[dict, list[int]]:
        """This host's shards; returns the layout of all arrays and the elements written of each."""
        layout, written, pending = {}, [], []
        for name in sorted(params):
            array = params[name]
            layout[name] = {
                'shape': list(array.shape),
                'dtype': array.dtype.name,
                'chunk': _chunk_shape(_shard_shape(array), array.dtype.itemsize),
            }
        manifest = {'attempt': attempt, 'arrays': layout}
        for name in layout:
            target = self._open(version, manifest, name)
            count = 0
            for index, shard in _shards(params[name], process_index):
                data = np.asarray(shard)
                count += data.size
                pending.append((data.nbytes, target[index or ...].write(data)))
                if sum(size for size, _ in pending) > _MAX_PENDING:
                    _finish(pending)
            written.append(count)
        _finish(pending)
        return layout, written

    def _open(self, version: int, manifest: dict, name: str) -> ts.TensorStore:
        """The zarr3 array `name`, described by the manifest alone."""
        number = sorted(manifest['arrays']).index(name)
        array = manifest['arrays'][name]
        metadata = {
            'zarr_format': 3,
            'node_type': 'array',
            'shape': array['shape'],
            'data_type': array['dtype'],
            'fill_value': 0.0,
            'chunk_grid': {'name': 'regular', 'configuration': {'chunk_shape': array['chunk']}},
            'chunk_key_encoding': {'name': 'default', 'configuration': {'separator': '.'}},
            'codecs': [
                {'name': 'bytes', 'configuration': {'endian': 'little'}},
                {'name': 'crc32c'},
            ],
        }
        spec = {
            'driver': 'zarr3',
            'metadata': metadata,
            # A chunk of zeros is stored, so that a chunk that is not there is an error, not zeros.
            'store_data_equal_to_fill_value': True,
            'fill_missing_data_reads': False,
        }
        folder = self._kvstore / f'data/{version:010d}/{manifest["attempt"]}/{number:04d}/'
        return ts.open(spec, kvstore=folder, open=True, assume_metadata=True).result()

    def _manifest(self, version: int) -> dict:
        found = self._kvstore.read(_manifest_key(version)).result()
        if found.state == 'missing':
            raise self._missing(version)
        try:
            manifest = unseal(found.value)
        except ValueError as error:
            raise self._corrupt(version, error) from error
        if manifest.get('kind') != 'full':
            raise ValueError(
                f'version {version} in {self.url} is of kind {manifest.get("kind")!r}; '
                f"this reader knows 'full': update it"
            )
        return manifest

    def _committed(self, version: int) -> bool:
        return self._kvstore.read(_manifest_key(version)).result().state == 'value'

    def _wait(self, key: str, deadline: float, what: str) -> dict:
        """The sealed document at `key` once it is there."""
        while True:
            found = self._kvstore.read(key).result()
            if found.state == 'value':
                return unseal(found.value)
            if time.monotonic() > deadline:
                raise TimeoutError(f'{self.url}: waited in vain for {what}; is that host alive?')
            time.sleep(_POLL_SECONDS)

    def _collect(self, version: int) -> None:
        """Deletes what is older than the newest `keep` versions: manifests first, then data."""
        versions = self.versions()
        kept = {*versions[-self.keep :], version}
        for old in versions:
            if old not in kept:
                self._kvstore.write(_manifest_key(old), None).result()
        below = ts.KvStore.KeyRange('data/', f'data/{min(kept):010d}')
        self._kvstore.delete_range(below).result()

    def _missing(self, version: int) -> MissingError:
        return MissingError(
            f'version {version} is not in {self.url}, which has {self.versions()}: it was '
            f'collected or is not finished; take latest() and retry'
        )

    def _corrupt(self, version: int, error: Exception) -> CorruptError:
        return CorruptError(
            f'version {version} in {self.url} is corrupt ({error}); read another one, or let the '
            f'learner publish it again after WeightStore({self.url!r}).rewind({version - 1})'
        )


def _manifest_key(version: int) -> str:
    return f'manifests/{version:010d}'


def _attempt_key(version: int) -> str:
    return f'data/{version:010d}/attempt'


def _host_key(version: int, attempt: str, process_index: int) -> str:
    return f'data/{version:010d}/{attempt}/host.{process_index}'


def _check(params: Params, version: int) -> None:
    if not 0 <= version < 10**10:
        raise ValueError(f'version is {version}; expected 0 to 10**10 - 1')
    for name, array in params.items():
        if array.dtype.name not in DTYPES:
            raise ValueError(f'{name} is {array.dtype}; expected one of {", ".join(DTYPES)}')


def _shard_shape(array) -> tuple[int, ...]:
    sharding = getattr(array, 'sharding', None)
    return tuple(sharding.shard_shape(array.shape) if sharding is not None else array.shape)


def _shards(array, process_index: int) -> Iterator[tuple[Index, np.ndarray]]:
    """What this host writes of an array: each part of it is replica 0 on exactly one host."""
    if hasattr(array, 'addressable_shards'):
        shards = array.addressable_shards
        yield from ((shard.index, shard.data) for shard in shards if shard.replica_id == 0)
    elif process_index == 0:
        yield (), array


def _chunk_shape(shape: tuple[int, ...], itemsize: int) -> list[int]:
    """Splits a shard into equal chunks of at most MAX_CHUNK, leading axes first.

    Leading axes, because layers are stacked on them and a chunk stays one run of memory. Each
    length divides the shard's, so that the chunk grid meets every shard's border.
    """
    chunk = [max(1, length) for length in shape]
    for axis, length in enumerate(chunk):
        divisors = (n for n in itertools.count(1) if length % n == 0)
        while math.prod(chunk) * itemsize > MAX_CHUNK and chunk[axis] > 1:
            chunk[axis] = length // next(divisors)
    return chunk


def _finish(pending: list[tuple[int, ts.WriteFutures]]) -> None:
    for _, write in pending:
        write.result()
    pending.clear()


def _digest(layout: dict) -> int:
    return zlib.crc32(json.dumps(layout).encode())
