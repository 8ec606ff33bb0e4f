"""Sandboxes of both kinds, as fixtures."""

import asyncio

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
    """Images by the agent's uid."""
    made = {user: images.Images(used, user=user, network=False) for user in (1000, 0)}
    yield made
    for one in made.values():
        one.close()


@pytest.fixture
def in_container(task, made):
    """in_container(commands..., timeout=, user=, **limits): as `session`, in a Docker container."""

    def run(*commands: str, timeout: float = SEC, user: int = 1000, **limits):
        sandbox = docker.DockerSandbox(task, images=made[user], **limits)
        return asyncio.run(results(sandbox, commands, timeout))

    return run
