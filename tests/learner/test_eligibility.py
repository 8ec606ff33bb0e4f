"""Groups of equal rewards and rollouts that spent a budget: who counts where, by hand."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from echo_jax.learner.batching import make_batch
from echo_jax.learner.eligibility import eligibility_metrics, equal_groups
from echo_jax.types import Status
from tests.support.random_rollouts import loss_settings, make_rollout, rollout_lists, small_config

# Group 0 has rewards 1 and 0, group 1 has 1 twice. Each rollout has 2 ACTION and 1 OUTPUT token.
UNEQUAL = [make_rollout('PAAO', float(i == 0), 0, i, first_token=1 + 4 * i) for i in range(2)]
EQUAL = [make_rollout('PAAO', 1.0, 1, i, first_token=11 + 4 * i) for i in range(2)]


def weights(rollouts, **loss):
    """By rollout: the weight of its ACTION tokens, of its OUTPUT token, and its advantage."""
    batch = make_batch(rollouts, small_config(**loss))
    found = []
    for r in rollouts:
        first = [np.isin(batch.tokens, r.tokens[k]) & (batch.segment_ids > 0) for k in (1, 3)]
        arrays = (batch.policy_weight, first[0]), (batch.env_weight, first[1])
        values = [array[mask].item() if mask.any() else 0.0 for array, mask in arrays]
        advantage = batch.advantages[first[0]]
        found.append((*values, advantage.item() if advantage.size else 0.0))
    return found


def test_equal_groups_are_kept():
    # N = 4: policy 1/(4*2), env 1/(4*1). Rewards 1, 0: r - m = 1/2; of equal ones 0.
    assert weights([*UNEQUAL, *EQUAL], advantages='dr_grpo') == [
        *((1 / 8, 1 / 4, 0.5), (1 / 8, 1 / 4, -0.5)),
        *((1 / 8, 1 / 4, 0.0), (1 / 8, 1 / 4, 0.0)),
    ]


@pytest.mark.parametrize(
    'reduction, policy, env',
    [
        ('sequence_mean', 1 / (2 * 2), 1 / (4 * 1)),  # N is 2 in the policy term, 4 in the other
        ('token_mean', 1 / 4, 1 / 4),  # 2 + 2 ACTION tokens, not 8; 4 targets
        ('prompt_mean', 1 / (1 * 4), 1 / (2 * 2)),  # G is 1 in the policy term, 2 in the other
        ('dr_grpo', 1 / (2 * 24), 1 / (4 * 24)),
    ],
)
def test_equal_groups_are_dropped_from_the_policy_term_alone(reduction, policy, env):
    found = weights(
        [*UNEQUAL, *EQUAL], equal_groups='drop', reduction=reduction, advantages='dr_grpo'
    )
    expected = [(policy, env, 0.5), (policy, env, -0.5), (0, env, 0), (0, env, 0)]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_which_groups_are_equal():
    loss = small_config().loss
    failed = dataclasses.replace(UNEQUAL[1], status=Status.INFRA_ERROR)
    alone = make_rollout('PAO', 1.0, 2, 0)
    unrewarded = [dataclasses.replace(r, group_id=3, environment_only=True) for r in EQUAL]
    assert equal_groups([*UNEQUAL, *EQUAL, alone, *unrewarded], loss) == {1, 2}
    assert equal_groups([UNEQUAL[0], failed], loss) == {0}  # one reward is left
    loss.count_infra_errors = True  # and now it has reward 0
    assert equal_groups([UNEQUAL[0], dataclasses.replace(failed, reward=1.0)], loss) == set()
    assert equal_groups([], loss) == set()
    loss.equal_groups = 'forget'
    with pytest.raises(ValueError, match=r"loss\.equal_groups is 'forget'; expected one of"):
        equal_groups([], loss)


@pytest.mark.parametrize('status', [Status.TRUNCATED, Status.AGENT_TIMEOUT])
def test_truncated_rollouts_are_masked(status):
    cut = dataclasses.replace(EQUAL[0], group_id=0, sample_id=2, status=status)
    rollouts = [*UNEQUAL, cut]  # rewards 1, 0 and, of the truncated one, 1
    third = pytest.approx(1 / 3)

    def found(**loss):
        return weights(rollouts, advantages='dr_grpo', **loss)

    # Trained on: N = 3, m = 2/3.
    assert found() == [
        (pytest.approx(1 / 6), third, third),
        (pytest.approx(1 / 6), third, pytest.approx(-2 / 3)),
        (pytest.approx(1 / 6), third, third),
    ]
    # Masked: no weight, but it counts in N and in the mean.
    assert found(mask_truncated=True) == [*found()[:2], (0.0, third, 0.0)]
    # Not counted either: N = 2 in the policy term and m = 1/2; N = 3 in the environment term.
    assert found(mask_truncated=True, count_truncated=False) == [
        *((1 / 4, third, 0.5), (1 / 4, third, -0.5)),
        (0.0, third, 0.0),
    ]


def test_a_group_may_become_equal_by_masking():
    cut = dataclasses.replace(UNEQUAL[1], status=Status.TRUNCATED)
    config = small_config(mask_truncated=True, equal_groups='drop')
    assert equal_groups([UNEQUAL[0], cut], config.loss) == set()  # its reward is compared with
    config.loss.count_truncated = False
    assert equal_groups([UNEQUAL[0], cut], config.loss) == {0}


def test_metrics_count_what_was_taken_out():
    loss = small_config().loss
    cut = make_rollout('PAO', 0.0, 0, 2, Status.TRUNCATED)
    rollouts = [*UNEQUAL, *EQUAL, cut]
    assert eligibility_metrics(rollouts, loss) == {}
    loss.equal_groups, loss.mask_truncated = 'drop', True
    assert eligibility_metrics(rollouts, loss) == {
        'rollout/dropped_groups': 1.0,
        'rollout/masked_truncated': 1.0,
    }
    assert set(eligibility_metrics([], loss).values()) == {0.0}


rules = st.fixed_dictionaries(
    {
        'equal_groups': st.sampled_from(['keep', 'drop']),
        'mask_truncated': st.booleans(),
        'count_truncated': st.booleans(),
    }
)


@given(rollouts=rollout_lists(), loss=loss_settings, rules=rules)
def test_rules_take_out_of_the_policy_term_and_nothing_else(rollouts, loss, rules):
    """The environment term stays to the last bit; what is left has the gradients' sum of its own.

    By sequence, every rollout that trains has weights that sum to 1/N.
    """
    plain = make_batch(rollouts, small_config(**loss))
    batch = make_batch(rollouts, small_config(**loss | rules))
    assert all(np.isfinite(array).all() for array in batch)
    np.testing.assert_array_equal(batch.env_weight, plain.env_weight)
    np.testing.assert_array_equal(batch.tokens, plain.tokens)
    assert not (batch.policy_weight[plain.policy_weight == 0]).any()
    assert not batch.advantages[batch.policy_weight == 0].any() or not rules['mask_truncated']
    if loss['reduction'] == 'sequence_mean':
        sums = [
            batch.policy_weight[row][batch.segment_ids[row] == segment].sum()
            for row in range(len(batch.tokens))
            for segment in range(1, batch.segment_ids[row].max() + 1)
        ]
        sums = [value for value in sums if value]
        if sums:
            assert np.allclose(sums, sums[0], rtol=1e-5)
            assert sum(sums) < 1 + 1e-5
