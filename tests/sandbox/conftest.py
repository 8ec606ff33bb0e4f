"""Sandboxes of both kinds, as fixtures."""

import asyncio
import dataclasses

import pytest

from echo_jax import types
from echo_jax.sandbox import CommandResult, docker, local
from echo_jax.sandbox.docker import engine, images
from echo_jax.sandbox.local import namespaces
from tests.support import docker_engine
from tests.support.episodes import episodes, make_task  # noqa: F401  pytest finds them here
from tests.support.sandboxes import SEC, refusal, results
from tests.support.tokenizers import (  # noqa: F401  pytest finds them by their names here
    protocol_config,
    tiny_tokenizer,
)


@pytest.fixture
def task(tmp_path) -> types.Task:
    (tmp_path / 'task').mkdir()
    return types.Task('task', tmp_path / 'task', 'do it', docker_image=docker_engine.BASE)


@pytest.fixture(params=namespaces.BACKENDS)
def backend(request) -> str:
    if refusal(request.param):
        pytest.skip(refusal(request.param))
    return request.param


@pytest.fixture
def session(task, backend):
    """session(commands..., timeout=, **limits): their results, then proof that it still works."""

    def run(*commands: str, timeout: float = SEC, **limits) -> list[CommandResult]:
        sandbox = local.LocalSandbox(task, backend=backend, **limits)
        return asyncio.run(results(sandbox, commands, timeout))

    return run


@pytest.fixture(scope='module')
def used(daemon):
    used = engine.Engine(daemon.url, run='tests', worker='sandbox')
    yield used
    used.close()


@pytest.fixture(scope='module')
def made(used):
    """Images: fitted ones by the agent's uid, and the tasks' own by None."""
    made = {user: images.Images(used, user=user, network=False) for user in (1000, 0, None)}
    yield made
    for one in made.values():
        one.close()


@pytest.fixture
def container(task, made):
    """container(user, **limits): a strict sandbox of the task, or a plain one if user is None.

    `memory_mb` and `disk_mb` are the task's own limits in a plain one.
    """

    def make(
        user: int | None, asking: types.Task = task, **limits
    ) -> docker.shell.ContainerSandbox:
        if user is not None:
            return docker.StrictSandbox(asking, images=made[user], **limits)
        for name, key in (('memory_mb', 'memory_mb'), ('storage_mb', 'disk_mb')):
            if key in limits:
                asking = dataclasses.replace(asking, **{name: limits.pop(key)})
        return docker.PlainSandbox(asking, images=made[None], **limits)

    return make


@pytest.fixture
def in_container(container):
    """in_container(commands..., timeout=, user=, **limits): as `session`, in a Docker container."""

    def run(*commands: str, timeout: float = SEC, user: int | None = 1000, **limits):
        return asyncio.run(results(container(user, **limits), commands, timeout))

    return run
