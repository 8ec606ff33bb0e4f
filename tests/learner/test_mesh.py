"""The same loss and gradients on one device, on meshes of eight, and in two processes."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import ml_collections
import numpy as np
import pytest

from echo_jax.learner import distributed
from echo_jax.learner.sharding import make_mesh
from echo_jax.learner.step import ShardedModel
from tests.support.mesh_step import SHARDING, SIZES
from tests.support.random_rollouts import small_config

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]
MESHES = [
    {'fsdp': 8},
    {'fsdp': 4, 'tensor': 2},
    {'fsdp': 2, 'context': 2, 'tensor': 2},
    {'data': 2, 'fsdp': 2, 'context': 2},
]


def start(output, sizes, dtype='float32', devices=8, loss=None, **environment):
    arguments = [output, json.dumps(sizes), dtype, json.dumps(loss or {})]
    return run('mesh_step.py', *arguments, dtype=dtype, devices=devices, **environment)


def run(program, *arguments, dtype, devices=8, **environment):
    flags = f'--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0'
    return subprocess.Popen(
        [sys.executable, ROOT / 'tests/support' / program, *arguments],
        env=os.environ
        | {
            'JAX_PLATFORMS': 'cpu',
            'JAX_ENABLE_X64': str(int(dtype == 'float64')),
            'XLA_FLAGS': flags,
            'PYTHONPATH': str(ROOT),
        }
        | environment,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(output, *processes):
    for process in processes:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors[-4000:]
    return dict(np.load(output))


@pytest.fixture(scope='module')
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp('alone')
    return {
        dtype: finish(folder / f'{dtype}.npz', start(folder / f'{dtype}.npz', {}, dtype, devices=1))
        for dtype in ('float32', 'float64')
    }


def assert_same(found, expected, tolerance, least=1e-3):
    assert found.keys() == expected.keys()
    assert abs(expected['loss']) > 0.01
    # The old log-probabilities are those of the same policy, scored by a pass of its own.
    assert max(x['ratio_deviation'] / x['action_tokens'] for x in (found, expected)) < 1e-5
    assert expected['target_tokens'] == 7 + 5 + 5 + 6 + 0 + 0 + 1
    for name, value in expected.items():
        if name == 'held':
            continue
        assert found[name].shape == value.shape
        scale = np.abs(value).max()
        if value.ndim:
            assert scale > least, name  # a gradient of zeros would show nothing
        else:
            scale = max(scale, 1.0)  # the policy's loss is 0 but for rounding
        np.testing.assert_allclose(found[name], value, 0, tolerance * scale, err_msg=name)


@pytest.mark.parametrize('dtype, tolerance', [('float32', 1e-5), ('float64', 1e-12)])
@pytest.mark.parametrize('sizes', MESHES, ids=str)
def test_eight_devices_compute_what_one_does(alone, tmp_path, sizes, dtype, tolerance):
    output = tmp_path / 'mesh.npz'
    found = finish(output, start(output, sizes, dtype))
    assert found['held'] == pytest.approx(0.25 if 'data' in sizes else 0.125)
    assert_same(found, alone[dtype], tolerance)


def test_ratios_of_rollouts_whose_tokens_are_on_several_devices(tmp_path):
    """The model's gradients through sums over each rollout, beside all that is new per group."""
    loss = {'policy': 'gspo', 'mismatch': 'geometric', 'mismatch_cap': 40.0}
    loss |= {'reduction': 'prompt_mean', 'advantages': 'maxrl'}
    outputs = [tmp_path / 'alone.npz', tmp_path / 'mesh.npz']
    expected = finish(outputs[0], start(outputs[0], {}, devices=1, loss=loss))
    assert 0 < expected['mismatch_masked'] < expected['mismatch_masked/count']
    sizes = {'fsdp': 2, 'context': 2, 'tensor': 2}
    found = finish(outputs[1], start(outputs[1], sizes, loss=loss))
    assert_same(found, expected, 1e-5, least=1e-4)


def test_every_loss_of_divided_arrays_is_that_of_whole_ones():
    process = run('mesh_losses.py', '10', dtype='float64')
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors[-4000:]


def test_the_coefficient_and_the_balance_of_the_two_gradients(tmp_path):
    """What `loss.env_schedule`, `loss.env_adaptive` and `eval.balance` need, on a mesh as on one
    device, in two micro-batches."""

    def computed(name, sizes, devices):
        output = tmp_path / f'{name}.npz'
        arguments = output, json.dumps(sizes)
        return finish(output, run('mesh_env_coef.py', *arguments, dtype='float64', devices=devices))

    alone, found = computed('alone', {}, 1), computed('mesh', {'data': 2, 'fsdp': 2}, 4)
    assert found.keys() == alone.keys()
    for name, value in alone.items():
        scale = max(np.abs(value).max(), 1e-3)
        np.testing.assert_allclose(found[name], value, 0, 1e-11 * scale, err_msg=name)
    # A step's gradient is that of the others plus the coefficient times the environment term's.
    names = [name.removeprefix('gradient/0.0/') for name in alone if 'gradient/0.0/' in name]
    others, both = (
        np.concatenate([found[f'gradient/{coef}/{name}'].ravel() for name in names])
        for coef in ('0.0', '0.25')
    )
    assert len(others) > 5000
    env = (both - others) / 0.25
    norms = [np.linalg.norm(others), np.linalg.norm(env)]
    np.testing.assert_allclose(norms, [found['grad_norm_policy'], found['grad_norm_env']], 1e-9)
    cosine = others @ env / np.prod(norms)
    np.testing.assert_allclose(cosine, found['grad_cosine'], 1e-9)
    assert min(norms) > 0.1 and abs(cosine) > 1e-3


def test_two_processes_compute_what_one_does(alone, tmp_path):
    with socket.socket() as free:
        free.bind(('localhost', 0))
        address = f'localhost:{free.getsockname()[1]}'
    output, sizes = tmp_path / 'mesh.npz', {'fsdp': 2, 'context': 2, 'tensor': 2}
    together = {'JAX_COORDINATOR_ADDRESS': address, 'JAX_PROCESS_COUNT': '2'}
    processes = [
        start(output, sizes, devices=4, JAX_PROCESS_ID=str(i), **together) for i in range(2)
    ]
    assert_same(finish(output, *processes), alone['float32'], 1e-5)


def test_a_process_count_without_a_number_says_what_to_set(monkeypatch):
    monkeypatch.setenv('JAX_COORDINATOR_ADDRESS', 'host:1234')
    with pytest.raises(ValueError, match=r'JAX_PROCESS_COUNT.*set all three'):
        distributed.start()


@pytest.mark.parametrize('sizes', [(1, 2, 1, 3), (-1, -1, 1, 1), (2, 1, 1, 16), (1, 0, 1, 1)])
def test_a_mesh_that_does_not_fit_says_so(sizes):
    config = ml_collections.ConfigDict()
    config.mesh = dict(zip(('data', 'fsdp', 'context', 'tensor'), sizes))
    with pytest.raises(ValueError, match=r'does not fit 1 devices; change config\.mesh'):
        make_mesh(config)


class Chip:
    platform = 'none'


@pytest.mark.parametrize(
    'mesh, change, message',
    [
        ({'tensor': 4}, {}, 'num_key_value_heads=2 does not divide over tensor=4 = 4; make it'),
        ({'fsdp': 3}, {}, r'batch\.micro_rows=8 does not divide over data=1 x fsdp=3 = 3'),
        ({'context': 5}, {}, r'batch\.seq_len=16 does not divide over context=5'),
        ({'tensor': 2}, {'sharding': {}}, 'mesh.tensor=2 splits nothing'),
        ({'fsdp': 2}, {'sharding': {'embed': 'tensor'}}, r'sharding\.embed is .*expected embed'),
        ({'fsdp': 2}, {'sharding': {'embed': 'fsdp', 'layers': 'fsdp'}}, r'sharding\.layers'),
    ],
)
def test_a_model_that_does_not_divide_says_so(mesh, change, message):
    config = small_config(groups=4, group_size=2, seq_len=16, micro_rows=8)
    config.model.update(SIZES)
    config.mesh.update({'data': 1, 'fsdp': 1, 'context': 1, 'tensor': 1} | mesh)
    with config.unlocked():
        config.sharding = change.get('sharding', SHARDING)
    devices = [Chip()] * int(np.prod(list(mesh.values())))
    with pytest.raises(ValueError, match=message):
        ShardedModel.of(config, devices)
