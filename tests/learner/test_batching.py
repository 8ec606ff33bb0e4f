import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from echo_jax.learner.batching import (
    REDUCTIONS,
    age_metrics,
    make_batch,
    make_supervised_batch,
    rollout_metrics,
)
from echo_jax.types import OBSERVATION_ROLES, Role, Status
from tests.support.random_rollouts import loss_settings, make_rollout, rollout_lists, small_config

# Two rollouts of one group, 10 and 6 tokens: 4 and 2 actions; observations of 1 warning, 1 wrapper,
# 2 outputs, and of 1 feedback.
FIRST = make_rollout('PAAWROOSAA', reward=1.0, sample=0)
SECOND = make_rollout('PPAAFS', reward=0.0, sample=1, first_token=11)


def test_sequence_mean_by_hand():
    batch = make_batch([FIRST, SECOND], small_config())
    # R = 3 groups x 3 = 9 rows, rounded up to 10; both fit in row 0 of 24 tokens, longest first.
    assert batch.tokens.shape == (10, 24)
    np.testing.assert_array_equal(batch.tokens[0, :17], [*range(1, 17), 0])
    np.testing.assert_array_equal(batch.segment_ids[0], [1] * 10 + [2] * 6 + [0] * 8)
    np.testing.assert_array_equal(batch.positions[0], [*range(10), *range(6)] + [0] * 8)
    assert not any(array[1:].any() for array in batch)
    # Policy 1/(N |A_i|): 1/(2*4) and 1/(2*2). Env 1/(N O_i): 1/(2*4), 1/(2*1); never the warning.
    e, q, h = 1 / 8, 1 / 4, 1 / 2
    np.testing.assert_array_equal(
        batch.policy_weight[0], [0, e, e, 0, 0, 0, 0, 0, e, e, 0, 0, q, q, 0, 0] + [0] * 8
    )
    np.testing.assert_array_equal(
        batch.env_weight[0], [0, 0, 0, 0, e, e, e, 0, 0, 0, 0, 0, 0, 0, h, 0] + [0] * 8
    )
    # Rewards 1 and 0: (1 - 1/2) / (sqrt(1/2) + 1e-6) = 0.7071058
    a = batch.advantages[0]
    np.testing.assert_allclose(a[[1, 2, 8, 9, 12, 13]], np.repeat([1, -1], [4, 2]) * 0.7071058)
    assert np.count_nonzero(a) == 6
    # The sampler's numbers travel with their tokens: -0.01 x token.
    np.testing.assert_allclose(batch.rollout_logprobs[0, [1, 12]], [-0.02, -0.13])


@pytest.mark.parametrize(
    ('settings', 'policy', 'env'),
    [
        # O_i is the number of targets: 3 (wrapper, two outputs) and 1.
        ({'env_normalization': 'selected'}, (1 / 8, 1 / 4), (1 / 6, 1 / 2)),
        # Targets are outputs alone: 2 and none, O_i as before.
        ({'targets': 'output'}, (1 / 8, 1 / 4), (1 / 8, 0)),
        # 6 actions and 4 targets in the batch.
        ({'reduction': 'token_mean'}, (1 / 6, 1 / 6), (1 / 4, 1 / 4)),
        # N = 2 sequences of at most 24 tokens.
        ({'reduction': 'dr_grpo'}, (1 / 48, 1 / 48), (1 / 48, 1 / 48)),
    ],
)
def test_other_weights_by_hand(settings, policy, env):
    batch = make_batch([FIRST, SECOND], small_config(**settings))
    for weight, expected in ((batch.policy_weight, policy), (batch.env_weight, env)):
        for segment, value in enumerate(expected, start=1):
            values = weight[batch.segment_ids == segment]
            np.testing.assert_allclose(values.max(), value, rtol=1e-6)


def test_every_group_has_the_same_share_by_prompt():
    other = make_rollout('PAO', reward=1.0, group=7, sample=0, first_token=17)
    empty = make_rollout('PP', reward=0.0, group=9, sample=0, first_token=21)
    batch = make_batch([FIRST, SECOND, other, empty], small_config(reduction='prompt_mean'))
    # Three groups, of 6, 1 and 0 actions: 1/(3*6), 1/(3*1). Targets are 4, 1 and 0.
    for tokens, policy, env in ((range(1, 17), 1 / 18, 1 / 12), (range(17, 21), 1 / 3, 1 / 3)):
        at = np.isin(batch.tokens, tokens)
        assert set(np.unique(batch.policy_weight[at])) == {np.float32(0), np.float32(policy)}
        assert set(np.unique(batch.env_weight[at])) == {np.float32(0), np.float32(env)}
    np.testing.assert_allclose(batch.policy_weight.sum(), 2 / 3)


def test_infra_error_is_nobodys_reward():
    broken = make_rollout('PAO', reward=1.0, sample=2, status=Status.INFRA_ERROR, first_token=17)
    alone = make_batch([FIRST, SECOND], small_config())
    for array, expected in zip(make_batch([FIRST, broken, SECOND], small_config()), alone):
        np.testing.assert_array_equal(array, expected)
    # The paper's code: N = 3 and rewards 1, 0, 0 whatever the broken one carries.
    config = small_config(count_infra_errors=True, advantages='dr_grpo')
    batch = make_batch([FIRST, broken, SECOND], config)
    assert batch.policy_weight[0, 1] == np.float32(1 / 12)
    np.testing.assert_allclose(batch.advantages[0, [1, 12, 17]], [2 / 3, -1 / 3, -1 / 3])
    assert (batch.segment_ids[0] == 3).sum() == 3


def test_environment_only_has_no_policy_gradient():
    second = make_rollout('PPAAOW', reward=0.0, group=0, sample=1, first_token=11)
    marked = [dataclasses.replace(r, environment_only=True) for r in (FIRST, second)]
    other = make_rollout('PAAO', reward=1.0, group=1, sample=0, first_token=17)
    worse = make_rollout('PAO', reward=0.0, group=1, sample=1, first_token=21)
    batch = make_batch([*marked, other, worse], small_config())
    plain = make_batch([FIRST, second, other, worse], small_config())
    # N stays 4: the others weigh what they weigh beside trained groups, 1/(4*2) and 1/(4*1).
    ours = batch.tokens >= 17
    np.testing.assert_array_equal(batch.policy_weight, np.where(ours, plain.policy_weight, 0))
    assert batch.policy_weight[batch.tokens == 18] == np.float32(1 / 8)
    np.testing.assert_array_equal(batch.advantages, np.where(ours, plain.advantages, 0))
    assert plain.advantages[~ours].any() and plain.policy_weight[~ours].any()
    # The environment term is as before: 1/(N O_i), the first rollout's 1/(4*4).
    np.testing.assert_array_equal(batch.env_weight, plain.env_weight)
    assert batch.env_weight[batch.tokens == 5] == np.float32(1 / 16)
    # By token: 2 + 1 actions that are trained on, not 4 + 2 more.
    batch = make_batch([*marked, other, worse], small_config(reduction='token_mean'))
    assert set(np.unique(batch.policy_weight)) == {np.float32(0), np.float32(1 / 3)}
    alone = make_batch(marked, small_config())
    assert not alone.policy_weight.any() and alone.env_weight.any()


def test_environment_only_skips_a_rollout_with_an_invalid_call():
    def batch_of(environment_only):
        refused = make_rollout('PAFAO', reward=1.0, group=0, sample=0, first_token=1)
        valid = make_rollout('PAO', reward=0.0, group=0, sample=1, first_token=11)
        rollouts = [
            dataclasses.replace(r, environment_only=environment_only) for r in (refused, valid)
        ]
        return make_batch(rollouts, small_config())

    batch = batch_of(True)
    assert not batch.env_weight[batch.tokens < 10].any()
    # It is a sequence all the same: the other one weighs 1/(2*1).
    assert batch.env_weight[batch.tokens == 13] == np.float32(1 / 2)
    assert batch_of(False).env_weight[batch.tokens == 5] == np.float32(1 / 4)


@pytest.mark.parametrize('reduction', REDUCTIONS)
def test_nothing_to_train_on_is_an_ordinary_case(reduction):
    config = small_config(reduction=reduction)
    for rollouts in (
        [],
        [make_rollout('')],
        [make_rollout('PPSS')],
        [make_rollout('PAO', status=Status.INFRA_ERROR)],
    ):
        batch = make_batch(rollouts, config)
        assert batch.tokens.shape == (10, 24)
        assert not (batch.policy_weight.any() or batch.env_weight.any())
        assert all(np.isfinite(array).all() for array in batch)


def test_first_fit_decreasing_fills_rows_from_the_front():
    lengths = [10, 9, 14, 15, 24]
    rollouts = [make_rollout('P' + 'A' * (n - 1), sample=i) for i, n in enumerate(lengths)]
    batch = make_batch(rollouts, small_config())
    # 24 | 15 and 9 | 14 and 10: by length, each in the first row with room.
    used = (batch.segment_ids > 0).sum(axis=1)
    np.testing.assert_array_equal(used, [24, 24, 24] + [0] * 7)
    np.testing.assert_array_equal(batch.segment_ids.max(axis=1), [1, 2, 2] + [0] * 7)
    padded = make_batch(rollouts, small_config(pack=False))
    np.testing.assert_array_equal(
        (padded.segment_ids > 0).sum(axis=1), [24, 15, 14, 10, 9] + [0] * 5
    )


def test_first_token_is_never_trained_on():
    batch = make_batch([make_rollout('AAOO'), make_rollout('OAO', sample=1)], small_config())
    # Of the actions one and one can be predicted, N = 2: 1/2 each.
    np.testing.assert_array_equal(batch.policy_weight[0, :7], [0, 0.5, 0, 0, 0, 0.5, 0])
    assert batch.env_weight[0, 4] == 0


def test_errors_say_what_to_change():
    with pytest.raises(ValueError, match=r'sample 4 of group 7 has 25 tokens.*raise batch.seq_len'):
        make_batch([make_rollout('P' * 25, group=7, sample=4)], small_config())
    with pytest.raises(ValueError, match=r'need 11 rows.*10.*raise batch.groups'):
        make_batch([make_rollout('P' * 20, sample=i) for i in range(11)], small_config())
    for key, value in (
        ('reduction', 'mean'),
        ('targets', 'all'),
        ('env_normalization', 'none'),
        ('advantages', 'gae'),
    ):
        with pytest.raises(ValueError, match=f"loss.{key} is '{value}'; expected"):
            make_batch([FIRST], small_config(**{key: value}))


def test_supervised_by_hand():
    batch = make_supervised_batch([FIRST, SECOND], small_config(), (Role.ACTION, Role.OUTPUT))
    # 4 + 2 actions and 2 outputs: an eighth each. Nothing for the policy.
    chosen = np.isin(batch.roles, (Role.ACTION, Role.OUTPUT))
    assert chosen.sum() == 8
    np.testing.assert_array_equal(batch.env_weight, np.where(chosen, 1 / 8, 0))
    assert not (batch.policy_weight.any() or batch.advantages.any())
    assert not make_supervised_batch([], small_config()).env_weight.any()


@given(rollouts=rollout_lists(), pack=st.booleans(), settings=loss_settings, data=st.data())
def test_weights_and_rows(rollouts, pack, settings, data):
    config = small_config(pack=pack, **settings)
    batch = make_batch(rollouts, config)
    assert batch.tokens.shape == (10, 24)
    counted = [
        r for r in rollouts if settings['count_infra_errors'] or r.status != Status.INFRA_ERROR
    ]
    # Every counted rollout is there once, whole and in order, and nothing else is.
    segments = {}
    for tokens, ids in zip(batch.tokens, batch.segment_ids):
        filled = ids > 0
        assert not filled[filled.sum() :].any()  # padding only at the end
        for number in range(1, ids.max() + 1):
            segments[tokens[ids == number][0]] = tokens[ids == number]
    expected = {r.tokens[0]: r.tokens for r in counted if len(r.tokens)}
    assert segments.keys() == expected.keys()
    assert all((segments[key] == expected[key]).all() for key in segments)
    rows = (batch.segment_ids > 0).any(axis=1)
    assert not rows[rows.sum() :].any()
    # Nothing predicts a first token; nothing else than its role decides what a weight may be on.
    assert not batch.policy_weight[batch.positions == 0].any()
    assert not batch.policy_weight[batch.roles != Role.ACTION].any()
    released = (Role.FEEDBACK, Role.WRAPPER, Role.OUTPUT)
    targets = released if settings['targets'] == 'released' else (Role.OUTPUT,)
    assert not batch.env_weight[~np.isin(batch.roles, targets)].any()
    if settings['reduction'] == 'sequence_mean' and counted:
        # Each sequence with an action has the same share; likewise the observed ones, by their
        # part of target tokens.
        share = sum((r.roles == Role.ACTION).any() for r in counted) / len(counted)
        np.testing.assert_allclose(batch.policy_weight.sum(), share, rtol=1e-5)
        parts = [
            np.isin(r.roles, targets).sum() / max(1, np.isin(r.roles, OBSERVATION_ROLES).sum())
            for r in counted
        ]
        if settings['env_normalization'] == 'selected':
            parts = [part > 0 for part in parts]
        np.testing.assert_allclose(batch.env_weight.sum(), np.mean(parts), rtol=1e-5)
    if settings['reduction'] == 'token_mean':
        for weight in (batch.policy_weight, batch.env_weight):
            np.testing.assert_allclose(weight.sum(), float(weight.any()), rtol=1e-5)
    # The order in which the rollouts came changes no bit.
    shuffled = data.draw(st.permutations(rollouts))
    for array, again in zip(batch, make_batch(shuffled, config)):
        np.testing.assert_array_equal(array, again)


def test_metrics_by_hand():
    rollouts = [
        dataclasses.replace(FIRST, metrics={'seconds_sampling': 2.0, 'turns': 99.0}),
        dataclasses.replace(SECOND, metrics={'seconds_sampling': 4.0}),
        # One turn through which the weights were swapped.
        dataclasses.replace(
            make_rollout('PAA', reward=1.0, group=1, sample=0),
            policy_versions=np.array([-1, 1, 3], np.int32),
        ),
        dataclasses.replace(
            make_rollout('P', reward=9.0, group=1, sample=1, status=Status.INFRA_ERROR),
            environment_only=True,
        ),
    ]
    metrics = rollout_metrics(rollouts, version=4)
    expected = {
        'reward': 2 / 3,  # 1, 0, 1
        'solved': 2 / 3,
        'turns': (2 + 1 + 1 + 0) / 4,
        'tokens': (10 + 6 + 3 + 1) / 4,
        'max_tokens': 10,
        'action_tokens': (4 + 2 + 2 + 0) / 4,
        'observation_tokens': (4 + 1) / 4,
        'environment_only': 1 / 4,  # the INFRA_ERROR is one, and counts here
        'staleness': (1 + 1 + 3) / 3,  # versions 3, 3, 1 under 4
        'max_staleness': 3,
        'uninformative_groups': 1 / 2,  # group 1 has a single reward
        'seconds_sampling': 3,
        'status/ok': 3,
        'status/infra_error': 1,
    }
    for name, value in expected.items():
        assert metrics[f'rollout/{name}'] == pytest.approx(value), name
    assert rollout_metrics([], 0).keys() == {f'rollout/status/{status}' for status in Status}


def test_errors_are_counted_and_not_averaged():
    failed = [
        dataclasses.replace(
            make_rollout('P', reward=0.0, sample=i, status=Status.INFRA_ERROR), metrics={name: 1.0}
        )
        for i, name in enumerate(['error/OSError', 'error/SandboxError', 'error/SandboxError'])
    ]
    metrics = rollout_metrics([FIRST, *failed], version=4)
    errors = {name: value for name, value in metrics.items() if '/error/' in name}
    assert errors == {'rollout/error/OSError': 1, 'rollout/error/SandboxError': 2}


def test_ages_of_tokens_by_hand():
    swapped = dataclasses.replace(
        make_rollout('PAAAO', reward=1.0), policy_versions=np.array([-1, 1, 3, 3, -1], np.int32)
    )
    newest = dataclasses.replace(
        make_rollout('PA', reward=1.0), policy_versions=np.array([-1, 4], np.int32)
    )
    # Under version 4: one token of age 3, two of age 1, one of age 0.
    expected = {'rollout/age/0': 0.25, 'rollout/age/1': 0.5, 'rollout/age/2': 0.0}
    expected |= {'rollout/age/3': 0.25}
    assert age_metrics([swapped, newest], version=4, max_staleness=3) == expected
    longer = age_metrics([swapped, newest], version=4, max_staleness=4)
    assert longer == expected | {'rollout/age/4': 0.0}
    later = age_metrics([swapped, newest], version=5, max_staleness=4)
    assert [later[f'rollout/age/{age}'] for age in range(5)] == [0.0, 0.25, 0.5, 0.0, 0.25]
    assert age_metrics([make_rollout('P', reward=0.0)], version=4, max_staleness=3) == {}
