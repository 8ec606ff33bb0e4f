"""Qwen3-0.6B by the recipe of configs/qwen3_8b.py; only the model's sizes differ.

    python -m echo_jax.plan --config=configs/qwen3_0p6b.py --topology=v5e:4x4

Topology: v5e:4x4. Plan: 256 rows of 34,816 tokens: 3.8 of 15.75 GiB a chip, 88 s
a step, MFU 0.50. Expected result: not yet run.
`--config=configs/qwen3_0p6b.py:grpo` is the same run without the environment term.
"""

import ml_collections

from configs import qwen3_8b


def get_config(variant: str = 'echo') -> ml_collections.ConfigDict:
    c = qwen3_8b.get_config(variant)
    c.model.update(
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        tie_word_embeddings=True,
    )
    return c
