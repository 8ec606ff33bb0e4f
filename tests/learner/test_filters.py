"""The released code's three filters, by tables made by hand."""

import dataclasses

import pytest

from echo_jax.learner.batching import make_batch
from echo_jax.learner.filters import filter_reasons, turn_shares
from echo_jax.learner.targets import choose_targets
from echo_jax.types import Status
from tests.support.random_rollouts import make_rollout, small_config


def reasons(rollouts, **filters):
    config = small_config()
    config.loss.env_filter.update(filters)
    return filter_reasons(rollouts, config.loss.env_filter)


@pytest.mark.parametrize(
    ('roles', 'parsed', 'clean'),
    [
        ('PA', 1, 1),  # one turn that says `done`
        ('PASOSAS', 1, 1),
        ('PAFAOA', 2 / 3, 2 / 3),  # the first of three turns did not parse
        ('PAWOAOA', 1, 2 / 3),  # it parsed, with a warning
        ('PAFAWOAOAO', 3 / 4, 1 / 2),
        ('PAWRFAO', 1 / 2, 1 / 2),  # a warning and a refused call
        ('PAFFFF', 0, 0),
        ('PPP', 0, 0),  # no turn
        ('', 0, 0),
    ],
)
def test_shares_of_turns_by_hand(roles, parsed, clean):
    assert turn_shares(make_rollout(roles).roles) == pytest.approx((parsed, clean))


def test_the_shares_are_at_least_what_is_asked_for():
    rollouts = [
        make_rollout(roles, sample=i) for i, roles in enumerate(['PAO', 'PAFAO', 'PAWOAO', 'PFO'])
    ]
    assert reasons(rollouts) == [''] * 4
    # Shares that parsed: 1, 1/2, 1 and no turn at all; without a warning: 1, 1/2, 1/2.
    assert reasons(rollouts, min_parsed=0.5) == ['', '', '', 'parsed']
    assert reasons(rollouts, min_parsed=0.51) == ['', 'parsed', '', 'parsed']
    assert reasons(rollouts, min_clean=1.0) == ['', 'clean', 'clean', 'parsed']
    assert reasons(rollouts, min_parsed=1.0, min_clean=1.0) == ['', 'parsed', 'clean', 'parsed']


@pytest.mark.parametrize(
    ('rewards', 'share', 'kept'),
    [
        # c correct ones leave room for c (1 - share) / share others.
        ([1, 0, 0, 0], 0.5, [1, 1, 0, 0]),  # 1 x 0.5 / 0.5 = 1
        ([1, 0, 0, 0], 0.25, [1, 1, 1, 1]),  # 1 x 0.75 / 0.25 = 3
        ([0, 0, 0, 1], 0.3, [1, 1, 0, 1]),  # 0.7 / 0.3 = 2.33: the first two
        ([1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0], 0.3, [1] * 10 + [0]),  # 3 x 0.7 / 0.3 = 7 exactly
        ([1, 1, 0, 0], 1.0, [1, 1, 0, 0]),  # correct ones only
        ([0, 0, 0, 0], 0.01, [0, 0, 0, 0]),  # none to learn from beside them
        ([1, 1, 1, 1], 1.0, [1, 1, 1, 1]),
        ([0.5, 0.49], 0.6, [1, 0]),  # 0.5 is correct
    ],
)
def test_the_cap_on_incorrect_rollouts_by_hand(rewards, share, kept):
    rollouts = [make_rollout('PAO', reward=r, sample=i) for i, r in enumerate(rewards)]
    found = reasons(rollouts, min_correct=share)
    assert [reason == '' for reason in found] == [bool(k) for k in kept]
    # Whatever the order in which they come.
    assert reasons(rollouts[::-1], min_correct=share) == found[::-1]


def test_the_cap_is_of_each_group_and_of_those_that_passed_the_others():
    def rollout(roles, reward, group, sample):
        return make_rollout(roles, reward=reward, group=group, sample=sample)

    rollouts = [
        rollout('PAFAO', 1, 0, 0),  # correct, and does not count: it did not parse
        rollout('PAO', 0, 0, 1),
        rollout('PAO', 1, 1, 0),
        rollout('PAO', 0, 1, 1),
        rollout('PAO', 0, 1, 2),
    ]
    found = reasons(rollouts, min_parsed=1.0, min_correct=0.5)
    assert found == ['parsed', 'correct', '', '', 'correct']
    # No tests were run for those that are environment_only: nobody knows which are correct.
    marked = [dataclasses.replace(r, environment_only=True) for r in rollouts]
    assert reasons(marked, min_parsed=1.0, min_correct=0.5) == ['parsed', '', '', '', '']
    # An INFRA_ERROR is never correct.
    failed = [dataclasses.replace(r, status=Status.INFRA_ERROR) for r in rollouts]
    assert reasons(failed, min_correct=0.5) == ['correct'] * 5


def test_a_filtered_rollout_counts_in_n_and_keeps_its_policy_term():
    rollouts = [
        make_rollout('PAO', reward=1.0, sample=0, first_token=1),
        make_rollout('PAFAO', reward=0.0, sample=1, first_token=11),
    ]
    config = small_config()
    config.loss.env_filter.min_parsed = 1.0
    batch, plain = make_batch(rollouts, config), make_batch(rollouts, small_config())
    ours = batch.tokens < 10
    assert (batch.env_weight[ours] == plain.env_weight[ours]).all()  # 1 / (2 x 1), and not 1
    assert batch.env_weight.max() == 0.5
    assert not batch.env_weight[~ours].any() and plain.env_weight[~ours].any()
    assert (batch.policy_weight == plain.policy_weight).all()
    _, counts = choose_targets(rollouts, config)
    assert counts == {'env_filtered/parsed': 1, 'env_filtered/clean': 0, 'env_filtered/correct': 0}
    assert choose_targets(rollouts, small_config())[1] == {}
    # With nobody left, there is no term, and nothing is NaN.
    config.loss.env_filter.min_clean = config.loss.env_filter.min_correct = 1.0
    assert not make_batch(rollouts[1:], config).env_weight.any()
    assert not make_batch([], config).env_weight.any()
