"""Refuses, before a run begins, a recipe that the learner's program cannot do or would ignore.

What only a part of the code can tell, such as an unknown dialect, that part refuses itself.
"""

import operator
from collections.abc import Iterable

import jax
import ml_collections

from echo_jax.learner import env_coef
from echo_jax.learner.options import check_clashes, check_options
from echo_jax.learner.step import ShardedModel
from echo_jax.learner.updates import check_cut
from echo_jax.model import huggingface
from echo_jax.policy import check_swap
from echo_jax.run.inert import check_inert, sandbox_kinds
from echo_jax.run.numbering import STRAGGLERS, may_be_late
from echo_jax.run.sinks import check_packages
from echo_jax.run.workdir import read_tokenizer

_SEEDS = 1 << 31  # Grain and NumPy take no negative ones, JAX no larger ones
_AT_LEAST_1 = (
    'num_epochs',
    'group_size',
    'batch.groups',
    'batch.micro_rows',
    'batch.updates',
    'batch.epochs',
    'policy.slots',
    'sandbox.at_once',
    'tasks.train_count',
    'tasks.heldout_count',
    'warm_start.rollouts',
    'warm_start.demonstrations',
    'warm_start.explorations',
    'warm_start.save_every',
    'eval.samples',
    'eval.every',
    'checkpoint.every',
    'checkpoint.keep',
)


def check_config(config: ml_collections.ConfigDict, overrides: Iterable[str] = ()) -> None:
    """Refuses what the learner's program cannot do here, or would ignore; see `check_inert`."""
    check_options(config.loss)  # first: a name that nobody knows is not called inert
    check_inert(config, overrides)
    check_clashes(config.loss)
    _check_values(config)
    check_packages(config)
    _check_learner(config)


def sandboxes_here(config: ml_collections.ConfigDict) -> set[str]:
    """The kinds of sandbox that the learner's program itself runs commands in."""
    if config.policy.backend == 'jax':
        return sandbox_kinds(config)
    return {config.warm_start.sandbox} if config.warm_start.steps else set()


def _check_values(config: ml_collections.ConfigDict) -> None:
    if not 0 <= config.seed < _SEEDS:
        raise ValueError(f'seed is {config.seed}; expected 0 to {_SEEDS - 1}')
    for key in _AT_LEAST_1:
        value = operator.attrgetter(key)(config)
        if value is not None and value < 1:
            raise ValueError(f'{key} is {value}; expected at least 1')
    for key in ('scores', 'rollouts'):
        if (config.logging[key] or 0) < 0:
            raise ValueError(f'logging.{key} is {config.logging[key]}; expected 0 or more steps')
    if not 0 <= config.logging.prometheus_port < 1 << 16:
        port = config.logging.prometheus_port
        raise ValueError(f'logging.prometheus_port is {port}; expected 1 to 65535, or 0 for none')
    if config.eval.tasks is not None and config.eval.tasks < 0:
        raise ValueError(f'eval.tasks is {config.eval.tasks}; expected 0 or more, or None for all')
    check_cut(config)
    if config.loss.equal_groups == 'redraw' and config.loss.redraw_limit < 1:
        raise ValueError(
            f'loss.redraw_limit is {config.loss.redraw_limit}; expected at least 1, or '
            "loss.equal_groups = 'keep'"
        )
    if config.policy.backend not in ('jax', 'vllm'):
        raise ValueError(f"policy.backend is {config.policy.backend!r}; expected 'jax' or 'vllm'")
    check_swap(config.policy.swap)
    if not config.policy.temperature > 0:
        raise ValueError(
            f'policy.temperature is {config.policy.temperature}; expected more than 0, since the '
            'learner divides by it'
        )
    if config.max_staleness < 0:
        raise ValueError(f'max_staleness is {config.max_staleness}; expected 0 or more steps')
    if config.max_staleness > 1 and config.policy.backend == 'jax':
        raise ValueError(
            f'max_staleness is {config.max_staleness}; the embedded policy draws one step ahead at '
            'most, set it to 0 or 1'
        )
    if config.batch.stragglers not in STRAGGLERS:
        raise ValueError(
            f'batch.stragglers is {config.batch.stragglers!r}; expected one of {STRAGGLERS}'
        )
    for key in ('oversample', 'deadline_sec'):
        if config.batch[key] < 0:
            raise ValueError(f'batch.{key} is {config.batch[key]}; expected 0 or more')
    if config.policy.lease_sec <= 0:
        raise ValueError(f'policy.lease_sec is {config.policy.lease_sec}; expected more than 0')
    if config.loss.equal_groups == 'redraw' and may_be_late(config):
        raise ValueError(
            "loss.equal_groups = 'redraw' has each step wait for what it draws anew, and with "
            'max_staleness, batch.oversample or batch.deadline_sec a step waits for no group; set '
            "them to 0, or loss.equal_groups to 'drop'"
        )
    if config.batch.seq_len < config.protocol.max_total_tokens:
        raise ValueError(
            f'batch.seq_len={config.batch.seq_len} cannot hold a rollout of '
            f'protocol.max_total_tokens={config.protocol.max_total_tokens}; raise it'
        )
    group = max(config.group_size, config.eval.samples)
    if config.policy.slots < group:
        raise ValueError(
            f'policy.slots={config.policy.slots} cannot hold a group of {group} rollouts; raise it'
        )
    if not 0 <= config.warm_start.explore_steps <= config.warm_start.steps:
        raise ValueError(
            f'warm_start.explore_steps={config.warm_start.explore_steps} is not among the '
            f'warm_start.steps={config.warm_start.steps}; expected at most as many'
        )
    _check_env_term(config)
    if config.model.path:
        return
    sizes = huggingface.field_names(huggingface.own_family(config.model))
    unknown = [f'model.{key}' for key in config.model if key in sizes and config.model[key] is None]
    if unknown:
        raise ValueError(
            f'{", ".join(unknown)} is None and there is no model.path whose config.json would say '
            'it; set one of them'
        )


def _check_env_term(config: ml_collections.ConfigDict) -> None:
    loss = config.loss
    env_coef.check(loss)
    if loss.env_adaptive.every and loss.env_schedule.name != 'constant':
        raise ValueError(
            f'loss.env_adaptive.every={loss.env_adaptive.every} and loss.env_schedule.name='
            f'{loss.env_schedule.name!r} both move loss.env_coef; choose one of them'
        )
    if loss.max_env_tokens < 0:
        raise ValueError(f'loss.max_env_tokens is {loss.max_env_tokens}; expected 0 or more')
    shares = {f'env_filter.{name}': value for name, value in loss.env_filter.items()}
    shares |= {f'drop_surprising.{name}': value for name, value in loss.drop_surprising.items()}
    for key, value in shares.items():
        if not 0 <= value <= 1:
            raise ValueError(f'loss.{key} is {value}; expected a share from 0 to 1')
    dropped = loss.drop_surprising
    if dropped.top + dropped.bottom >= 1:
        raise ValueError(
            f'loss.drop_surprising.top={dropped.top} and bottom={dropped.bottom} leave no target; '
            'expected less than 1 together'
        )
    if ':environment_only' in config.tasks.heldout:
        raise ValueError(
            f'tasks.heldout={config.tasks.heldout!r} marks tasks as environment_only, whose tests '
            'are not run; held-out tasks are measured by them, leave the mark out'
        )


def _check_learner(config: ml_collections.ConfigDict) -> None:
    """Refuses what this machine's JAX, or the model that is there, does not allow."""
    processes = jax.process_count()
    if processes > 1 and config.warm_start.steps:
        raise ValueError(
            f'this learner has {processes} processes and warm_start.steps='
            f'{config.warm_start.steps}, which is for one; set it to 0 and name a model.path'
        )
    if processes > 1 and config.policy.backend == 'jax':
        raise ValueError(
            f"this learner has {processes} processes, but policy.backend='jax' samples in one; "
            "start it on one host, or set it to 'vllm'"
        )
    model = ShardedModel.of(config).model  # raises ValueError if it does not fit the mesh
    if config.model.path:
        huggingface.check_tokenizer(read_tokenizer(config.model.path), model)
