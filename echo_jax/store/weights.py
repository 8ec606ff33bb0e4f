"""Published weights, from every learner host to every worker, through any store TensorStore opens.

Not a checkpoint: no optimizer, no step, and old versions go. It imports no JAX; an array is a NumPy
array or anything with the `sharding` and `addressable_shards` of a `jax.Array`. What a version is
made of, and how it is read, is in versions.py.

The learner's hosts meet in the store, so publishing needs no collective. Process 0 draws a new
attempt each time it starts on a version: what a killed learner left behind is never mixed in, and a
host that began on an attempt of the past begins again. The manifest is written, once, when the
markers of all hosts are there and together cover every element. Chunks are aligned with the shards,
so no two hosts write the same one.

Every host holds its shards of the version that it published last and makes its deltas to them.
Process 0 begins an attempt as a delta if it can. A host that does not hold that base says so in its
marker, and process 0 begins again with a key frame.
"""

import functools
import math
import pathlib
import secrets
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np
import tensorstore as ts

from echo_jax.store.kvstore import seal, unseal, write_once
from echo_jax.store.shards import Index, Params, Part
from echo_jax.store.versions import Link, Versions, chain, manifest_key

Answer = TypeVar('Answer')

_POLL_SECONDS = 0.1


class WeightStore:
    """Versions of the weights under `url`: a path, or a `file://`, `gs://`, `s3://` URL.

    keep: versions that can be read when newer ones are published; 2 lets a worker finish reading
        one while the next arrives. The bases of a delta among them stay with it.
    keyframe_every: 1 (or 0) publishes each version whole. If N > 1, a full copy is published at
        least every N versions and deltas in between; for these each host of the learner keeps a
        copy of its shards in memory (2 bytes a parameter over all hosts, in bfloat16).
    """

    def __init__(self, url: str | pathlib.Path, keep: int = 2, keyframe_every: int = 1):
        if keep < 1:
            raise ValueError(f'keep is {keep}; expected at least 1 version')
        self.url = str(url)
        self.keep = keep
        self.keyframe_every = keyframe_every
        self._published = Versions(url)
        # The chain, key frame first, of the version that this host published last, and its bits.
        self._chain: list[Link] = []
        self._copy: Part | None = None

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

        The version is a delta unless the one before it is not this learner's, has other arrays or
        shards, or is `keyframe_every` versions away from its key frame.

        Raises TimeoutError if other hosts have not done their part after `timeout` seconds, and
        ValueError if the shards of all hosts do not make up the arrays.
        """
        if not 0 <= version < 10**10:
            raise ValueError(f'version is {version}; expected 0 to 10**10 - 1')
        part = Part.of(params, process_index)
        deadline = time.monotonic() + timeout
        if self._published.find(version) is not None:
            return False
        if process_index == 0:
            done = self._lead(part, version, process_count, deadline, about or {})
            self._collect(version)
            return done
        return self._follow(part, version, process_index, deadline)

    def versions(self) -> list[int]:
        """The published versions, ascending."""
        return self._published.numbers()

    def latest(self) -> int | None:
        """The newest published version; None if there is none yet."""
        return max(self.versions(), default=None)

    def newest(self) -> tuple[int, str] | None:
        """(version, attempt) of the newest version; another attempt may have other bits."""
        while True:
            version = self.latest()
            if version is None:
                return None
            manifest = self._published.find(version)
            if manifest is not None:  # unless it was rewound meanwhile
                return version, manifest['attempt']

    def about(self, version: int) -> dict:
        """What `publish` was told of a version; MissingError if it was collected."""
        return self._published.get(version).get('about', {})

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

        A delta is read with all of its bases; use a `reader` to follow the versions. Raises
        MissingError if the version was collected, before or during the read (take `latest()` and
        retry), and CorruptError if its bytes are damaged.
        """
        return self._published.read(self._published.get(version), names, slices)

    def reader(
        self, names: list[str] | None = None, slices: Mapping[str, Index] | None = None
    ) -> 'WeightReader':
        """A reader that follows the versions of these arrays, or parts of them, as in `read`."""
        return WeightReader(self._published, names, slices)

    def rewind(self, version: int) -> None:
        """Forgets the versions after `version`: for a learner that resumes before them."""
        self._forget([later for later in self.versions() if later > version])
        beyond = ts.KvStore.KeyRange(f'data/{version + 1:010d}', 'data0')
        self._published.kvstore.delete_range(beyond).result()

    def _lead(
        self, part: Part, version: int, process_count: int, deadline: float, about: dict
    ) -> bool:
        """Process 0's part: opens an attempt, waits for the other hosts, commits."""
        for bases in (self._bases(part, version), []):
            begun = {'attempt': secrets.token_hex(8), 'bases': bases}
            self._put(_attempt_key(version), begun)
            written = self._write(part, version, begun)
            for process_index in range(1, process_count):
                look = functools.partial(self._get, _host_key(version, begun, process_index))
                marker = self._wait(look, deadline, f'process {process_index}', version)
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
        for (name, array), count in zip(part.arrays.items(), written):
            if count != math.prod(array['shape']):
                raise ValueError(
                    f'{process_count} processes wrote {count} elements of {name}; expected '
                    f'{math.prod(array["shape"])}: check process_count, and that arrays are global'
                )
        kind = 'delta' if bases else 'full'
        manifest = {'kind': kind, 'version': version, **begun, 'about': about}
        manifest['arrays'] = part.arrays
        done = write_once(self._published.kvstore, manifest_key(version), seal(manifest))
        if done:
            self._hold(part, manifest)
        return done

    def _follow(self, part: Part, version: int, process_index: int, deadline: float) -> bool:
        """Another process's part, again for each attempt that it sees, until one is committed."""
        mine = None
        while True:
            look = functools.partial(self._news, version, mine)
            manifest, begun = self._wait(look, deadline, 'process 0', version)
            if manifest is not None:
                break
            marker = {'layout': part.digest(), 'written': self._write(part, version, begun)}
            mine = begun['attempt']
            self._put(_host_key(version, begun, process_index), marker)
        if manifest['attempt'] == mine:
            self._hold(part, manifest)
        return mine is not None

    def _news(self, version: int, mine: str | None) -> tuple[dict | None, dict | None] | None:
        """(manifest, None) of a committed version, or (None, an attempt other than `mine`)."""
        manifest = self._published.find(version)
        if manifest is not None:
            return manifest, None
        begun = self._get(_attempt_key(version))
        return (None, begun) if begun is not None and begun['attempt'] != mine else None

    def _bases(self, part: Part, version: int) -> list[Link]:
        """What process 0 proposes to make `version` a delta to; empty: a key frame."""
        if not self._holds(self._chain, part) or len(self._chain) >= self.keyframe_every:
            return []
        base, attempt = self._chain[-1]
        found = self._published.intact(base) if base < version else None
        return self._chain if found and found['attempt'] == attempt else []

    def _write(self, part: Part, version: int, begun: dict) -> list[int] | None:
        """Writes this host's shards; the elements of each array, or None without the base."""
        bases, link = begun.get('bases', []), [version, begun['attempt']]
        if bases and not self._holds(bases, part):
            return None
        part.write(
            lambda name: self._published.open_array(link, part.arrays, name, bool(bases)),
            self._copy if bases else None,
        )
        return part.elements()

    def _holds(self, links: list[Link], part: Part) -> bool:
        """Whether this host has the bits of that version, of the same shards as `part`."""
        return bool(self._chain) and self._chain == links and self._copy.matches(part)

    def _hold(self, part: Part, manifest: dict) -> None:
        """Copies this host's shards of what was committed, over those of the version before."""
        self._chain = []  # a copy that is interrupted leaves bits of no version
        if self.keyframe_every > 1:
            self._copy = part.copy(self._copy)
            self._chain = chain(manifest)

    def _put(self, key: str, document: dict) -> None:
        self._published.kvstore.write(key, seal(document)).result()

    def _get(self, key: str) -> dict | None:
        found = self._published.kvstore.read(key).result()
        return unseal(found.value) if found.state == 'value' else None

    def _wait(
        self, look: Callable[[], Answer | None], deadline: float, host: str, version: int
    ) -> Answer:
        """The first answer of `look` that is not None.

        A loop by hand: with a library for retries it takes more lines to say what None means.
        """
        while True:
            answer = look()
            if answer is not None:
                return answer
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f'{self.url}: waited in vain for {host} to publish version {version}; is that '
                    f'host alive?'
                )
            time.sleep(_POLL_SECONDS)

    def _forget(self, versions: list[int]) -> None:
        for version in versions:
            self._published.kvstore.write(manifest_key(version), None).result()

    def _collect(self, version: int) -> None:
        """Deletes what is older than the newest `keep` versions and their bases.

        Manifests go first: a reader whose chunks are gone finds that its version is.
        """
        versions = self.versions()
        kept = {*versions[-self.keep :], version}
        self._forget([old for old in versions if old not in kept])
        chains = [chain(manifest) for manifest in map(self._published.intact, kept) if manifest]
        first = min((links[0][0] for links in chains), default=min(kept))
        old = ts.KvStore.KeyRange('data/', f'data/{first:010d}')
        self._published.kvstore.delete_range(old).result()


class WeightReader:
    """Follows the versions of one store and holds the arrays of the one that it read last.

    A version that continues from that one costs the deltas between them; any other, such as the
    first, or one of a learner that went back, is read from its key frame on.
    """

    def __init__(
        self, published: Versions, names: list[str] | None, slices: Mapping[str, Index] | None
    ):
        self._published, self._names, self._slices = published, names, slices
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
        manifest = self._published.get(version)
        links = chain(manifest)
        have, arrays = (self._link, self._arrays) if self._link in links else (None, None)
        self._link, self._arrays = None, {}  # arrays that are half changed are of no version
        self._arrays = self._published.read(manifest, self._names, self._slices, have, arrays)
        self._link = links[-1]
        views = {name: array.view() for name, array in self._arrays.items()}
        for view in views.values():
            view.flags.writeable = False
        return views


def _attempt_key(version: int) -> str:
    return f'data/{version:010d}/attempt'


def _host_key(version: int, begun: dict, process_index: int) -> str:
    return f'data/{version:010d}/{begun["attempt"]}/host.{process_index}'
