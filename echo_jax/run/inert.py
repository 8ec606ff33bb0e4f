"""Refuses a key of a recipe that is set and can have no effect with the others chosen.

It is for every program that takes a recipe, and needs no JAX. checks.py refuses what the learner
cannot do.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import ml_collections


class Inert(NamedTuple):
    """Keys that have no effect together with what was chosen for others."""

    keys: tuple[str, ...]  # a section stands for all keys below it
    when: Callable[[ml_collections.ConfigDict], bool]
    deciding: tuple[str, ...]  # the keys that `when` reads
    reason: str  # completes "has no effect ..."
    values: tuple = ()  # if there are any, only these values of the keys have no effect


def sandbox_kinds(config: ml_collections.ConfigDict) -> set[str]:
    """The kinds of sandbox that commands of this run are run in, on any machine."""
    warm_start = {config.warm_start.sandbox} if config.warm_start.steps else set()
    return warm_start | {config.sandbox.backend}


def kills_on_request(config: ml_collections.ConfigDict) -> bool:
    """Whether the run has sandboxes that keep or kill what the agent left running, as asked."""
    return 'docker' in sandbox_kinds(config) and config.sandbox.hardening == 'docker'


def has_one_update(config: ml_collections.ConfigDict) -> bool:
    """Whether a step is a single update of the optimizer."""
    return config.batch.updates * config.batch.epochs == 1


def has_ratio(config: ml_collections.ConfigDict) -> bool:
    """Whether the ratio of the new to the old probability can be other than 1.

    A policy loss differs from a plain policy gradient only by what it does with this ratio.
    """
    return config.loss.old_logprobs == 'rollout' or (
        config.loss.old_logprobs == 'recomputed' and not has_one_update(config)
    )


def drops_targets(config: ml_collections.ConfigDict) -> bool:
    """Whether tokens that `loss.targets` names may be dropped one by one."""
    surprising = config.loss.drop_surprising
    return bool(config.loss.drop_unpredictable or surprising.top or surprising.bottom)


_UPDATES = ('batch.updates', 'batch.epochs')
_KINDS = ('sandbox.backend', 'warm_start.sandbox', 'warm_start.steps')

# What is not here. The model's sizes have an effect beside model.path too: they are compared with
# what is there (model/huggingface.py). What only rewards, tasks or the length of the run can tell
# is not read from a recipe: a bound that no rollout reaches, eval.every beyond num_steps. A key
# that training does not read may be read by another program (loss.targets with loss.env_coef = 0:
# the environment's cross-entropy is measured all the same).
INERT = (
    Inert(
        keys=('batch.mini',),
        when=lambda config: config.batch.updates == 1,
        deciding=('batch.updates',),
        reason='with batch.updates = 1, which cuts nothing',
    ),
    Inert(
        keys=('loss.old_logprobs',),
        when=has_one_update,
        deciding=_UPDATES,
        reason="with one update a batch: it is the same as 'current'",
        values=('recomputed',),
    ),
    Inert(
        keys=('loss.policy', 'loss.clip_low', 'loss.clip_high'),
        when=lambda config: not has_ratio(config),
        deciding=('loss.old_logprobs', *_UPDATES),
        reason=(
            "unless loss.old_logprobs = 'rollout', or 'recomputed' with several updates a batch: "
            'the ratio is 1'
        ),
    ),
    Inert(
        keys=('loss.redraw_limit',),
        when=lambda config: config.loss.equal_groups != 'redraw',
        deciding=('loss.equal_groups',),
        reason="unless loss.equal_groups = 'redraw'",
    ),
    Inert(
        keys=('loss.count_truncated',),
        when=lambda config: not config.loss.mask_truncated,
        deciding=('loss.mask_truncated',),
        reason='with loss.mask_truncated = False',
    ),
    Inert(
        keys=('loss.env_normalization',),
        when=lambda config: config.loss.reduction != 'sequence_mean',
        deciding=('loss.reduction',),
        reason="unless loss.reduction = 'sequence_mean'",
    ),
    Inert(
        keys=('loss.clip_low', 'loss.clip_high'),
        when=lambda config: config.loss.policy == 'dppo',
        deciding=('loss.policy',),
        reason="with loss.policy = 'dppo', which bounds by loss.dppo_tv",
    ),
    Inert(
        keys=('loss.dual_clip',),
        when=lambda config: config.loss.policy != 'dual_clip',
        deciding=('loss.policy',),
        reason="unless loss.policy = 'dual_clip'",
    ),
    Inert(
        keys=('loss.dppo_tv',),
        when=lambda config: config.loss.policy != 'dppo',
        deciding=('loss.policy',),
        reason="unless loss.policy = 'dppo'",
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
        keys=('loss.kl', 'loss.kl_in'),
        when=lambda config: config.loss.kl_coef == 0,
        deciding=('loss.kl_coef',),
        reason='with loss.kl_coef = 0',
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
        keys=('optimizer.warmup_from',),
        when=lambda config: config.optimizer.warmup_steps == 0,
        deciding=('optimizer.warmup_steps',),
        reason='with optimizer.warmup_steps = 0',
    ),
    Inert(
        keys=('sharding.vocab', 'sharding.heads', 'sharding.kv_heads', 'sharding.mlp'),
        when=lambda config: config.mesh.tensor == 1,
        deciding=('mesh.tensor',),
        reason='with mesh.tensor = 1, which divides nothing',
    ),
    Inert(
        keys=(
            'policy.swap',
            'policy.tensor_parallel',
            'policy.keyframe_every',
            'policy.gpu_memory_utilization',
            'policy.lease_sec',
            'batch.oversample',
            'batch.deadline_sec',
            'batch.stragglers',
        ),
        when=lambda config: config.policy.backend == 'jax',
        deciding=('policy.backend',),
        reason="with policy.backend = 'jax', which has no workers",
    ),
    Inert(
        keys=('batch.stragglers',),
        when=lambda config: config.max_staleness == 0,
        deciding=('max_staleness',),
        reason='with max_staleness = 0, where no group is of older weights',
    ),
    Inert(
        keys=('sandbox.user',),
        when=lambda config: (
            config.sandbox.hardening != 'strict' or 'docker' not in sandbox_kinds(config)
        ),
        deciding=('sandbox.hardening', *_KINDS),
        reason=(
            "unless commands run in 'docker' with sandbox.hardening = 'strict': else the image and "
            'the task name the user'
        ),
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
        keys=('num_steps',),
        when=lambda config: config.num_epochs is not None,
        deciding=('num_epochs',),
        reason='if num_epochs names the number of epochs, which gives the steps',
    ),
    Inert(
        keys=('checkpoint.keep_best',),
        when=lambda config: config.eval.tasks == 0,
        deciding=('eval.tasks',),
        reason='with eval.tasks = 0, which measures no solve rate in between',
        values=(True,),
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
    Inert(
        keys=('tasks.families',),
        when=lambda config: bool(
            config.tasks.train and config.tasks.heldout and config.warm_start.steps == 0
        ),
        deciding=('tasks.train', 'tasks.heldout', 'warm_start.steps'),
        reason=(
            'if tasks.train and tasks.heldout name tasks and warm_start.steps = 0: no task is '
            'generated'
        ),
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
    Inert(
        keys=('warm_start.demonstrations', 'warm_start.habits'),
        when=lambda config: 0 < config.warm_start.steps <= config.warm_start.explore_steps,
        deciding=('warm_start.steps', 'warm_start.explore_steps'),
        reason='if all warm_start.steps are of exploration',
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
    defaults, values = base_values(), flat(config)
    for row in INERT:
        if not row.when(config):
            continue
        change = f'or change {" or ".join(row.deciding)}'
        by_recipe = flags.isdisjoint(row.deciding)
        for key in keys_of(row, values):
            if row.values and values[key] not in row.values:
                continue
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


def inert_keys(config: ml_collections.ConfigDict) -> list[str]:
    """The keys and sections that can have no effect with the others of the recipe, set or not."""
    values, found = flat(config), {}
    for row in INERT:
        for name in row.keys if row.when(config) else ():
            below = keys_of(row._replace(keys=(name,)), values)
            if any(not row.values or values[key] in row.values for key in below):
                found[name] = True
    return sorted(found)


def base_values() -> dict[str, object]:
    """What configs/base.py has; nothing for a recipe that stands apart from the checkout."""
    try:
        from configs import base  # here: recipes lie beside the package, not in it
    except ModuleNotFoundError:
        return {}
    return flat(base.get_config())


def keys_of(row: Inert, keys: Iterable[str]) -> list[str]:
    """Those of the flat `keys` that the row speaks of."""
    return [key for key in keys if any(f'{key}.'.startswith(f'{name}.') for name in row.keys)]


def flat(config: Mapping | ml_collections.ConfigDict, prefix: str = '') -> dict[str, Any]:
    """The values of a config by their keys, such as 'batch.groups'."""
    values = {}
    for key, value in config.items():
        if isinstance(value, Mapping | ml_collections.ConfigDict):
            values |= flat(value, f'{prefix}{key}.')
        else:
            values[f'{prefix}{key}'] = value
    return values
