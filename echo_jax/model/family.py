"""What a family of models says of itself, above all its table: what each of its arrays is.

Whatever must know something about an array reads the table: the module makes its parameters from
it, `learner/sharding.py` places them, the optimizer finds its matrices, `huggingface.py` reads and
writes them, vLLM's ranks load them, and `planner/estimate.py` counts them. So a second family is a
module of its own, beside qwen3.py, and one line in `families.py`.

Nothing here knows any one family.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from echo_jax.model.attention import Cache

# Logical axes that tensor parallelism splits, both here and in vLLM. Each device computes its part
# of them alone; all other axes of a parameter are whole on it when it is used.
TENSOR_AXES = ('heads', 'kv_heads', 'mlp', 'vocab')


class Array(NamedTuple):
    """One parameter of a family."""

    theirs: str  # its name in a Hugging Face directory; {} stands for the number of the layer
    axes: tuple[str, ...]  # what each axis holds; 'layers' first, if it is stacked over the layers
    # 'matrix': multiplies every token, and Muon orthogonalises it. 'unembedding': multiplies too,
    # but its rows are words. 'lookup': a table that only gives rows. 'vector': all the rest.
    kind: Literal['matrix', 'unembedding', 'lookup', 'vector']
    transposed: bool = False  # whether its last two axes are the other way round in the directory
    constant: float = 0.0  # what all of it is at a random start, if `std` is 0
    std: float = 0.0  # of the normal distribution that a random start is drawn from

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

    architecture: str  # the class of transformers and of vLLM
    supported: Mapping[str, Any]  # what it must say of these keys, if it says anything
    required: tuple[str, ...]  # fields of the family's config that it must name
    defaults: Mapping[str, Any]  # fields, and what transformers takes if it does not name them


class ModelConfig(Protocol):
    """The config of one model: a frozen dataclass of its sizes, named as in config.json."""

    model_type: ClassVar[str]  # config.json's, and the family's name in `families.FAMILIES`
    config_json: ClassVar[ConfigJson]
    spare_tensors: ClassVar[tuple[str, ...]]  # ends of names that a directory may have in vain
    vocab_size: int
    num_attention_heads: int  # a device has whole ones
    num_key_value_heads: int
    dtype: str  # of activations and matrix products; parameters are float32

    def arrays(self) -> dict[str, Array]:
        """The table, by flat name: {'embedding': ..., 'layers/wq': ...}, in the order of files."""

    def axis_sizes(self) -> dict[str, int]:
        """The length of every logical axis; 'layers', 'heads' and 'kv_heads' among them."""

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        """The module, its parameters drawn at random.

        It is called with tokens, positions and segment ids [B, T] and returns the hidden states
        [B, T, D] that the property `unembedding` [V, D] makes logits of. For the embedded sampler
        it has `extend(tokens, positions, cache) -> (hidden states, cache)`.
        """

    def init_cache(self, batch: int, length: int) -> Cache: ...

    @classmethod
    def read_json(cls, found: dict, file) -> dict:
        """Fields out of config.json that `config_json` does not name."""

    def write_json(self) -> dict:
        """Keys of config.json that `config_json` does not name."""


def set_params(module: nnx.Module, config: ModelConfig, rngs: nnx.Rngs) -> None:
    """Gives a module the float32 parameters of its family's table, drawn in the table's order.

    The array 'layers/wq' becomes `module.layers['wq']`. The metadata of a parameter is what the
    learner needs of the table: `axes` and `kind`.
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
    """How many parameters there are, and how many of them multiply every token."""
    sizes, total, multiply = config.axis_sizes(), 0, 0
    for array in config.arrays().values():
        size = math.prod(array.shape(sizes))
        total += size
        multiply += size if array.kind in ('matrix', 'unembedding') else 0
    return total, multiply


def published_arrays(config: ModelConfig) -> dict[str, dict]:
    """What a version of the weights says of its arrays, for vLLM's ranks, which have no JAX.

    {flat name: {'name': Hugging Face name, 'stacked', 'transposed', 'split'}}. `split` is None if
    every rank holds the whole tensor, else the tensor's `axis` that is split, its `length`, and of
    how many `units` it consists that no rank may cut (heads, words or single numbers). `padded`
    says that vLLM rounds the length up before it splits, as it does with a vocabulary.
    """
    sizes = config.axis_sizes()
    units = sizes | {'heads': config.num_attention_heads, 'kv_heads': config.num_key_value_heads}

    def split(array: Array) -> dict | None:
        for number, axis in enumerate(array.their_axes()):
            if axis in TENSOR_AXES:
                return {
                    'axis': number,
                    'length': sizes[axis],
                    'units': units[axis],
                    'padded': axis == 'vocab',
                }
        return None

    return {
        name: {
            'name': array.theirs,
            'stacked': array.stacked,
            'transposed': array.transposed,
            'split': split(array),
        }
        for name, array in config.arrays().items()
    }
