"""Qwen3-4B by the recipe of configs/qwen3_8b.py; only the model's sizes differ.

    python -m echo_jax.plan --config=configs/qwen3_4b.py --topology=v5p:2x2x4

Topology: v5p:2x2x4. Plan: 256 rows of 34,816 tokens: 16.1 of 95.7 GiB a chip, 115
s a step, MFU 0.58. Expected result: not yet run.
`--config=configs/qwen3_4b.py:grpo` is the same run without the environment term.
"""

import ml_collections

from configs import qwen3_8b


def get_config(variant: str = 'echo') -> ml_collections.ConfigDict:
    c = qwen3_8b.get_config(variant)
    c.model.update(
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        tie_word_embeddings=True,
    )
    return c
