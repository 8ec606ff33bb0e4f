"""The environment term in the learner's program: targets, coefficient, and the two gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from echo_jax.learner.batching import make_batch
from echo_jax.learner.losses import finish_metrics
from echo_jax.learner.step import ShardedModel
from echo_jax.run.env_term import EnvTerm
from echo_jax.types import Status
from tests.support.random_rollouts import add_model, make_rollout, small_config
from tests.support.tokenizers import TINY, build


def rollouts():
    return [
        make_rollout('PPAAROOSAAFOO', reward=1.0, sample=0, first_token=1),
        make_rollout('PAAROOASROO', reward=0.0, sample=1, first_token=20),
        make_rollout('PPP', sample=2, status=Status.INFRA_ERROR, first_token=40),
    ]


def recipe(**loss):
    config = small_config(**loss)
    add_model(config, vocab_size=500)
    return config


def needless(*_):
    pytest.fail('no pass is needed')


def env_term(config, score=needless, balance=needless):
    return EnvTerm(config, config.num_steps, build(TINY), score, balance)


@functools.cache
def models():
    """The small model on one device, by the keys of `loss` that its step is compiled with."""
    model = ShardedModel.of(recipe(), jax.devices()[:1])
    return model, model.random_params()


def test_nothing_acts_unless_it_is_asked_for():
    config = recipe()
    config.eval.balance = False
    env = env_term(config, score=needless, balance=needless)
    targets, metrics = env.targets(rollouts(), None)
    assert metrics == {} and env.balance(0, None, None) == {}
    expected, found = make_batch(rollouts(), config), make_batch(rollouts(), config, targets)
    for one, other in zip(expected, found):
        np.testing.assert_array_equal(one, other)
    # A number, which is compiled into the step; 0 leaves the term out.
    assert env.coef(3) == 0.05 and isinstance(env.coef(3), float)


def test_the_coefficient_depends_on_the_step_alone():
    config = recipe()
    config.num_steps, config.loss.env_schedule.name = 10, 'linear'
    env = env_term(config)
    coefs = [env.coef(done) for done in range(10)]
    assert all(isinstance(coef, jax.Array) and coef.shape == () for coef in coefs)
    np.testing.assert_allclose(coefs, np.linspace(0.05, 0.005, 10), rtol=1e-6)
    assert env.balance(5, None, None) == {'train/env_coef': pytest.approx(0.025)}
    # A run that is resumed at step 4 makes another one.
    assert env_term(config).coef(4) == coefs[4]


def test_the_most_surprising_targets_are_left_out():
    config = recipe()
    config.loss.drop_surprising.update(top=0.25, bottom=0.1)
    # A token's log-probability is minus its id: the targets are 5 6 7 11 12 13 and 23 24 25 28 29
    # 30. Of 12, 3 are dropped at the top and 1 at the bottom, by every packing.
    for pack in (True, False):
        config.batch.pack = pack
        env = env_term(config, score=lambda _, batch: -batch.tokens)
        targets, metrics = env.targets(rollouts(), None)
        assert metrics == {'train/env_dropped/surprising': 4}
        batch = make_batch(rollouts(), config, targets)
        left = sorted(batch.tokens[batch.env_weight > 0])
        assert left == [6, 7, 11, 12, 13, 23, 24, 25]
        # Denominators count what was dropped: N = 2, O_1 = 6.
        assert batch.env_weight.max() == np.float32(1 / 12)
    config.loss.count_dropped = False
    targets, _ = env.targets(rollouts(), None)
    batch = make_batch(rollouts(), config, targets)
    assert batch.env_weight[batch.tokens == 6] == np.float32(1 / 10)
    assert batch.env_weight[batch.tokens == 25] == np.float32(1 / 6)
    assert env.targets([], None)[0] == []


@pytest.mark.slow
def test_the_policys_own_surprise():
    model, params = models()
    config = recipe()
    config.loss.drop_surprising.top = 0.5
    env = env_term(config, score=model.score())
    targets, _ = env.targets(rollouts(), params)
    whole = make_batch(rollouts(), recipe())
    logprobs = np.asarray(model.score()(params, whole))
    kept = make_batch(rollouts(), config, targets).env_weight > 0
    dropped = (whole.env_weight > 0) & ~kept
    assert kept.sum() == dropped.sum() == 6
    assert -logprobs[kept].max() >= 0 and (-logprobs[dropped]).min() > (-logprobs[kept]).max()


@pytest.mark.slow
def test_a_traced_coefficient_is_the_same_step():
    """0, 0.05 and 0.1 through one compiled step, against steps that have them compiled in."""
    model, params = models()
    config = recipe()
    batch = make_batch(rollouts(), config)
    fixed, _, init = model.step(config.optimizer)
    traced, _, _ = model.step(config.optimizer, traced_env_coef=True)
    for coef in (0.0, 0.05, 0.1):
        a, one = fixed(init(jax.tree.map(jnp.copy, params)), batch, coef, None)
        b, two = traced(init(jax.tree.map(jnp.copy, params)), batch, jnp.float32(coef), None)
        assert finish_metrics(one) == pytest.approx(finish_metrics(two), rel=1e-5, abs=1e-9)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-7), a, b)


@pytest.mark.slow
def test_the_norms_are_those_of_the_two_gradients_apart():
    model, params = models()
    config = recipe()
    batch = make_batch(rollouts(), config)
    found = finish_metrics(model.balance()(params, batch, None))
    # A step of GRPO has the policy's norm. The environment's is that of a batch without advantages.
    step, _, init = model.step(config.optimizer)

    def norm_of(batch, coef):
        _, metrics = step(init(jax.tree.map(jnp.copy, params)), batch, coef, None)
        return finish_metrics(metrics)['grad_norm']

    policy, env = found['grad_norm_policy'], found['grad_norm_env']
    assert policy == pytest.approx(norm_of(batch, 0.0), rel=1e-4)
    still = batch._replace(advantages=np.zeros_like(batch.advantages))
    assert env == pytest.approx(norm_of(still, 1.0), rel=1e-4)
    assert min(policy, env) > 1e-3
    empty = finish_metrics(model.balance()(params, make_batch([], config), None))
    assert empty == {'grad_norm_policy': 0, 'grad_norm_env': 0}  # and no direction


@pytest.mark.slow
def test_the_balance_is_measured_when_it_is_due():
    """In the first of eight steps, in every third, and in the last; with GRPO as with ECHO."""
    model, params = models()
    for coef in (0.0, 0.05):
        config = recipe(env_coef=coef)
        config.num_steps, config.eval.every = 8, 3
        batch = make_batch(rollouts(), config)
        env = env_term(config, balance=model.balance())
        found = [env.balance(done, params, batch) for done in range(8)]
        assert [step for step, values in enumerate(found, 1) if values] == [1, 3, 6, 8]
        assert set(found[0]) == {f'train/grad_{n}' for n in ('norm_policy', 'norm_env', 'cosine')}
        assert found[0]['train/grad_norm_env'] > 1e-3
        assert env.coef(8) == coef


@pytest.mark.slow
def test_the_coefficient_follows_the_gradients():
    model, params = models()
    config = recipe()
    config.loss.env_adaptive.update(every=2, target=0.2, smoothing=0.0, high=10.0)
    config.eval.every = 4
    batch = make_batch(rollouts(), config)
    env = env_term(config, balance=model.balance())
    assert env.balance(1, params, batch) == {'train/env_coef': 0.05}
    # To be shown in step 4 is no reason to adapt.
    assert env.balance(3, params, batch)['train/grad_norm_env'] > 0 and env.adapted == 0.05
    values = env.balance(2, params, batch)
    coef, held = values['train/env_coef'], values['train/grad_norm_policy']
    assert coef * values['train/grad_norm_env'] == pytest.approx(0.2 * held)
    assert env.coef(2) == jnp.float32(coef) and env.adapted == coef
    # A batch that says nothing leaves it.
    env.balance(4, params, make_batch([], config))
    assert env.adapted == coef
