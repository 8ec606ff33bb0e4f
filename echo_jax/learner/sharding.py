"""Logical axis names to mesh axes, by the table in the config; the model knows no mesh.

A logical name that the table does not list is replicated.
"""

from collections.abc import Sequence

import jax
import ml_collections
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from echo_jax.types import Batch

MESH_AXES = ('data', 'fsdp', 'context', 'tensor')


def make_mesh(
    config: ml_collections.ConfigDict, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """The mesh of `config.mesh`, over all devices; an axis of -1 takes what the others leave."""
    sizes = [config.mesh[axis] for axis in MESH_AXES]
    devices = jax.devices() if devices is None else devices
    fixed = int(np.prod([size for size in sizes if size != -1]))
    if sizes.count(-1) > 1 or len(devices) % fixed or (-1 not in sizes and fixed != len(devices)):
        wanted = ', '.join(f'{axis}={size}' for axis, size in zip(MESH_AXES, sizes))
        raise ValueError(
            f'mesh {wanted} does not fit {len(devices)} devices; change config.mesh so that the '
            'product is the number of devices, with at most one axis of -1'
        )
    sizes = [len(devices) // fixed if size == -1 else size for size in sizes]
    return Mesh(np.array(devices).reshape(sizes), MESH_AXES)


def param_shardings(abstract_params: nnx.State, mesh: Mesh, rules: dict) -> nnx.State:
    """A NamedSharding for every parameter, by the logical names it was made with."""

    def place(variable):
        spec = PartitionSpec(*(rules.get(axis) for axis in variable.get_metadata()['axes']))
        return variable.replace(NamedSharding(mesh, spec))

    return jax.tree.map(place, abstract_params, is_leaf=lambda x: isinstance(x, nnx.Variable))


def state_shardings(abstract_state, params_shardings, mesh: Mesh):
    """Shardings of a training state: mirrors of the parameters lie like them, the rest is whole."""
    by_path = {
        _names(path): sharding
        for path, sharding in jax.tree_util.tree_leaves_with_path(params_shardings)
    }

    def place(path, leaf):
        names = _names(path)
        for start in range(len(names)):
            if names[start:] in by_path and leaf.ndim == len(by_path[names[start:]].spec):
                return by_path[names[start:]]
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(place, abstract_state)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over data and fsdp, tokens over context."""
    return NamedSharding(mesh, PartitionSpec(('data', 'fsdp'), 'context'))


def put_batch(batch: Batch, mesh: Mesh) -> Batch:
    return jax.device_put(batch, batch_sharding(mesh))


def _names(path) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
