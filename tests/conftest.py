"""One small training run, made once, that the programs' tests share; copy it before writing."""

import os
import pathlib

os.environ.setdefault('JAX_PLATFORMS', 'cpu')  # libtpu is installed, and looks for a TPU at length

import pytest
from small_run import Programs

from echo_jax.agent.sandbox import SandboxError, local


@pytest.fixture(scope='session')
def programs(tmp_path_factory) -> Programs:
    try:
        local.check()
    except SandboxError as error:
        pytest.skip(str(error))
    return Programs(tmp_path_factory.mktemp('compiled'))


@pytest.fixture(scope='session')
def finished(programs, tmp_path_factory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp('run') / 'finished'
    programs.train(workdir)
    return workdir


@pytest.fixture(scope='session')
def daemon():
    """A Docker engine (docker_engine.py), the only one of these tests."""
    docker_engine = pytest.importorskip('docker_engine', reason='the Docker SDK is not installed')
    with docker_engine.running() as daemon:
        yield daemon
