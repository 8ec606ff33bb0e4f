"""What all tests share: which ones are slow, and one small training run for tests of programs."""

import contextlib
import os
import pathlib
from collections.abc import Callable, Iterator

os.environ.setdefault('JAX_PLATFORMS', 'cpu')  # with libtpu, JAX looks for a TPU at length

import pytest

from echo_jax.sandbox import SandboxError, local
from tests.support.small_run import Programs

# No test is timed: on a busy machine an example may take longer than Hypothesis expects.
with contextlib.suppress(ModuleNotFoundError):  # the rollout environment has no Hypothesis
    import hypothesis

    hypothesis.settings.register_profile('untimed', deadline=None)
    hypothesis.settings.load_profile('untimed')

# A test that uses one of these starts programs, containers or a cluster.
SLOW_FIXTURES = {'programs', 'finished', 'daemon', 'cluster'}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks slow tests by what they use, so that few have to be marked by hand.

    With several processes the files that have some come first: at the end all are busy until the
    last of the quick ones.
    """
    slow = set()
    for item in items:
        if SLOW_FIXTURES & set(getattr(item, 'fixturenames', ())):
            item.add_marker('slow')
        if item.get_closest_marker('slow'):
            slow.add(item.path)
    if 'PYTEST_XDIST_WORKER' in os.environ:
        items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope='session')
def programs(tmp_path_factory) -> Iterator[Programs]:
    try:
        local.check()
    except SandboxError as error:
        pytest.skip(str(error))
    programs = Programs(tmp_path_factory.mktemp('compiled'))
    yield programs
    programs.close()


@pytest.fixture(scope='session')
def finished(programs, tmp_path_factory) -> pathlib.Path:
    """The workdir of a finished run. Copy it before writing to it."""
    workdir = tmp_path_factory.mktemp('run') / 'finished'
    programs.train(workdir)
    return workdir


@pytest.fixture(scope='session')
def run_of(programs, finished, tmp_path_factory, request) -> Callable[[str], pathlib.Path]:
    """The workdir of a finished run of support/every_option.py. Copy it before writing to it."""
    # Here, because the rollout environment has no JAX.
    from tests.support.every_option import RUNS, flags_of, write_tasks

    done = {'plain': finished}

    def run(name: str) -> pathlib.Path:
        if name not in done:
            folder, run = tmp_path_factory.mktemp(name), RUNS[name]
            flags, without = flags_of(name, write_tasks(folder))
            environment = {}
            if run.devices > 1:
                environment['XLA_FLAGS'] = f'--xla_force_host_platform_device_count={run.devices}'
            if run.needs_docker:
                environment['DOCKER_HOST'] = request.getfixturevalue('daemon').url
            programs.train(
                folder / 'run', *flags, recipe=run.recipe, without=without, **environment
            )
            done[name] = folder / 'run'
        return done[name]

    return run


@pytest.fixture(scope='session')
def daemon():
    """The one Docker engine of all tests (support/docker_engine.py)."""
    from tests.support import docker_engine  # here: the rollout environment may lack what it needs

    with docker_engine.running() as daemon:
        yield daemon
