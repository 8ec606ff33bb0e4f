"""One small training run, made once, that the programs' tests share; copy it before writing."""

import os
import pathlib

os.environ.setdefault('JAX_PLATFORMS', 'cpu')  # libtpu is installed, and looks for a TPU at length

import pytest

from echo_jax.sandbox import SandboxError, local
from tests.support.small_run import Programs


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
    from tests.support import docker_engine  # here: the rollout environment may lack what it needs

    with docker_engine.running() as daemon:
        yield daemon
