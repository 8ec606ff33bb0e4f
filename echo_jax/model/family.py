"""How a family of models is described: its config, and a table that says what each array is.

All code that has to know something about an array reads the table. The module makes its parameters
from it, `learner/sharding.py` places them, the optimizer finds its matrices, `huggingface.py` reads
and writes them, vLLM's ranks load them, and `planner/estimate.py` counts them. So a second family
is a module of its own, beside qwen3.py, and one line in `families.py`. This module knows no family.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from echo_jax.model.attention import Cache

# The logical axes that tensor parallelism splits, both here and in vLLM. Each device computes its
# part of them alone. All other axes of a parameter are whole on a device when it is used.
TENSOR_AXES = ('heads', 'kv_heads', 'mlp', 'vocab')


class Array(NamedTuple):
    """One parameter of a family."""

    theirs: str  # its name in a Hugging Face directory; {} stands for the number of the layer
    axes: tuple[str, ...]  # what each axis holds; 'layers' first, if it is stacked over the layers
    # 'matrix': multiplies every token, and Muon orthogonalises it. 'unembedding': multiplies too,
    # but its rows are words. 'lookup': a table that only gives rows. 'vector': all the rest.
    kind: Literal['matrix', 'unembedding', 'lookup', 'vector']
    transposed: bool = False  # whether its last two axes are the other way round in the directory
    std: float = 0.0  # standard deviation of the normal distribution of its random start
    constant: float = 0.0  # the value of all its elements at the start, if `std` is 0

    @property
    def stacked(self) -> bool:
        return self.axes[0] == 'layers'

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        return tuple(sizes[axis] for axis in self.axes)

    def their_axes(self) -> tuple[str, ...]:
        """The logical axes of one tensor in the directory, which is that of one layer."""
        axes = self.axes[1:] if self.stacked else self.axes
        return (*axes[:-2], axes[-1], axes[-2]) if self.transposed else axes


class ConfigJson(NamedTuple):
    """What a family reads from config.json and writes there, besides what its own methods do."""

    architecture: str  # the name of the model's class in transformers and in vLLM
    supported: Mapping[str, Any]  # the only value that each of these keys may have, if it is there
    required: tuple[str, ...]  # fields of the family's config that have to be there
    defaults: Mapping[str, Any]  # other fields, with what transformers takes if they are not there


class ModelConfig(Protocol):
    """The config of one model: a frozen dataclass of its sizes, named as in config.json.

    A recipe's `model` gives the fields. Those that every recipe has a value for (`dtype`,
    `attention` and `remat`) must be among them, the others of configs/base.py only if the family
    has such a size: a recipe leaves the rest None.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]
    model_type: ClassVar[str]  # config.json's, and the family's name in `families.FAMILIES`
    config_json: ClassVar[ConfigJson]
    # Endings of the names of tensors that a directory may hold and that are not read.
    spare_tensors: ClassVar[tuple[str, ...]]

    # Fields of the dataclass. They are properties here, because it is frozen.
    @property
    def vocab_size(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...  # no head is split over devices
    @property
    def num_key_value_heads(self) -> int: ...
    @property
    def dtype(self) -> str: ...  # of activations and matrix products; parameters are float32

    def arrays(self) -> dict[str, Array]:
        """The table, by flat name: {'embedding': ..., 'layers/wq': ...}, in the order of files."""

    def axis_sizes(self) -> dict[str, int]:
        """The length of every logical axis; 'layers', 'heads' and 'kv_heads' among them."""

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        """The module, with its parameters drawn at random.

        It is called with tokens, positions and segment ids [B, T] and returns hidden states
        [B, T, D]; their products with its property `unembedding` [V, D] are the logits. For the
        embedded sampler it has `extend(tokens, positions, cache) -> (hidden states, cache)`.
        """

    def init_cache(self, batch: int, length: int) -> Cache: ...

    @classmethod
    def read_json(cls, found: dict, file) -> dict:
        """The fields that `config_json` does not name, out of the config.json `found`."""

    def write_json(self) -> dict:
        """The keys of config.json that `config_json` does not name."""


def set_params(module: nnx.Module, config: ModelConfig, rngs: nnx.Rngs) -> None:
    """Gives a module the float32 parameters of its family's table, drawn in the table's order.

    The array 'layers/wq' becomes `module.layers['wq']`. A parameter's metadata are the `axes` and
    the `kind` that the table gives it; the learner reads them.
    """
    sizes, folders = config.axis_sizes(), {}
    for name, array in config.arrays().items():
        shape = array.shape(sizes)
        if array.std:
            value = jax.random.normal(rngs.params(), shape) * array.std
        else:
            value = jnp.full(shape, array.constant, float)
        folder, _, last = name.rpartition('/')
        folders.setdefault(folder, {})[last] = nnx.Param(value, axes=array.axes, kind=array.kind)
    for name, param in folders.pop('', {}).items():
        setattr(module, name, param)
    for folder, params in folders.items():
        setattr(module, folder, nnx.Dict(params))


def count_params(config: ModelConfig) -> tuple[int, int]:
    """(how many parameters there are, how many of them multiply every token)."""
    sizes, total, multiply = config.axis_sizes(), 0, 0
    for array in config.arrays().values():
        size = math.prod(array.shape(sizes))
        total += size
        multiply += size if array.kind in ('matrix', 'unembedding') else 0
    return total, multiply


def published_arrays(config: ModelConfig) -> dict[str, dict]:
    """What a version of the weights says of its arrays, for vLLM's ranks, which have no JAX.

    {flat name: {'name': Hugging Face name, 'stacked', 'transposed', 'split'}}. `split` is None if
    every rank holds the whole tensor. Otherwise it says which `axis` of the tensor is split, its
    `length`, and of how many `units` it consists that no rank may cut (heads, words or single
    numbers). `padded` says that vLLM rounds the length up before it splits, as it does with a
    vocabulary.
    """
    sizes = config.axis_sizes()
    units = sizes | {'heads': config.num_attention_heads, 'kv_heads': config.num_key_value_heads}
    published: dict[str, dict] = {}
    for name, array in config.arrays().items():
        split = None
        for number, axis in enumerate(array.their_axes()):
            if axis in TENSOR_AXES:  # at most one axis of an array is
                split = {'axis': number, 'length': sizes[axis], 'units': units[axis]}
                split['padded'] = axis == 'vocab'
        published[name] = {
            'name': array.theirs,
            'stacked': array.stacked,
            'transposed': array.transposed,
            'split': split,
        }
    return published
