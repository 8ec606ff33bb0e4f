"""Hugging Face directories of Qwen3: config.json and safetensors, in and out.

A matrix is [in, out] here, with a leading L for the layers, and [out, in], a tensor a layer, there.
Nothing is downloaded, and nothing that the model does not do is read: sliding windows, mixtures of
experts, scalings of RoPE but YaRN, and quantized tensors are refused by name.
"""

import itertools
import json
import os
import pathlib
import shutil
from collections.abc import Iterable

import jax
import ml_collections
import numpy as np
from flax import nnx

from echo_jax.model import params as model_params
from echo_jax.model import safetensors
from echo_jax.model.qwen3 import Qwen3Config
from echo_jax.model.rope import ROPE_TYPES

SHARD_BYTES = 5_000_000_000  # of one file
# What config.json must say, where it says anything.
_SUPPORTED = {
    'model_type': 'qwen3',  # not 'qwen3_moe'
    'hidden_act': 'silu',
    'attention_bias': False,
    'attention_dropout': 0.0,
    'use_sliding_window': False,
    'quantization_config': None,
}
_SIZES = (
    *('vocab_size', 'hidden_size', 'intermediate_size', 'num_hidden_layers'),
    'num_attention_heads',
)
# What transformers takes where config.json is silent.
_DEFAULTS = {
    'head_dim': 128,
    'max_position_embeddings': 32_768,
    'rms_norm_eps': 1e-6,
    'tie_word_embeddings': False,
    'initializer_range': 0.02,
}
_YARN = (
    *('factor', 'original_max_position_embeddings', 'attention_factor'),
    *('beta_fast', 'beta_slow', 'truncate'),
)
_TENSORS = {
    'embedding': 'model.embed_tokens.weight',
    'layers/attention_norm': 'model.layers.{}.input_layernorm.weight',
    'layers/wq': 'model.layers.{}.self_attn.q_proj.weight',
    'layers/wk': 'model.layers.{}.self_attn.k_proj.weight',
    'layers/wv': 'model.layers.{}.self_attn.v_proj.weight',
    'layers/q_norm': 'model.layers.{}.self_attn.q_norm.weight',
    'layers/k_norm': 'model.layers.{}.self_attn.k_norm.weight',
    'layers/wo': 'model.layers.{}.self_attn.o_proj.weight',
    'layers/mlp_norm': 'model.layers.{}.post_attention_layernorm.weight',
    'layers/w_gate': 'model.layers.{}.mlp.gate_proj.weight',
    'layers/w_up': 'model.layers.{}.mlp.up_proj.weight',
    'layers/w_down': 'model.layers.{}.mlp.down_proj.weight',
    'final_norm': 'model.norm.weight',
    'head': 'lm_head.weight',
}


# ----------------------------------------------------------------------------------------- configs


def recipe_config(model: ml_collections.ConfigDict) -> Qwen3Config:
    """Of a recipe's `model`: at its own sizes, or those of the directory `path`."""
    if not model.path:
        return Qwen3Config.of(model)
    return read_config(model.path, **Qwen3Config.given(model))


def read_config(path: str | os.PathLike, **options) -> Qwen3Config:
    """From `path`/config.json, with `rope_theta` and `rope_scaling` or with `rope_parameters`.

    `options` are fields of Qwen3Config: those that config.json settles must say the same. Raises
    ValueError where they do not, where a size is missing, and for what is not supported.
    """
    file = pathlib.Path(path) / 'config.json'
    if not file.exists():
        raise ValueError(
            f'{file} is missing; expected a local Hugging Face directory, as `hf download` makes'
        )
    document = safetensors.parse(file.read_bytes(), file)
    found = {key: value for key, value in document.items() if value is not None}  # null: a default
    for key, supported in _SUPPORTED.items():
        if found.get(key, supported) != supported:
            raise ValueError(f'{file}: {key} is {found[key]!r}; only {supported!r} is supported')
    if other := set(found.get('layer_types', ())) - {'full_attention'}:
        raise ValueError(f"{file}: layer_types has {other}; only 'full_attention' is supported")
    if missing := [key for key in _SIZES if key not in found]:
        raise ValueError(f'{file} lacks {", ".join(missing)}; expected the config of a Qwen3')
    fields = {key: found[key] for key in _SIZES}
    fields['num_key_value_heads'] = found.get('num_key_value_heads', found['num_attention_heads'])
    fields |= {key: found.get(key, default) for key, default in _DEFAULTS.items()}
    fields |= _read_rope(found, file)
    for key, value in options.items():
        if fields.get(key, value) != value:
            raise ValueError(
                f'model.{key} is {value!r} but {fields[key]!r} in {file}; take it out of the recipe'
            )
    return Qwen3Config(**(options | fields))


def _read_rope(found: dict, file: pathlib.Path) -> dict:
    rope = found.get('rope_scaling') or found.get('rope_parameters') or {}
    rope = {key: value for key, value in rope.items() if value is not None}
    kind = rope.get('rope_type', rope.get('type', 'default'))
    if kind not in ROPE_TYPES:
        raise ValueError(f'{file}: rope_type is {kind!r}; only {ROPE_TYPES} are supported')
    if unknown := rope.keys() - {*_YARN, 'type', 'rope_type', 'rope_theta'}:
        raise ValueError(f'{file}: {unknown} of RoPE are not supported; only {_YARN} are')
    theta = rope.get('rope_theta', found.get('rope_theta', 1e4))
    fields = {key: getattr(Qwen3Config, key) for key in _YARN}
    fields |= {'rope_type': kind, 'rope_theta': theta}
    if kind == 'yarn':
        length = found.get('max_position_embeddings', _DEFAULTS['max_position_embeddings'])
        rope.setdefault('original_max_position_embeddings', length)
        rope.setdefault('factor', length / rope['original_max_position_embeddings'])
        fields |= {key: rope[key] for key in _YARN if key in rope}
    return fields


def _config_json(config: Qwen3Config, dtype: str) -> dict:
    rope = {'rope_type': config.rope_type}
    if config.rope_type != 'default':
        rope |= {key: getattr(config, key) for key in _YARN if getattr(config, key) is not None}
    return (
        {'architectures': ['Qwen3ForCausalLM'], 'dtype': dtype}
        | {key: value for key, value in _SUPPORTED.items() if value is not None}
        | {key: getattr(config, key) for key in (*_SIZES, 'num_key_value_heads', *_DEFAULTS)}
        | {'rope_parameters': {'rope_theta': config.rope_theta, **rope}}
        # The old form too: without it transformers 4 takes 10,000, and says nothing.
        | {'rope_theta': config.rope_theta, 'rope_scaling': rope if len(rope) > 1 else None}
    )


def check_tokenizer(tokenizer, config: Qwen3Config) -> None:
    """Raises ValueError where the tokenizer has ids that the embedding has no row for."""
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
    """The parameters of a directory, in the dtypes and at the places that are asked for.

    A process reads the parts that its own devices hold and no other, one device's part of one array
    at a time: that is what it takes of the host's memory. Raises ValueError where a file is missing
    or cut, and where a tensor is missing, unknown, or of another shape than config.json says.
    """
    tensors = safetensors.open_tensors(pathlib.Path(path))
    leaves = model_params.flatten(abstract_params)
    wanted = _layout({name: leaf.shape for name, leaf in leaves.items()})
    # A tied head may be there, and the frequencies that older versions of transformers saved.
    spare = {name for name in tensors if name == 'lm_head.weight' or name.endswith('inv_freq')}
    for name in [*wanted, *sorted(tensors.keys() - wanted.keys() - spare)]:
        found = tensors[name].shape if name in tensors else 'absent'
        if found != wanted.get(name):
            raise ValueError(
                f'{path}: {name} is {found} in its safetensors and {wanted.get(name, "absent")} by '
                'its config.json; they are not of one model'
            )
    places = model_params.flatten(shardings)
    arrays = {name: _load(tensors, name, leaf, places[name]) for name, leaf in leaves.items()}
    return model_params.unflatten(abstract_params, arrays)


def write_model(
    directory: str | os.PathLike,
    params: Iterable[tuple[str, jax.Array]],
    config: Qwen3Config,
    tokenizer=None,
    *,
    dtype: str = 'bfloat16',
    shard_bytes: int = SHARD_BYTES,
    generation_config: dict | None = None,
) -> None:
    """Makes a directory that transformers and vLLM load; it appears whole or not at all.

    `params` are the flat names and arrays of `params.flatten`, in any order: one is held at a time,
    so a generator may read them from wherever they are. `dtype` is that of the tensors. Without
    `generation_config`, the tokenizer says where a generation ends. Raises ValueError where the
    directory holds something, or the arrays or the tokenizer are not of this config.
    """
    directory = pathlib.Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f'{directory} is there already; remove it or name another directory')
    if tokenizer is not None:
        check_tokenizer(tokenizer, config)
    _, abstract = model_params.abstract(config)
    shapes = {name: leaf.shape for name, leaf in model_params.flatten(abstract).items()}
    partial = directory.with_name(directory.name + '.partial')
    shutil.rmtree(partial, ignore_errors=True)
    write_config(partial, config, tokenizer, dtype=dtype, generation_config=generation_config)
    places = safetensors.create_files(partial, _layout(shapes), dtype, shard_bytes)
    for name, array in params:
        if shapes.pop(name, 'no such array') != array.shape:
            raise ValueError(f'{name} {array.shape} is not of {config}, or came twice')
        for number, theirs in enumerate(_theirs(name, array.shape)):
            part = array if '/' not in name else _layer(array, number)
            places[theirs].write(np.asarray(part.astype(dtype)))
    if shapes:
        raise ValueError(f'the parameters lack {", ".join(shapes)}')
    partial.rename(directory)


def write_config(
    directory: pathlib.Path,
    config: Qwen3Config,
    tokenizer=None,
    *,
    dtype: str = 'bfloat16',
    generation_config: dict | None = None,
) -> None:
    """What `write_model` writes besides the tensors, into a new directory."""
    directory.mkdir(parents=True)
    document, ends = _config_json(config, dtype), generation_config or {}
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
        ids = {f'{end}_token_id': getattr(tokenizer, f'{end}_token_id') for end in ('eos', 'pad')}
        document, ends = document | ids, ids | ends
    (directory / 'generation_config.json').write_text(json.dumps(ends, indent=2))
    (directory / 'config.json').write_text(json.dumps(document, indent=2))


def tensor_names(names: Iterable[str]) -> dict[str, str]:
    """{flat name of ours: tensor's name there, with {} for the layer}."""
    return {name: _TENSORS[name] for name in names}


def _load(tensors: dict, name: str, leaf: jax.ShapeDtypeStruct, sharding) -> jax.Array:
    theirs = list(_theirs(name, leaf.shape))

    def read(index: tuple[slice, ...]) -> np.ndarray:
        if '/' not in name:
            return tensors[theirs[0]][index].astype(leaf.dtype)
        layers, *inner = index
        parts = [tensors[tensor].T[tuple(inner)] for tensor in theirs[layers]]
        stacked = np.empty((len(parts), *parts[0].shape), leaf.dtype)
        for target, part in zip(stacked, parts):
            target[...] = part  # reads the file, turns and converts, in one go
        return stacked

    shards = [
        jax.block_until_ready(jax.device_put(read(index), device))
        for device, index in sharding.addressable_devices_indices_map(leaf.shape).items()
    ]
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, shards)


@jax.jit
def _layer(array: jax.Array, number: int) -> jax.Array:
    return array[number].T


def _theirs(name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """{tensor: shape} that an array of ours is made of, in the order of the layers."""
    if '/' not in name:
        return {_TENSORS[name]: shape}
    return {_TENSORS[name].format(layer): shape[:0:-1] for layer in range(shape[0])}


def _layout(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """{tensor: shape} of a whole model, one layer after the other."""
    theirs = {name: _theirs(name, shapes[name]).items() for name in _TENSORS if name in shapes}
    layers = zip(*(tensors for name, tensors in theirs.items() if '/' in name))
    ends = theirs['final_norm'], theirs.get('head', ())
    return dict(itertools.chain(theirs['embedding'], *layers, *ends))
