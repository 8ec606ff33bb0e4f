"""A model's parameters as a tree and as {flat name: array}, and their shapes alone.

The flat names, such as `layers/wq`, are those of the family's table and of the weight store.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from echo_jax.model.family import ModelConfig


def abstract(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """(static half, parameters as ShapeDtypeStructs) of the model; nothing is allocated."""
    return nnx.split(nnx.eval_shape(lambda: config.build(nnx.Rngs(0))))


def flatten(params: nnx.State) -> dict[str, Any]:
    """{flat name: array}, or shape, or sharding: whatever the state holds for each parameter."""
    return {_name(path): variable.get_value() for path, variable in nnx.to_flat_state(params)}


def unflatten(
    abstract_params: nnx.State, arrays: Mapping[str, np.ndarray | jax.Array]
) -> nnx.State:
    """The inverse of `flatten`, in the dtypes of `abstract_params`.

    Raises ValueError if the names or shapes of `arrays` are not those of this model.
    """
    wanted = {_name(path): leaf.shape for path, leaf in nnx.to_flat_state(abstract_params)}
    found = {name: array.shape for name, array in arrays.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise ValueError(
                f'weights of another model: {name} is {found.get(name, "absent")} there, '
                f'{wanted.get(name, "absent")} in this config; use the config of their run'
            )
    return nnx.from_flat_state(
        (path, leaf.replace(jnp.asarray(arrays[_name(path)], leaf.dtype)))
        for path, leaf in nnx.to_flat_state(abstract_params)
    )


def _name(path: tuple) -> str:
    return '/'.join(map(str, path))
