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

import math
import pathlib
import secrets
import time
from collections.abc import Mapping

import numpy as np
import tensorstore as ts

from echo_jax.store.kvstore import CorruptError, MissingError, read_sealed, seal, write_once
from echo_jax.store.shards import Index, Params, Part
from echo_jax.store.versions import Link, Versions, WeightReader, chain, manifest_key

_POLL_SECONDS = 0.1
UNREADABLE = 'unreadable'  # stands for the attempt of a version whose manifest is damaged


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
        self.published = Versions(url)
        self._kvstore = self.published.kvstore
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
        try:
            if self.published.find(version) is not None:
                return False
        except CorruptError:
            if process_index == 0:  # or the damaged manifest would be in the way
                self._forget([version])
        if process_index == 0:
            done = self._lead(part, version, process_count, deadline, about or {})
            self._collect(version)
            return done
        return self._follow(part, version, process_index, deadline)

    def versions(self) -> list[int]:
        """The published versions, ascending."""
        return self.published.numbers()

    def latest(self) -> int | None:
        """The newest published version; None if there is none yet."""
        versions = self.versions()
        return versions[-1] if versions else None

    def newest(self) -> tuple[int, str] | None:
        """(version, attempt) of the newest version; another attempt may have other bits.

        The attempt is UNREADABLE if the manifest, which names it, is damaged.
        """
        while True:
            version = self.latest()
            if version is None:
                return None
            try:
                manifest = self.published.find(version)
            except CorruptError:
                return version, UNREADABLE
            if manifest is not None:  # unless it was rewound meanwhile
                return version, manifest['attempt']

    def is_sound(self, version: int) -> bool:
        """Whether all arrays of a version can be read; True too if it was collected.

        They are read one by one, so it takes the memory of the largest.
        """
        try:
            for name in self.published.get(version)['arrays']:
                self.read(version, [name])
        except CorruptError:
            return False
        except MissingError:
            pass
        return True

    def about(self, version: int) -> dict:
        """What `publish` was told of a version; MissingError if it was collected."""
        return self.published.get(version).get('about', {})

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
        return self.reader(names, slices).read_writable(version)

    def reader(
        self, names: list[str] | None = None, slices: Mapping[str, Index] | None = None
    ) -> WeightReader:
        """A reader that follows the versions of these arrays, or parts of them, as in `read`."""
        return WeightReader(self.published, names, slices)

    def rewind(self, version: int) -> None:
        """Forgets the versions after `version`: for a learner that resumes before them."""
        self._forget([later for later in self.versions() if later > version])
        beyond = ts.KvStore.KeyRange(f'data/{version + 1:010d}', 'data0')
        self._kvstore.delete_range(beyond).result()

    def _lead(
        self, part: Part, version: int, process_count: int, deadline: float, about: dict
    ) -> bool:
        """Process 0's part: opens an attempt, waits for the other hosts, commits."""
        for bases in (self._bases(part, version), []):
            begun = {'attempt': secrets.token_hex(8), 'bases': bases}
            self._kvstore[_attempt_key(version)] = seal(begun)
            self._write(part, version, begun)
            written = [part.elements()]  # of each array, by each process
            for process_index in range(1, process_count):
                while True:
                    marker = read_sealed(self._kvstore, _host_key(version, begun, process_index))
                    if marker is not None:
                        break
                    self._pause(deadline, f'process {process_index}', version)
                if marker['layout'] != part.digest():
                    raise ValueError(
                        f'process {process_index} publishes version {version} with other names, '
                        f'shapes, dtypes or shards than process 0; give every process the same '
                        f'arrays'
                    )
                if marker['written'] is None:  # it does not hold the base
                    break
                written.append(marker['written'])
            if len(written) == process_count:
                break
        for (name, array), counts in zip(part.arrays.items(), zip(*written)):
            expected = math.prod(array['shape'])
            if sum(counts) != expected:
                raise ValueError(
                    f'{process_count} processes wrote {sum(counts)} elements of {name}; expected '
                    f'{expected}: check process_count, and that arrays are global'
                )
        kind = 'delta' if begun['bases'] else 'full'
        manifest = {
            'kind': kind,
            'version': version,
            **begun,
            'about': about,
            'arrays': part.arrays,
        }
        done = write_once(self._kvstore, manifest_key(version), seal(manifest))
        if done:
            self._hold(part, manifest)
        return done

    def _follow(self, part: Part, version: int, process_index: int, deadline: float) -> bool:
        """Another process's part, again for each attempt that it sees, until one is committed."""
        mine = None
        while True:
            manifest = self.published.intact(version)
            if manifest is not None:
                if manifest['attempt'] == mine:
                    self._hold(part, manifest)
                return mine is not None
            begun = read_sealed(self._kvstore, _attempt_key(version))
            if begun is None or begun['attempt'] == mine:
                self._pause(deadline, 'process 0', version)
                continue
            mine, bases, written = begun['attempt'], begun.get('bases', []), None
            if not bases or self._holds(bases, part):
                self._write(part, version, begun)
                written = part.elements()
            marker = {'layout': part.digest(), 'written': written}
            self._kvstore[_host_key(version, begun, process_index)] = seal(marker)

    def _bases(self, part: Part, version: int) -> list[Link]:
        """What process 0 proposes to make `version` a delta to; empty: a key frame."""
        if not self._holds(self._chain, part) or len(self._chain) >= self.keyframe_every:
            return []
        base, attempt = self._chain[-1]
        found = self.published.intact(base) if base < version else None
        return self._chain if found and found['attempt'] == attempt else []

    def _write(self, part: Part, version: int, begun: dict) -> None:
        """Writes this host's shards to an attempt."""
        link, delta = [version, begun['attempt']], bool(begun.get('bases'))
        part.write(
            lambda name: self.published.open_array(link, part.arrays, name, delta),
            self._copy if delta else None,
        )

    def _holds(self, links: list[Link], part: Part) -> bool:
        """Whether this host has the bits of that version, of the same shards as `part`."""
        if self._copy is None or not self._chain or self._chain != links:
            return False
        return self._copy.matches(part)

    def _hold(self, part: Part, manifest: dict) -> None:
        """Copies this host's shards of what was committed, over those of the version before."""
        self._chain = []  # a copy that is interrupted leaves bits of no version
        if self.keyframe_every > 1:
            self._copy = part.copy(self._copy)
            self._chain = chain(manifest)

    def _pause(self, deadline: float, host: str, version: int) -> None:
        """Sleeps before another look at the store; TimeoutError once the deadline has passed."""
        if time.monotonic() > deadline:
            raise TimeoutError(
                f'{self.url}: waited in vain for {host} to publish version {version}; is that '
                f'host alive?'
            )
        time.sleep(_POLL_SECONDS)

    def _forget(self, versions: list[int]) -> None:
        for version in versions:
            del self._kvstore[manifest_key(version)]

    def _collect(self, version: int) -> None:
        """Deletes what is older than the newest `keep` versions and their bases.

        Manifests go first: a reader whose chunks are gone finds that its version is.
        """
        versions = self.versions()
        kept = {*versions[-self.keep :], version}
        self._forget([old for old in versions if old not in kept])
        chains = [chain(manifest) for manifest in map(self.published.intact, kept) if manifest]
        first = min((links[0][0] for links in chains), default=min(kept))
        old = ts.KvStore.KeyRange('data/', f'data/{first:010d}')
        self._kvstore.delete_range(old).result()


def _attempt_key(version: int) -> str:
    return f'data/{version:010d}/attempt'


def _host_key(version: int, begun: dict, process_index: int) -> str:
    return f'data/{version:010d}/{begun["attempt"]}/host.{process_index}'
