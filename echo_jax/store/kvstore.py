"""What all stores need of TensorStore: opening a URL, write-once keys, sealed documents, arrays.

It knows nothing of rollouts or weights. The stores rest on one property of every TensorStore
driver: the write of one key is atomic, so a reader sees the old value or the new one, never a part.

A value may have more bytes than were written, though. The `file` driver writes KEY.__lock and
renames it. If a writer is killed in between, the file stays, and the next writer writes over it
without cutting it (TensorStore 0.1.86): a shorter value keeps the tail of the longer one. So each
value whose key can be written twice says how long it is, and readers ignore what follows.
"""

import functools
import json
import logging
import pathlib
import zlib
from collections.abc import Iterable

import tensorstore as ts


class MissingError(LookupError):
    """Not in the store, or not any more: look again (`groups`, `latest`) and retry with what is."""


class CorruptError(ValueError):
    """Finished, but its bytes are not what was written: never retried, never returned."""


def open_kvstore(url: str | pathlib.Path) -> ts.KvStore:
    """Opens the folder at `url`: a path, or `file://`, `gs://`, `s3://`, `memory://`.

    Nothing is created before the first write. Every call with `memory://` opens a new empty store.
    """
    url = str(url)
    if '://' not in url:
        spec = {'driver': 'file', 'path': str(pathlib.Path(url).absolute()) + '/'}
    else:
        spec = url if url.endswith('/') else url + '/'
    return ts.KvStore.open(spec).result()


def inside(folder: str) -> ts.KvStore.KeyRange:
    """The keys under `folder`."""
    return ts.KvStore.KeyRange(f'{folder}/', f'{folder}0')  # '0' follows '/'


def write_once(kvstore: ts.KvStore, key: str, value: bytes) -> bool:
    """Writes `key` unless it exists; True if this call wrote it.

    If several write at the same moment, the first wins on drivers with conditional writes (`file`,
    `memory`, `gs`). On an S3 service without them the last wins, still with a whole value.
    """
    found = kvstore.read(key).result()
    if found.state == 'value':
        return False
    stamp = kvstore.write(key, value, if_equal=found.stamp.generation).result()
    return stamp.generation != b''  # empty: the condition failed, somebody else was first


def seal(document: dict) -> bytes:
    """JSON behind a line with its CRC-32 and length."""
    text = json.dumps(document).encode()
    return b'%08x %010d\n' % (zlib.crc32(text), len(text)) + text


def unseal(data: bytes) -> dict:
    """The document that `seal` got, whatever follows it; CorruptError for any other bytes."""
    return unseal_first(data)[0]


def intact(documents: Iterable[tuple[str, bytes]]) -> list[dict]:
    """Those of the documents, (name, what `seal` gave), that are not damaged; others are logged."""
    found = []
    for name, data in documents:
        try:
            found.append(unseal(data))
        except CorruptError as error:
            _name_damaged(name, str(error))
    return found


@functools.lru_cache(maxsize=1000)  # so it is said once of each, however often it is read
def _name_damaged(name: str, error: str) -> None:
    logging.warning('%s is damaged, and counts as if it were not there: %s', name, error)


def unseal_first(data: bytes) -> tuple[dict, bytes]:
    """The same, and the bytes that follow the document."""
    line, _, text = data.partition(b'\n')
    length = int(line[9:]) if line[9:].isdigit() else len(text)
    text, rest = text[:length], text[length:]
    if line != b'%08x %010d' % (zlib.crc32(text), len(text)):
        raise CorruptError(f'checksum of a {len(data)} byte document does not match')
    return json.loads(text), rest


def read_sealed(kvstore: ts.KvStore, key: str) -> dict | None:
    """The sealed document under `key`; None if there is none, CorruptError if it is damaged."""
    found = kvstore.read(key).result()
    return unseal(found.value) if found.state == 'value' else None


def open_array(
    kvstore: ts.KvStore, shape: list[int], dtype: str, chunk: list[int], codecs: list[dict]
) -> ts.TensorStore:
    """The zarr3 array in `kvstore`, whose metadata are these arguments and are stored nowhere.

    A chunk that is not there is an error. By default TensorStore stores no chunk that is all zeros
    and reads a missing one as zeros, so a lost file would be read as data.
    """
    metadata = {
        'zarr_format': 3,
        'node_type': 'array',
        'shape': shape,
        'data_type': dtype,
        'fill_value': 0,
        'chunk_grid': {'name': 'regular', 'configuration': {'chunk_shape': chunk}},
        'chunk_key_encoding': {'name': 'default', 'configuration': {'separator': '.'}},
        'codecs': [{'name': 'bytes', 'configuration': {'endian': 'little'}}, *codecs],
    }
    spec = {
        'driver': 'zarr3',
        'metadata': metadata,
        'store_data_equal_to_fill_value': True,
        'fill_missing_data_reads': False,
    }
    return ts.open(spec, kvstore=kvstore, open=True, assume_metadata=True).result()
