"""A small Qwen3 learns to work in a real shell, on one CPU, in minutes.

    python -m echo_jax.train --config=configs/tiny.py --workdir=runs/tiny

Hardware: two CPU cores, 4 GiB of memory, Linux namespaces. Measured, seed 0: 11.4 min;
held-out solve rate 0.27 to 0.85, environment CE 0.82 to 0.33. Other seeds, GRPO: experiments/tiny.
`--config=configs/tiny.py:grpo` is the same run without the environment term.

Every part is the one that large recipes use, only small: Harbor task directories, the qwen3_xml
protocol, sandboxes, both stores, one jitted step. What is not set here is as in configs/base.py.
"""

import ml_collections

from configs import base


def get_config(variant: str = 'echo') -> ml_collections.ConfigDict:
    c = base.get_config(variant)
    c.num_steps = 80
    c.group_size = 8

    c.batch.groups = 8
    c.batch.seq_len = 288
    c.batch.micro_rows = 2  # these fit a core's cache

    c.protocol.system_prompt = 'brief'
    c.protocol.max_turns = 5
    c.protocol.max_turn_tokens = 64
    c.protocol.max_context_tokens = 288
    c.protocol.max_total_tokens = 288
    c.protocol.max_prompt_tokens = 128
    c.protocol.at_max_total_tokens = 'verify'
    c.protocol.at_agent_timeout = 'verify'

    c.model.vocab_size = 512
    c.model.hidden_size = 128
    c.model.intermediate_size = 384
    c.model.num_hidden_layers = 4
    c.model.num_attention_heads = 4
    c.model.num_key_value_heads = 1
    c.model.head_dim = 32
    c.model.rope_theta = 10_000.0
    c.model.initializer_range = 0.05
    c.model.tie_word_embeddings = True
    c.model.dtype = 'float32'

    c.sharding = ml_collections.ConfigDict({'embed': 'fsdp'})  # and nothing over the tensor axis

    c.optimizer.learning_rate = 2e-4
    c.optimizer.warmup_steps = 5
    c.optimizer.warmup_from = 'one'
    c.optimizer.b2 = 0.95

    c.policy.backend = 'jax'
    c.policy.temperature = 1.0
    c.policy.slots = 64

    c.sandbox.backend = 'local'
    c.sandbox.at_once = 64
    c.sandbox.shell = 'persistent'
    c.sandbox.processes = 64
    c.sandbox.memory_mb = 512
    c.sandbox.disk_mb = 32

    c.warm_start.steps = 210
    c.warm_start.explore_steps = 140
    c.warm_start.optimizer.name = 'muon'
    c.warm_start.optimizer.learning_rate = 3e-3
    c.warm_start.optimizer.warmup_steps = 5
    c.warm_start.optimizer.warmup_from = 'one'
    c.warm_start.optimizer.b2 = 0.95
    c.warm_start.optimizer.max_grad_norm = 1.0

    c.eval.samples = 1
    c.eval.every = 5
    c.eval.tasks = 0
    c.checkpoint.every = 10
    return c
