"""The updates of a step, put together: what reaches the optimizer of a recipe's options."""

import dataclasses

import jax
import numpy as np
import pytest

from echo_jax.learner.batching import make_batch, unpack
from echo_jax.learner.step import ShardedModel
from echo_jax.run.env_term import EnvTerm
from echo_jax.run.learning import Learner
from echo_jax.store.scores import ScoreStore
from echo_jax.types import Role, Status
from tests.support.random_rollouts import make_rollout, small_config
from tests.support.tokenizers import TINY, build


def learned(rollouts, reference, balance=False, done=0, scores=None, batch=None, **loss):
    """The parameters after step `done` + 1, and how the frozen model scores the rollouts."""
    config = small_config(**{'env_coef': 0.0} | loss)
    config.batch.update(batch or {})
    config.logging.scores, config.batch.groups = 1, 2
    sizes = dict(hidden_size=16, intermediate_size=24, num_attention_heads=2, head_dim=8)
    config.model.update(vocab_size=500, num_hidden_layers=1, **sizes)
    config.mesh.fsdp = 1
    config.eval.balance = balance
    config.optimizer.warmup_from = 'one'
    model = ShardedModel.of(config, jax.devices()[:1])
    step, _, first = model.step(config.optimizer, keeps_scores=scores is not None)
    term = EnvTerm(config, config.num_steps, build(TINY), model.score(), model.balance())
    frozen = jax.tree.map(lambda x: x * reference, model.random_params())
    learner = Learner(config, model, step, term, frozen if loss.get('kl_coef') else None, scores)
    state, values = learner.learn(first(model.random_params()), rollouts, done)
    batch = make_batch(rollouts, config)
    score = np.asarray(model.score(config.policy.temperature)(frozen, batch))
    return jax.tree.leaves(state.params), unpack(rollouts, score, config), values


def test_a_step_that_is_not_finite_gives_no_weights():
    rollout = make_rollout('PPAAROOA', reward=1.0, first_token=1)
    rollout.rollout_logprobs = np.full_like(rollout.rollout_logprobs, np.nan)
    with pytest.raises(
        FloatingPointError, match=r'^step 4: .*train/.* not finite; lower the learn'
    ):
        learned([rollout], 0.5, done=3)


@pytest.mark.slow
def test_the_kl_in_the_reward_is_a_change_of_the_rewards():
    rollouts = [
        make_rollout('PPAAROOA', reward=1.0, sample=0, first_token=1),
        make_rollout('PAAROO', reward=0.0, sample=1, first_token=20),
        make_rollout('PAAA', reward=0.0, sample=2, first_token=40),
    ]
    ours, frozen, values = learned(rollouts, 0.5, kl_coef=0.5, kl_in='reward', kl='k2')
    assert values['rollout/reward'] == np.float32(1 / 3)  # what the tests said
    changed = []
    for rollout, logprobs in zip(rollouts, frozen):
        acting = rollout.roles == Role.ACTION
        squares = np.square(logprobs[acting] - rollout.rollout_logprobs[acting])
        reward = rollout.reward - 0.5 * squares.sum() / 2  # k2 = x^2 / 2, summed over the rollout
        changed.append(dataclasses.replace(rollout, reward=float(reward)))
    by_hand, _, _ = learned(changed, 0.5)
    plain, _, _ = learned(rollouts, 0.5)
    for one, two in zip(ours, by_hand):
        np.testing.assert_allclose(one, two, rtol=1e-6, atol=1e-8)
    assert any(np.abs(one - two).max() > 1e-9 for one, two in zip(ours, plain))


@pytest.mark.slow
@pytest.mark.parametrize('loss', [{}, {'env_coef': 0.3, 'kl_coef': 0.5}], ids=['grpo', 'echo'])
def test_measuring_the_balance_changes_no_bit_of_an_update(loss):
    rollouts = [
        make_rollout('PPAAROOA', reward=1.0, sample=0, first_token=1),
        make_rollout('PAAROO', reward=0.0, sample=1, first_token=20),
    ]
    without, _, plain = learned(rollouts, 0.5, balance=False, **loss)
    measured, _, values = learned(rollouts, 0.5, balance=True, **loss)
    for one, two in zip(without, measured, strict=True):
        np.testing.assert_array_equal(one, two)
    added = {f'train/grad_{name}' for name in ('norm_policy', 'norm_env', 'cosine')}
    assert values.keys() - plain.keys() == added
    assert {name: values[name] for name in plain} == plain


@pytest.mark.slow
@pytest.mark.parametrize('batch', [{}, {'updates': 2, 'epochs': 2}], ids=['one', 'four updates'])
def test_scores_are_kept_by_rollout_and_change_no_bit(tmp_path, batch):
    rollouts = [
        make_rollout('PPAAROOA', reward=1.0, group=9, sample=0, first_token=1),
        make_rollout('PAAROO', reward=0.0, group=9, sample=1, first_token=20),
        make_rollout('PAAO', reward=0.0, group=10, sample=0, first_token=40),
        make_rollout('P', group=10, sample=1, first_token=60, status=Status.INFRA_ERROR),
    ]
    store = ScoreStore(tmp_path)
    store.write_group(8, {})  # as many groups are kept as a step has
    given = dict(batch=batch, env_coef=0.3, old_logprobs='recomputed' if batch else 'current')
    without, _, _ = learned(rollouts, 1.0, done=3, **given)
    # The parameters before the step are the frozen ones, since these are 1.0 times the first.
    kept, frozen, _ = learned(rollouts, 1.0, done=3, scores=store, **given)
    for one, two in zip(without, kept, strict=True):
        np.testing.assert_array_equal(one, two)
    assert store.groups() == [9, 10]
    found = {(group, i): one for group in (9, 10) for i, one in store.read_group(group).items()}
    assert found.keys() == {(9, 0), (9, 1), (10, 0)}
    for rollout, logprobs in zip(rollouts, frozen):
        if rollout.status == Status.INFRA_ERROR:
            continue
        scores = found[rollout.group_id, rollout.sample_id]
        assert [array.shape for array in scores] == [rollout.tokens.shape] * 3
        if not batch:  # else the second mini-batch is scored after the update by the first
            np.testing.assert_allclose(scores.logprobs, logprobs, rtol=2e-3)
        assert (scores.entropy[1:] > 0).all() and (scores.logprobs_t1[1:] < 0).all()


@pytest.mark.slow
def test_scores_that_are_not_finite_are_not_kept(tmp_path, monkeypatch):
    drawn = ShardedModel.random_params
    monkeypatch.setattr(
        ShardedModel,
        'random_params',
        lambda model: jax.tree.map(lambda x: x * np.nan, drawn(model)),
    )
    rollouts = [make_rollout('PPAAROOA', reward=1.0, first_token=1)]
    with pytest.raises(FloatingPointError, match=r'^step 1: .*train/loss, .* not finite'):
        learned(rollouts, 1.0, scores=ScoreStore(tmp_path))
    assert ScoreStore(tmp_path).groups() == []


@pytest.mark.slow
def test_a_group_is_equal_by_the_rewards_that_are_learned():
    """Less their KL, equal rewards are not equal: nothing is dropped, and the metric says so."""
    rollouts = [
        make_rollout('PPAAROOA', reward=1.0, sample=0, first_token=1),
        make_rollout('PAAROO', reward=1.0, sample=1, first_token=20),
    ]
    _, _, values = learned(rollouts, 0.5, equal_groups='drop', kl_coef=0.5, kl_in='reward', kl='k2')
    assert values['rollout/dropped_groups'] == 0 and values['train/action_tokens'] == 3 + 2
