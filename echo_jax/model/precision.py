"""The dtype in which the model sums and normalises, whatever that of parameters and activations."""

import jax
import jax.numpy as jnp


def sum_dtype(*arrays: jax.Array):
    """float32, or float64 if an array is; tests check gradients in float64."""
    return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)
