"""Keys of a recipe that are refused because they can have no effect, and that they have none."""

import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from configs import base, qwen3_8b, tiny
from echo_jax.learner.batching import REDUCTIONS, make_batch
from echo_jax.learner.losses import echo_loss
from echo_jax.learner.targets import choose_targets
from echo_jax.run import rollout_worker
from echo_jax.run.inert import INERT, check_inert, flat, inert_keys, keys_of
from echo_jax.run.workdir import Workdir
from echo_jax.sandbox.make import sandbox_maker
from echo_jax.tasks.generate import generate_tasks
from tests.support.random_rollouts import make_rollout, small_config
from tests.support.small_run import ROOT

# For each row of INERT, by its first key: a choice that makes its keys inert, one that does not.
CHOICES = {
    'batch.mini': ({'batch.updates': 1}, {'batch.updates': 4}),
    'loss.old_logprobs': (
        {'batch.updates': 1, 'batch.epochs': 1},
        {'batch.updates': 1, 'batch.epochs': 2},
    ),
    'loss.policy': (
        {'loss.old_logprobs': 'current', 'batch.updates': 4},
        {'loss.old_logprobs': 'recomputed', 'batch.updates': 4},
    ),
    'loss.redraw_limit': ({'loss.equal_groups': 'drop'}, {'loss.equal_groups': 'redraw'}),
    'loss.count_truncated': ({'loss.mask_truncated': False}, {'loss.mask_truncated': True}),
    'loss.env_normalization': (
        {'loss.reduction': 'token_mean'},
        {'loss.reduction': 'sequence_mean'},
    ),
    'loss.clip_low': ({'loss.policy': 'dppo'}, {'loss.policy': 'clip'}),
    'loss.dual_clip': ({'loss.policy': 'clip'}, {'loss.policy': 'dual_clip'}),
    'loss.dppo_tv': ({'loss.policy': 'cispo'}, {'loss.policy': 'dppo'}),
    'loss.env_schedule.end': (
        {'loss.env_schedule.name': 'steps'},
        {'loss.env_schedule.name': 'linear'},
    ),
    'loss.env_schedule.steps': (
        {'loss.env_schedule.name': 'linear'},
        {'loss.env_schedule.name': 'steps'},
    ),
    'loss.env_adaptive.target': ({'loss.env_adaptive.every': 0}, {'loss.env_adaptive.every': 5}),
    'loss.count_dropped': (
        {'loss.drop_unpredictable': False, 'loss.drop_surprising.top': 0.0},
        {'loss.drop_unpredictable': False, 'loss.drop_surprising.top': 0.1},
    ),
    'loss.mismatch': ({'loss.old_logprobs': 'rollout'}, {'loss.old_logprobs': 'current'}),
    'loss.mismatch_cap': ({'loss.mismatch': 'none'}, {'loss.mismatch': 'token'}),
    'loss.kl': ({'loss.kl_coef': 0.0}, {'loss.kl_coef': 0.1}),
    'protocol.max_commands_per_turn': (
        {'protocol.command_selection': 'all'},
        {'protocol.command_selection': 'last'},
    ),
    'protocol.length_penalty_start': (
        {'protocol.length_penalty_coef': 0.0},
        {'protocol.length_penalty_coef': 0.1},
    ),
    'optimizer.warmup_from': ({'optimizer.warmup_steps': 0}, {'optimizer.warmup_steps': 5}),
    'sharding.vocab': ({'mesh.tensor': 1}, {'mesh.tensor': -1}),
    'policy.swap': ({'policy.backend': 'jax'}, {'policy.backend': 'vllm'}),
    'batch.stragglers': ({'max_staleness': 0}, {'max_staleness': 1}),
    'sandbox.user': ({'sandbox.hardening': 'docker'}, {'sandbox.hardening': 'strict'}),
    'verifier.kill_agent_processes': (
        {'sandbox.hardening': 'strict'},
        {'sandbox.hardening': 'docker'},
    ),
    'sandbox.hardening': (
        {'sandbox.backend': 'local', 'warm_start.steps': 3, 'warm_start.sandbox': 'local'},
        {'sandbox.backend': 'local', 'warm_start.steps': 3, 'warm_start.sandbox': 'docker'},
    ),
    'sandbox.harbor_environment': (
        {'sandbox.backend': 'docker', 'warm_start.steps': 3, 'warm_start.sandbox': 'local'},
        {'sandbox.backend': 'harbor', 'warm_start.steps': 3, 'warm_start.sandbox': 'local'},
    ),
    'sandbox.processes': (
        {'sandbox.backend': 'harbor', 'warm_start.steps': 0},
        {'sandbox.backend': 'harbor', 'warm_start.steps': 3},
    ),
    'num_steps': ({'num_epochs': 2}, {'num_epochs': None}),
    'checkpoint.keep_best': ({'eval.tasks': 0}, {'eval.tasks': 10}),
    'tasks.train_count': ({'tasks.train': 'set'}, {'tasks.train': ''}),
    'tasks.heldout_count': ({'tasks.heldout': 'set'}, {'tasks.heldout': ''}),
    'tasks.families': (
        {'tasks.train': 'set', 'tasks.heldout': 'set', 'warm_start.steps': 0},
        {'tasks.train': 'set', 'tasks.heldout': '', 'warm_start.steps': 0},
    ),
    'warm_start.rollouts': ({'warm_start.steps': 0}, {'warm_start.steps': 3}),
    'warm_start.demonstrations': (
        {'warm_start.steps': 3, 'warm_start.explore_steps': 3},
        {'warm_start.steps': 3, 'warm_start.explore_steps': 2},
    ),
}
# Besides its choice, what it takes for a key to act. Of the policy term the ratio must not be 1.
RATIO = {'loss.old_logprobs': 'rollout'}
CONTEXT = {
    'loss.clip_low': RATIO,
    'loss.dual_clip': RATIO,
    'loss.dppo_tv': RATIO,
    'policy.swap': {'max_staleness': 1},
    'batch.stragglers': {'policy.backend': 'vllm'},
}
ROWS = pytest.mark.parametrize('row', INERT, ids=lambda row: row.keys[0])


def with_values(**values):
    """The defaults with some other values, keys with dots included."""
    config = base.get_config()
    config.update_from_flattened_dict(values)
    return config


def another(value):
    """A value of the same type."""
    match value:
        case bool():
            return not value
        case int() | float():
            return value + 1
        case tuple():
            return value[:1] or (1,)
        case _:
            return 'another'


def test_every_row_has_its_choices():
    assert [row.keys[0] for row in INERT] == list(CHOICES)
    for row in INERT:
        for choice in CHOICES[row.keys[0]]:
            assert choice.keys() <= set(row.deciding)


@ROWS
def test_a_key_is_refused_only_if_it_is_inert(row):
    inert, acting = CHOICES[row.keys[0]]
    context = CONTEXT.get(row.keys[0], {})
    defaults = flat(base.get_config())
    keys = keys_of(row, defaults)
    assert len(keys) >= len(row.keys)
    check_inert(with_values(**context, **inert), inert)
    for key in keys:
        changed = {key: row.values[0] if row.values else another(defaults[key])}
        # By a flag, even to its default, if that is not the value that acts.
        given = changed if row.values else {key: defaults[key]}
        with pytest.raises(ValueError) as error:
            check_inert(with_values(**context, **inert, **given), [key])
        assert f'--config.{key}={given[key]} has no effect {row.reason}' in str(error.value)
        assert f'change {row.deciding[0]}' in str(error.value)
        # By a recipe.
        with pytest.raises(ValueError) as error:
            check_inert(with_values(**context, **inert, **changed))
        assert f'{key} is {changed[key]!r} in the recipe' in str(error.value)
        assert f'leave it at {defaults[key]!r}' in str(error.value)
        # A flag that turns something off leaves the recipe as it is.
        check_inert(with_values(**context, **inert, **changed), inert)
        check_inert(with_values(**context, **acting, **changed), [*acting, key])


def test_a_value_that_acts_is_not_refused():
    check_inert(base.get_config(), ['loss.old_logprobs'])  # 'current'
    check_inert(with_values(**{'loss.old_logprobs': 'rollout'}), ['loss.old_logprobs'])


def test_all_that_cannot_act_is_named():
    config = qwen3_8b.get_config()
    found = inert_keys(config)
    assert found == sorted(set(found))
    assert {'loss.clip_low', 'loss.clip_high', 'batch.mini', 'warm_start.optimizer'} <= set(found)
    assert config.loss.clip_high == 0.2  # the released value, though it cannot act
    assert 'loss.old_logprobs' not in found  # 'current' acts, 'recomputed' would not
    config.loss.old_logprobs = 'recomputed'
    assert 'loss.old_logprobs' in inert_keys(config)
    config.batch.epochs = 2
    assert {'loss.clip_low', 'loss.old_logprobs'}.isdisjoint(inert_keys(config))
    assert 'sharding.vocab' not in inert_keys(tiny.get_config())  # it has no such key


def test_an_element_of_a_tuple_is_its_key():
    with pytest.raises(ValueError, match=r'warm_start\.habits=.* has no effect'):
        check_inert(base.get_config(), ['warm_start.habits[0]'])


def test_flags_turn_parts_of_a_recipe_off():
    config = tiny.get_config()
    config.warm_start.steps = config.warm_start.explore_steps = 0
    check_inert(config, ['warm_start.steps', 'warm_start.explore_steps'])
    config = qwen3_8b.get_config()
    config.policy.backend, config.sandbox.backend = 'jax', 'local'
    check_inert(config, ['policy.backend', 'sandbox.backend'])
    with pytest.raises(ValueError, match=r'policy\.keyframe_every is 10 in the recipe'):
        check_inert(config, ['sandbox.backend'])


# ------------------------------------------------------- that the table says what the code does


def without(config, *keys: str):
    """The config without some keys, so that code which reads one of them raises an error."""
    for key in keys:
        section, _, name = key.rpartition('.')
        with config.unlocked():
            del config[section][name]
    return config


def test_the_cap_is_read_only_with_a_correction():
    # A rollout of advantage 1 / sqrt(2), of which the learner says log p = 2 and the sampler -0.03
    # and -0.04: ratios of 7.6, which both caps cut. The other one's ratios are near 1.
    def loss(mismatch, cap):
        config = small_config(groups=1, group_size=2, mismatch=mismatch, mismatch_cap=cap)
        rollouts = [
            make_rollout('PPAAO', reward=1.0, sample=0, first_token=1),
            make_rollout('PPAAO', reward=0.0, sample=1, first_token=11),
        ]
        batch = make_batch(rollouts, config)
        logprobs = jnp.where(batch.tokens < 10, 2.0, -0.1)
        return float(echo_loss(logprobs, batch, config, 0.0)[0])

    assert loss('none', 1.0) == loss('none', 2.0)
    assert loss('token', 1.0) != loss('token', 2.0)


def test_the_count_of_observations_is_read_only_by_sequences():
    def weights(**loss):
        config = small_config(groups=1, group_size=2, **loss)
        rollouts = [make_rollout('PPAAWWOO', sample=i) for i in range(2)]  # WARNING is no target
        return np.asarray(make_batch(rollouts, config).env_weight)

    counts = ['full_observation', 'selected']
    for reduction in REDUCTIONS:
        differ = reduction == 'sequence_mean'
        one, two = (weights(reduction=reduction, env_normalization=count) for count in counts)
        assert one.any() and (one != two).any() == differ


def test_a_dropped_target_counts_in_no_denominator_of_dr_grpo():
    def weights(**loss):
        config = small_config(groups=1, group_size=2, drop_unpredictable=True, **loss)
        rollouts = [make_rollout('PPAAOO', sample=i) for i in range(2)]
        targets, _ = choose_targets(rollouts, config, lambda r: r.tokens == 5)
        return np.asarray(make_batch(rollouts, config, targets).env_weight)

    for reduction, differ in {'sequence_mean': True, 'token_mean': True, 'dr_grpo': False}.items():
        one, two = (weights(reduction=reduction, count_dropped=count) for count in (True, False))
        assert one.any() and (one != two).any() == differ


def test_counts_of_tasks_are_read_only_if_they_are_generated(tmp_path):
    folder = generate_tasks(tmp_path / 'set', split='train', count=3)
    config = with_values(**{'tasks.train': str(folder)})
    work = Workdir(tmp_path / 'named', without(config, 'tasks.train_count'))
    assert len(work.tasks('train')) == 3
    generated = Workdir(tmp_path / 'generated', without(base.get_config(), 'tasks.train_count'))
    with pytest.raises((KeyError, AttributeError), match='train_count'):
        generated.tasks('train')


def test_dockers_and_harbors_keys_are_not_read_for_a_local_sandbox(programs):
    del programs  # skips the test if this machine allows no namespaces
    foreign = ('user', 'build_network', 'runtime', 'harbor_environment')
    keys = [f'sandbox.{name}' for name in foreign]
    sandbox_maker(without(base.get_config(), *keys), 'local').close()
    with pytest.raises((KeyError, AttributeError), match='processes'):
        sandbox_maker(without(base.get_config(), 'sandbox.processes'), 'local')


def test_workers_refuse_a_key_that_cannot_act():
    config = with_values(**{'policy.backend': 'vllm', 'loss.mismatch': 'none'})
    rollout_worker.check_config(config, [])
    with pytest.raises(ValueError, match=r'loss\.mismatch_cap=2\.0 has no effect'):
        rollout_worker.check_config(config, ['loss.mismatch_cap'])
    config.policy.swap = 'wait'
    with pytest.raises(ValueError, match=r"policy\.swap is 'wait'; expected one of"):
        rollout_worker.check_config(config, [])


def test_a_worker_without_jax_can_check():
    program = (
        'import sys; sys.modules.update(jax=None, flax=None, optax=None)\n'
        'from configs import tiny; from echo_jax.run.inert import check_inert\n'
        'check_inert(tiny.get_config())'
    )
    subprocess.run([sys.executable, '-c', program], cwd=ROOT, check=True, timeout=120)
