"""Maps logical axis names to mesh axes, by the table in the config.

Every mesh axis but 'tensor' splits the tokens of a batch: 'data' and 'fsdp' its rows, 'context' the
tokens of a row. The config's table says how the parameters are split. 'embed' may be split over any
of these three; it is gathered when it is used. 'heads', 'kv_heads', 'mlp' and 'vocab' may be split
over 'tensor'; each part is computed by itself. An axis that the table lacks is whole on every
device.
"""

import math
from collections.abc import Sequence

import jax
import ml_collections
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from echo_jax.model.family import TENSOR_AXES, ModelConfig
from echo_jax.model.partition import Layout
from echo_jax.types import Batch

MESH_AXES = ('data', 'fsdp', 'context', 'tensor')
_BATCH = {'rows': ('data', 'fsdp'), 'tokens': ('context',)}


def make_mesh(
    config: ml_collections.ConfigDict, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """The mesh of `config.mesh`; an axis of -1 takes what the others leave.

    `devices` are by default all that JAX has, of all processes. The planner gives those of a
    topology for which it only compiles. Raises ValueError if the mesh does not fit them.
    """
    sizes = [config.mesh[axis] for axis in MESH_AXES]
    devices = jax.devices() if devices is None else list(devices)
    given = [size for size in sizes if size != -1]
    fixed = math.prod(given)
    if (
        len(given) < len(sizes) - 1
        or min(given) < 1
        or len(devices) % fixed
        or (given == sizes and fixed != len(devices))
    ):
        wanted = ', '.join(f'{axis}={size}' for axis, size in zip(MESH_AXES, sizes))
        raise ValueError(
            f'mesh {wanted} does not fit {len(devices)} devices; change config.mesh so that the '
            'product is the number of devices, with at most one axis of -1'
        )
    sizes = [len(devices) // fixed if size == -1 else size for size in sizes]
    if len(devices) > 1 and devices[0].platform == 'tpu':
        # So that neighbours on the mesh are neighbours on the torus.
        placed = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    else:
        placed = np.array(devices).reshape(sizes)
    return Mesh(placed, MESH_AXES)


def make_layout(config: ml_collections.ConfigDict, mesh: Mesh) -> Layout:
    """The layout of `config.sharding` on a mesh. Raises ValueError for a split that is not done."""
    table = {
        name: (axes,) if isinstance(axes, str) else tuple(axes or ())
        for name, axes in config.sharding.items()
    }
    for name, axes in table.items():
        allowed = MESH_AXES[:3] if name == 'embed' else ('tensor',)
        if name not in ('embed', *TENSOR_AXES) or not set(axes) <= set(allowed):
            raise ValueError(
                f'sharding.{name} is {axes}; expected embed over some of {MESH_AXES[:3]} and '
                f"{', '.join(TENSOR_AXES)} over 'tensor'"
            )
    if table.get('heads') != table.get('kv_heads'):
        raise ValueError("sharding.heads and sharding.kv_heads differ; split both over 'tensor'")
    if mesh.shape['tensor'] > 1 and not any(table.get(name) for name in TENSOR_AXES):
        raise ValueError(
            f'mesh.tensor={mesh.shape["tensor"]} splits nothing; '
            "list 'heads', 'kv_heads', 'mlp' and 'vocab' in config.sharding, or set it to 1"
        )
    return Layout(mesh, _BATCH | table)


def check_divides(config: ml_collections.ConfigDict, model: ModelConfig, layout: Layout) -> None:
    """Raises ValueError if the batch, the heads or a parameter do not divide over the mesh."""

    def check(what: str, length: int, axis: str) -> None:
        parts = layout.size(axis)
        if length % parts:
            sizes = ' x '.join(f'{name}={layout.mesh.shape[name]}' for name in layout.rules[axis])
            raise ValueError(
                f'{what} does not divide over {sizes} = {parts}; make it a multiple, or change '
                'config.mesh or config.sharding'
            )

    for key, length, axis in (
        ('batch.micro_rows', config.batch.micro_rows, 'rows'),
        ('batch.seq_len', config.batch.seq_len, 'tokens'),
        ('num_attention_heads', model.num_attention_heads, 'heads'),
        ('num_key_value_heads', model.num_key_value_heads, 'kv_heads'),
    ):
        check(f'{key}={length}', length, axis)
    lengths = model.axis_sizes()
    for name, array in model.arrays().items():
        for axis in array.axes:
            check(f'{name} {array.shape(lengths)}: {lengths[axis]} ({axis})', lengths[axis], axis)


def param_shardings(abstract_params: nnx.State, layout: Layout) -> nnx.State:
    """A NamedSharding for every parameter, by the logical axes that its family's table gives it."""
    return jax.tree.map(
        lambda variable: variable.replace(layout.sharding(*variable.get_metadata()['axes'])),
        abstract_params,
        is_leaf=lambda x: isinstance(x, nnx.Variable),
    )


def state_shardings(abstract_state, params_shardings, mesh: Mesh):
    """Shardings of a training state: copies of parameters, such as moments, lie as these do.

    Everything else is whole on every device.
    """
    by_path = {
        _names(path): sharding
        for path, sharding in jax.tree_util.tree_leaves_with_path(params_shardings)
    }

    def place(path, leaf):
        names = _names(path)
        for start in range(len(names)):
            if names[start:] in by_path and leaf.ndim == len(by_path[names[start:]].spec):
                return by_path[names[start:]]
        return everywhere(mesh)

    return jax.tree_util.tree_map_with_path(place, abstract_state)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch's arrays: rows over data and fsdp, tokens over context."""
    return Layout(mesh, _BATCH).sharding('rows', 'tokens')


def everywhere(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that is whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def put_batch(batch: Batch, mesh: Mesh) -> Batch:
    """Puts on the mesh a batch that every host has made alike; each host sends its own part."""
    place = batch_sharding(mesh)
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, place, lambda index: x[index]), batch
    )


def _names(path) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
