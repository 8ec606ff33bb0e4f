"""What the learner's forward pass said of the tokens of groups: log-probabilities and entropy.

It is for people to look at (echo_jax.view); nothing is decided by it. The rollouts themselves are
in a RolloutStore, and a group has the same number in both. The scores of a group are one key,
`groups/000000000012`: a sealed JSON header (kvstore.py), then one compressed chunk (chunks.py).
float16 is enough to colour tokens by: its error is 0.05% of a value, and a token takes 6 bytes.

A step that is trained again, because a run was resumed, writes its groups again: the last write
wins, and a reader sees one of them whole.
"""

import pathlib
import zlib
from collections.abc import Mapping

import numpy as np
import tensorstore as ts

from echo_jax.store.chunks import compress, decompress, planes, unplanes
from echo_jax.store.groups import check_number, group_key, list_groups
from echo_jax.store.kvstore import CorruptError, open_kvstore, seal, unseal_first
from echo_jax.types import TokenScores

FORMAT = 1
MAX_PAYLOAD = 1 << 28  # bytes of one group uncompressed, as of a group of rollouts
_DTYPE = np.dtype('<f2')


class ScoreStore:
    """Scores under `url`: a path, or a `file://`, `gs://`, `s3://` or `memory://` URL.

    Calls block. Threads may share one store.
    """

    def __init__(self, url: str | pathlib.Path):
        self.url = str(url)
        self._kvstore = open_kvstore(url)

    def write_group(self, group_id: int, scores: Mapping[int, TokenScores]) -> None:
        """Writes the scores of rollouts of a group, by sample_id, in place of any that are there.

        They are float16 [T], of the weights that the rollouts' step started from. Raises ValueError
        for arrays that are not, or not finite.
        """
        check_number(group_id)
        for sample_id, each in scores.items():
            _check(f'sample {sample_id} of group {group_id}', each)
        columns = [array for each in scores.values() for array in each]
        payload = b''.join(planes(array.astype(_DTYPE)) for array in columns)
        if len(payload) > MAX_PAYLOAD:
            raise ValueError(f'scores of {len(payload)} bytes; expected at most {MAX_PAYLOAD}')
        chunk = compress(payload) if payload else b''
        header = {
            'format': FORMAT,
            'group_id': group_id,
            'samples': [[sample_id, len(each.logprobs)] for sample_id, each in scores.items()],
            'chunk': len(chunk),
            'crc': zlib.crc32(chunk),
        }
        self._kvstore[group_key(group_id)] = seal(header) + chunk

    def read_group(self, group_id: int) -> dict[int, TokenScores] | None:
        """The scores of a group by sample_id; None if none are kept.

        Raises CorruptError for damaged ones, and ValueError if a later echo_jax has written them.
        """
        found = self._kvstore.read(group_key(group_id)).result()
        if found.state == 'missing':
            return None
        try:
            header, rest = unseal_first(found.value)
            if header['format'] == FORMAT:
                return _decode(group_id, header, rest)
        except (ValueError, TypeError, LookupError) as error:
            raise CorruptError(
                f'the scores of group {group_id} in {self.url} are corrupt ({error}); remove '
                f'{group_key(group_id)} from it: nothing but the viewer reads them'
            ) from error
        raise ValueError(
            f'the scores of group {group_id} in {self.url} have format {header["format"]!r}; '
            f'expected {FORMAT}: update echo_jax'
        )

    def groups(self) -> list[int]:
        """Ids of the groups whose scores are kept, ascending."""
        return list_groups(self._kvstore)

    def keep(self, first_group: int) -> None:
        """Removes the scores of all groups before `first_group`, so that the store stays small."""
        old = ts.KvStore.KeyRange(group_key(0), group_key(first_group))
        self._kvstore.delete_range(old).result()


def _check(name: str, scores: TokenScores) -> None:
    for field, array in scores._asdict().items():
        if array.dtype != np.float16 or array.shape != (len(scores.logprobs),):
            raise ValueError(
                f'{name}: {field} is {array.dtype} {list(array.shape)}; expected float16 '
                f'[{len(scores.logprobs)}]'
            )
        if not np.isfinite(array).all():
            raise ValueError(f'{name}: {field} is not finite; expected finite nats')


def _decode(group_id: int, header: dict, rest: bytes) -> dict[int, TokenScores]:
    if header['group_id'] != group_id:
        raise ValueError(f'it holds group {header["group_id"]}')
    chunk = rest[: header['chunk']]  # for what follows see kvstore.py
    if zlib.crc32(chunk) != header['crc']:
        raise ValueError('checksum of the chunk does not match')
    lengths = [length for _, length in header['samples'] for _ in TokenScores._fields]
    # Before anything is allocated: a damaged header cannot get here, a made one can.
    if not all(isinstance(n, int) and 0 <= n <= MAX_PAYLOAD for n in lengths):
        raise ValueError('a length that is none')
    size = sum(lengths) * _DTYPE.itemsize
    if size > MAX_PAYLOAD:
        raise ValueError(f'payload of {size} bytes; expected at most {MAX_PAYLOAD}')
    payload = decompress(chunk, size) if size else np.zeros(0, np.uint8)
    parts = np.split(payload, np.cumsum(lengths)[:-1] * _DTYPE.itemsize)
    columns = iter(unplanes(part, _DTYPE) for part in parts)
    return {
        sample_id: TokenScores(*(next(columns) for _ in TokenScores._fields))
        for sample_id, _ in header['samples']
    }
