"""Reads and writes Hugging Face directories: config.json and safetensors.

Most matrices are [in, out] here, with a leading axis for the layers. In a directory they are
[out, in], and there is one for each layer. Each family's table says this of every array
(family.py). Nothing is downloaded. What a family does not do is refused by name: for Qwen3 that is
sliding windows, mixtures of experts, scalings of RoPE other than YaRN, and quantized tensors.
"""

import dataclasses
import itertools
import json
import os
import pathlib
import shutil
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx

from echo_jax.model import params as model_params
from echo_jax.model import safetensors
from echo_jax.model.families import DEFAULT, FAMILIES
from echo_jax.model.family import Array, ModelConfig

SHARD_BYTES = 5_000_000_000  # of one file


# ----------------------------------------------------------------------------------------- configs


def recipe_config(model: ml_collections.ConfigDict) -> ModelConfig:
    """The config that a recipe's `model` asks for.

    Its sizes are those of the directory `model.path`, or else the recipe's own, for the family
    `model.model_type`. All other keys are fields of the config; one that is None is left to
    config.json or to the family's default. Raises ValueError for a family that is not there, and
    for a key that the family has no field for.
    """
    fields = {key: value for key, value in model.items() if key != 'path' and value is not None}
    if model.path:
        return read_config(model.path, **fields)
    fields.pop('model_type', None)
    return _config(own_family(model), fields)


def own_family(model: ml_collections.ConfigDict) -> type[ModelConfig]:
    """The family of a recipe's `model` without a `path`; ValueError if there is none."""
    model_type = model.get('model_type') or DEFAULT
    if model_type not in FAMILIES:
        raise ValueError(f'model.model_type is {model_type!r}; expected one of {list(FAMILIES)}')
    return FAMILIES[model_type]


def field_names(family: type[ModelConfig]) -> set[str]:
    """The names of the fields of a family's config, which are keys of a recipe's `model`."""
    return {field.name for field in dataclasses.fields(family)}


def _config(family: type[ModelConfig], fields: dict) -> ModelConfig:
    strange = [f'model.{key}' for key in fields if key not in field_names(family)]
    if strange:
        raise ValueError(
            f'{", ".join(strange)} is given, which a {family.model_type} model does not have; set '
            'it to None'
        )
    return family(**fields)


def read_config(path: str | os.PathLike, **options) -> ModelConfig:
    """The config in `path`/config.json, of the family that its `model_type` names.

    `options` are more fields of the config. Raises ValueError if one of them differs from what
    config.json says, if a size is missing, and for what is not supported.
    """
    file = pathlib.Path(path) / 'config.json'
    if not file.exists():
        raise ValueError(
            f'{file} is missing; expected a local Hugging Face directory, as `hf download` makes'
        )
    document = safetensors.parse(file.read_bytes(), file)
    # null means the default, as a missing key does.
    found = {key: value for key, value in document.items() if value is not None}
    model_type = found.get('model_type', DEFAULT)
    if model_type not in FAMILIES:
        names = ', '.join(map(repr, FAMILIES))
        raise ValueError(f'{file}: model_type is {model_type!r}; only {names} is supported')
    family = FAMILIES[model_type]
    said = family.config_json
    for key, supported in said.supported.items():
        if found.get(key, supported) != supported:
            raise ValueError(f'{file}: {key} is {found[key]!r}; only {supported!r} is supported')
    missing = [key for key in said.required if key not in found]
    if missing:
        raise ValueError(
            f'{file} lacks {", ".join(missing)}; expected the config of a {model_type} model'
        )
    fields = {key: found[key] for key in said.required}
    fields |= {key: found.get(key, default) for key, default in said.defaults.items()}
    fields |= family.read_json(found, file)
    settled = fields | {'model_type': model_type}
    for key, value in options.items():
        if settled.get(key, value) != value:
            raise ValueError(
                f'model.{key} is {value!r} but {settled[key]!r} in {file}; take it out of the '
                'recipe'
            )
    options.pop('model_type', None)
    return _config(family, options | fields)


def check_tokenizer(tokenizer, config: ModelConfig) -> None:
    """Raises ValueError if the tokenizer has ids that the embedding has no row for."""
    largest = max(tokenizer.get_vocab().values())
    if largest >= config.vocab_size:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path} is not this model's: it has an id {largest}, "
            f'the embedding {config.vocab_size} rows; give the tokenizer that belongs to the model'
        )


# -------------------------------------------------------------------------------------- parameters


def load_params(
    path: str | os.PathLike, abstract_params: nnx.State, shardings: nnx.State
) -> nnx.State:
    """The parameters in a directory, with the dtypes of `abstract_params` and these shardings.

    A process reads only the parts that its own devices hold. It reads one device's part of one
    array at a time, so that it needs no more of the host's memory. Raises ValueError if a file is
    missing or cut short, or if a tensor is missing, unknown, or not of config.json's shape.
    """
    tensors = safetensors.open_tensors(pathlib.Path(path))
    config = read_config(path)
    arrays, wanted = config.arrays(), tensor_shapes(config)
    spare = {name for name in tensors if name.endswith(config.spare_tensors)}
    for name in [*wanted, *sorted(tensors.keys() - wanted.keys() - spare)]:
        found = tuple(tensors[name].get_shape()) if name in tensors else 'absent'
        if found != wanted.get(name):
            raise ValueError(
                f'{path}: {name} is {found} in its safetensors and {wanted.get(name, "absent")} by '
                'its config.json; they are not of one model'
            )
    places = model_params.flatten(shardings)
    loaded = {
        name: _load(tensors, arrays[name], leaf, places[name])
        for name, leaf in model_params.flatten(abstract_params).items()
    }
    return model_params.unflatten(abstract_params, loaded)


def write_model(
    directory: str | os.PathLike,
    params: Iterable[tuple[str, jax.Array]],
    config: ModelConfig,
    tokenizer=None,
    *,
    dtype: str = 'bfloat16',
    shard_bytes: int = SHARD_BYTES,
    generation_config: dict | None = None,
) -> None:
    """Makes a directory that transformers and vLLM load; it appears whole or not at all.

    `params` are the flat names and arrays of `params.flatten`, in any order. One array is held at a
    time, so a generator may read them one by one. `dtype` is that of the tensors. The ids of the
    tokens that end a generation and that pad are those of `generation_config`; those that it lacks
    are the tokenizer's. Raises ValueError if the directory is not empty, or if the arrays or the
    tokenizer are not of this config.
    """
    directory = pathlib.Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f'{directory} is there already; remove it or name another directory')
    if tokenizer is not None:
        check_tokenizer(tokenizer, config)
    arrays, sizes = config.arrays(), config.axis_sizes()
    left = {name: array.shape(sizes) for name, array in arrays.items()}
    partial = directory.with_name(directory.name + '.partial')
    shutil.rmtree(partial, ignore_errors=True)
    write_config(partial, config, tokenizer, dtype=dtype, generation_config=generation_config)
    places = safetensors.create_files(partial, tensor_shapes(config), dtype, shard_bytes)
    for name, array in params:
        if left.pop(name, 'no such array') != array.shape:
            raise ValueError(f'{name} {array.shape} is not of {config}, or came twice')
        ours = arrays[name]
        for number, theirs in enumerate(_tensors(ours, sizes)):
            part = _layer(array, number) if ours.stacked else array
            part = jnp.swapaxes(part, -1, -2) if ours.transposed else part
            places[theirs].write(np.asarray(part.astype(dtype)))
    if left:
        raise ValueError(f'the parameters lack {", ".join(left)}')
    partial.rename(directory)


def write_config(
    directory: pathlib.Path,
    config: ModelConfig,
    tokenizer=None,
    *,
    dtype: str = 'bfloat16',
    generation_config: dict | None = None,
) -> None:
    """Writes all that `write_model` writes, except the tensors, into a new directory."""
    directory.mkdir(parents=True)
    said, ends = config.config_json, generation_config or {}
    document = (
        {'architectures': [said.architecture], 'model_type': config.model_type, 'dtype': dtype}
        | {key: value for key, value in said.supported.items() if value is not None}
        | {key: getattr(config, key) for key in (*said.required, *said.defaults)}
        | config.write_json()
    )
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
        ids = {f'{end}_token_id': getattr(tokenizer, f'{end}_token_id') for end in ('eos', 'pad')}
        document, ends = document | ids, ids | ends
    (directory / 'generation_config.json').write_text(json.dumps(ends, indent=2))
    (directory / 'config.json').write_text(json.dumps(document, indent=2))


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """{tensor: shape} of a whole model, layer by layer, the order in which others write them."""
    sizes = config.axis_sizes()
    before, stacked, after = [], [], []
    for array in config.arrays().values():
        group = stacked if array.stacked else (after if stacked else before)
        group.append(_tensors(array, sizes).items())
    layers = zip(*stacked, strict=True)
    return dict(itertools.chain(*before, *layers, *after))


def _tensors(array: Array, sizes: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """{tensor: shape} of the tensors that make up one of our arrays, in the order of the layers."""
    shape = tuple(sizes[axis] for axis in array.their_axes())
    layers = range(sizes['layers']) if array.stacked else [0]
    return {array.theirs.format(layer): shape for layer in layers}


def _load(tensors: dict, array: Array, leaf: jax.ShapeDtypeStruct, sharding) -> jax.Array:
    """One of our arrays; each device of this process gets the part that `sharding` gives it."""

    def read(index: tuple[slice, ...]) -> np.ndarray:
        layers, inner = (index[0], index[1:]) if array.stacked else (slice(1), index)
        if array.transposed:
            inner = (*inner[:-2], inner[-1], inner[-2])
        numbers = range(leaf.shape[0] if array.stacked else 1)[layers]
        shape = [len(range(*part.indices(size))) for part, size in zip(index, leaf.shape)]
        out = np.empty(shape, leaf.dtype)
        targets = out if array.stacked else [out]
        for number, target in zip(numbers, targets, strict=True):
            part = tensors[array.theirs.format(number)][inner]
            target[...] = np.swapaxes(part, -1, -2) if array.transposed else part
        return out

    # One after the other; otherwise the host would hold the parts of all devices at once.
    shards = [
        jax.block_until_ready(jax.device_put(read(index), device))
        for device, index in sharding.addressable_devices_indices_map(leaf.shape).items()
    ]
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, shards)


@jax.jit
def _layer(array: jax.Array, number: int) -> jax.Array:
    """Jitted with the number as an argument, so that it compiles once and not for every layer."""
    return array[number]
