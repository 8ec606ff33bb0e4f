"""The whole step through the real model: objective and gradients against references, in float64.

The tokens of a list of rollouts are all different (random_rollouts), so a table by token holds
what a model that sees every rollout alone says of each, and `reference` is the objective.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from echo_jax.learner.batching import make_batch, make_supervised_batch
from echo_jax.learner.losses import finish_metrics
from echo_jax.learner.optimizer import make_optimizer
from echo_jax.learner.step import (
    init_state,
    make_balance,
    make_score,
    make_step,
    make_supervised_step,
    micro_batches,
)
from echo_jax.model.qwen3 import Qwen3, Qwen3Config
from echo_jax.types import ENV_TARGETS, Role, Status
from tests.support.objective import VOCABULARY, reference
from tests.support.random_rollouts import loss_settings, make_rollout, rollout_lists, small_config

MODEL = Qwen3Config(
    vocab_size=VOCABULARY,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    rope_theta=100.0,
    dtype='float64',
    remat='full',
)
GRAPHDEF, SHAPES = nnx.split(nnx.eval_shape(lambda: Qwen3(MODEL, rngs=nnx.Rngs(0))))
T = 24  # of a row, and the longest rollout
CURRENT = {'old_logprobs': 'current', 'mismatch': 'token', 'mismatch_cap': 1.5}
ROLLOUT = {'old_logprobs': 'rollout', 'clip_high': 0.3, 'kl_coef': 0.1, 'temperature': 0.7}
# The rollout's ratio, with a narrower bound since it is nearer to 1, and each token's.
GSPO = ROLLOUT | {'policy': 'gspo', 'clip_low': 0.02, 'clip_high': 0.02, 'kl': 'k2'}
CISPO = ROLLOUT | {'policy': 'cispo', 'reduction': 'prompt_mean', 'advantages': 'maxrl'}
RECOMPUTED = ROLLOUT | {'old_logprobs': 'recomputed', 'mismatch': 'sequence'}
# Tiny modules are fast enough without LLVM's optimizations, which take half of their compilation.
jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})


@pytest.fixture(autouse=True, scope='module')
def float64():
    with jax.enable_x64(True):
        yield


def draw_params(seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(0.3, 0.5, x.shape).astype(dtype), SHAPES)


def draw_rollouts():
    """Two groups with rewards that differ, every role, several turns, and an INFRA_ERROR."""
    bodies = ['PPAAARROOSAAROO', 'PPAAWFFSAO', 'PAAAAAASRRROOORSAAARO', 'PAAAS', 'PPOROASA']
    rollouts, first_token = [], 1
    for i, roles in enumerate(bodies + [body[::-1] for body in bodies[:3]]):
        status = Status.INFRA_ERROR if i == 3 else Status.OK
        reward = [1.0, 0.0, 0.25][i % 3]
        rollouts.append(make_rollout('P' + roles, reward, i % 2, i, status, first_token))
        first_token += len(roles) + 1
    return rollouts


def recipe(temperature=1.0, **options):
    config = small_config(**options)
    config.policy.temperature = temperature
    return config


@functools.cache
def _compiled(options, model_dtype):
    """A plain descent step of rate 1, so that the parameters' change is the gradient."""
    config = recipe(**dict(options))
    graphdef = GRAPHDEF
    if model_dtype != MODEL.dtype:
        lower = dataclasses.replace(MODEL, dtype=model_dtype)
        graphdef, _ = nnx.split(nnx.eval_shape(lambda: Qwen3(lower, rngs=nnx.Rngs(0))))
    optimizer = optax.sgd(1.0)
    step = jit(make_step(graphdef, optimizer, config), static_argnums=2)
    return lambda params, *args: step(init_state(params, optimizer), *args)


def run(params, batch, env_coef, frozen=None, dtype='float64', **options):
    """(loss, gradients, metrics) of one step."""
    step = _compiled(tuple(sorted(options.items())), dtype)
    batch = batch._replace(rollout_logprobs=batch.rollout_logprobs.astype(dtype))
    state, metrics = step(params, batch, env_coef, frozen if 'kl_coef' in options else None)
    assert state.step == 1
    return metrics['loss'].sum, jax.tree.map(np.subtract, params, state.params), metrics


def alone(params, tokens_RT, temperature):
    """[R, T] log-probabilities, a rollout a row, by log_softmax; column 0 is 0."""
    model = nnx.merge(GRAPHDEF, params)
    positions_RT = jnp.tile(jnp.arange(T), (len(tokens_RT), 1))
    hidden_RTD = model(tokens_RT, positions_RT, jnp.ones_like(tokens_RT))
    logp_RTV = jax.nn.log_softmax(hidden_RTD @ model.unembedding.T / temperature)
    picked = jnp.take_along_axis(logp_RTV[:, :-1], tokens_RT[:, 1:, None], axis=-1)[..., 0]
    return jnp.pad(picked, ((0, 0), (1, 0)))


score_alone = jit(alone)


@jit
def pulled(params, tokens_RT, temperature, cotangent_RT):
    return jax.vjp(lambda p: alone(p, tokens_RT, temperature), params)[1](cotangent_RT)[0]


def rows_of(rollouts):
    tokens = np.zeros((9, T), np.int32)
    for row, rollout in zip(tokens, rollouts):
        row[: len(rollout.tokens)] = rollout.tokens
    return tokens


def table_of(params, rollouts, temperature):
    """[VOCABULARY]: each token's log-probability where its rollout is alone in a row."""
    tokens, table = rows_of(rollouts), np.zeros(VOCABULARY)
    table[tokens] = score_alone(params, tokens, temperature)
    return table


@jit
def score(params, batch):
    return make_score(GRAPHDEF, 2, 0.7)(params, batch)


def assert_trees_close(actual, expected, rtol=1e-8, atol=1e-11):
    check = functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol)
    jax.tree.map(check, actual, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    'options',
    [CURRENT, ROLLOUT, RECOMPUTED, GSPO, CISPO],
    ids=['current', 'rollout', 'recomputed', 'gspo', 'cispo'],
)
def test_step_is_the_objective_of_every_rollout_alone(options):
    """Loss and every parameter's gradient: the reference's, pulled back through log_softmax."""
    params, frozen, rollouts = draw_params(0), draw_params(1), draw_rollouts()
    config = recipe(**options)
    temperature = config.policy.temperature
    current = table_of(params, rollouts, temperature)
    sampler = (current + np.random.default_rng(2).normal(0, 0.3, VOCABULARY)).astype(np.float32)
    for r in rollouts:
        r.rollout_logprobs = np.where(r.roles == Role.ACTION, sampler[r.tokens], np.float32(0))
    still = table_of(frozen, rollouts, temperature)
    expected, by_token = reference(rollouts, config, 0.3, current, current, still)

    loss, grads, metrics = run(params, make_batch(rollouts, config), 0.3, frozen, **options)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)  # the batch's weights are float32
    kept = [r for r in rollouts if r.status != Status.INFRA_ERROR]
    tokens = rows_of(kept)
    by_hand = pulled(params, tokens, temperature, np.where(tokens, by_token[tokens], 0.0))
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(by_hand))
    assert all(np.abs(leaf).max() > 1e-4 * largest for leaf in jax.tree.leaves(by_hand))
    assert_trees_close(grads, by_hand, rtol=1e-5, atol=1e-7 * largest)

    metrics = finish_metrics(metrics)
    np.testing.assert_allclose(metrics['grad_norm'], optax.tree.norm(by_hand), rtol=1e-5)
    targets = np.concatenate([r.tokens[np.isin(r.roles, ENV_TARGETS['released'])] for r in kept])
    ce = -table_of(params, rollouts, 1.0)[targets].mean()
    np.testing.assert_allclose(metrics['env_ce'], ce, rtol=1e-9)  # at temperature 1 always
    acting = np.concatenate([r.tokens[r.roles == Role.ACTION] for r in kept])
    gap = np.abs(current - sampler)[acting].mean()
    np.testing.assert_allclose(metrics['logprob_gap'], gap, rtol=1e-6)
    if config.loss.old_logprobs == 'rollout':
        assert 0.05 < metrics['clip_fraction'] < 0.95


@pytest.mark.slow
def test_the_balance_is_of_the_two_terms_pulled_back_apart():
    """Norms and cosine against the reference's gradients, with KL and several micro-batches."""
    params, frozen, rollouts = draw_params(0), draw_params(1), draw_rollouts()
    config = recipe(**ROLLOUT)
    temperature, batch = config.policy.temperature, make_batch(rollouts, config)
    assert micro_batches(batch, config.batch.micro_rows)[1] >= 2
    batch = batch._replace(rollout_logprobs=batch.rollout_logprobs.astype(np.float64))
    current, still = (table_of(p, rollouts, temperature) for p in (params, frozen))
    tokens = rows_of([r for r in rollouts if r.status != Status.INFRA_ERROR])

    def by_hand(env_coef):
        _, by_token = reference(rollouts, config, env_coef, current, current, still)
        grads = pulled(params, tokens, temperature, np.where(tokens, by_token[tokens], 0.0))
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(grads)])

    policy = by_hand(0.0)
    env = by_hand(1.0) - policy
    expected = {
        'grad_norm_policy': np.linalg.norm(policy),
        'grad_norm_env': np.linalg.norm(env),
        'grad_cosine': policy @ env / np.linalg.norm(policy) / np.linalg.norm(env),
    }
    assert min(abs(value) for value in expected.values()) > 1e-3
    found = finish_metrics(jit(make_balance(GRAPHDEF, config))(params, batch, frozen))
    assert found == pytest.approx(expected, rel=1e-6)  # the batch's weights are float32


@pytest.mark.slow
def test_a_supervised_step_is_cross_entropy_without_a_recipes_loss():
    """Loss and gradient by log_softmax, from a recipe that has no section `loss` at all."""
    params, rollouts, roles = draw_params(), draw_rollouts(), (Role.ACTION, Role.OUTPUT)
    config = recipe(temperature=0.7)
    batch = make_supervised_batch(rollouts, config, roles)
    with config.unlocked():
        del config.loss
    optimizer = optax.sgd(1.0)  # of rate 1, so that the parameters' change is the gradient
    step = jit(make_supervised_step(GRAPHDEF, optimizer, config))
    state, metrics = step(init_state(params, optimizer), batch)

    learned = np.concatenate([r.tokens[np.isin(r.roles, roles)] for r in rollouts])
    by_token = np.zeros(VOCABULARY)
    by_token[learned] = -1 / len(learned)
    tokens, values = rows_of(rollouts), finish_metrics(metrics)
    ce = -table_of(params, rollouts, 0.7)[learned].mean()
    np.testing.assert_allclose(values['loss'], ce, rtol=1e-6)  # the batch's weights are float32
    assert 0 < values['entropy'] < np.log(VOCABULARY)
    by_hand = pulled(params, tokens, 0.7, np.where(tokens, by_token[tokens], 0.0))
    grads = jax.tree.map(np.subtract, params, state.params)
    assert_trees_close(grads, by_hand, rtol=1e-5, atol=1e-8)


def directional(loss, params, seed):
    """(leaf, a direction in it, the slope of the loss along it by central differences)."""
    leaves, tree = jax.tree.flatten(params)
    rng, h = np.random.default_rng(seed), 1e-5
    for i, leaf in enumerate(leaves):
        along = rng.normal(size=leaf.shape) / np.sqrt(leaf.size)
        ends = [tree.unflatten([*leaves[:i], leaf + d * along, *leaves[i + 1 :]]) for d in (h, -h)]
        yield i, along, (loss(ends[0]) - loss(ends[1])) / (2 * h)


@pytest.mark.slow
@pytest.mark.parametrize('options', [ROLLOUT, RECOMPUTED], ids=lambda o: o['old_logprobs'])
def test_gradients_are_the_slopes_of_the_loss(options):
    """Finite differences of the whole objective, from the parameters to the loss.

    Under 'recomputed' (and 'current') the old policy is a constant that moves with the parameters.
    Held still it is a sampler with these log-probabilities, so the slope is that of 'rollout'.
    """
    params, frozen = draw_params(0), draw_params(1)
    batch = make_batch(draw_rollouts(), recipe())
    logprobs = np.asarray(score(params, batch))
    if options is ROLLOUT:
        logprobs = logprobs + np.random.default_rng(3).normal(0, 0.3, logprobs.shape)
    batch = batch._replace(rollout_logprobs=logprobs)
    _, grads, metrics = run(params, batch, 0.3, frozen, **options)
    assert (metrics['clip_fraction'].sum > 0) == (options is ROLLOUT)

    def loss(p):
        return float(run(p, batch, 0.3, frozen, **ROLLOUT)[0])

    for i, along, slope in directional(loss, params, seed=4):
        grad = jax.tree.leaves(grads)[i]
        np.testing.assert_allclose(np.sum(grad * along), slope, rtol=1e-5, atol=1e-8)


@pytest.mark.slow
def test_env_coef_0_is_grpo_bit_for_bit():
    """A step without the term, the term times 0, and a batch without targets; float32."""
    config = recipe()
    batch = make_batch(draw_rollouts(), config)
    targetless = batch._replace(env_weight=np.zeros_like(batch.env_weight))
    with jax.enable_x64(False):
        params = draw_params(dtype=np.float32)
        lower = dataclasses.replace(MODEL, dtype='float32')
        graphdef, _ = nnx.split(nnx.eval_shape(lambda: Qwen3(lower, rngs=nnx.Rngs(0))))
        optimizer = make_optimizer(config.optimizer)
        step = make_step(graphdef, optimizer, config)
        left_out, traced = jax.jit(step, static_argnums=2), jax.jit(step)  # optimized, as in train
        state = jit(lambda p: init_state(p, optimizer))(params)
        grpo, _ = left_out(state, batch, 0.0)
        others = {
            'targetless': left_out(state, targetless, 0.0),
            'traced': traced(state, batch, 0.0),
            'traced, targetless': traced(state, targetless, 0.3),
        }
        echo, _ = traced(state, batch, 0.3)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), grpo.params, params)
    assert min(jax.tree.leaves(moved)) > 1e-5
    for name, (other, _) in others.items():
        jax.tree.map(functools.partial(np.testing.assert_array_equal, err_msg=name), other, grpo)
    apart = jax.tree.map(lambda a, b: np.abs(a - b).max(), grpo.params, echo.params)
    assert max(jax.tree.leaves(apart)) > 1e-5


PACKINGS = [
    {'pack': False, 'micro_rows': 9},
    {'pack': True, 'micro_rows': 9},
    {'pack': False},  # micro-batches of 2 rows
    {'pack': True},
    {'pack': True, 'micro_rows': 4},  # 12 rows, so three more that are empty
]


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(rollouts=rollout_lists(), loss=loss_settings, order=st.permutations(range(10)))
def test_packing_changes_nothing(rollouts, loss, order):
    """Packed or not, micro-batches of any size, rows in any order, more rows of padding."""
    params, frozen = draw_params(0), draw_params(1)
    runs = []
    for packing in PACKINGS:
        batch = make_batch(rollouts, recipe(**packing, **loss))
        options = RECOMPUTED | {k: v for k, v in packing.items() if k != 'pack'}
        runs.append(run(params, batch, 0.3, frozen, **options))
        if 'micro_rows' not in packing:
            shuffled = jax.tree.map(lambda x: x[list(order)], batch)
            runs.append(run(params, shuffled, 0.3, frozen, **options))
    for other in runs[1:]:
        assert_trees_close(other, runs[0], rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_float32_and_another_packing_agree_with_float64():
    rollouts, params = draw_rollouts(), draw_params()
    apart, packed = (make_batch(rollouts, recipe(pack=pack)) for pack in (False, True))
    loss, grads, _ = run(params, apart, 0.3, **CURRENT)
    with jax.enable_x64(False):
        lower = jax.tree.map(lambda x: x.astype(np.float32), params)
        loss_32, grads_32, _ = run(lower, packed, 0.3, dtype='float32', **CURRENT)
    assert {x.dtype for x in jax.tree.leaves((loss_32, grads_32))} == {np.dtype('float32')}
    assert_trees_close((loss_32, grads_32), (loss, grads), rtol=1e-4, atol=1e-5)


def test_only_the_micro_batches_that_hold_tokens_are_counted():
    batch = make_batch(draw_rollouts(), recipe(pack=False))
    assert batch.tokens.shape == (10, T)  # 9 rows to a multiple of 2; 7 rollouts count
    micro, count = micro_batches(batch, 2)
    assert micro.tokens.shape == (5, 2, T) and count == 4
    late = jax.tree.map(lambda x: x[::-1], batch)  # empty rows in front are walked
    assert micro_batches(late, 2)[1] == 5
    empty = jax.tree.map(np.zeros_like, batch)
    assert micro_batches(empty, 2)[1] == 0
    with pytest.raises(
        ValueError, match='batch of 10 rows does not divide into micro-batches of 4'
    ):
        micro_batches(batch, 4)


@pytest.mark.slow
@pytest.mark.parametrize('empty', [True, False], ids=['no tokens', 'no weights'])
def test_a_batch_without_weight_has_gradients_of_0(empty):
    rollouts = [make_rollout('PPPP', 1.0, 0, 0), make_rollout('PSSW', 0.0, 0, 1)]
    if empty:
        rollouts = [dataclasses.replace(r, status=Status.INFRA_ERROR) for r in draw_rollouts()]
    batch = make_batch(rollouts, recipe())
    assert batch.segment_ids.any() != empty
    params = draw_params()
    loss, grads, metrics = run(params, batch, 0.3, **CURRENT)
    assert loss == 0.0 and metrics['grad_norm'].sum == 0.0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize('name', ['adamw', 'muon'])
def test_on_gradients_of_0_an_optimizer_only_decays(name):
    config = recipe().optimizer
    config.name, config.weight_decay = name, 0.1
    optimizer, params = make_optimizer(config), draw_params()
    grads = jax.tree.map(np.zeros_like, params)
    updates = jit(lambda g, p: optimizer.update(g, optimizer.init(p), p)[0])(grads, params)
    decay = 0.1 * config.learning_rate / (config.warmup_steps + 1)  # of the first step
    assert_trees_close(updates, jax.tree.map(lambda p: p * -decay, params), rtol=1e-5)


def test_score_is_what_each_rollout_is_alone():
    params, rollouts = draw_params(), draw_rollouts()
    batch = make_batch(rollouts, recipe())
    assert (batch.segment_ids > 1).any()  # packed
    scores = score(params, batch)
    scored = batch.positions > 0
    expected = table_of(params, rollouts, 0.7)[batch.tokens]
    np.testing.assert_allclose(scores[scored], expected[scored], rtol=1e-9)
