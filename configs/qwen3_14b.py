"""Qwen3-14B by the recipe of configs/qwen3_8b.py; only the model's sizes differ.

    python -m echo_jax.plan --config=configs/qwen3_14b.py --topology=v5p:2x2x4

Topology: v5p:2x2x4. Plan, 256 rows of 34,816 tokens: 41.9 of 95.7 GiB a chip, 240 s a step, MFU
0.64. Expected result: not yet run; the paper's: TerminalBench 2 pass@1 4.27 to 10.79 percent,
val100 35.3 to 65.0.
`--config=configs/qwen3_14b.py:grpo` is the same run without the environment term.
"""

import ml_collections

from configs import qwen3_8b


def get_config(variant: str = 'echo') -> ml_collections.ConfigDict:
    c = qwen3_8b.get_config(variant)
    c.model.update(
        hidden_size=5120,
        intermediate_size=17_408,
        num_hidden_layers=40,
        num_attention_heads=40,
        tie_word_embeddings=False,
    )
    return c
