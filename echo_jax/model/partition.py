"""Says how a model's arrays lie on a mesh, by logical names of their axes.

The model and its kernels name logical axes ('rows', 'tokens', 'embed', 'heads', ...). A `Layout`,
which `learner/sharding.py` makes of the config's table, maps them to mesh axes. It is in force
while a function is traced inside `use`. Without a layout, as in the sampler, all functions here
leave arrays and computations as they are.

B rows, T tokens, I and O the input and output axes of a weight.
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Generator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec


class Layout(NamedTuple):
    """How logical axes lie on a mesh. An axis that `rules` lacks is whole on every device."""

    mesh: Mesh
    # {logical axis: the mesh axes that split it, major first}
    rules: Mapping[str, tuple[str, ...]]

    def spec(self, *axes: str | None) -> PartitionSpec:
        return PartitionSpec(*((self.rules.get(axis) or None) if axis else None for axis in axes))

    def size(self, axis: str) -> int:
        """Into how many parts a logical axis is split."""
        return math.prod(self.mesh.shape[name] for name in self.rules.get(axis, ()))

    def sharding(self, *axes: str | None) -> NamedSharding:
        return NamedSharding(self.mesh, self.spec(*axes))


# A context variable, because as an argument the layout would pass through every function of the
# model, and through JAX's transformations, which take arrays only.
_LAYOUT: contextvars.ContextVar[Layout | None] = contextvars.ContextVar('layout', default=None)


@contextlib.contextmanager
def use(layout: Layout) -> Generator[None]:
    """Makes `layout` that of all functions that are traced inside the block."""
    token = _LAYOUT.set(layout)
    try:
        yield
    finally:
        _LAYOUT.reset(token)


def layout() -> Layout | None:
    return _LAYOUT.get()


def platform() -> str:
    """'cpu', 'tpu' or 'gpu': the platform that will run the function that is being traced.

    That may be another than this machine's: the planner compiles for TPUs that it does not have.
    """
    layout = _LAYOUT.get()
    return layout.mesh.devices.flat[0].platform if layout else jax.default_backend()


def mesh_axes(axis: str) -> tuple[str, ...]:
    """The mesh axes that split a logical axis, major first; none if there is no layout."""
    layout = _LAYOUT.get()
    return layout.rules.get(axis, ()) if layout else ()


def size(axis: str) -> int:
    """Into how many parts a logical axis is split."""
    layout = _LAYOUT.get()
    return layout.size(axis) if layout else 1


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """`x`, laid out by the logical names of its axes. An axis of None is whole on every device."""
    layout = _LAYOUT.get()
    return jax.lax.with_sharding_constraint(x, layout.sharding(*axes)) if layout else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(x_BTI: jax.Array, w_IO: jax.Array, axes: tuple[str, str]) -> jax.Array:
    """x @ w [B, T, O], in the dtype of x; `axes` are the logical axes of the weight.

    The weight is cast on the devices that hold its parts, then gathered along 'embed' for the
    product. Its gradient is summed over a device's tokens in float32, and split again while it is
    summed over the devices. Left to itself, XLA would first have every device hold all of it.
    """
    return x_BTI @ _gathered(x_BTI, w_IO, axes)


def _gathered(x_BTI, w_IO, axes):
    # Two constraints, because of their order: the cast comes before the gathering, so that bfloat16
    # travels and not float32, which is twice the bytes.
    w_IO = constrain(w_IO.astype(x_BTI.dtype), *axes)
    return constrain(w_IO, *_without_embed(axes))


def _without_embed(axes: tuple[str, str]) -> list[str | None]:
    """The axes of a weight that is in use: it is whole along 'embed', still split along others."""
    return [None if axis == 'embed' else axis for axis in axes]


def _matmul_backward(axes, operands, d_BTO):
    x_BTI, w_IO = operands
    lie_in, lie_out = _without_embed(axes)

    def weight_gradient(x_BTI, d_BTO):
        # Summed over thousands of tokens in the weight's own float32: in bfloat16 a sum stops
        # growing when it is some hundred times as large as what is added.
        d_IO = jnp.einsum('bti,bto->io', x_BTI, d_BTO, preferred_element_type=w_IO.dtype)
        return sum_over_tokens(d_IO, axes.index('embed'))

    split = per_device(
        weight_gradient, (('rows', 'tokens', lie_in), ('rows', 'tokens', lie_out)), axes
    )
    # The weight is gathered again. If it were kept from the forward pass, the whole weights of all
    # layers would be in memory at once.
    return d_BTO @ _gathered(x_BTI, w_IO, axes).T, split(x_BTI, d_BTO)


matmul.defvjp(lambda x, w, axes: (matmul(x, w, axes), (x, w)), _matmul_backward)


def sum_over_tokens(part: jax.Array, dimension: int) -> jax.Array:
    """Called under `per_device`: sums over devices that hold other tokens, splits along 'embed'."""
    split = mesh_axes('embed')
    # Major axes first, as in a PartitionSpec; in another order, devices would swap their slices.
    for axis in split:
        part = jax.lax.psum_scatter(part, axis, scatter_dimension=dimension, tiled=True)
    # Axes that split 'embed' have been summed over already; a second time would multiply by their
    # size. Those that split 'heads' or 'mlp' hold other columns, and are not summed over at all.
    rest = [a for name in ('rows', 'tokens') for a in mesh_axes(name) if a not in split]
    return jax.lax.psum(part, rest) if rest else part


def per_device(f: Callable, in_axes: tuple, out_axes) -> Callable:
    """`f` on each device's part, for what XLA cannot split by itself: kernels and collectives.

    `in_axes` and `out_axes` hold, for each array or tree of arrays alike, a tuple of logical names
    or a PartitionSpec.
    """
    layout = _LAYOUT.get()
    if layout is None:
        return f
    by_names = layout.spec

    def are_names(x) -> bool:
        return isinstance(x, tuple) and all(name is None or isinstance(name, str) for name in x)

    def specs(tree):
        return jax.tree.map(lambda x: by_names(*x) if are_names(x) else x, tree, is_leaf=are_names)

    # check_vma=False: JAX takes an input that is whole on several devices for a copy on each, and
    # sums the gradients of the copies.
    return jax.shard_map(
        f, mesh=layout.mesh, in_specs=specs(in_axes), out_specs=specs(out_axes), check_vma=False
    )
