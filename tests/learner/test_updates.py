"""Several updates on one batch: how it is cut, ordered, scored and counted."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from echo_jax.learner import sharding
from echo_jax.learner.batching import batch_rows, make_batch
from echo_jax.learner.losses import Metric, finish_metrics
from echo_jax.learner.step import ShardedModel, make_score
from echo_jax.learner.updates import check_cut, finish_updates, mini_batches, order, updates_of_step
from echo_jax.types import Role, Status
from tests.support.random_rollouts import make_rollout, small_config

# Four groups of two. Each rollout has 2 ACTION tokens and 1 OUTPUT token.
ROLLOUTS = [
    make_rollout('PAAO', float(sample), group, sample, first_token=1 + 8 * group + 4 * sample)
    for group in range(4)
    for sample in range(2)
]


def recipe(updates=2, epochs=1, mini='groups', **options):
    config = small_config(**{'groups': 4, 'group_size': 2} | options)
    config.batch.update(updates=updates, epochs=epochs, mini=mini)
    return config


def members(batch):
    """The (group, sample) of the rollouts in a batch, by their first tokens."""
    first = batch.tokens[(batch.positions == 0) & (batch.segment_ids > 0)]
    return sorted(divmod(int(token - 1) // 4, 2) for token in first)


# ------------------------------------------------------------------------------------- the cut


def test_weights_by_hand():
    one, two = mini_batches(ROLLOUTS, recipe(advantages='dr_grpo'), step=3)
    assert {group for group, _ in members(one)} & {group for group, _ in members(two)} == set()
    for batch in one, two:
        assert batch.tokens.shape == (4, 24)  # 8 rollouts over 2 updates
        assert len(members(batch)) == 4
        # N is the mini-batch's own: policy 1/(4*2), env 1/(4*1).
        assert set(batch.policy_weight[batch.roles == Role.ACTION]) == {np.float32(1 / 8)}
        assert set(batch.env_weight[batch.roles == Role.OUTPUT]) == {np.float32(1 / 4)}
        assert set(batch.advantages[batch.roles == Role.ACTION]) == {0.5, -0.5}


def test_advantages_are_those_of_the_whole_batch():
    """Cut between rollouts, a group's samples may part; their mean stays that of the group."""
    config = recipe(updates=8, mini='rollouts', advantages='dr_grpo')
    batches = mini_batches(ROLLOUTS, config, step=0)
    assert [len(members(batch)) for batch in batches] == [1] * 8
    for batch in batches:
        [(_, sample)] = members(batch)
        assert set(batch.advantages[batch.roles == Role.ACTION]) == {sample - 0.5}
        assert batch.policy_weight.max() == 1 / 2  # N = 1


def test_a_group_is_judged_whole():
    equal = [make_rollout('PAAO', 1.0, 0, i, first_token=1 + 4 * i) for i in range(2)]
    rollouts = [*equal, *ROLLOUTS[2:]]
    config = recipe(updates=8, mini='rollouts', equal_groups='drop')
    dropped = [
        members(b)[0][0] for b in mini_batches(rollouts, config, 0) if not b.policy_weight.any()
    ]
    assert dropped == [0, 0]


@given(
    updates=st.sampled_from([1, 2, 4]),
    epochs=st.integers(1, 3),
    mini=st.sampled_from(['groups', 'rollouts']),
    step=st.integers(0, 1000),
    shuffled=st.permutations(ROLLOUTS),
)
def test_every_rollout_is_in_one_mini_batch_whatever_the_order(
    updates, epochs, mini, step, shuffled
):
    config = recipe(updates, epochs, mini)
    batches = mini_batches(ROLLOUTS, config, step)
    found = sorted(itertools.chain(*map(members, batches)))
    assert found == [(group, sample) for group in range(4) for sample in range(2)]
    assert {batch.tokens.shape for batch in batches} == {
        (batch_rows(config, config.batch.updates), 24)
    }
    for ours, theirs in zip(batches, mini_batches(shuffled, config, step)):
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    numbers = order(config, step)
    assert len(numbers) == updates_of_step(config) == updates * epochs
    for epoch in range(epochs):
        assert sorted(numbers[epoch * updates :][:updates]) == list(range(updates))


def test_steps_and_epochs_are_shuffled_anew():
    config = recipe(updates=4, epochs=3)
    cuts = {str([members(b) for b in mini_batches(ROLLOUTS, config, step)]) for step in range(8)}
    assert len(cuts) > 4
    numbers = order(config, 0)
    assert len({tuple(numbers[i : i + 4]) for i in (0, 4, 8)}) > 1
    other = recipe(updates=4, epochs=3)
    other.seed = 1
    assert order(other, 0) != numbers


def test_one_update_is_the_whole_batch():
    config = recipe(updates=1)
    [batch] = mini_batches(ROLLOUTS, config, step=5)
    jax.tree.map(np.testing.assert_array_equal, batch, make_batch(ROLLOUTS, config))
    assert batch_rows(config, config.batch.updates) == batch_rows(config) == 8
    assert order(config, 5) == [0]


def test_rows_are_whole_micro_batches():
    assert batch_rows(recipe(updates=2, micro_rows=3), 2) == 6  # 4 rollouts, in passes of 3 rows
    assert batch_rows(recipe(updates=4, micro_rows=4), 4) == 4


@pytest.mark.parametrize('mini', ['groups', 'rollouts'])
def test_nothing_to_train_on_is_an_ordinary_case(mini):
    failed = [
        make_rollout('PAO', 1.0, group, 0, Status.INFRA_ERROR, first_token=1 + 4 * group)
        for group in range(3)
    ]
    for rollouts in ([], failed, [make_rollout('PPSS')], [make_rollout('')], ROLLOUTS[:1]):
        batches = mini_batches(rollouts, recipe(4, mini=mini), step=0)
        assert [batch.tokens.shape for batch in batches] == [(2, 24)] * 4
        for batch in batches:
            assert all(np.isfinite(array).all() for array in batch)
            assert not batch.advantages.any()


@pytest.mark.parametrize(
    'change, says',
    [
        ({'updates': 3}, 'batch.updates=3 does not divide the 4 groups of a batch'),
        ({'updates': 16, 'mini': 'rollouts'}, 'batch.updates=16 does not divide the 8 rollouts'),
        ({'mini': 'tokens'}, "batch.mini is 'tokens'; expected one of"),
    ],
)
def test_what_cannot_be_cut(change, says):
    with pytest.raises(ValueError) as error:
        check_cut(recipe(**change))
    assert says in str(error.value)


# -------------------------------------------------------------------------------- their metrics


def test_metrics_by_hand():
    def update(loss, gap, tokens, norm):
        return {
            'loss': Metric(jnp.float32(loss), None),
            'logprob_gap': Metric(jnp.float32(gap), jnp.float32(tokens)),
            'env_ce': Metric(jnp.float32(0.0), jnp.float32(0.0)),
            'action_tokens': Metric(jnp.float32(tokens), None),
            'grad_norm': Metric(jnp.float32(norm), None),
        }

    first, second = update(1.0, 2.0, 4, 0.5), update(2.0, 2.0, 12, 1.0)
    assert finish_updates([first]) == finish_metrics(first)
    assert finish_updates([first, second]) == {
        'loss': 1.5,  # each is normalised by its own mini-batch
        'logprob_gap': (2 + 2) / (4 + 12),  # the mean over all tokens
        'action_tokens': 16.0,
        'grad_norm': 0.75,
        'grad_norm_last': 1.0,
    }


# ------------------------------------------------------------------------- the real model's steps


SIZES = dict(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
)


@functools.cache
def compiled(**options):
    """(config, sharded model, step, function to its first state), compiled once for the options.

    The rate is so large that one update moves the policy.
    """
    config = recipe(**options)
    config.model.update(SIZES)
    config.optimizer.update(learning_rate=0.03, warmup_steps=0, weight_decay=0.0)
    config.policy.temperature = 0.7
    config.mesh.fsdp = 1
    model = ShardedModel.of(config, jax.devices()[:1])
    step, _, initial = model.step(config.optimizer)
    params = jax.device_get(model.random_params())
    return config, model, step, lambda: initial(params), model.with_old_logprobs()


def learn(rollouts=ROLLOUTS, number=0, **options):
    """A step as in train.py: (state, metrics of each update)."""
    config, model, step, first, with_old_logprobs = compiled(**options)
    state, found = first(), []
    batches = [
        with_old_logprobs(state.params, sharding.put_batch(batch, model.mesh))
        for batch in mini_batches(rollouts, config, number)
    ]
    for which in order(config, number):
        state, added = step(state, batches[which], 0.05, None)
        found.append(added)
    return state, found


RECOMPUTED = {'old_logprobs': 'recomputed'}


@pytest.mark.slow
def test_old_logprobs_are_those_before_the_first_update():
    """In the first update the ratio is 1; in the second it is to the policy before the first."""
    state, metrics = learn(updates=2, **RECOMPUTED)
    assert state.step == 2
    first, second = (finish_metrics(each) for each in metrics)
    assert first['ratio_deviation'] < 1e-5 and first['approx_kl'] < 1e-9
    assert second['ratio_deviation'] > 0.01
    # With 'current' the ratio is 1 always, whatever has happened before.
    _, metrics = learn(updates=2)
    assert [finish_metrics(each)['ratio_deviation'] for each in metrics] == [0.0, 0.0]


@pytest.mark.slow
def test_recomputed_by_hand():
    """The second update's ratio, by scores of the model before and after the first."""
    config, model, step, first, with_old_logprobs = compiled(updates=1, epochs=2, **RECOMPUTED)
    state = first()
    [batch] = mini_batches(ROLLOUTS, config, 0)
    score = jax.jit(make_score(model.graphdef, 2, temperature=0.7))
    before = np.asarray(score(state.params, batch))
    on_mesh = sharding.put_batch(batch, model.mesh)
    held = with_old_logprobs(state.params, on_mesh)
    acting = batch.policy_weight > 0
    np.testing.assert_allclose(np.asarray(held.old_logprobs)[acting], before[acting], rtol=1e-6)
    assert not np.asarray(on_mesh.old_logprobs).any()
    state, _ = step(state, held, 0.05, None)
    after = np.asarray(score(state.params, batch))
    ratio = np.exp(after - before)[acting]
    assert np.abs(ratio - 1).max() > 0.01
    _, metrics = step(state, held, 0.05, None)
    found = finish_metrics(metrics)
    assert found['ratio_deviation'] == pytest.approx(np.abs(ratio - 1).mean(), rel=1e-4)
    advantage = np.asarray(batch.advantages)[acting]
    held_in = np.clip(ratio, 0.8, 1.2)
    gain = np.minimum(ratio * advantage, held_in * advantage)
    loss = -np.sum(np.asarray(batch.policy_weight)[acting] * gain)
    assert found['policy_loss'] == pytest.approx(loss, rel=1e-4)


@pytest.mark.slow
def test_clips_act_in_later_updates():
    """Bounds of 0 cut the gradient wherever the first update went the way of the advantage."""

    def moved(**loss):
        return finish_updates(learn(updates=1, epochs=2, **RECOMPUTED | loss)[1])

    tight, wide = moved(clip_low=0.0, clip_high=0.0), moved(clip_low=0.9, clip_high=9.0)
    assert tight['clip_fraction'] > 0.2 and wide['clip_fraction'] == 0.0
    assert tight['grad_norm_last'] < wide['grad_norm_last']


@pytest.mark.slow
def test_micro_batches_and_packing_change_nothing():
    def params_after(**options):
        state, metrics = learn(updates=2, epochs=2, mini='rollouts', **RECOMPUTED | options)
        return jax.tree.leaves(state.params), finish_updates(metrics)

    reference, expected = params_after(micro_rows=4, pack=False)
    for options in ({'micro_rows': 1}, {'micro_rows': 2, 'pack': False}, {'micro_rows': 4}):
        leaves, found = params_after(**options)
        for ours, theirs in zip(leaves, reference):
            np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-4)


@pytest.mark.slow
def test_updates_without_weight_leave_finite_numbers():
    failed = [make_rollout('PAO', 1.0, i, 0, Status.INFRA_ERROR) for i in range(4)]
    for rollouts in ([], failed, ROLLOUTS[:1]):
        state, metrics = learn(rollouts, updates=2, **RECOMPUTED)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
        assert all(np.isfinite(value) for value in finish_updates(metrics).values())


def test_scores_of_padding_are_not_computed():
    """`make_score` walks the micro-batches that hold tokens, as the step does."""
    config, model, _, first, _ = compiled(updates=2, **RECOMPUTED)
    batch = make_batch(ROLLOUTS, config)
    assert batch.segment_ids[:2].any() and not batch.segment_ids[2:].any()
    found = np.asarray(jax.jit(make_score(model.graphdef, 2))(first().params, batch))
    assert found[:2].any() and not found[2:].any()
