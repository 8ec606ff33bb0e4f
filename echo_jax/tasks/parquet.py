"""Task sets as one parquet file: columns `prompt`, `path`, `task_binary` (docs/protocol.md#tasks).

Reads a file into task directories in a cache, where a second reader finds them, and writes a file
from task directories. Builds nothing and runs nothing.
"""

import fcntl
import hashlib
import os
import pathlib
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from echo_jax.tasks import archives
from echo_jax.tasks.harbor import Reading, read_task
from echo_jax.types import Task

_MESSAGE = pa.struct([('role', pa.string()), ('content', pa.string())])
SCHEMA = pa.schema(
    [('prompt', pa.list_(_MESSAGE)), ('path', pa.string()), ('task_binary', pa.binary())]
)
_ROWS = 32  # how many are in memory at a time
# Ends what a prompt says before the instruction (docs/protocol.md#prompt).
_TASK_PREFIX_END = '\n\nTask: '


def read_parquet(
    file: pathlib.Path, cache: pathlib.Path, left_out: dict[str, str]
) -> list[Reading]:
    """The tasks of a file, with their files in `cache`; puts into `left_out` why a row gave none.

    A task's id is its row's `path`, a plain name, since results, groups and images are named after
    it. Its instruction is the archive's instruction.md or, if the archive has none, the prompt's
    last user message from `Task: ` on. Its files lie in a folder of `cache` that is named by their
    content. A folder is there whole or not at all, so no reader ever writes it again.

    A row is left out, under its id or as 'row N', if its id is no plain name, if its archive is one
    that `archives.unpack` refuses, and if what is in it is no task. Raises ValueError in one line
    for a file that is not such a parquet, and for ids that differ in nothing but case: nobody could
    say which of the two a result is of.
    """
    cache.mkdir(parents=True, exist_ok=True)
    readings: list[Reading] = []
    owners: dict[str, str] = {}  # ids by what they are without case
    with open(cache / '.lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the system releases it if this process is killed
        for number, row in enumerate(_rows(file)):
            task_id = row['path']
            if not isinstance(task_id, str) or not _is_plain(task_id):
                left_out[f'row {number}'] = (
                    f'path is {_short(task_id)}, expected a plain name, the id'
                )
                continue
            if task_id.casefold() in owners:
                owner = owners[task_id.casefold()]
                where = f'{file}, row {number}, {task_id!r}'
                raise ValueError(f'{where}: its id is taken, by {owner!r}; rename one')
            owners[task_id.casefold()] = task_id
            try:
                readings.append(read_task(_extract(*_content(row), cache), task_id))
            except ValueError as error:
                left_out[task_id] = str(error)
    if not readings and not left_out:
        raise ValueError(f'{file} has no rows; name a file with tasks')
    return readings


def write_parquet(tasks: Sequence[Task], file: pathlib.Path) -> None:
    """Packs task directories into a file, which appears whole; the same tasks give the same rows.

    `prompt` is the bare instruction as a user message, without the text that a prompt puts before
    it. Raises ValueError for a task that `archives.pack` refuses.
    """
    partial = file.with_name(file.name + '.partial')
    with pq.ParquetWriter(partial, SCHEMA, compression='zstd') as writer:
        for start in range(0, len(tasks), _ROWS):
            rows = [
                {
                    'prompt': [{'role': 'user', 'content': task.instruction}],
                    'path': task.task_id,
                    'task_binary': _packed(task),
                }
                for task in tasks[start : start + _ROWS]
            ]
            writer.write_table(pa.Table.from_pylist(rows, SCHEMA))
    partial.rename(file)


def _packed(task: Task) -> bytes:
    try:
        return archives.pack(task.path)
    except ValueError as error:
        raise ValueError(f'{task.path}: {error}') from error


def _rows(file: pathlib.Path) -> Iterator[dict[str, Any]]:
    try:
        with pq.ParquetFile(file) as parquet:
            _check_columns(file, parquet.schema_arrow)
            batches = parquet.iter_batches(batch_size=_ROWS, columns=SCHEMA.names)
            for batch in batches:
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        reason = ' '.join(str(error).split())
        raise ValueError(f'{file} cannot be read, or is no parquet file ({reason})') from error


def _check_columns(file: pathlib.Path, schema: pa.Schema) -> None:
    missing = [name for name in SCHEMA.names if name not in schema.names]
    if missing:
        raise ValueError(
            f'{file} lacks the column {missing[0]}; it has {", ".join(schema.names)}, a task set '
            f'has {", ".join(SCHEMA.names)}'
        )


def _content(row: dict[str, Any]) -> tuple[str, bytes]:
    """(instruction of the prompt, archive); ValueError if a value is not what it should be."""
    archive, prompt = row['task_binary'], row['prompt']
    if not isinstance(archive, bytes):
        raise ValueError(f'task_binary is {_short(archive)}, expected the bytes of a tar')
    try:
        asked = [message['content'] for message in prompt if message['role'] == 'user']
        text = asked[-1]
        before, found, instruction = text.partition(_TASK_PREFIX_END)
    except (TypeError, KeyError, IndexError, AttributeError):
        expected = 'expected chat messages, {role, content}, one of them of the user'
        raise ValueError(f'prompt is {_short(prompt)}, {expected}') from None
    return (instruction if found else before), archive


def _is_plain(name: str) -> bool:
    """Whether the name is fit for a folder, an image's label and a line of text."""
    return (
        name.isprintable()
        and 0 < len(name.encode()) <= 200
        and not set(name) & set('/\\')
        and name[0] not in '.-'
        and name == name.strip()
    )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f'{text[:60]}...'


def _extract(instruction: str, archive: bytes, cache: pathlib.Path) -> pathlib.Path:
    """The folder with a row's files; the caller holds the cache's lock."""
    digest = hashlib.sha256(archive)
    digest.update(instruction.encode())  # it becomes a file if the archive has none
    folder = cache / digest.hexdigest()[:32]
    if folder.is_dir():
        return folder
    partial = cache / '.partial'
    shutil.rmtree(partial, ignore_errors=True)  # left by a reader that was killed
    partial.mkdir()
    archives.unpack(archive, partial)
    own = partial / 'instruction.md'
    if not os.path.lexists(own):
        own.write_text(instruction, encoding='utf-8')
    partial.rename(folder)
    return folder
