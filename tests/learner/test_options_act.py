"""What the checks accept, acts: no key of `loss` that may be set is without an effect.

It is the other side of the tables of refused keys: if one of them lacked a row, a key would be
accepted here that changes neither the loss nor its gradient.
"""

import dataclasses
import random

import jax
import numpy as np
import pytest

from echo_jax.learner.batching import make_batch
from echo_jax.learner.kl import reward_less_kl
from echo_jax.learner.options import NAMES, check_clashes, check_options
from echo_jax.learner.targets import choose_targets
from echo_jax.run.inert import check_inert
from echo_jax.types import Role, Status
from tests.support.hand_losses import tables, value_and_grad
from tests.support.random_rollouts import make_rollout, small_config

BOOLS = (
    *('count_infra_errors', 'mask_truncated', 'count_truncated'),
    *('drop_unpredictable', 'count_dropped'),
)
# Two values on both sides of what the rollouts below have.
NUMBERS = {
    'clip_low': (0.3, 0.02),
    'clip_high': (0.3, 0.02),
    'dual_clip': (2.0, 1.05),
    'dppo_tv': (0.2, 0.01),
    'mismatch_cap': (3.0, 1.4),
    'kl_coef': (0.1, 0.0),
    'max_env_tokens': (0, 1),
}
VALUES = {**NAMES, **dict.fromkeys(BOOLS, (False, True)), **NUMBERS}
# So far apart that every bound, the defaults included, acts on some tokens and not on others.
CURRENT, OLD, FROZEN = tables(seed=1, scale=1.2)


def draw_rollouts():
    bodies = [
        *('AAARWROOSAAWROOSAAAAAROO', 'AAWWFFSAROOA', 'AAAAAAAROO', 'AWRO'),
        *('AARWOSAAAFFF', 'AAAAARO', 'AAWROOOSAA', 'AAAO'),
        *('AAWRO', 'AAAARO'),  # of equal rewards
    ]
    rewards = [1.0, 0.0, 0.25, 0.0, 0.0, 1.0, 0.75, 0.5, 0.5, 0.5]
    status = {2: Status.TRUNCATED, 3: Status.INFRA_ERROR, 6: Status.AGENT_TIMEOUT}
    rollouts, first_token = [], 1
    for i, (roles, reward) in enumerate(zip(bodies, rewards)):
        group, ended = min(i // 4, 2), status.get(i, Status.OK)
        rollouts.append(make_rollout('PP' + roles, reward, group, i, ended, first_token))
        near = CURRENT[rollouts[-1].tokens] + 1.5 * np.sin(3 * rollouts[-1].tokens) + 2 * (i == 1)
        acting = rollouts[-1].roles == Role.ACTION
        rollouts[-1].rollout_logprobs = np.where(acting, near, 0).astype(np.float32)
        first_token += len(roles) + 2
    return rollouts


def computed(config):
    """The loss and its gradient, as the program makes them."""
    rollouts, loss = draw_rollouts(), config.loss
    if loss.kl_coef and loss.kl_in == 'reward':
        rewards = [
            reward_less_kl(
                r.reward,
                r.rollout_logprobs,
                FROZEN[r.tokens],
                r.roles == Role.ACTION,
                kl=loss.kl,
                kl_coef=loss.kl_coef,
            )
            for r in rollouts
        ]
        rollouts = [dataclasses.replace(r, reward=x) for r, x in zip(rollouts, rewards)]
    rule = (lambda r: r.tokens % 3 == 0) if loss.drop_unpredictable else None
    targets, _ = choose_targets(rollouts, config, rule)
    batch = make_batch(rollouts, config, targets)
    with jax.enable_x64(True):
        (value, _), gradient = value_and_grad(CURRENT, batch, config, 0.3, OLD, FROZEN)
    return np.append(gradient, value)


def recipe(options, epochs):
    config = small_config(groups=3, group_size=4, seq_len=32, **options)
    config.batch.epochs = epochs
    return config


def is_accepted(options, epochs):
    """Whether all of the options may be set, as flags."""
    config = recipe(options, epochs)
    try:
        check_options(config.loss)
        check_inert(config, [f'loss.{key}' for key in options])
        check_clashes(config.loss)
    except ValueError:
        return False
    return True


def is_same(key, options, value):
    """Pairs of values between which nothing of the loss lies."""
    if key == 'equal_groups':
        # Other groups are drawn before there is a batch; and less their KL, rewards are not equal.
        less_kl = options.get('kl_in') == 'reward' and options.get('kl_coef')
        return {value, options[key]} == {'keep', 'redraw'} or less_kl
    # All observation tokens are targets, so their counts are the same.
    return (
        key == 'env_normalization'
        and options.get('targets') == 'warning_and_released'
        and {value, options[key]} == {'full_observation', 'selected'}
    )


@pytest.mark.slow
@pytest.mark.parametrize('key', VALUES)
def test_a_key_that_may_be_set_changes_something(key):
    draw, others = random.Random(key), sorted(VALUES.keys() - {key})
    accepted = False
    while not accepted:  # most of what is drawn is refused
        keys = [key, *draw.sample(others, k=draw.randint(2, 7))]
        options, epochs = {each: draw.choice(VALUES[each]) for each in keys}, draw.choice([1, 2])
        accepted = is_accepted(options, epochs)
    expected, compared = computed(recipe(options, epochs)), 0
    assert np.isfinite(expected).all()
    for each in keys:
        for value in set(VALUES[each]) - {options[each]}:
            other = options | {each: value}
            if is_accepted(other, epochs) and not is_same(each, options, value):
                found = computed(recipe(other, epochs))
                assert np.abs(found - expected).max() > 1e-9, (options, epochs, each, value)
                compared += 1
    assert compared
