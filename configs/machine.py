"""ECHO ahead of GRPO: an agent learns the tools of one machine, on one CPU, in minutes.

    python -m echo_jax.train --config=configs/machine.py --workdir=runs/machine
    python -m echo_jax.train --config=configs/machine.py:grpo --workdir=runs/machine_grpo

The machine has 24 tools whose options nobody tells but the machine: a usage line that one task
prints helps in every later one. The warm start knows such tools from other machines. What it shows,
the other variants and what it does not show: experiments/machine.

Hardware: two CPU cores, 4 GiB of memory, Linux namespaces. Measured, seeds 0 to 4: held-out solve
rate 0.33 to 0.77 in the mean, 0.60 to 0.92; GRPO's 0.33 to 0.43, 0.38 to 0.48; 14.3 minutes on two
cores, five and a half of them until the end of the first step.
"""

import ml_collections

from configs import tiny

# What the arms of experiments/machine change in the recipe, which is 'echo'.
VARIANTS = {
    'echo': {},
    'grpo': {'loss.env_coef': 0.0},
    'echo_0p05': {'loss.env_coef': 0.05},
    'echo_1p0': {'loss.env_coef': 1.0},
    'echo_released': {'loss.targets': 'released'},
    'echo_no_kl': {'loss.kl_coef': 0.0},
    'grpo_no_kl': {'loss.env_coef': 0.0, 'loss.kl_coef': 0.0},
    'new_machine': {'tasks.families': ('new_machine',)},
    'new_machine_grpo': {'tasks.families': ('new_machine',), 'loss.env_coef': 0.0},
}


def get_config(variant: str = 'echo') -> ml_collections.ConfigDict:
    if variant not in VARIANTS:
        raise ValueError(f'the recipe has the variants {list(VARIANTS)}, not {variant!r}')
    c = tiny.get_config()
    c.loss.env_coef = 0.3
    c.loss.targets = 'output'
    c.loss.kl_coef = 0.05

    c.protocol.max_turns = 3
    c.protocol.max_turn_tokens = 40

    c.model.vocab_size = 432
    c.optimizer.max_grad_norm = 1.0

    c.tasks.families = ('machine',)
    c.tasks.train_count = 640  # each is worked on once
    c.tasks.heldout_count = 192  # 64 each with one, two and three tools

    c.eval.every = 10

    c.warm_start.steps = 150
    c.warm_start.explore_steps = 150
    c.warm_start.explorations = 2000
    c.update_from_flattened_dict(VARIANTS[variant])
    return c
