"""Small real runs that take every option once, and which options there are.

RUNS is the table; a new value of an option goes into one of its runs. tests/test_every_option.py
does the runs and fails if a value is in none of them.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import ml_collections

from configs import base, tiny
from echo_jax.learner.env_coef import SCHEDULES
from echo_jax.learner.options import NAMES
from echo_jax.learner.updates import MINI
from echo_jax.run.inert import flat, inert_keys
from tests.support.small_run import SETTINGS

# The sections whose options the runs cover.
SECTIONS = ('batch', 'loss')
# What an option that is a name may be, by the tables of the code itself.
KNOWN: Mapping[str, Sequence] = {
    **{f'loss.{key}': names for key, names in NAMES.items()},
    'loss.env_schedule.name': SCHEDULES,
    'batch.mini': MINI,
}


class Run(NamedTuple):
    values: Mapping[str, object]  # of the recipe's keys, beside tiny.py's and SETTINGS
    logs: tuple[str, ...] = ()  # metrics of every row that there are only with these values


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
}


def flags_of(name: str) -> tuple[list[str], list[str]]:
    """The flags of a run of RUNS, and what of SETTINGS is left out: both for `Programs.train`."""
    values = RUNS[name].values
    flags = [f'--config.{key}={value}' for key, value in values.items()]
    return flags, [*values, *(['warm_start'] if values.get('warm_start.steps') == 0 else [])]


def config_of(name: str) -> ml_collections.ConfigDict:
    """The recipe of a run of RUNS."""
    config = tiny.get_config()
    settings = flat(ml_collections.ConfigDict(SETTINGS))
    config.update_from_flattened_dict(settings | dict(RUNS[name].values))
    return config


def uncovered(runs: Sequence[str]) -> list[str]:
    """What of SECTIONS none of these runs has: 'key = value', or the key if it is a number.

    A name or a bool is to have each of its values, and a number, or a tuple of them, another than
    the default. A value counts only where its key has an effect (run/inert.py).
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
        if key.partition('.')[0] not in SECTIONS:
            continue
        if key in KNOWN or isinstance(default, bool):
            wanted = KNOWN.get(key, (False, True))
            missing += [f'{key} = {value!r}' for value in wanted if value not in values]
        elif not values - {default}:
            missing.append(key)
    return missing
