"""The released recipe of ECHO, value by value (SkyRL pull request 1716, head efd864b, Qwen3-8B).

Each value is a fact about the released code. A recipe that differs from one of them names the key,
with the reason, in docs/deviations.md.
"""

import re

import pytest

from configs import qwen3_8b
from echo_jax.run.inert import flat
from tests.support.small_run import ROOT

RELEASED = {
    # 2 epochs of 8,770 tasks, 16 a step: 548 whole batches each
    'num_steps': 2 * (8770 // 16),
    'batch.groups': 16,
    'group_size': 16,
    'max_staleness': 0,
    'loss.env_coef': 0.05,
    'loss.targets': 'released',
    'loss.env_normalization': 'full_observation',
    'loss.reduction': 'sequence_mean',
    'loss.advantages': 'grpo',
    'loss.clip_low': 0.2,
    'loss.clip_high': 0.2,
    'loss.kl_coef': 0.0,
    'loss.mismatch': 'none',
    'loss.count_infra_errors': True,
    'optimizer.name': 'adamw',
    'optimizer.learning_rate': 1e-6,
    'optimizer.b1': 0.9,
    'optimizer.b2': 0.999,
    'optimizer.weight_decay': 0.01,
    'optimizer.max_grad_norm': 0.2,
    'optimizer.warmup_steps': 20,
    'optimizer.warmup_from': 'zero',
    'optimizer.decay_steps': 0,
    'protocol.max_turns': 16,
    'protocol.max_turn_tokens': 2048,
    'protocol.max_prompt_tokens': 1536,
    'protocol.max_context_tokens': 16_384,
    'protocol.max_total_tokens': 34_096,
    'protocol.at_max_total_tokens': 'discard',
    'protocol.at_agent_timeout': 'discard',
    'protocol.command_timeout': 30,
    'protocol.max_output_chars': 50_000,
    'protocol.truncation': 'start',
    'protocol.thinking': 'keep_all',
    'protocol.command_selection': 'first',
    'protocol.max_commands_per_turn': 1,
    'protocol.parse_after_think': False,
    'protocol.length_penalty_coef': 0.0,
    'protocol.length_penalty_start': 20_000,
    'policy.temperature': 0.8,
    'policy.gpu_memory_utilization': 0.8,
    'sandbox.shell': 'fresh',
    'sandbox.cpus': 1,
    'sandbox.memory_mb': 1024,
    'sandbox.agent_timeout': 600,
    'sandbox.verifier_timeout': 120,
    'sandbox.at_once': 512,
    'eval.every': 20,
    'eval.samples': 8,
    'eval.temperature': 0.6,
    'checkpoint.every': 20,
    'warm_start.steps': 0,
}


def differences(recipe: dict) -> set[str]:
    return {key for key, value in RELEASED.items() if recipe[key] != value}


def documented() -> set[str]:
    """The keys that the tables of docs/deviations.md name in their last column."""
    rows = re.findall(r'^\|(.*)\|$', (ROOT / 'docs' / 'deviations.md').read_text(), re.MULTILINE)
    return {key for row in rows for key in re.findall(r'`([\w.]+)`', row.rpartition('|')[2])}


def test_the_recipe_is_the_released_one_but_for_what_deviations_says():
    found = differences(flat(qwen3_8b.get_config()))
    assert found == {'loss.count_infra_errors'} and found <= documented()


@pytest.mark.parametrize('key', RELEASED)
def test_another_value_is_found(key):
    recipe = flat(qwen3_8b.get_config())
    recipe[key] = 'another'
    assert key in differences(recipe)


def test_grpo_differs_in_the_environment_term_alone():
    assert differences(flat(qwen3_8b.get_config('grpo'))) == {
        'loss.count_infra_errors',
        'loss.env_coef',
    }


def test_our_variant_changes_what_it_says():
    assert differences(flat(qwen3_8b.get_config('ours'))) == {
        'loss.count_infra_errors',
        *qwen3_8b.OURS,
    }
