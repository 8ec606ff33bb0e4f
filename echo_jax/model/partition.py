"""Where arrays lie on a mesh, by what their axes hold; in force while a function is traced.

The model and its kernels name logical axes ('rows', 'tokens', 'embed', 'heads', ...). A `Layout`,
which `learner/sharding.py` makes of the config's table, maps them to mesh axes. Without one, as in
the sampler, all of this is the identity.

B rows, T tokens, I and O the input and output axes of a weight.
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec


class Layout(NamedTuple):
    """How logical axes lie on a mesh; one that `rules` does not list is whole on every device."""

    mesh: Mesh
    rules: Mapping[str, tuple[str, ...]]  # logical axis: the mesh axes that split it, major first

    def spec(self, *axes: str | None) -> PartitionSpec:
        return PartitionSpec(*(self.rules.get(axis) or None for axis in axes))

    def size(self, axis: str | None) -> int:
        """Into how many parts a logical axis is split."""
        return math.prod(self.mesh.shape[name] for name in self.rules.get(axis, ()))

    def sharding(self, *axes: str | None) -> NamedSharding:
        return NamedSharding(self.mesh, self.spec(*axes))


# A context variable and no argument: the layout would otherwise pass through every function of the
# model, and through JAX's transformations, which take arrays.
_LAYOUT: contextvars.ContextVar[Layout | None] = contextvars.ContextVar('layout', default=None)


@contextlib.contextmanager
def use(layout: Layout) -> Iterator[None]:
    """Everything that is traced inside lies by `layout`."""
    token = _LAYOUT.set(layout)
    try:
        yield
    finally:
        _LAYOUT.reset(token)


def layout() -> Layout | None:
    return _LAYOUT.get()


def platform() -> str:
    """'cpu', 'tpu' or 'gpu': what will run the function that is being traced.

    It need not be a device of this machine: the planner compiles for TPUs that it does not have.
    """
    layout = _LAYOUT.get()
    return layout.mesh.devices.flat[0].platform if layout else jax.default_backend()


def mesh_axes(axis: str) -> tuple[str, ...]:
    """The mesh axes that a logical axis is split over, major first."""
    layout = _LAYOUT.get()
    return layout.rules.get(axis, ()) if layout else ()


def size(axis: str) -> int:
    """Into how many parts a logical axis is split."""
    layout = _LAYOUT.get()
    return layout.size(axis) if layout else 1


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """`x` laid out by the logical names of its axes; None is an axis that is whole everywhere."""
    layout = _LAYOUT.get()
    return jax.lax.with_sharding_constraint(x, layout.sharding(*axes)) if layout else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(x_BTI: jax.Array, w_IO: jax.Array, axes: tuple[str, str]) -> jax.Array:
    """x @ w, [B, T, O] in the dtype of x, of states and of a weight that lies by `axes`.

    The weight is cast where it lies and gathered along 'embed' for the product. Its gradient is
    summed over a device's tokens in float32 and split again as it is summed over the devices. Left
    to itself, XLA would have every device hold the whole gradient first.
    """
    return x_BTI @ _gathered(x_BTI, w_IO, axes)


def _gathered(x_BTI, w_IO, axes):
    # Two constraints, because of their order: the cast comes before the gathering, so that bfloat16
    # travels and not float32, which is twice the bytes.
    w_IO = constrain(w_IO.astype(x_BTI.dtype), *axes)
    return constrain(w_IO, *_without_embed(axes))


def _without_embed(axes: tuple[str, str]) -> list[str | None]:
    """How a weight lies when it is used: whole along 'embed', still split over 'tensor'."""
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
    # The weight is gathered again. Kept from the forward pass, every layer's would be in memory.
    return d_BTO @ _gathered(x_BTI, w_IO, axes).T, split(x_BTI, d_BTO)


matmul.defvjp(lambda x, w, axes: (matmul(x, w, axes), (x, w)), _matmul_backward)


def sum_over_tokens(part: jax.Array, dimension: int) -> jax.Array:
    """Under `per_device`: the sum over devices that hold other tokens, split along 'embed'."""
    split = mesh_axes('embed')
    # Major axes first, as in a PartitionSpec: the other order gives each device another's slice.
    for axis in split:
        part = jax.lax.psum_scatter(part, axis, scatter_dimension=dimension, tiled=True)
    # Axes that split 'embed' have been summed over already; a second time would multiply by their
    # size. Those that split 'heads' or 'mlp' hold other columns, and are not summed over at all.
    rest = [a for name in ('rows', 'tokens') for a in mesh_axes(name) if a not in split]
    return jax.lax.psum(part, rest) if rest else part


def per_device(f: Callable, in_axes: tuple, out_axes) -> Callable:
    """`f` on each device's part, for what XLA cannot split by itself: kernels and collectives.

    `in_axes` and `out_axes` hold a tuple of logical names, or a PartitionSpec, for each array.
    """
    layout = _LAYOUT.get()
    if layout is None:
        return f

    def specs(tree):
        return jax.tree.map(
            lambda axes: axes if isinstance(axes, PartitionSpec) else layout.spec(*axes),
            tree,
            is_leaf=_names,
        )

    # check_vma=False: JAX takes an input that is whole on several devices for a copy on each, and
    # sums the gradients of the copies.
    return jax.shard_map(
        f, mesh=layout.mesh, in_specs=specs(in_axes), out_specs=specs(out_axes), check_vma=False
    )


def _names(x) -> bool:
    return isinstance(x, tuple) and all(a is None or isinstance(a, str) for a in x)
