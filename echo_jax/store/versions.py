"""The published versions of the weights in one store: which there are, and the arrays of each.

It publishes and deletes nothing (weights.py does). Under the store's URL are

    manifests/0000000007                the commit: attempt, bases, each array's shape and dtype
    data/0000000007/attempt             names the attempt that is under way; process 0 writes it
    data/0000000007/ATTEMPT/0012/c.0.3  one zarr3 chunk of array 12 (in order of name), with CRC-32C
    data/0000000007/ATTEMPT/host.3      process 3 has written its shards

Metadata is in the manifest and nowhere else, so a read costs one GET and then the chunks. Chunks
are at most 16 MiB, so that a slice reads little besides itself.

A version is a key frame (kind 'full': its values, not compressed, since bfloat16 weights shrink by
a fifth at ten times the cost) or a delta: the bits XOR those of its base, packed (shards.py). Its
manifest lists the bases, key frame first, each by version and attempt, so a delta never meets other
bits than it was made from, and reading it needs no other manifest.
"""

import itertools
import pathlib
import re
from collections.abc import Mapping

import numpy as np
import tensorstore as ts

from echo_jax.store import shards
from echo_jax.store.kvstore import CorruptError, MissingError, inside, open_kvstore, read_sealed
from echo_jax.store.shards import Index

Link = list  # [version, attempt]


class Versions:
    """What is published under `url`; `kvstore` is all that lies there."""

    def __init__(self, url: str | pathlib.Path):
        self.url = str(url)
        self.kvstore = open_kvstore(url)

    def numbers(self) -> list[int]:
        """The published versions, ascending."""
        found = self.kvstore.list(inside('manifests')).result()
        matches = (re.fullmatch(rb'manifests/(\d{10})', key) for key in found)
        return sorted(int(match[1]) for match in matches if match)

    def find(self, version: int) -> dict | None:
        """The manifest of a version; None if it is not published."""
        try:
            manifest = read_sealed(self.kvstore, manifest_key(version))
        except CorruptError as error:
            raise self.corrupt(version, error, version) from error
        if manifest is not None and manifest.get('kind') not in ('full', 'delta'):
            raise ValueError(
                f'version {version} in {self.url} is of kind {manifest.get("kind")!r}; '
                f"this reader knows 'full' and 'delta': update it"
            )
        return manifest

    def intact(self, version: int) -> dict | None:
        """As `find`, but None for a damaged manifest, too: to publish, it is as good as absent."""
        try:
            return self.find(version)
        except CorruptError:
            return None

    def get(self, version: int) -> dict:
        """The manifest of a version; MissingError if it is not published."""
        manifest = self.find(version)
        if manifest is None:
            raise self.missing(version)
        return manifest

    def open_array(self, link: Link, described: dict, name: str, delta: bool) -> ts.TensorStore:
        """The zarr3 array `name` of one version and attempt."""
        version, attempt = link
        number = sorted(described).index(name)
        folder = self.kvstore / f'data/{version:010d}/{attempt}/{number:04d}/'
        return shards.open_part(folder, described[name], delta)

    def missing(self, version: int) -> MissingError:
        return MissingError(
            f'version {version} is not in {self.url}, which has {self.numbers()}: it was '
            f'collected or is not finished; take latest() and retry'
        )

    def corrupt(self, version: int, error: Exception, damaged: int) -> CorruptError:
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
        self, published: Versions, names: list[str] | None, slices: Mapping[str, Index] | None
    ):
        self._published, self._names, self._slices = published, names, slices or {}
        self._link: Link | None = None
        self._arrays: dict[str, np.ndarray] = {}

    @property
    def version(self) -> int | None:
        """The version that it holds; None before the first read and after one that failed."""
        return self._link[0] if self._link else None

    def read(self, version: int) -> dict[str, np.ndarray]:
        """The arrays of a version: read-only views, good until the next `read`, which changes them.

        Copy what must outlive that, also before `jax.device_put` on a CPU: it may keep the memory.
        Raises what `WeightStore.read` raises; the next read then starts from a key frame.
        """
        views = {name: array.view() for name, array in self.read_writable(version).items()}
        for view in views.values():
            view.flags.writeable = False
        return views

    def read_writable(self, version: int) -> dict[str, np.ndarray]:
        """As `read`, but the arrays themselves: for a caller that reads once and then owns them."""
        manifest = self._published.get(version)
        described, links = manifest['arrays'], chain(manifest)
        held, arrays = (self._link, self._arrays) if self._link in links else (None, {})
        self._link, self._arrays = None, {}  # arrays that are half changed are of no version
        names = list(described) if self._names is None else self._names
        unknown = [name for name in {*names, *self._slices} if name not in described]
        if unknown or not {*self._slices} <= {*names}:
            raise ValueError(
                f'version {version} in {self._published.url} has no arrays {unknown}; it has '
                f'{list(described)}; slices are of arrays in names'
            )
        for link in links[links.index(held) + 1 :] if held else links:
            delta = link != links[0]
            sources = {
                name: self._published.open_array(link, described, name, delta)[
                    self._slices.get(name, ...)
                ]
                for name in names
            }
            try:
                if delta:
                    jobs = (shards.apply(sources[name], arrays[name]) for name in names)
                    shards.run(itertools.chain.from_iterable(jobs))
                else:
                    futures = {name: source.read() for name, source in sources.items()}
                    arrays = {name: np.asarray(future.result()) for name, future in futures.items()}
            except ValueError as error:
                # A chunk that cannot be read is damage only if the version is still published. A
                # learner that publishes meanwhile may have collected it under this reader.
                if self._published.find(version) != manifest:
                    raise self._published.missing(version) from error
                raise self._published.corrupt(version, error, link[0]) from error
        self._link, self._arrays = links[-1], arrays
        return arrays


def chain(manifest: dict) -> list[Link]:
    """What is read for a version, key frame first: its bases, and itself."""
    return [*manifest.get('bases', []), [manifest['version'], manifest['attempt']]]


def manifest_key(version: int) -> str:
    return f'manifests/{version:010d}'
