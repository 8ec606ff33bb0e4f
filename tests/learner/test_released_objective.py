"""Loss and gradient against the released objective in its own layout, on random batches."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from echo_jax.learner.batching import make_batch
from echo_jax.types import Status
from tests.support.hand_losses import value_and_grad
from tests.support.random_rollouts import small_config
from tests.support.released_objective import Episode, Turn, as_response, as_rollout, objective

# The released code's name of each choice.
TARGETS = {
    'released': 'env_only',
    'warning': 'warning_only',
    'warning_and_released': 'warning_plus_env',
    'observation': 'full_observation',
}
NORMALIZATIONS = {'full_observation': 'full_observation_tokens', 'selected': 'selected_tokens'}
REDUCTIONS = {
    'sequence_mean': 'sequence_mean',
    'token_mean': 'token_mean',
    'dr_grpo': 'seq_mean_token_sum_norm',
}
SEQ_LEN, TOKENS = 64, 700  # of a row, and more than all episodes have


def table(seed, scale):
    rng = np.random.default_rng(seed)
    current = -rng.uniform(0.1, 3, TOKENS)
    return current, *(current + scale * rng.normal(size=(2, TOKENS)))


@functools.cache
def compiled(**loss):
    """The loss and its gradient; of the keys of `loss`, these are what they are compiled with."""
    config = small_config(**loss)

    def f(current, batch, coef, old, frozen):
        return value_and_grad(current, batch, config, coef, old, frozen)

    return jax.jit(f)


def compare(groups, seed=0, extra=0.0, limit=0, coef=0.05, **loss):
    """((loss, gradient) here, the same of the released objective); `groups` holds episodes."""
    config = small_config(groups=4, group_size=4, seq_len=SEQ_LEN, count_infra_errors=True)
    config.loss.update({'max_env_tokens': limit} | loss)
    rollouts, responses, first_token = [], [], 2
    for uid, group in enumerate(groups):
        for sample, episode in enumerate(group):
            rollouts.append(as_rollout(episode, uid, sample, first_token))
            target = TARGETS[config.loss.targets]
            responses.append(as_response(episode, uid, first_token, target, limit or None))
            first_token += len(rollouts[-1].tokens)
    assert first_token <= TOKENS
    current, old, frozen = table(seed, scale=0.25)
    before = current if config.loss.old_logprobs == 'current' else old
    with jax.enable_x64(True):
        batch = make_batch(rollouts, config)
        compile_with = {key: config.loss[key] for key in ('old_logprobs', 'kl_coef')}
        f = compiled(**compile_with)
        (value, _), gradient = f(current, batch, coef, before, frozen)
    expected = objective(
        responses,
        current,
        before,
        frozen,
        loss_reduction=REDUCTIONS[config.loss.reduction],
        world_loss_normalization=NORMALIZATIONS[config.loss.env_normalization],
        world_model_coeff=coef,
        max_seq_len=config.protocol.max_total_tokens,
        eps_clip=config.loss.clip_low,
        kl_loss_coef=config.loss.kl_coef,
        extra=extra,
    )
    return (value, np.asarray(gradient)), expected


def assert_same(found, expected, rtol=2e-6, atol=1e-9):  # the batch's weights are float32
    np.testing.assert_allclose(found[0], expected[0], rtol=rtol, atol=1e3 * atol)
    np.testing.assert_allclose(found[1], expected[1], rtol=rtol, atol=atol)


# Hypothesis would draw any number for what is not given.
none, few, some = st.just(0), st.integers(0, 2), st.integers(1, 3)
executed = st.builds(Turn, some, few, warning=few, output=some, feedback=none)
refused = st.builds(Turn, some, few, warning=few, output=none, feedback=some)
# Rewards that hardly differ show the constant beside the standard deviation.
rewards = st.sampled_from([0.0, 0.0, 1.0, 1.0, 0.25, 0.1, 1.0 + 3e-6])


def episodes(turn, **fixed):
    """Of up to three turns, ended by each of the ways in which an episode can end."""
    ends = st.sampled_from(
        [
            {'answered': False},  # `done`
            {'answered': True},  # the last turn that is allowed
            {'answered': False, 'status': Status.TRUNCATED},
            {'reward': 0.0, 'status': Status.VERIFIER_ERROR},
            {'status': Status.INFRA_ERROR},
            {'turns': (), 'status': Status.INFRA_ERROR},  # of its start
            {'discarded': True, 'status': Status.AGENT_TIMEOUT, 'reward': 0.0},
        ]
    )
    turns = st.lists(turn, max_size=3).map(tuple)
    return st.builds(
        lambda turns, reward, end: Episode(**{'turns': turns, 'reward': reward} | fixed | end),
        turns,
        rewards,
        ends,
    )


group = st.one_of(
    st.lists(episodes(st.one_of(executed, executed, refused)), min_size=2, max_size=4),
    st.lists(episodes(executed, environment_only=True), min_size=2, max_size=3),
)
GROUPS = st.lists(group, max_size=3)
ONE = Turn(2, 1, 1, output=2)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(
    groups=GROUPS,
    loss=st.fixed_dictionaries(
        {
            'targets': st.sampled_from(sorted(TARGETS)),
            'env_normalization': st.sampled_from(sorted(NORMALIZATIONS)),
            'reduction': st.sampled_from(sorted(REDUCTIONS)),
            'old_logprobs': st.sampled_from(['current', 'recomputed']),
        }
    ),
    limit=st.sampled_from([0, 0, 1, 4]),
    seed=st.integers(0, 5),
)
@example(groups=[], loss={}, limit=0, seed=0)
@example(groups=[[Episode((ONE,), reward=1.0)] * 3], loss={}, limit=0, seed=0)  # equal rewards
@example(groups=[[Episode(discarded=True)] * 2], loss={}, limit=0, seed=0)
@example(groups=[[Episode((ONE,), status=Status.INFRA_ERROR)] * 2], loss={}, limit=0, seed=0)
@example(groups=[[Episode((Turn(1),), False, r) for r in (0, 1)]], loss={}, limit=0, seed=0)
def test_the_objective_is_the_released_one(groups, loss, limit, seed):
    assert_same(*compare(groups, seed, limit=limit, **loss))


MIXED = [
    [
        Episode((ONE, Turn(3, 0, 0, feedback=2), Turn(1)), False, 1.0),
        Episode((Turn(2, 0, 2, output=3),), True, 0.0),
        Episode((Turn(2, 1, 0, output=1),), True, 0.25, Status.TRUNCATED),
        Episode((ONE,), discarded=True),
    ],
    [Episode((ONE,), True, r, environment_only=True) for r in (0.0, 1.0)],
    [Episode((ONE, ONE), False, 1.0 + 3e-6 * i) for i in range(2)],
]


@pytest.mark.slow
def test_the_released_recipe_by_itself():
    """configs/qwen3_8b.py sets nothing of `loss`: it is what the tests start from."""
    found, expected = compare(MIXED)
    assert_same(found, expected)
    assert np.abs(expected[1]).max() > 0.01
    # With a KL loss, which the released code has as an option.
    found, expected = compare(MIXED, kl_coef=0.1)
    assert_same(found, expected)


@pytest.mark.parametrize('reduction', REDUCTIONS)
def test_the_released_denominators_have_a_thousandth_more(reduction):
    """docs/deviations.md: of the environment term alone, and a thousandth at most."""
    (value, gradient), expected = compare(MIXED, extra=1e-3, coef=1.0, reduction=reduction)
    np.testing.assert_allclose(value, expected[0], rtol=0, atol=1e-3 * abs(expected[0]) + 1e-3)
    np.testing.assert_allclose(gradient, expected[1], rtol=1e-3)


def test_a_lone_sample_is_the_other_difference():
    """docs/deviations.md: there, its advantage is its bare reward; here there is nothing to compare
    it with. Its environment term is the same.
    """
    alone = [[Episode((ONE,), False, 1.0)], MIXED[0]]
    (_, gradient), (_, expected) = compare(alone)
    differ = np.flatnonzero(np.abs(gradient - expected) > 1e-6)
    assert list(differ) == [4, 5]  # its two ACTION tokens, behind two of the prompt
    assert not gradient[differ].any()
    np.testing.assert_allclose(expected[differ], -1 / (5 * 2 * (1 + 1e-6)))
