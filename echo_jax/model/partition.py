"""Where arrays lie on a mesh, by what their axes hold; in force while a program is traced.

The model and its kernels name logical axes ('rows', 'tokens', 'embed', 'heads', ...); a layout,
which `learner/sharding.py` makes of the config's table, maps them to mesh axes. Without one, as in
the sampler, all of this is the identity.
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
    """A logical axis that `rules` does not list lies whole on every device."""

    mesh: Mesh
    rules: Mapping[str, tuple[str, ...]]

    def spec(self, *axes: str | None) -> PartitionSpec:
        return PartitionSpec(*(self.rules.get(axis) or None for axis in axes))

    def size(self, axis: str | None) -> int:
        """Into how many parts a logical axis is split."""
        return math.prod(self.mesh.shape[name] for name in self.rules.get(axis, ()))

    def sharding(self, *axes: str | None) -> NamedSharding:
        return NamedSharding(self.mesh, self.spec(*axes))


_LAYOUT: contextvars.ContextVar[Layout | None] = contextvars.ContextVar('layout', default=None)


@contextlib.contextmanager
def use(layout: Layout) -> Iterator[None]:
    token = _LAYOUT.set(layout)
    try:
        yield
    finally:
        _LAYOUT.reset(token)


def layout() -> Layout | None:
    return _LAYOUT.get()


def platform() -> str:
    """'cpu', 'tpu' or 'gpu': what the program that is being traced will run on."""
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
    """x @ w, [B, T, O] in the dtype of x, of states and a weight that lies by `axes`.

    The weight is cast where it lies and gathered along 'embed' for the product. Its gradient is
    summed over a device's tokens in float32 and split again as it is summed over the devices; by
    itself XLA would have every device hold all of it first.
    """
    return x_BTI @ _gathered(x_BTI, w_IO, axes)


def _gathered(x_BTI, w_IO, axes):
    w_IO = constrain(w_IO.astype(x_BTI.dtype), *axes)
    return constrain(w_IO, *(None if axis == 'embed' else axis for axis in axes))


def _matmul_backward(axes, operands, d_BTO):
    x_BTI, w_IO = operands
    lie_in, lie_out = (None if axis == 'embed' else axis for axis in axes)

    def weight_gradient(x_BTI, d_BTO):
        d_IO = jnp.einsum('bti,bto->io', x_BTI, d_BTO, preferred_element_type=w_IO.dtype)
        return sum_over_tokens(d_IO, axes.index('embed'))

    split = per_device(
        weight_gradient, (('rows', 'tokens', lie_in), ('rows', 'tokens', lie_out)), axes
    )
    return d_BTO @ _gathered(x_BTI, w_IO, axes).T, split(x_BTI, d_BTO)


matmul.defvjp(lambda x, w, axes: (matmul(x, w, axes), (x, w)), _matmul_backward)


def sum_over_tokens(part: jax.Array, dimension: int) -> jax.Array:
    """Under `per_device`: the sum over devices that hold other tokens, split along 'embed'."""
    split = mesh_axes('embed')
    for axis in split:
        part = jax.lax.psum_scatter(part, axis, scatter_dimension=dimension, tiled=True)
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

    # Where an input is whole on some devices, its gradient is summed over them (check_vma=False).
    return jax.shard_map(
        f,
        mesh=layout.mesh,
        in_specs=specs(in_axes),
        out_specs=specs(out_axes),
        check_vma=False,
    )


def _names(x) -> bool:
    return isinstance(x, tuple) and all(a is None or isinstance(a, str) for a in x)
