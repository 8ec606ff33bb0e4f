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
from echo_jax.store.kvstore import CorruptError, MissingError, inside, open_kvstore, unseal
from echo_jax.store.shards import Index

Link = list  # [version, attempt]
Held = tuple[Link, dict[str, np.ndarray]]  # a version that was read, and its arrays


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
        found = self.kvstore.read(manifest_key(version)).result()
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
            raise self._missing(version)
        return manifest

    def read(
        self,
        manifest: dict,
        names: list[str] | None,
        slices: Mapping[str, Index] | None,
        held: Held | None = None,
    ) -> dict[str, np.ndarray]:
        """The arrays of a manifest: all of them or those in `names`, and of these all or `slices`.

        `held` is a base of it, or itself, that the caller has: its arrays are changed in place.
        """
        version, described, links = manifest['version'], manifest['arrays'], chain(manifest)
        base, arrays = held or (None, {})
        names, slices = list(described) if names is None else names, slices or {}
        unknown = [name for name in {*names, *slices} if name not in described]
        if unknown or not {*slices} <= {*names}:
            raise ValueError(
                f'version {version} in {self.url} has no arrays {unknown}; it has '
                f'{list(described)}; slices are of arrays in names'
            )
        for link in links[links.index(base) + 1 :] if base else links:
            delta = link != links[0]
            sources = {
                name: self.open_array(link, described, name, delta)[slices.get(name, ...)]
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
                if self.find(version) != manifest:
                    raise self._missing(version) from error
                raise self._corrupt(version, error, link[0]) from error
        return arrays

    def open_array(self, link: Link, described: dict, name: str, delta: bool) -> ts.TensorStore:
        """The zarr3 array `name` of one version and attempt."""
        version, attempt = link
        number = sorted(described).index(name)
        folder = self.kvstore / f'data/{version:010d}/{attempt}/{number:04d}/'
        return shards.open_part(folder, described[name], delta)

    def _missing(self, version: int) -> MissingError:
        return MissingError(
            f'version {version} is not in {self.url}, which has {self.numbers()}: it was '
            f'collected or is not finished; take latest() and retry'
        )

    def _corrupt(self, version: int, error: Exception, damaged: int) -> CorruptError:
        return CorruptError(
            f'version {version} in {self.url} is corrupt ({error}); read another one, or let the '
            f'learner publish it again after WeightStore({self.url!r}).rewind({damaged - 1})'
        )


def chain(manifest: dict) -> list[Link]:
    """What is read for a version, key frame first: its bases, and itself."""
    return [*manifest.get('bases', []), [manifest['version'], manifest['attempt']]]


def manifest_key(version: int) -> str:
    return f'manifests/{version:010d}'
