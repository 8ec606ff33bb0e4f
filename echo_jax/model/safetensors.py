"""The safetensors format: a directory's tensors as memory maps, and files written out of order.

A file is the length of its header (8 bytes, little-endian), the header (JSON: dtype, shape and
place of every tensor) and the tensors. NumPy reads and writes all of it, bfloat16 too, so there is
neither torch nor a copy of a file in memory. What the tensors are for is `huggingface.py`'s.
"""

import json
import math
import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

DTYPES = {'BF16': jnp.bfloat16, 'F16': np.float16, 'F32': np.float32}
SINGLE, INDEX = 'model.safetensors', 'model.safetensors.index.json'


def open_tensors(directory: pathlib.Path) -> dict[str, np.ndarray]:
    """name: tensor, memory-mapped and read-only, of a single file or of a sharded model.

    Raises ValueError, which names the file, where one is missing, cut or of another format.
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
    """JSON that stood in `file`."""
    try:
        return json.loads(text)
    except ValueError as error:  # no UTF-8, either
        raise ValueError(f'{file} is damaged: {error}; download it again') from error


def _open_file(file: pathlib.Path) -> dict[str, np.ndarray]:
    if not file.exists():
        raise ValueError(f'{file} is missing; download or export the model again, whole')
    size = file.stat().st_size
    data = np.memmap(file, np.uint8, 'r') if size else np.zeros(0, np.uint8)
    start = 8 + int.from_bytes(bytes(data[:8]), 'little')
    if not 8 < start <= size:  # what a Git LFS pointer's text comes to as well
        raise ValueError(f'{file} is cut short or no safetensors file; download it again')
    header = parse(bytes(data[8:start]), file)
    header.pop('__metadata__', None)
    end = start + max((entry['data_offsets'][1] for entry in header.values()), default=0)
    if size < end:
        raise ValueError(f'{file} has {size} bytes, {end} by its header; download it again')
    tensors = {}
    for name, entry in header.items():
        if entry['dtype'] not in DTYPES:
            raise ValueError(
                f'{file}: {name} is {entry["dtype"]}; expected one of {tuple(DTYPES)}, as in a '
                'model that is not quantized'
            )
        first, last = entry['data_offsets']
        flat = np.asarray(data[start + first : start + last]).view(DTYPES[entry['dtype']])
        tensors[name] = flat.reshape(entry['shape'])
    return tensors


class Place(NamedTuple):
    """Where a tensor's bytes go."""

    file: pathlib.Path
    offset: int

    def write(self, array: np.ndarray) -> None:
        with self.file.open('r+b') as file:
            file.seek(self.offset)
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def create_files(
    directory: pathlib.Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: str,
    shard_bytes: int,
) -> dict[str, Place]:
    """Makes the files for tensors of these shapes, headers and all; the caller fills each place.

    The tensors stand in the order of `shapes`; a file holds as many as `shard_bytes` allow, and at
    least one. There is an index where there is more than one file.
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
        header, end = {'__metadata__': {'format': 'pt'}}, 0
        for name in names:
            offsets = [end, end := end + sizes[name]]
            header[name] = {'dtype': code, 'shape': shapes[name], 'data_offsets': offsets}
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
