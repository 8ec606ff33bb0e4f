"""The same step on one device and on meshes of four."""

import json
import os
import pathlib
import subprocess
import sys

import ml_collections
import numpy as np
import pytest

from echo_jax.learner.sharding import make_mesh

ROOT = pathlib.Path(__file__).parents[2]


def test_meshes_of_four_devices_compute_what_one_does():
    """In float64, so that what is left are reductions in another order."""
    environment = os.environ | {
        'JAX_PLATFORMS': 'cpu',
        'JAX_ENABLE_X64': '1',
        'XLA_FLAGS': '--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0',
        'PYTHONPATH': f'{ROOT}',
    }
    done = subprocess.run(
        [sys.executable, pathlib.Path(__file__).with_name('mesh_step.py')],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(line['fsdp'], line['tensor']) for line in lines] == [(4, 1), (2, 2)]
    for line in lines:
        assert line['held'] == 0.25, line  # every matrix and its moments lie on all four
        assert abs(line['loss'][0]) > 0.01 and line['grad_norm'][0] > 0.01, line
        np.testing.assert_allclose(line['loss'][1], line['loss'][0], rtol=1e-5)
        np.testing.assert_allclose(line['grad_norm'][1], line['grad_norm'][0], rtol=1e-5)
        assert line['apart'] < 1e-5, line


@pytest.mark.parametrize('sizes', [(1, 2, 1, 3), (-1, -1, 1, 1), (2, 1, 1, 16)])
def test_a_mesh_that_does_not_fit_says_so(sizes):
    config = ml_collections.ConfigDict()
    config.mesh = dict(zip(('data', 'fsdp', 'context', 'tensor'), sizes))
    with pytest.raises(ValueError, match=r'does not fit 1 devices; change config\.mesh'):
        make_mesh(config)
