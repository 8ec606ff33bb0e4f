"""Small real runs that take every option once, and which options there are.

RUNS is the table; a new value of an option goes into one of its runs. tests/test_every_option.py
does the runs and fails if a value is in none of them.
"""

import pathlib
import socket
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import ml_collections

from configs import base, tiny
from echo_jax.agent import protocol
from echo_jax.agent.dialects import DIALECTS
from echo_jax.learner.env_coef import SCHEDULES
from echo_jax.learner.options import NAMES
from echo_jax.learner.updates import MINI
from echo_jax.model import attention
from echo_jax.model.qwen3 import REMAT
from echo_jax.policy import SWAPS
from echo_jax.run.inert import flat, inert_keys
from echo_jax.run.numbering import STRAGGLERS
from echo_jax.tasks.generate import generate_tasks
from tests.support import divided
from tests.support.small_run import SETTINGS


def free_port() -> int:
    with socket.create_server(('localhost', 0)) as free:
        return free.getsockname()[1]


_OPTIMIZER = {'name': ('adamw', 'muon'), 'warmup_from': ('zero', 'one')}
_SANDBOXES = ('local', 'docker', 'harbor')
_SPENT = ('discard', 'verify')
# What an option that is a name may be, by the tables of the code itself if it has one.
KNOWN: Mapping[str, Sequence] = {
    **{f'loss.{key}': names for key, names in NAMES.items()},
    'loss.env_schedule.name': SCHEDULES,
    'batch.mini': MINI,
    'batch.stragglers': STRAGGLERS,
    **{f'protocol.{key}': names for key, names in protocol.CHOICES.items()},
    'protocol.dialect': tuple(DIALECTS),
    'protocol.at_max_total_tokens': _SPENT,
    'protocol.at_agent_timeout': _SPENT,
    'model.dtype': ('bfloat16', 'float32'),
    'model.attention': attention.KINDS,
    'model.remat': tuple(REMAT),
    **{f'sharding.{axis}': ('tensor',) for axis in ('vocab', 'heads', 'kv_heads', 'mlp')},
    **{f'optimizer.{key}': names for key, names in _OPTIMIZER.items()},
    **{f'warm_start.optimizer.{key}': names for key, names in _OPTIMIZER.items()},
    'policy.backend': ('jax', 'vllm'),
    'policy.swap': SWAPS,
    'sandbox.backend': _SANDBOXES,
    'warm_start.sandbox': _SANDBOXES,
    'sandbox.shell': ('fresh', 'persistent'),
    'sandbox.hardening': ('docker', 'strict'),
}
# Options that are any text.
TEXTS = (
    'logging.wandb',
    'model.path',
    'tasks.train',
    'tasks.heldout',
    'sandbox.harbor_environment',
)
_HARBOR = 'Harbor has an environment of its own, without JAX: tests/sandbox/test_harbor_*.py'
_VLLM = 'vLLM has an environment of its own: tests/test_fleet.py'
_SWAPS = 'vLLM has an environment of its own: tests/rollout/test_vllm_policy.py'
# What none of the runs can have on one CPU, and why, or where else it is run.
ELSEWHERE: Mapping[str, str] = {
    "model.attention = 'splash'": 'needs a TPU: tests/learner/test_platforms.py',
    "model.attention = 'cudnn'": 'needs CUDA: tests/learner/test_platforms.py',
    "model.attention = 'pallas'": 'needs CUDA: tests/learner/test_platforms.py',
    "model.remat = 'offload'": 'needs an accelerator: tests/learner/test_platforms.py',
    'model.path': 'needs a model in files: tests/test_export.py',
    "policy.backend = 'vllm'": _VLLM,
    **{f'policy.swap = {swap!r}': _SWAPS for swap in SWAPS},
    'policy.keyframe_every': _VLLM,
    'policy.lease_sec': _VLLM,
    'batch.oversample': _VLLM,
    'batch.deadline_sec': _VLLM,
    **{f'batch.stragglers = {choice!r}': _VLLM for choice in STRAGGLERS},
    'policy.tensor_parallel': 'needs several GPUs',
    'policy.gpu_memory_utilization': 'needs a GPU',
    "sandbox.backend = 'harbor'": _HARBOR,
    "warm_start.sandbox = 'harbor'": _HARBOR,
    'sandbox.harbor_environment': _HARBOR,
}


class Run(NamedTuple):
    values: Mapping[str, object]  # of the recipe's keys, beside its own and SETTINGS
    logs: tuple[str, ...] = ()  # metrics of every row that there are only with these values
    recipe: str = 'configs/tiny.py'
    devices: int = 1

    @property
    def needs_docker(self) -> bool:
        return 'docker' in (
            self.values.get('sandbox.backend'),
            self.values.get('warm_start.sandbox'),
        )


NO_WARM_START = {'warm_start.steps': 0, 'warm_start.explore_steps': 0}
# No task is solved by so small a model, but after a warm start its rollouts differ in length, so
# there are advantages.
UNEQUAL_REWARDS = {'protocol.length_penalty_coef': 1.0, 'protocol.length_penalty_start': 0}
SEVERAL_UPDATES = {'batch.epochs': 2, 'loss.old_logprobs': 'recomputed'}
RUNS: Mapping[str, Run] = {
    'plain': Run({}),
    'updates': Run(
        {
            **NO_WARM_START,
            **SEVERAL_UPDATES,
            'num_steps': 4,
            'batch.updates': 2,
            'batch.mini': 'rollouts',
            'batch.micro_rows': 1,
            'loss.clip_low': 0.001,
            'loss.reduction': 'dr_grpo',
            'loss.mismatch': 'sequence',
            # Without rewards all groups are equal, so every step draws as many as it may.
            'loss.equal_groups': 'redraw',
            'loss.redraw_limit': 2,
            'tasks.families': ('machine', 'new_machine'),
        },
        logs=('rollout/redrawn_groups', 'train/grad_norm_last'),
    ),
    'env_term': Run(
        {
            **UNEQUAL_REWARDS,
            # So many that some calls are right, and the terminal answers.
            'warm_start.steps': 120,
            'warm_start.explore_steps': 60,
            'warm_start.save_every': 120,
            'logging.rollouts': 1,
            'loss.targets': 'observation',
            'loss.env_normalization': 'selected',
            'loss.max_env_tokens': 24,
            'loss.env_filter.min_clean': 0.01,
            'loss.drop_unpredictable': True,
            'loss.drop_surprising.top': 0.1,
            'loss.drop_surprising.bottom': 0.2,
            'loss.count_dropped': False,
            'loss.env_adaptive.every': 2,
            'loss.env_adaptive.target': 0.2,
            'loss.env_adaptive.smoothing': 0.5,
            'loss.env_adaptive.low': 0.001,
            'loss.env_adaptive.high': 0.2,
            'loss.advantages': 'rloo',
            'loss.mismatch': 'token',
        },
        logs=(
            *('train/env_coef', 'train/env_ce/scaffold', 'train/env_filtered/clean'),
            *(f'train/env_dropped/{why}' for why in ('capped', 'unpredictable', 'surprising')),
        ),
    ),
    'kl_in_loss': Run(
        {
            **UNEQUAL_REWARDS,
            'num_steps': 2,
            'loss.kl_coef': 0.05,
            'loss.kl': 'k2',
            'loss.old_logprobs': 'rollout',
            'loss.policy': 'cispo',
            'loss.clip_high': 0.3,
            'loss.targets': 'output',
            'loss.reduction': 'token_mean',
            'loss.advantages': 'dr_grpo',
            'loss.env_filter.min_parsed': 0.01,
            'loss.env_schedule.name': 'linear',
            'loss.env_schedule.end': 0.01,
        },
        logs=('train/reference_kl', 'train/env_coef', 'train/env_filtered/parsed'),
    ),
    'kl_in_reward': Run(
        {
            **SEVERAL_UPDATES,
            'num_steps': 2,
            'max_staleness': 1,
            'loss.kl_coef': 0.05,
            'loss.kl': 'k1',
            'loss.kl_in': 'reward',
            'loss.policy': 'dppo',
            'loss.dppo_tv': 0.05,
            'loss.mismatch': 'icepop',
            'loss.targets': 'warning',
            'loss.env_schedule.name': 'steps',
            'loss.env_schedule.steps': (1,),
            'loss.env_schedule.coefs': (0.02,),
        },
        logs=(
            *('train/reference_kl', 'train/env_coef'),
            *('train/masked_fraction', 'train/mismatch_masked'),
        ),
    ),
    'rollouts_ratio': Run(
        {
            **UNEQUAL_REWARDS,
            **SEVERAL_UPDATES,
            'num_steps': 2,
            'batch.updates': 2,
            'batch.pack': False,
            'loss.policy': 'gspo',
            'loss.mismatch': 'geometric',
            'loss.mismatch_cap': 1.5,
            'loss.targets': 'warning_and_released',
            'loss.reduction': 'prompt_mean',
            'loss.advantages': 'maxrl',
            'loss.kl_coef': 0.05,
            'loss.count_infra_errors': True,
        },
        logs=('train/kl_loss', 'train/mismatch_masked'),
    ),
    'dual_clip': Run(
        {
            **UNEQUAL_REWARDS,
            **SEVERAL_UPDATES,
            'num_steps': 2,
            'loss.policy': 'dual_clip',
            'loss.dual_clip': 1.5,
            'loss.mismatch': 'mask',
            'loss.env_coef': 0.02,
            'loss.env_normalization': 'token_mean',
            'loss.drop_unpredictable': True,
        },
        logs=(
            *('train/dual_clip_fraction', 'train/mismatch_masked'),
            'train/env_dropped/unpredictable',
        ),
    ),
    # So small a model never says that it is done, so all rollouts are truncated: in these two the
    # policy term learns nothing.
    'masked': Run(
        {**NO_WARM_START, 'num_steps': 1, 'loss.mask_truncated': True, 'loss.equal_groups': 'drop'},
        logs=('rollout/masked_truncated', 'rollout/dropped_groups'),
    ),
    'uncounted': Run(
        {
            **NO_WARM_START,
            'num_steps': 1,
            'loss.mask_truncated': True,
            'loss.count_truncated': False,
            'loss.env_filter.min_correct': 0.1,
        },
        logs=('rollout/masked_truncated', 'train/env_filtered/correct'),
    ),
    # The transcripts of the warm start run commands, so the protocol has something to read.
    'conversation': Run(
        {
            'seed': 1,
            'num_steps': 2,
            'protocol.system_prompt': 'full',
            'protocol.max_prompt_tokens': 1200,
            'protocol.max_context_tokens': 1600,
            'protocol.max_total_tokens': 1600,
            'batch.seq_len': 1600,
            'protocol.command_selection': 'all',
            'protocol.command_timeout': 20,
            'protocol.max_output_chars': 8,
            'protocol.truncation': 'start_end',
            'protocol.thinking': 'strip_rollout',
            'protocol.parse_after_think': True,
            'protocol.at_max_total_tokens': 'discard',
            'protocol.at_agent_timeout': 'discard',
            'sandbox.shell': 'fresh',
            'sandbox.agent_timeout': 50.0,
            'sandbox.verifier_timeout': 40.0,
            'model.dtype': 'bfloat16',
            'model.remat': 'none',
            'optimizer.name': 'muon',
            'optimizer.warmup_from': 'zero',
            'optimizer.warmup_steps': 1,
            'optimizer.weight_decay': 0.1,
            'optimizer.max_grad_norm': 1.0,
            'warm_start.optimizer.name': 'adamw',
            'warm_start.optimizer.warmup_from': 'zero',
            'warm_start.optimizer.b1': 0.8,
            'warm_start.optimizer.weight_decay': 0.1,
            'warm_start.optimizer.decay_steps': 2,
            'warm_start.habits': ('solve', 'leave'),
            'eval.balance': False,
            'eval.temperature': 1.0,
            'eval.tasks': 2,
            'logging.scores': 0,
            'logging.wandb': 'tests',
            'logging.prometheus_port': free_port(),
            'eval.every': 1,
            'checkpoint.keep': 1,
            'checkpoint.keep_best': True,
            'tasks.train': '{tasks}/train',
            'tasks.heldout': '{tasks}/heldout',
        }
    ),
    'divided': Run(
        {
            'num_epochs': 1,
            'tasks.train_count': 4,
            'warm_start.steps': 2,
            'warm_start.explore_steps': 1,
            'warm_start.sandbox': 'docker',
            'mesh.data': 2,
            'mesh.fsdp': 1,
            'mesh.context': 2,
            'mesh.tensor': 2,
            'model.model_type': 'qwen3',
            'model.num_key_value_heads': 2,
            'model.tie_word_embeddings': False,
            'model.attention': 'blocks',
            'model.remat': 'attention',
            'protocol.command_selection': 'last',
            'protocol.max_commands_per_turn': 2,
            'protocol.max_output_chars': 8,
            'protocol.truncation': 'end',
            'protocol.thinking': 'strip_all',
            'optimizer.b1': 0.8,
            'optimizer.decay_steps': 2,
        },
        recipe='tests/support/divided.py',
        devices=8,
    ),
    'containers': Run(
        {
            'num_steps': 2,
            **NO_WARM_START,
            'sandbox.backend': 'docker',
            'sandbox.memory_mb': 128,
            'sandbox.cpus': 1.0,
            'sandbox.runtime': 'runc',
            'sandbox.build_network': False,
            'verifier.kill_agent_processes': True,
        }
    ),
    'strict_containers': Run(
        {
            **NO_WARM_START,
            'num_steps': 2,
            'sandbox.backend': 'docker',
            'sandbox.memory_mb': 128,
            'sandbox.hardening': 'strict',
            'sandbox.user': 0,
        }
    ),
}


def write_tasks(folder: pathlib.Path) -> pathlib.Path:
    """A folder with the tasks of the runs that name tasks: `train` and `heldout`."""
    for split, count in (('train', 40), ('heldout', 6)):
        generate_tasks(folder / split, split=split, count=count)
    return folder


def flags_of(name: str, tasks: str | pathlib.Path = '') -> tuple[list[str], list[str]]:
    """The flags of a run of RUNS, and what of SETTINGS is left out: both for `Programs.train`."""
    values = RUNS[name].values
    flags = [f'--config.{key}={value}'.format(tasks=tasks) for key, value in values.items()]
    return flags, [*values, *inert_keys(config_of(name))]


def config_of(name: str) -> ml_collections.ConfigDict:
    """The recipe of a run of RUNS."""
    config = (tiny if RUNS[name].recipe == 'configs/tiny.py' else divided).get_config()
    settings = flat(ml_collections.ConfigDict(SETTINGS))
    config.update_from_flattened_dict(settings | dict(RUNS[name].values))
    return config


def uncovered(runs: Sequence[str]) -> list[str]:
    """What none of these runs has: 'key = value', or the key if it is a number or any text.

    A name or a bool is to have each of its values, and a number, a tuple or a text another than the
    default. A value counts only where its key has an effect (run/inert.py).
    """
    found: dict[str, set] = {}
    for name in runs:
        config = config_of(name)
        inert = tuple(f'{key}.' for key in inert_keys(config))
        for key, value in flat(config).items():
            if not f'{key}.'.startswith(inert):
                found.setdefault(key, set()).add(value)
    missing = []
    for key, default in flat(base.get_config()).items():
        values = found.get(key, set())
        if key in KNOWN or isinstance(default, bool):
            wanted = KNOWN.get(key, (False, True))
            missing += [f'{key} = {value!r}' for value in wanted if value not in values]
        elif not values - {default}:
            missing.append(key)
    return missing
