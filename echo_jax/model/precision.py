"""The dtype that the model sums and normalises in; parameters and activations choose their own."""

import jax
import jax.numpy as jnp


def sum_dtype(*arrays: jax.Array):
    """float32 for float32 and below; float64 for float64, in which tests check gradients."""
    return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)
