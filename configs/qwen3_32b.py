"""Qwen3-32B by the recipe of configs/qwen3_8b.py; only sizes differ.

    python -m echo_jax.plan --config=configs/qwen3_32b.py --topology=v5p:4x4x4

Topology: v5p:4x4x4. Plan, 256 rows of 34,816 tokens: 36.6 of 95.7 GiB a chip, 145 s a step, MFU
0.63. Expected result: not yet run.
`--config=configs/qwen3_32b.py:grpo` is the same run without the environment term.
"""

import ml_collections

from configs import qwen3_8b


def get_config(variant: str = 'echo') -> ml_collections.ConfigDict:
    c = qwen3_8b.get_config(variant)
    c.model.update(
        hidden_size=5120,
        intermediate_size=25_600,
        num_hidden_layers=64,
        num_attention_heads=64,
        tie_word_embeddings=False,
    )
    c.batch.micro_rows = 32  # half a row on each of 64 chips
    return c
