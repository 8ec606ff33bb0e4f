"""The safetensors format: reads parts of a directory's tensors, and writes files tensor by tensor.

The safetensors library does the reading. Its `save_file` (0.8) takes all tensors of a file at once,
which for a sharded model is gigabytes of host memory. So a file is written by hand: the length of
its header (8 bytes, little-endian), the header (JSON: dtype, shape and place of every tensor), and
room for the tensors, which come one at a time. `huggingface.py` knows what the tensors mean.
"""

import json
import math
import pathlib
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np
import safetensors

DTYPES = {'BF16': jnp.bfloat16, 'F16': np.float16, 'F32': np.float32}
SINGLE, INDEX = 'model.safetensors', 'model.safetensors.index.json'


class Tensor(Protocol):
    """A tensor in a file. Indexing it reads the part that is asked for, and no more."""

    def get_shape(self) -> list[int]: ...

    def __getitem__(self, index) -> np.ndarray: ...


def open_tensors(directory: pathlib.Path) -> dict[str, Tensor]:
    """{name: tensor} of a model, which may be in one file or in several.

    Raises ValueError, which names the file, if one is missing, cut short or of another format.
    """
    if (directory / SINGLE).exists() or not (directory / INDEX).exists():
        return _open_file(directory / SINGLE)
    places = parse((directory / INDEX).read_bytes(), directory / INDEX)['weight_map']
    files = {name: _open_file(directory / name) for name in sorted(set(places.values()))}
    for tensor, name in places.items():
        if tensor not in files[name]:
            raise ValueError(f'{directory / name} lacks {tensor}, which {INDEX} says is there')
    return {tensor: files[name][tensor] for tensor, name in places.items()}


def parse(text: bytes, file: pathlib.Path) -> dict:
    """The JSON document `text`, which was read from `file`. Raises ValueError if it is damaged."""
    try:
        return json.loads(text)
    except ValueError as error:  # this includes text that is not UTF-8
        raise ValueError(f'{file} is damaged: {error}; download it again') from error


def _open_file(file: pathlib.Path) -> dict[str, Tensor]:
    if not file.exists():
        raise ValueError(f'{file} is missing; download or export the model again, whole')
    try:
        opened = safetensors.safe_open(file, 'np')
        names = opened.keys()  # it has `keys`, but is no mapping
        tensors = {name: opened.get_slice(name) for name in names}
    except (safetensors.SafetensorError, OSError) as error:  # also if it is a Git LFS pointer
        raise ValueError(
            f'{file} is cut short or no safetensors file ({error}); download it again'
        ) from error
    for name, tensor in tensors.items():
        if tensor.get_dtype() not in DTYPES:
            raise ValueError(
                f'{file}: {name} is {tensor.get_dtype()}; expected one of {tuple(DTYPES)}, as in a '
                'model that is not quantized'
            )
    return tensors


class Place(NamedTuple):
    """The place of one tensor's bytes in a file."""

    file: pathlib.Path
    offset: int

    def write(self, array: np.ndarray) -> None:
        with self.file.open('r+b') as file:
            file.seek(self.offset)
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def create_files(
    directory: pathlib.Path, shapes: Mapping[str, tuple[int, ...]], dtype: str, shard_bytes: int
) -> dict[str, Place]:
    """Makes the files for tensors of these shapes, headers and all; the caller fills each place.

    The tensors stand in the order of `shapes`; a file holds as many as `shard_bytes` allow, and at
    least one. If there is more than one file, there is an index too.
    """
    code = next(code for code, known in DTYPES.items() if np.dtype(known) == np.dtype(dtype))
    sizes = {name: math.prod(shape) * np.dtype(dtype).itemsize for name, shape in shapes.items()}
    shards: list[list[str]] = [[]]
    for name, size in sizes.items():
        if shards[-1] and sum(sizes[other] for other in shards[-1]) + size > shard_bytes:
            shards.append([])
        shards[-1].append(name)
    places = {}
    for number, names in enumerate(shards, start=1):
        file = directory / SINGLE
        if len(shards) > 1:
            file = directory / f'model-{number:05d}-of-{len(shards):05d}.safetensors'
        header: dict[str, dict] = {'__metadata__': {'format': 'pt'}}
        end = 0
        for name in names:
            start, end = end, end + sizes[name]
            header[name] = {'dtype': code, 'shape': shapes[name], 'data_offsets': [start, end]}
        text = json.dumps(header, separators=(',', ':')).encode()
        text += b' ' * (-len(text) % 8)  # so that tensors are aligned
        with file.open('wb') as opened:
            opened.write(len(text).to_bytes(8, 'little') + text)
            opened.truncate(8 + len(text) + end)
        for name in names:
            places[name] = Place(file, 8 + len(text) + header[name]['data_offsets'][0])
    if len(shards) > 1:
        index = {
            'metadata': {'total_size': sum(sizes.values())},
            'weight_map': {name: place.file.name for name, place in places.items()},
        }
        (directory / INDEX).write_text(json.dumps(index, indent=1))
    return places
