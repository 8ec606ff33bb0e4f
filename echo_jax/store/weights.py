"""Published weights, from every learner host to every worker, through any store TensorStore opens.

Not a checkpoint: no optimizer, no step, and old versions go. It imports no JAX; an array is a NumPy
array or anything with the `sharding` and `addressable_shards` of a `jax.Array`.

    manifests/0000000007                the commit: attempt, bases, each array's shape and dtype
    data/0000000007/attempt             names the attempt that is under way; process 0 writes it
    data/0000000007/ATTEMPT/0012/c.0.3  one zarr3 chunk of array 12 (in order of name), with CRC-32C
    data/0000000007/ATTEMPT/host.3      process 3 has written its shards

The hosts meet in the store, so publishing needs no collective. Process 0 draws a new attempt each
time it starts on a version: what a killed learner left behind is never mixed in, and a host that
began on an attempt of the past begins again. The manifest is written, once, when the markers of all
hosts are there and together cover every element. Metadata is in the manifest and nowhere else, so a
read costs one GET and then the chunks. Chunks are aligned with the shards, hence no two hosts touch
the same one, and at most 16 MiB, so that a slice reads little besides itself.

A version is a key frame (kind 'full': its values, not compressed, since bfloat16 weights shrink by
a fifth at ten times the cost) or a delta: the bits XOR those of its base, packed (shards.py). Its
manifest lists the bases, key frame first, each by version and attempt, so a delta never meets other
bits than it was made from, and reading it needs no other manifest. Every host holds its shards of
the version it published last and makes its deltas to them. Process 0 begins an attempt as a delta
where it can; a host that does not hold that base says so in its marker, and process 0 begins again
with a key frame. A reader refuses kinds that it does not know.
"""

import itertools
import math
import pathlib
import re
import secrets
import time
from collections.abc import Mapping

import numpy as np
import tensorstore as ts

from echo_jax.store import shards
from echo_jax.store.kvstore import (
    CorruptError,
    MissingError,
    inside,
    open_kvstore,
    seal,
    unseal,
    write_once,
)
from echo_jax.store.shards import Index, Params, Part

Link = list  # [version, attempt]

_POLL_SECONDS = 0.1


class WeightStore:
    """Versions of the weights under `url`: a path, or a `file://`, `gs://`, `s3://` URL.

    keep: versions that can be read when newer ones are published; 2 lets a worker finish reading
        one while the next arrives. The bases of a delta among them stay with it.
    keyframe_every: 1 (or 0) publishes each version whole; a larger number makes at least every so
        many'th a key frame and the others deltas, for which each host of the learner keeps a copy
        of its shards in memory (2 bytes a parameter over all hosts, in bfloat16).
    """

    def __init__(self, url: str | pathlib.Path, keep: int = 2, keyframe_every: int = 1):
        if keep < 1:
            raise ValueError(f'keep is {keep}; expected at least 1 version')
        self.url = str(url)
        self.keep = keep
        self.keyframe_every = keyframe_every
        self._kvstore = open_kvstore(url)
        # The chain, key frame first, and the bits of the version that this host published last.
        self._held: tuple[list[Link], Part] = [], None

    def publish(
        self,
        params: Params,
        version: int,
        process_index: int = 0,
        process_count: int = 1,
        timeout: float = 600.0,
        about: dict | None = None,
    ) -> bool:
        """Publishes `params` as `version`; True if this call did, False if it was there already.

        Every host of the learner calls it with the same names, and writes those shards of each
        `jax.Array` that it holds (replica 0 of each); NumPy arrays are the same on every host and
        process 0 writes them. Returns when the version is readable; then process 0 collects old
        versions. Arrays are bfloat16, float16 or float32, of any shape. `about` is process 0's: a
        small JSON object that `about(version)` returns.

        The version is a key frame where the one before it is not this learner's, has other arrays
        or shards, or is `keyframe_every` versions away from its own; else a delta.

        Raises TimeoutError where other hosts have not done their part after `timeout` seconds, and
        ValueError where the shards of all hosts do not make up the arrays.
        """
        if not 0 <= version < 10**10:
            raise ValueError(f'version is {version}; expected 0 to 10**10 - 1')
        part = Part.of(params, process_index)
        deadline = time.monotonic() + timeout
        if self._find(version) is not None:
            return False
        if process_index == 0:
            done = self._lead(part, version, process_count, deadline, about or {})
            self._collect(version)
            return done
        return self._follow(part, version, process_index, deadline)

    def versions(self) -> list[int]:
        """The published versions, ascending."""
        found = self._kvstore.list(inside('manifests')).result()
        matches = (re.fullmatch(rb'manifests/(\d{10})', key) for key in found)
        return sorted(int(match[1]) for match in matches if match)

    def latest(self) -> int | None:
        """The newest published version; None where there is none yet."""
        return max(self.versions(), default=None)

    def newest(self) -> tuple[int, str] | None:
        """(version, attempt) of the newest version; another attempt has other bits, maybe."""
        while (version := self.latest()) is not None:
            if manifest := self._find(version):  # unless it was rewound meanwhile
                return version, manifest['attempt']
        return None

    def about(self, version: int) -> dict:
        """What `publish` was told of a version; MissingError where it was collected."""
        return self._manifest(version).get('about', {})

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

        A delta is read with all of its bases; who follows the versions takes a `reader`. Raises
        MissingError where the version was collected, before or during the read (take `latest()`
        and retry), and CorruptError where its bytes are damaged.
        """
        return self._fetch(self._manifest(version), names, slices)

    def reader(
        self, names: list[str] | None = None, slices: Mapping[str, Index] | None = None
    ) -> 'WeightReader':
        """A reader that follows the versions of these arrays, or parts of them, as in `read`."""
        return WeightReader(self, names, slices)

    def rewind(self, version: int) -> None:
        """Forgets the versions after `version`: for a learner that resumes before them."""
        for later in [later for later in self.versions() if later > version]:
            self._kvstore.write(_manifest_key(later), None).result()
        beyond = ts.KvStore.KeyRange(f'data/{version + 1:010d}', 'data0')
        self._kvstore.delete_range(beyond).result()

    def _lead(
        self, part: Part, version: int, process_count: int, deadline: float, about: dict
    ) -> bool:
        """Process 0's part: opens an attempt, waits for the other hosts, commits."""
        for bases in (self._bases(part, version), []):
            attempt = secrets.token_hex(8)
            begun = {'attempt': attempt, 'bases': bases}
            self._kvstore.write(_attempt_key(version), seal(begun)).result()
            written = self._write(part, version, begun)
            for process_index in range(1, process_count):
                key = _host_key(version, attempt, process_index)
                marker = self._wait(key, deadline, f'process {process_index} to publish {version}')
                if marker['layout'] != part.digest():
                    raise ValueError(
                        f'process {process_index} publishes version {version} with other names, '
                        f'shapes, dtypes or shards than process 0; give every process the same '
                        f'arrays'
                    )
                if marker['written'] is None:  # it does not hold the base
                    written = None
                    break
                written = [a + b for a, b in zip(written, marker['written'])]
            if written is not None:
                break
        for (name, array), count in zip(part.layout.items(), written):
            if count != math.prod(array['shape']):
                raise ValueError(
                    f'{process_count} processes wrote {count} elements of {name}; expected '
                    f'{math.prod(array["shape"])}: check process_count, and that arrays are global'
                )
        kind = 'delta' if bases else 'full'
        manifest = {'kind': kind, 'version': version, **begun, 'about': about}
        manifest['arrays'] = part.layout
        done = write_once(self._kvstore, _manifest_key(version), seal(manifest))
        if done:
            self._hold(part, manifest)
        return done

    def _follow(self, part: Part, version: int, process_index: int, deadline: float) -> bool:
        """Another process's part, again for each attempt that it sees, until one is committed."""
        mine = None
        while (manifest := self._find(version)) is None:
            begun = self._wait(_attempt_key(version), deadline, 'process 0 to begin')
            if begun['attempt'] == mine:
                time.sleep(_POLL_SECONDS)
                if time.monotonic() > deadline:
                    raise TimeoutError(f'version {version} in {self.url}: no commit by process 0')
                continue
            marker = {'layout': part.digest(), 'written': self._write(part, version, begun)}
            mine = begun['attempt']
            key = _host_key(version, mine, process_index)
            self._kvstore.write(key, seal(marker)).result()
        if manifest['attempt'] == mine:
            self._hold(part, manifest)
        return mine is not None

    def _bases(self, part: Part, version: int) -> list[Link]:
        """What process 0 proposes to make `version` a delta to; empty: a key frame."""
        chain, copy = self._held
        if not chain or not copy.matches(part) or len(chain) >= self.keyframe_every:
            return []
        base, attempt = chain[-1]
        found = self._intact(base) if base < version else None
        return chain if found and found['attempt'] == attempt else []

    def _write(self, part: Part, version: int, begun: dict) -> list[int] | None:
        """Writes this host's shards; the elements of each array, or None without the base."""
        bases, (chain, copy) = begun.get('bases', []), self._held
        if bases and not (chain == bases and copy.matches(part)):
            return None
        link = [version, begun['attempt']]
        part.write(
            lambda name: self._open(link, part.layout, name, bool(bases)), copy if bases else None
        )
        return part.elements()

    def _hold(self, part: Part, manifest: dict) -> None:
        """Copies this host's shards of what was committed, over those of the version before."""
        (_, over), self._held = self._held, ([], None)
        if self.keyframe_every > 1:
            self._held = _chain(manifest), part.copy(over)

    def _fetch(
        self,
        manifest: dict,
        names: list[str] | None,
        slices: Mapping[str, Index] | None,
        have: Link | None = None,
        arrays: dict[str, np.ndarray] | None = None,
    ) -> dict[str, np.ndarray]:
        """The arrays of a manifest; `arrays`, of its base `have`, are changed in place."""
        version, layout, chain = manifest['version'], manifest['arrays'], _chain(manifest)
        names, slices = list(layout) if names is None else names, slices or {}
        unknown = [name for name in {*names, *slices} if name not in layout]
        if unknown or not {*slices} <= {*names}:
            raise ValueError(
                f'version {version} in {self.url} has no arrays {unknown}; it has {list(layout)}; '
                f'slices are of arrays in names'
            )
        for link in chain[chain.index(have) + 1 :] if have else chain:
            delta = link != chain[0]
            parts = {
                name: self._open(link, layout, name, delta)[slices.get(name, ...)] for name in names
            }
            try:
                if delta:
                    jobs = (shards.apply(parts[name], arrays[name]) for name in names)
                    shards.run(itertools.chain.from_iterable(jobs))
                else:
                    futures = {name: part.read() for name, part in parts.items()}
                    arrays = {name: np.asarray(future.result()) for name, future in futures.items()}
            except ValueError as error:
                if self._find(version) != manifest:
                    raise self._missing(version) from error
                raise self._corrupt(version, error, link[0]) from error
        return arrays

    def _open(self, link: Link, layout: dict, name: str, delta: bool) -> ts.TensorStore:
        """The zarr3 array `name` of one version and attempt."""
        version, attempt = link
        number = sorted(layout).index(name)
        folder = self._kvstore / f'data/{version:010d}/{attempt}/{number:04d}/'
        return shards.open_array(folder, layout[name], delta)

    def _manifest(self, version: int) -> dict:
        if (manifest := self._find(version)) is None:
            raise self._missing(version)
        return manifest

    def _find(self, version: int) -> dict | None:
        """The manifest of a version; None where there is none."""
        found = self._kvstore.read(_manifest_key(version)).result()
        if found.state == 'missing':
            return None
        try:
            manifest = unseal(found.value)
        except ValueError as error:
            raise self._corrupt(version, error, version) from error
        if manifest.get('kind') not in ('full', 'delta'):
            raise ValueError(
                f'version {version} in {self.url} is of kind {manifest.get("kind")!r}; '
                f"this reader knows 'full' and 'delta': update it"
            )
        return manifest

    def _intact(self, version: int) -> dict | None:
        """`_find`, for what publishes: a damaged version has no reader, and goes like any other."""
        try:
            return self._find(version)
        except CorruptError:
            return None

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
        """Deletes what is older than the newest `keep` versions and their bases.

        Manifests go first: a reader whose chunks are gone finds that its version is.
        """
        versions = self.versions()
        kept = {*versions[-self.keep :], version}
        for old in versions:
            if old not in kept:
                self._kvstore.write(_manifest_key(old), None).result()
        chains = [_chain(manifest) for manifest in map(self._intact, kept) if manifest]
        first = min((chain[0][0] for chain in chains), default=min(kept))
        self._kvstore.delete_range(ts.KvStore.KeyRange('data/', f'data/{first:010d}')).result()

    def _missing(self, version: int) -> MissingError:
        return MissingError(
            f'version {version} is not in {self.url}, which has {self.versions()}: it was '
            f'collected or is not finished; take latest() and retry'
        )

    def _corrupt(self, version: int, error: Exception, damaged: int) -> CorruptError:
        return CorruptError(
            f'version {version} in {self.url} is corrupt ({error}); read another one, or let the '
            f'learner publish it again after WeightStore({self.url!r}).rewind({damaged - 1})'
        )


class WeightReader:
    """Follows the versions of one store and holds the arrays of the one that it read last.

    A version that continues from that one costs the deltas between them; any other, such as the
    first, or one of a learner that went back, is read from its key frame on.
    """

    def __init__(
        self,
        store: WeightStore,
        names: list[str] | None = None,
        slices: Mapping[str, Index] | None = None,
    ):
        self._store, self._names, self._slices = store, names, slices
        self._link: Link | None = None
        self._arrays: dict[str, np.ndarray] = {}

    @property
    def version(self) -> int | None:
        """The version that it holds; None before the first read and after one that failed."""
        return self._link and self._link[0]

    def read(self, version: int) -> dict[str, np.ndarray]:
        """The arrays of a version: read-only views, good until the next `read`, which changes them.

        Copy what must outlive that, also before `jax.device_put` on a CPU: it may keep the memory.
        Raises what `WeightStore.read` raises; the next read then starts from a key frame.
        """
        manifest = self._store._manifest(version)
        chain = _chain(manifest)
        have, arrays = (self._link, self._arrays) if self._link in chain else (None, None)
        self._link, self._arrays = None, {}  # arrays that are half changed are of no version
        self._arrays = self._store._fetch(manifest, self._names, self._slices, have, arrays)
        self._link = chain[-1]
        views = {name: array.view() for name, array in self._arrays.items()}
        for view in views.values():
            view.flags.writeable = False
        return views


def _chain(manifest: dict) -> list[Link]:
    """What is read for a version, key frame first: its bases, and itself."""
    return [*manifest.get('bases', []), [manifest['version'], manifest['attempt']]]


def _manifest_key(version: int) -> str:
    return f'manifests/{version:010d}'


def _attempt_key(version: int) -> str:
    return f'data/{version:010d}/attempt'


def _host_key(version: int, attempt: str, process_index: int) -> str:
    return f'data/{version:010d}/{attempt}/host.{process_index}'
