"""Refuses, before a run begins, a config that this program cannot do or would ignore."""

import operator

import jax
import ml_collections

from echo_jax.learner.step import ShardedModel
from echo_jax.model import huggingface
from echo_jax.run.workdir import read_tokenizer

_COUNTS = (
    *('group_size', 'batch.groups', 'batch.micro_rows', 'policy.slots'),
    *('sandbox.at_once', 'eval.samples', 'eval.every', 'checkpoint.every', 'checkpoint.keep'),
    *('warm_start.rollouts', 'warm_start.demonstrations', 'warm_start.save_every'),
)


def check_choices(config: ml_collections.ConfigDict) -> None:
    """Refuses what this program cannot do, or would silently ignore."""
    for key in _COUNTS:
        if (value := operator.attrgetter(key)(config)) < 1:
            raise ValueError(f'{key} is {value}; expected at least 1')
    if config.policy.backend not in ('jax', 'vllm'):
        raise ValueError(f"policy.backend is {config.policy.backend!r}; expected 'jax' or 'vllm'")
    if config.max_staleness < 0:
        raise ValueError(f'max_staleness is {config.max_staleness}; expected 0 or more steps')
    if (count := jax.process_count()) > 1 and config.warm_start.steps:
        raise ValueError(
            f'this learner has {count} processes and warm_start.steps={config.warm_start.steps}, '
            'which is for one; set it to 0 and name a model.path'
        )
    if config.policy.backend == 'jax':
        if count > 1:
            raise ValueError(
                f"this learner has {count} processes, but policy.backend='jax' samples in one; "
                "start it on one host, or set it to 'vllm'"
            )
        if config.max_staleness:
            raise ValueError(
                f'max_staleness is {config.max_staleness}; the embedded policy samples every step '
                'from the weights that it updates, set it to 0'
            )
    if config.batch.seq_len < config.protocol.max_total_tokens:
        raise ValueError(
            f'batch.seq_len={config.batch.seq_len} cannot hold a rollout of '
            f'protocol.max_total_tokens={config.protocol.max_total_tokens}; raise it'
        )
    if config.policy.slots < (size := max(config.group_size, config.eval.samples)):
        raise ValueError(
            f'policy.slots={config.policy.slots} cannot hold a group of {size} rollouts; raise it'
        )
    if not 0 <= config.warm_start.explore_steps <= config.warm_start.steps:
        raise ValueError(
            f'warm_start.explore_steps={config.warm_start.explore_steps} is not among the '
            f'warm_start.steps={config.warm_start.steps}'
        )
    model = ShardedModel.of(config).model  # raises where it does not fit the mesh
    if path := config.model.path:
        huggingface.check_tokenizer(read_tokenizer(path), model)


def sandboxes_here(config: ml_collections.ConfigDict) -> set[str]:
    """The kinds of sandbox that this program itself runs commands in."""
    warm_start = {config.warm_start.sandbox} if config.warm_start.steps else set()
    return warm_start | ({config.sandbox.backend} if config.policy.backend == 'jax' else set())
