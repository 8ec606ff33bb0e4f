"""Rotary position embedding: its inverse frequencies, plain and YaRN's, and the rotation itself.

B rows, T tokens, N heads, H head dimension, h = H // 2 frequencies.

YaRN (arXiv 2309.00071, section 3) stretches a context: slow dimensions turn `factor` times slower,
fast ones as before, and those between lie on a ramp. No other scaling is here. Frequencies are
computed on the host, from fields that bear the names of Hugging Face's rope_parameters.
"""

import math

import jax.numpy as jnp
import numpy as np

from echo_jax.model.precision import sum_dtype

ROPE_TYPES = ('default', 'yarn')


def inverse_frequencies(config, dtype=np.float32) -> np.ndarray:
    """[h] in `dtype`, radians a position, of a `Qwen3Config`.

    Rounded where transformers rounds: one float32 step of a frequency is 0.002 radians at position
    32,768.
    """
    H, theta = config.head_dim, config.rope_theta
    numbers_h = np.arange(H // 2)
    wavelengths_h = (theta ** (numbers_h / (H // 2))).astype(dtype)
    plain_h = 1 / wavelengths_h
    if config.rope_type == 'default':
        return plain_h

    def dimension(rotations: float) -> float:
        """The one that turns so often over the original context."""
        wavelength = config.original_max_position_embeddings / (2 * math.pi * rotations)
        return H * math.log(wavelength) / (2 * math.log(theta))

    low, high = dimension(config.beta_fast), dimension(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, H - 1)
    ramp_h = (numbers_h.astype(dtype) - low) / (high - low or 0.001)
    fast_h = 1 - np.clip(ramp_h, 0, 1)
    return (1 - fast_h) * (1 / (config.factor * wavelengths_h)) + fast_h * plain_h


def attention_factor(config) -> float:
    """What sine and cosine are multiplied by: the paper's 0.1 ln(factor) + 1 unless it is given."""
    if config.rope_type == 'default':
        return 1.0
    if config.attention_factor is not None:
        return config.attention_factor
    return 0.1 * math.log(max(config.factor, 1.0)) + 1.0


def rope(x_BTNH, positions_BT, inverse_frequencies_h, attention_factor: float = 1.0):
    """Rotary embedding, halves layout (Hugging Face's); not in bfloat16, where 257 is 256."""
    wide = sum_dtype(x_BTNH)
    angles_BT1h = positions_BT[..., None, None].astype(wide) * inverse_frequencies_h.astype(wide)
    sin, cos = jnp.sin(angles_BT1h) * attention_factor, jnp.cos(angles_BT1h) * attention_factor
    a, b = jnp.split(x_BTNH.astype(wide), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)
