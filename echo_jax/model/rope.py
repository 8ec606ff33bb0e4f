"""Rotary position embedding: its inverse frequencies, plain and YaRN's, and the rotation itself.

B rows, T tokens, N heads, H head dimension, h = H // 2 frequencies.

YaRN (arXiv 2309.00071, section 3) stretches a context: slow dimensions turn `factor` times slower,
fast ones as before, and those between lie on a ramp. No other scaling is here. Frequencies are
computed on the host, from fields of a model's config that bear the names of Hugging Face's
rope_parameters; `read_rope` and `write_rope` take them from a config.json and put them there.
"""

import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from echo_jax.model.precision import sum_dtype

ROPE_TYPES = ('default', 'yarn')
# Fields of a config that only YaRN reads, with their values if config.json lacks them.
YARN = {
    'factor': 1.0,
    'original_max_position_embeddings': 32_768,
    'attention_factor': None,  # computed from `factor`
    'beta_fast': 32.0,
    'beta_slow': 1.0,
    'truncate': True,
}


def inverse_frequencies(config, dtype=np.float32) -> np.ndarray:
    """The frequencies [h] of a model's config, in `dtype`, in radians a position.

    They are rounded exactly as transformers rounds them: a difference in float32's last place turns
    position 32,768 by 0.002 radians.
    """
    H, theta = config.head_dim, config.rope_theta
    numbers_h = np.arange(H // 2)
    wavelengths_h = (theta ** (numbers_h / (H // 2))).astype(dtype)
    plain_h = 1 / wavelengths_h
    if config.rope_type == 'default':
        return plain_h

    def dimension(rotations: float) -> float:
        """The number of the dimension that makes so many rotations over the original context."""
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
    """The factor of sine and cosine: YaRN's 0.1 ln(factor) + 1, unless the config gives another."""
    if config.rope_type == 'default':
        return 1.0
    if config.attention_factor is not None:
        return config.attention_factor
    return 0.1 * math.log(max(config.factor, 1.0)) + 1.0


def rope(
    x_BTNH: jax.Array,
    positions_BT: jax.Array,
    inverse_frequencies_h: np.ndarray,
    attention_factor: float = 1.0,
) -> jax.Array:
    """Rotates the pairs (i, i + H / 2) of every head by its position times a frequency.

    These are Hugging Face's pairs; the paper's are (2 i, 2 i + 1).
    """
    # Not in bfloat16, in which position 257 is 256, and sin(257) is far from sin(256).
    wide = sum_dtype(x_BTNH)
    angles_BT1h = positions_BT[..., None, None].astype(wide) * inverse_frequencies_h.astype(wide)
    sin, cos = jnp.sin(angles_BT1h) * attention_factor, jnp.cos(angles_BT1h) * attention_factor
    a, b = jnp.split(x_BTNH.astype(wide), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)


def read_rope(found: dict, file: pathlib.Path, max_position_embeddings: int) -> dict:
    """`rope_type`, `rope_theta` and YARN's fields, out of `found`, the config.json in `file`.

    It has them as `rope_theta` and `rope_scaling`, or as `rope_parameters`. Raises ValueError for a
    kind of scaling, or a key of one, that is not supported.
    """
    said = found.get('rope_scaling') or found.get('rope_parameters') or {}
    said = {key: value for key, value in said.items() if value is not None}
    kind = said.get('rope_type', said.get('type', 'default'))
    if kind not in ROPE_TYPES:
        raise ValueError(f'{file}: rope_type is {kind!r}; only {ROPE_TYPES} are supported')
    unknown = said.keys() - {*YARN, 'type', 'rope_type', 'rope_theta'}
    if unknown:
        raise ValueError(f'{file}: {unknown} of RoPE are not supported; only {tuple(YARN)} are')
    theta = said.get('rope_theta', found.get('rope_theta', 1e4))
    fields = YARN | {'rope_type': kind, 'rope_theta': theta}
    if kind == 'yarn':
        original = said.get('original_max_position_embeddings', max_position_embeddings)
        fields['original_max_position_embeddings'] = original
        fields['factor'] = max_position_embeddings / original
        fields |= {key: said[key] for key in YARN if key in said}
    return fields


def write_rope(config) -> dict:
    """The keys of config.json that `read_rope` reads, in both their forms.

    If only `rope_parameters` is there, transformers 4 takes a theta of 10,000 without a word.
    """
    rope = {'rope_type': config.rope_type}
    if config.rope_type != 'default':
        rope |= {key: getattr(config, key) for key in YARN if getattr(config, key) is not None}
    return {
        'rope_parameters': {'rope_theta': config.rope_theta, **rope},
        'rope_theta': config.rope_theta,
        'rope_scaling': rope if len(rope) > 1 else None,
    }
