"""Refuses a key of a recipe that is set and can have no effect with the others chosen.

It is for every program that takes a recipe, and needs no JAX. checks.py refuses what the learner
cannot do.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import ml_collections


class Inert(NamedTuple):
    """Keys that have no effect together with what was chosen for others."""

    keys: tuple[str, ...]  # a section stands for all keys below it
    when: Callable[[ml_collections.ConfigDict], bool]
    deciding: tuple[str, ...]  # the keys that `when` reads
    reason: str  # completes "has no effect ..."


def sandbox_kinds(config: ml_collections.ConfigDict) -> set[str]:
    """The kinds of sandbox that commands of this run are run in, on any machine."""
    warm_start = {config.warm_start.sandbox} if config.warm_start.steps else set()
    return warm_start | {config.sandbox.backend}


def kills_on_request(config: ml_collections.ConfigDict) -> bool:
    """Whether the run has sandboxes that keep or kill what the agent left running, as asked."""
    return 'docker' in sandbox_kinds(config) and config.sandbox.hardening == 'docker'


def drops_targets(config: ml_collections.ConfigDict) -> bool:
    """Whether tokens that `loss.targets` names may be dropped one by one."""
    surprising = config.loss.drop_surprising
    return bool(config.loss.drop_unpredictable or surprising.top or surprising.bottom)


_KINDS = ('sandbox.backend', 'warm_start.sandbox', 'warm_start.steps')

# Two kinds of keys are not here. loss.clip_low, loss.clip_high and loss.old_logprobs='recomputed'
# cannot act either, as long as a batch gets one update. The model's sizes have an effect beside
# model.path too: they are compared with what is there (model/huggingface.py).
INERT = (
    Inert(
        keys=('loss.env_normalization',),
        when=lambda config: config.loss.reduction != 'sequence_mean',
        deciding=('loss.reduction',),
        reason="unless loss.reduction = 'sequence_mean'",
    ),
    Inert(
        keys=('loss.env_schedule.end',),
        when=lambda config: config.loss.env_schedule.name != 'linear',
        deciding=('loss.env_schedule.name',),
        reason="unless loss.env_schedule.name = 'linear'",
    ),
    Inert(
        keys=('loss.env_schedule.steps', 'loss.env_schedule.coefs'),
        when=lambda config: config.loss.env_schedule.name != 'steps',
        deciding=('loss.env_schedule.name',),
        reason="unless loss.env_schedule.name = 'steps'",
    ),
    Inert(
        keys=(
            'loss.env_adaptive.target',
            'loss.env_adaptive.smoothing',
            'loss.env_adaptive.low',
            'loss.env_adaptive.high',
        ),
        when=lambda config: config.loss.env_adaptive.every == 0,
        deciding=('loss.env_adaptive.every',),
        reason='with loss.env_adaptive.every = 0',
    ),
    Inert(
        keys=('loss.count_dropped',),
        when=lambda config: not drops_targets(config) or config.loss.reduction == 'dr_grpo',
        deciding=(
            'loss.reduction',
            'loss.drop_unpredictable',
            'loss.drop_surprising.top',
            'loss.drop_surprising.bottom',
        ),
        reason="unless a rule drops targets, and with loss.reduction = 'dr_grpo' never",
    ),
    Inert(
        keys=('loss.mismatch',),
        when=lambda config: config.loss.old_logprobs == 'rollout',
        deciding=('loss.old_logprobs',),
        reason="with loss.old_logprobs = 'rollout', whose ratio is to the sampler already",
    ),
    Inert(
        keys=('loss.mismatch_cap',),
        when=lambda config: config.loss.mismatch == 'none',
        deciding=('loss.mismatch',),
        reason="with loss.mismatch = 'none'",
    ),
    Inert(
        keys=('protocol.max_commands_per_turn',),
        when=lambda config: config.protocol.command_selection == 'all',
        deciding=('protocol.command_selection',),
        reason="with protocol.command_selection = 'all'",
    ),
    Inert(
        keys=('protocol.length_penalty_start',),
        when=lambda config: config.protocol.length_penalty_coef == 0,
        deciding=('protocol.length_penalty_coef',),
        reason='with protocol.length_penalty_coef = 0',
    ),
    Inert(
        keys=('sharding.vocab', 'sharding.heads', 'sharding.kv_heads', 'sharding.mlp'),
        when=lambda config: config.mesh.tensor == 1,
        deciding=('mesh.tensor',),
        reason='with mesh.tensor = 1, which divides nothing',
    ),
    Inert(
        keys=('policy.tensor_parallel', 'policy.keyframe_every', 'policy.gpu_memory_utilization'),
        when=lambda config: config.policy.backend == 'jax',
        deciding=('policy.backend',),
        reason="with policy.backend = 'jax', which has no workers",
    ),
    Inert(
        keys=('sandbox.user',),
        when=lambda config: config.sandbox.hardening == 'docker',
        deciding=('sandbox.hardening',),
        reason="with sandbox.hardening = 'docker', where the image and the task name the user",
    ),
    Inert(
        keys=('verifier.kill_agent_processes',),
        when=lambda config: not kills_on_request(config),
        deciding=(*_KINDS, 'sandbox.hardening'),
        reason=(
            "unless commands run in 'docker' with sandbox.hardening = 'docker': it is always so "
            "with 'local' and 'strict', and never with 'harbor'"
        ),
    ),
    Inert(
        keys=('sandbox.hardening', 'sandbox.build_network', 'sandbox.runtime'),
        when=lambda config: 'docker' not in sandbox_kinds(config),
        deciding=_KINDS,
        reason="unless commands run in 'docker'",
    ),
    Inert(
        keys=('sandbox.harbor_environment',),
        when=lambda config: 'harbor' not in sandbox_kinds(config),
        deciding=_KINDS,
        reason="unless commands run in 'harbor'",
    ),
    Inert(
        keys=('sandbox.processes',),
        when=lambda config: sandbox_kinds(config) == {'harbor'},
        deciding=_KINDS,
        reason="if all commands run in 'harbor', which has no such limit",
    ),
    Inert(
        keys=('tasks.train_count',),
        when=lambda config: bool(config.tasks.train),
        deciding=('tasks.train',),
        reason='if tasks.train names tasks: none are generated',
    ),
    Inert(
        keys=('tasks.heldout_count',),
        when=lambda config: bool(config.tasks.heldout),
        deciding=('tasks.heldout',),
        reason='if tasks.heldout names tasks: none are generated',
    ),
    # warm_start.explore_steps is not here: it is at most warm_start.steps, and so 0.
    Inert(
        keys=(
            'warm_start.rollouts',
            'warm_start.explorations',
            'warm_start.demonstrations',
            'warm_start.habits',
            'warm_start.sandbox',
            'warm_start.save_every',
            'warm_start.optimizer',
        ),
        when=lambda config: config.warm_start.steps == 0,
        deciding=('warm_start.steps',),
        reason='with warm_start.steps = 0',
    ),
)


def check_inert(config: ml_collections.ConfigDict, overrides: Iterable[str] = ()) -> None:
    """Refuses a key that is set and can have no effect with the others chosen (INERT).

    `overrides` are the keys that flags name: `config_flags.get_override_values(FLAGS['config'])`. A
    flag sets a key even to its default. A recipe sets it to another value than the default; that is
    refused only if the recipe itself makes the key inert, because a flag that turns something off
    cannot take out of the recipe how it would have been done.
    """
    flags = {name.partition('[')[0] for name in overrides}  # '[0]' is an element of a tuple
    defaults, values = _defaults(), flat(config)
    for row in INERT:
        if not row.when(config):
            continue
        change = f'or change {" or ".join(row.deciding)}'
        by_recipe = flags.isdisjoint(row.deciding)
        for key in keys_of(row, values):
            if key in flags:
                raise ValueError(
                    f'--config.{key}={values[key]} has no effect {row.reason}; leave the flag out, '
                    f'{change}'
                )
            if by_recipe and key in defaults and values[key] != defaults[key]:
                raise ValueError(
                    f'{key} is {values[key]!r} in the recipe, which has no effect {row.reason}; '
                    f'leave it at {defaults[key]!r}, {change}'
                )


def _defaults() -> dict[str, object]:
    """What configs/base.py has; nothing for a recipe that stands apart from the checkout."""
    try:
        from configs import base  # here: recipes lie beside the package, not in it
    except ModuleNotFoundError:
        return {}
    return flat(base.get_config())


def keys_of(row: Inert, keys: Iterable[str]) -> list[str]:
    """Those of the flat `keys` that the row speaks of."""
    return [key for key in keys if any(f'{key}.'.startswith(f'{name}.') for name in row.keys)]


def flat(config: ml_collections.ConfigDict, prefix: str = '') -> dict[str, object]:
    """The values of a config by their keys, such as 'batch.groups'."""
    values = {}
    for key, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            values |= flat(value, f'{prefix}{key}.')
        else:
            values[f'{prefix}{key}'] = value
    return values
