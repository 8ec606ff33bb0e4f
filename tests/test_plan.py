"""The plan of a recipe: arithmetic by hand, and the program on models small enough to compile."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from configs import qwen3_8b
from echo_jax.model import params as model_params
from echo_jax.model.family import count_params
from echo_jax.model.huggingface import recipe_config
from echo_jax.model.qwen3 import Qwen3Config
from echo_jax.planner import estimate, topology

ROOT = pathlib.Path(__file__).parents[1]
# Two small layers, four chips, two micro-batches of four rows.
SMALL = (
    '--config=configs/qwen3_8b.py',
    '--topology=v5e:2x2',
    '--mesh=fsdp=4',
    '--seq_len=128',
    '--config.batch.micro_rows=4',
    '--config.model.vocab_size=2048',
    '--config.model.hidden_size=256',
    '--config.model.intermediate_size=512',
    '--config.model.num_hidden_layers=2',
    '--config.model.num_attention_heads=4',
    '--config.model.num_key_value_heads=2',
)


def run(*flags: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != 'JAX_PLATFORMS'}
    return subprocess.run(
        [sys.executable, '-m', 'echo_jax.plan', *flags],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )


def planned(*flags: str):
    pytest.importorskip('libtpu')
    done = run(*flags, '--json')
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def qwen3_8b_model(**changes) -> Qwen3Config:
    config = qwen3_8b.get_config()
    config.model.update(changes)
    return recipe_config(config.model)


# ------------------------------------------------------------------------------------ by hand


@pytest.mark.parametrize('tied', [True, False])
def test_parameters_are_those_of_the_model(tied):
    c = qwen3_8b_model(num_hidden_layers=3, hidden_size=512, tie_word_embeddings=tied)
    total, multiply = count_params(c)
    _, abstract = model_params.abstract(c)
    leaves = jax.tree.leaves(abstract)
    assert total == sum(leaf.size for leaf in leaves)
    matrices = sum(leaf.size for leaf in leaves if leaf.ndim == 3)
    assert multiply == matrices + c.vocab_size * c.hidden_size


def test_model_flops():
    c = Qwen3Config(
        vocab_size=10,
        hidden_size=4,
        intermediate_size=6,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=2,
    )
    # A layer: queries and output 2 x 4 x 4, keys and values 2 x 4 x 2, three of 4 x 6: 120.
    # With the table of 10 x 4: 3 x 120 + 40 = 400.
    assert count_params(c)[1] == 400
    # 5 rows of 7 tokens: 6 x 400 x 35. Attention, forward: scores and mixture, each 2 x 7 x 7 x 2
    # FLOPs a head, half of it seen; 2 heads, 3 layers, 5 rows, and twice that again backward.
    attention = 3 * (2 * 2 * 7 * 7 * 2) / 2 * 2 * 3 * 5
    assert estimate.model_flops(c, rows=5, seq_len=7) == 6 * 400 * 35 + attention


def test_the_rollout_side():
    config = qwen3_8b.get_config()
    found = estimate.rollout_plan(config, 'H100')
    weights = 2 * 8_190_735_360  # bfloat16
    assert found['weight_gib_per_version'] == weights / 2**30
    # 36 layers x 8 heads x 128 x (keys, values) x 2 bytes = 144 KiB, of 34,096 tokens.
    assert found['kv_kib_per_token'] == 144
    assert found['kv_gib_per_rollout'] == 144 * 34_096 / 2**20
    # 0.8 x 80e9 - 16.38e9 = 47.62e9 bytes, 5.03e9 a rollout.
    assert found['rollouts_at_once'] == 9
    config.policy.gpu_memory_utilization = 0.9  # 55.62e9
    assert estimate.rollout_plan(config, 'H100')['rollouts_at_once'] == 11
    assert estimate.rollout_plan(config, 'L4')['rollouts_at_once'] == 1  # 5.22e9
    config.model.update(num_hidden_layers=64, intermediate_size=25_600)
    assert estimate.rollout_plan(config, 'L4')['rollouts_at_once'] == 0


def test_candidates():
    config = qwen3_8b.get_config()
    config.batch.seq_len = 6
    found = [
        ((mesh['fsdp'], mesh['context'], mesh['tensor']), sizes)
        for mesh, sizes in estimate.candidates(config, chips=8, rows=12)
    ]
    # 12 rows do not divide over fsdp=8, 6 tokens not over context=4 or 8; 8 key-value heads do.
    assert found == [
        ((4, 2, 1), [4]),
        ((4, 1, 2), [4]),
        ((2, 2, 2), [2, 4]),
        ((2, 1, 4), [2, 4]),
        ((1, 2, 4), [1, 2, 4]),
        ((1, 1, 8), [1, 2, 4]),
    ]


def test_hints():
    pytest.importorskip('libtpu')
    config = qwen3_8b.get_config()
    config.mesh.update(fsdp=8, context=1, tensor=2)
    config.batch.micro_rows = 16
    step = topology.PlannedStep(config, topology.tpu_devices('v5p:2x2x4'), rows=64)
    # 16 rows at a time over fsdp=8 may be 8, or 4 with each row on two chips.
    assert estimate.hint(step, used=100 * estimate.GIB, limit=96 * estimate.GIB) == (
        '4.0 GiB a chip too much: try batch.micro_rows=8, or --mesh=fsdp=4,context=2,tensor=2 with '
        'batch.micro_rows=4, or more chips; --search tries meshes'
    )
    # 12 + 4 bytes of 8.19e9 parameters, 122 GiB, over 16 chips are 7.6 GiB each.
    assert estimate.hint(step, used=30 * estimate.GIB, limit=6 * estimate.GIB) == (
        '24.0 GiB a chip too much: parameters, optimizer and gradients alone take 7.6 GiB; take '
        '21 chips or more, and spread the parameters over all of them (fsdp)'
    )


def test_mesh_flags():
    assert estimate.mesh_sizes('fsdp=-1,context=2') == {
        'data': 1,
        'fsdp': -1,
        'context': 2,
        'tensor': 1,
    }
    for text in ('fsdp', 'fsdp=', 'fsdp=0', 'contxt=2', 'fsdp=2;context=2'):
        with pytest.raises(ValueError, match=f'--mesh={text}.*expected such as'):
            estimate.mesh_sizes(text)


# ----------------------------------------------------------------------------------- the program


@pytest.mark.slow
def test_a_plan():
    found = planned(*SMALL, '--rows=8', '--gpu=H200')
    assert (found['topology'], found['chips']) == ('v5e:2x2', 4)
    assert found['mesh'] == {'data': 1, 'fsdp': 4, 'context': 1, 'tensor': 1}
    assert (found['rows'], found['seq_len'], found['tokens_per_step']) == (8, 128, 1024)
    assert found['fits'] and found['hint'] is None
    assert found['hbm_limit_gib'] == 15.75
    assert found['state_gib_per_chip'] < found['hbm_gib_per_chip'] < 1
    # The layers run once more for remat, the head runs three times for two temperatures, and
    # attention computes whole blocks of which half would do. That is more than the mathematics
    # asks for, but not twice as much again.
    model, hardware = found['model_flops_per_step'], found['hardware_flops_per_step']
    assert 1.2 < hardware / model < 2.5
    assert found['updates_per_step'] == 1

    # Two mini-batches of 8 rows, each taken twice, and scored once: four such updates, and two
    # forward passes of about a fourth of one (with remat, forward twice and backward twice that).
    flags = '--config.batch.updates=2', '--config.batch.epochs=2'
    several = planned(*SMALL, '--rows=16', '--config.loss.old_logprobs=recomputed', *flags)
    assert (several['rows'], several['updates_per_step']) == (16, 4)
    assert several['model_flops_per_step'] == 4 * model
    assert 4.2 < several['hardware_flops_per_step'] / hardware < 4.8
    assert several['hbm_gib_per_chip'] == pytest.approx(found['hbm_gib_per_chip'], rel=0.05)
    assert several['echo_over_grpo_flops'] == pytest.approx(found['echo_over_grpo_flops'])
    done = run(*SMALL, '--rows=9', '--config.batch.updates=2')
    assert 'rows=9 does not divide by batch.updates=2' in done.stderr
    # Each chip gathers the layers' three quarters that it lacks, at least forward and backward.
    assert found['collective_gib_per_step'] > 0.5 * found['state_gib_per_chip']
    seconds = found['estimated_step_seconds']
    assert found['estimated_mfu'] == pytest.approx(model / (seconds * 4 * 197e12))
    assert seconds > hardware / (4 * 197e12)
    assert found['echo_over_grpo_flops'] == pytest.approx(1, abs=0.02)
    assert found['echo_over_grpo_hbm'] == pytest.approx(1, abs=0.05)
    assert 0 < found['compile_seconds'] < 280
    assert found['rollout']['gpu'] == 'H200' and found['rollout']['rollouts_at_once'] > 100


@pytest.mark.slow
def test_a_search():
    found = planned(*SMALL, '--rows=8', '--search', '--search_limit=2')
    # The first mesh is fsdp=4. It is tried with 4 rows at a time and with all 8.
    assert {p['micro_rows'] for p in found} == {4, 8}
    assert {p['mesh']['fsdp'] for p in found} == {4}
    seconds = [p['estimated_step_seconds'] for p in found]
    assert 0 < seconds[0] < seconds[1]
    assert found[0]['estimated_mfu'] > found[1]['estimated_mfu']


@pytest.mark.slow
def test_a_model_that_does_not_fit():
    flags = '--topology=v5e:2x2', '--rows=4', '--seq_len=128', '--config.batch.micro_rows=4'
    found = planned('--config=configs/qwen3_8b.py', *flags, '--mesh=fsdp=4')
    assert not found['fits']
    # 8.19e9 parameters x 12 bytes over four chips, and a third of that for the gradients.
    assert found['state_gib_per_chip'] == pytest.approx(8_190_735_360 * 12 / 4 / 2**30, rel=1e-3)
    assert found['hbm_gib_per_chip'] > found['state_gib_per_chip'] > found['hbm_limit_gib']
    over = found['hbm_gib_per_chip'] - found['hbm_limit_gib']
    assert found['hint'].startswith(f'{over:.1f} GiB a chip too much')
    # 30.5 of 15.75 GiB on 4 chips: 7.75 of them.
    assert 'take 8 chips or more' in found['hint']
    assert found['estimated_step_seconds'] is None and found['estimated_mfu'] is None


@pytest.mark.slow
@pytest.mark.parametrize(
    'flags, says',
    [
        (['--topology=v9:2x2'], "topology is 'v9:2x2'; expected one of v5e, v5p, v6e"),
        (['--topology=v5e:2x2', '--gpu=H900'], "gpu is 'H900'; expected one of H100"),
        (['--topology=v5e:2x2', '--mesh=fsdp=two'], "'fsdp=two' is no axis and size"),
        (['--topology=v5e:2x2', '--rows=0'], '--rows=0'),
        ([], '--topology must have a value'),
    ],
)
def test_a_wrong_flag_is_one_line(flags, says):
    done = run('--config=configs/qwen3_8b.py', *flags)
    assert (done.returncode, done.stdout) == (1, '')
    assert done.stderr.startswith('error: ') and done.stderr.count('\n') == 1
    assert says in done.stderr


@pytest.mark.slow
def test_a_mesh_that_does_not_divide_is_one_line():
    pytest.importorskip('libtpu')
    done = run(*SMALL, '--rows=8', '--mesh=fsdp=3')
    assert (done.returncode, done.stdout) == (1, '')
    assert done.stderr.startswith('error: mesh ') and done.stderr.count('\n') == 1
    assert 'fsdp=3' in done.stderr and '4 devices' in done.stderr
