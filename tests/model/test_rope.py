"""Frequencies by hand, and to the last bit those of transformers."""

import dataclasses
import math

import numpy as np
import pytest

from echo_jax.model.qwen3 import Qwen3Config
from echo_jax.model.rope import attention_factor, inverse_frequencies

PLAIN = Qwen3Config(64, 32, 48, 2, 4, 2, head_dim=8, rope_theta=1e4)
YARN = dataclasses.replace(
    PLAIN, rope_type='yarn', factor=4.0, original_max_position_embeddings=4096
)


def test_plain_by_hand():
    """H = 8: theta^(-i/4) = 10^-i."""
    np.testing.assert_allclose(inverse_frequencies(PLAIN, float), [1, 0.1, 0.01, 0.001], rtol=1e-15)
    assert attention_factor(PLAIN) == 1.0


def test_yarn_by_hand():
    """Dimension i turns 4096 / (2 pi 10^i) times over 4,096 tokens: 652, 65, 6.5, 0.65.

    It would be beta_fast = 32 times at i = log10(4096 / 64 pi) = 1.31, rounded down to 1, and
    beta_slow = 1 times at 2.81, rounded up to 3. So 0 and 1 stay, 2 is half way, 3 is a quarter.
    """
    expected = [1, 0.1, 0.01 * (1 + 1 / 4) / 2, 0.001 / 4]
    np.testing.assert_allclose(inverse_frequencies(YARN, float), expected, rtol=1e-12)
    assert attention_factor(YARN) == pytest.approx(1 + 0.1 * math.log(4))
    # Not rounded, the ramp begins at 1.31 and is 2.81 - 1.31 = 1.5 long.
    ramp = (2 - math.log10(4096 / 64 / math.pi)) / math.log10(32)
    exact = inverse_frequencies(dataclasses.replace(YARN, truncate=False), float)
    np.testing.assert_allclose(exact[2], 0.01 * (1 - ramp * 3 / 4), rtol=1e-12)
    assert attention_factor(dataclasses.replace(YARN, attention_factor=0.7)) == 0.7


@pytest.mark.parametrize(
    'changes',
    [
        dict(rope_type='default', rope_theta=1e6),
        dict(rope_theta=1e6),
        dict(factor=2.5, beta_fast=40.0, beta_slow=2.0, attention_factor=1.5),
        dict(truncate=False, rope_theta=5e5),
        dict(original_max_position_embeddings=64),  # the ramp ends at its own beginning
        dict(factor=1.0),
    ],
    ids=str,
)
@pytest.mark.parametrize('head_dim', [16, 64])
def test_those_of_transformers(changes, head_dim):
    """Where rounding is concerned, too: position 32,768 multiplies it."""
    pytest.importorskip('torch', reason='the reference is PyTorch')
    from transformers.models.qwen3 import modeling_qwen3

    config = dataclasses.replace(YARN, head_dim=head_dim, **changes)
    parameters = {'rope_type': config.rope_type, 'rope_theta': config.rope_theta}
    if config.rope_type == 'yarn':
        keys = ('factor', 'original_max_position_embeddings', 'attention_factor')
        keys += ('beta_fast', 'beta_slow', 'truncate')
        parameters |= {key: getattr(config, key) for key in keys}
    reference = modeling_qwen3.Qwen3RotaryEmbedding(
        modeling_qwen3.Qwen3Config(head_dim=head_dim, rope_parameters=parameters)
    )
    np.testing.assert_array_equal(inverse_frequencies(config), reference.inv_freq.numpy())
    assert attention_factor(config) == pytest.approx(reference.attention_scaling, rel=1e-12)
