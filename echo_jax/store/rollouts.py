"""Groups of rollouts, from workers to the learner, through any store that TensorStore opens.

It stores and finds groups. Which of them to draw and to train on is for the learner to say.

A group is one key, `groups/000000000012`, written on condition that it does not exist: the write is
the commit, so there is nothing unfinished to see or to clean up, the first writer wins, and a group
costs one PUT and one GET on an object store. (An OCDBT database or a zarr hierarchy for each group
would take three and more, and a second key as commit marker.) The value is

    prefix   48 bytes: format, group's number and sizes, CRC-32 of the chunk, CRC-32 of the prefix
    chunk    one zstd-compressed zarr3 chunk: a JSON header, then the columns of all rollouts one
             after another, each with its bytes in planes (all lowest bytes, ..., all highest)

store/chunks.py says why planes and why zstd. Nothing is unpickled.

Groups of formats 1 and 2 can be read, too. They have no `reason` and no `tests_output`. The prefix
of format 1 has 8 more bytes, which nothing reads any more, and `environment_only` was a metric of
each rollout instead of a column of the header.
"""

import json
import logging
import pathlib
import re
import struct
import zlib
from collections.abc import Iterable, Sequence

import numpy as np
import tensorstore as ts

from echo_jax.store.chunks import compress, decompress, planes, unplanes
from echo_jax.store.groups import check_number, group_key, list_groups
from echo_jax.store.kvstore import CorruptError, MissingError, inside, open_kvstore, write_once
from echo_jax.types import Role, Rollout, Status

MAX_PAYLOAD = 1 << 28  # bytes of one group uncompressed; 32 x 32,768 tokens take 14 MB
# By format, which is the first 8 bytes: group's number; bytes of the payload (uncompressed), of
# the header and of the chunk; CRC-32 of the chunk and of the prefix.
_PREFIXES = {
    b'echogrp1': struct.Struct('<8sq8xQQQII'),
    b'echogrp2': struct.Struct('<8sqQQQII'),
    b'echogrp3': struct.Struct('<8sqQQQII'),
}
_NEWEST = b'echogrp3'
_COLUMNS = {
    'tokens': np.dtype('<i4'),
    'roles': np.dtype('u1'),
    'rollout_logprobs': np.dtype('<f4'),
    'policy_versions': np.dtype('<i4'),
    'turn_starts': np.dtype('<i4'),
}


class RolloutStore:
    """Groups under `url`: a path, or a `file://`, `gs://`, `s3://` or `memory://` URL.

    Calls block; from asyncio use `asyncio.to_thread`. Threads may share one store.
    """

    def __init__(self, url: str | pathlib.Path):
        self.url = str(url)
        self._kvstore = open_kvstore(url)

    def write_group(self, rollouts: Sequence[Rollout]) -> bool:
        """Writes the rollouts of one group; True if this call wrote it, False if it was there.

        Raises ValueError if the rollouts are not one group or break the contract of `Rollout`.
        """
        check_group(rollouts)
        group_id = int(rollouts[0].group_id)
        return write_once(self._kvstore, group_key(group_id), _encode(rollouts))

    def read_groups(self, ids: Iterable[int]) -> list[list[Rollout]]:
        """The groups `ids`, in that order, with the rollouts of each as they were written.

        Raises MissingError for a group that is not there, CorruptError for one that is damaged, and
        ValueError for one that a later version of echo_jax has written.
        """
        ids = list(ids)
        futures = [self._kvstore.read(group_key(group_id)) for group_id in ids]
        return [self._decode(group_id, future.result()) for group_id, future in zip(ids, futures)]

    def read_sound(self, ids: Iterable[int]) -> dict[int, list[Rollout]]:
        """Those of the groups that are there and undamaged, by number.

        A damaged one is set aside as `aside/000000000012`, which is logged. Then it is missing, and
        can be drawn and written anew.
        """
        sound = {}
        futures = {group_id: self._kvstore.read(group_key(group_id)) for group_id in ids}
        for group_id, future in futures.items():
            found = future.result()
            if found.state == 'missing':
                continue
            try:
                sound[group_id] = self._decode(group_id, found)
            except CorruptError as error:
                aside = f'aside/{group_id:012d}'
                self._kvstore[aside] = found.value
                self.remove([group_id])
                logging.error(
                    'group %d in %s is corrupt (%s); it is set aside as %s and drawn anew',
                    group_id,
                    self.url,
                    error.__cause__,
                    aside,
                )
        return sound

    def groups(self, first: int = 0) -> list[int]:
        """Ids, from `first` on, of the groups that are there, ascending. Each can be read whole."""
        return list_groups(self._kvstore, first)

    def set_aside(self) -> list[int]:
        """Ids of the groups that `read_sound` has found damaged, ascending."""
        keys = self._kvstore.list(inside('aside')).result()
        return sorted(int(key.rpartition(b'/')[2]) for key in keys if key[-12:].isdigit())

    def missing(self, ids: Iterable[int]) -> list[int]:
        """Those of `ids` that are not there, in their order."""
        ids = list(ids)
        # A long run asks for its last few groups again and again, so the others are not listed.
        there = set(self.groups(min(ids, default=0)))
        return [group_id for group_id in ids if group_id not in there]

    def remove(self, ids: Iterable[int]) -> None:
        """Removes groups, which may be written anew; one that is not there does no harm."""
        for removed in [self._kvstore.write(group_key(group_id), None) for group_id in ids]:
            removed.result()

    def _decode(self, group_id: int, found: ts.KvStore.ReadResult) -> list[Rollout]:
        if found.state == 'missing':
            raise MissingError(f'group {group_id} is not in {self.url}; take ids from groups()')
        form = found.value[:8]
        if form not in _PREFIXES and re.fullmatch(rb'echogrp\d', form):
            known = ' or '.join(each.decode() for each in _PREFIXES)
            raise ValueError(
                f'group {group_id} in {self.url} has format {form.decode()}; expected {known}: '
                'update echo_jax'
            )
        try:
            return _decode(group_id, found.value)
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise CorruptError(
                f'group {group_id} in {self.url} is corrupt ({error}); remove '
                f'{group_key(group_id)} from it and start the run again, which draws the group anew'
            ) from error


def check_group(rollouts: Sequence[Rollout]) -> None:
    """ValueError unless these rollouts are one group and every array keeps the contract."""
    if not rollouts:
        raise ValueError('a group of 0 rollouts; expected at least one')
    first = rollouts[0]
    check_number(first.group_id)
    if not isinstance(first.task_id, str):
        raise ValueError(f'group {first.group_id} has task_id {first.task_id!r}; expected a string')
    ids = [rollout.sample_id for rollout in rollouts]
    if len({*ids}) != len(ids):
        raise ValueError(f'group {first.group_id} has sample_ids {ids}; expected distinct ones')
    for rollout in rollouts:
        name = f'rollout {rollout.sample_id} of group {rollout.group_id}'
        if (rollout.group_id, rollout.task_id) != (first.group_id, first.task_id):
            raise ValueError(
                f'{name} is of task {rollout.task_id!r}; expected group {first.group_id} of task '
                f'{first.task_id!r} as the first rollout: write one group at a time'
            )
        if not isinstance(rollout.environment_only, bool):
            raise ValueError(
                f'{name}: environment_only is {rollout.environment_only!r}; expected a bool'
            )
        for text in ('reason', 'tests_output'):
            if not isinstance(getattr(rollout, text), str):
                raise ValueError(f'{name}: {text} is {getattr(rollout, text)!r}; expected a text')
        _check_arrays(name, rollout)


def _check_arrays(name: str, rollout: Rollout) -> None:
    length = len(rollout.tokens)
    for column, dtype in _COLUMNS.items():
        array = getattr(rollout, column)
        expected = array.shape if column == 'turn_starts' else (length,)
        if array.dtype != dtype or array.ndim != 1 or array.shape != expected:
            count = 'turns' if column == 'turn_starts' else length
            raise ValueError(
                f'{name}: {column} is {array.dtype} {list(array.shape)}; expected {dtype} [{count}]'
            )
    if length and rollout.roles.max() > max(Role):
        raise ValueError(f'{name}: role {rollout.roles.max()}; expected 0 to {max(Role):d}')
    turns = rollout.turn_starts
    if len(turns) and not 0 <= turns.min() <= turns.max() < length:
        raise ValueError(f'{name}: turn_starts {turns}; expected indices into {length} tokens')


def _encode(rollouts: Sequence[Rollout]) -> bytes:
    group_id = int(rollouts[0].group_id)
    header = {
        'task_id': rollouts[0].task_id,
        'sample_id': [int(rollout.sample_id) for rollout in rollouts],
        'environment_only': [bool(rollout.environment_only) for rollout in rollouts],
        'status': [Status(rollout.status).value for rollout in rollouts],
        'reason': [rollout.reason for rollout in rollouts],
        'tests_output': [rollout.tests_output for rollout in rollouts],
        'tokens': [len(rollout.tokens) for rollout in rollouts],
        'turns': [len(rollout.turn_starts) for rollout in rollouts],
        'metrics': [list(rollout.metrics) for rollout in rollouts],
    }
    metrics = [value for rollout in rollouts for value in rollout.metrics.values()]
    floats = np.array([*(rollout.reward for rollout in rollouts), *metrics], '<f8')
    columns = [np.concatenate([getattr(rollout, c) for rollout in rollouts]) for c in _COLUMNS]
    text = json.dumps(header).encode()
    payload = b''.join([text, planes(floats), *map(planes, columns)])
    if len(payload) > MAX_PAYLOAD:
        raise ValueError(f'group of {len(payload)} bytes; expected at most {MAX_PAYLOAD}')
    chunk = compress(payload)
    sizes = len(payload), len(text), len(chunk)
    prefix = _PREFIXES[_NEWEST].pack(_NEWEST, group_id, *sizes, zlib.crc32(chunk), 0)[:-4]
    return prefix + struct.pack('<I', zlib.crc32(prefix)) + chunk


def _decode(group_id: int, data: bytes) -> list[Rollout]:
    form, header, body = _unpack(group_id, data)
    count = len(header['sample_id'])
    per_rollout = ['status', 'tokens', 'turns', 'metrics']
    if form != b'echogrp1':
        per_rollout.append('environment_only')
    if form not in (b'echogrp1', b'echogrp2'):
        per_rollout += ['reason', 'tests_output']
    if {len(header[key]) for key in per_rollout} != {count}:
        raise ValueError('header disagrees about the number of rollouts')
    # Lengths are checked one by one before anything is allocated or split by them: negative ones
    # could still add up to the size of the payload.
    lengths = {column: header['tokens'] for column in _COLUMNS} | {'turn_starts': header['turns']}
    sizes = [8 * (count + sum(map(len, header['metrics'])))]
    sizes += [sum(map(_natural, lengths[c])) * dtype.itemsize for c, dtype in _COLUMNS.items()]
    if sum(sizes) != body.size:
        raise ValueError('lengths of its columns do not add up')
    floats, *parts = np.split(body, np.cumsum(sizes)[:-1])
    columns = {
        column: np.split(unplanes(part, dtype), np.cumsum(lengths[column])[:-1])
        for part, (column, dtype) in zip(parts, _COLUMNS.items())
    }
    values = iter(unplanes(floats, np.dtype('<f8')).tolist())
    rewards = [next(values) for _ in range(count)]
    metrics = [{name: next(values) for name in names} for names in header['metrics']]
    if form == b'echogrp1':
        environment_only = [bool(each.pop('environment_only', False)) for each in metrics]
    else:
        environment_only = header['environment_only']
    nothing = [''] * count
    rollouts = [
        Rollout(
            **{column: arrays[i] for column, arrays in columns.items()},
            reward=rewards[i],
            status=Status(header['status'][i]),
            task_id=header['task_id'],
            group_id=group_id,
            sample_id=header['sample_id'][i],
            environment_only=environment_only[i],
            reason=header.get('reason', nothing)[i],
            tests_output=header.get('tests_output', nothing)[i],
            metrics=metrics[i],
        )
        for i in range(count)
    ]
    check_group(rollouts)
    return rollouts


def _unpack(group_id: int, data: bytes) -> tuple[bytes, dict, np.ndarray]:
    """(format, header, uint8 columns) of a group, once its checksums are found to be right."""
    form = data[:8]
    if form not in _PREFIXES:
        raise ValueError(f'it begins with {form!r}')
    prefix = _PREFIXES[form]
    if len(data) < prefix.size:
        raise ValueError(f'{len(data)} bytes, shorter than the prefix')
    _, stored_id, size, header_size, chunk_size, chunk_crc, crc = prefix.unpack_from(data)
    if crc != zlib.crc32(data[: prefix.size - 4]):
        raise ValueError('checksum of the prefix does not match')
    if stored_id != group_id:
        raise ValueError(f'it holds group {stored_id}')
    # Before anything is allocated: a small chunk may say that it unpacks to a petabyte.
    if not header_size <= size <= MAX_PAYLOAD:
        raise ValueError(f'payload of {size} bytes; expected at most {MAX_PAYLOAD}')
    chunk = data[prefix.size :][:chunk_size]  # for what follows see kvstore.py
    if zlib.crc32(chunk) != chunk_crc:
        raise ValueError('checksum of the rollouts does not match')
    payload = decompress(chunk, size)
    return form, json.loads(payload[:header_size].tobytes()), payload[header_size:]


def _natural(number: int) -> int:
    if not isinstance(number, int) or not 0 <= number <= MAX_PAYLOAD:
        raise ValueError(f'a length of {number!r}')
    return number
