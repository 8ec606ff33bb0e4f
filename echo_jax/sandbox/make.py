"""Makes sandboxes by the recipe: the one place that knows the three backends by name."""

import contextlib
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import ml_collections

from echo_jax.sandbox import Sandbox, local
from echo_jax.types import Task

if TYPE_CHECKING:
    from echo_jax.sandbox.docker.images import Images


class SandboxMaker(contextlib.AbstractContextManager):
    """Makes the sandbox of a task. Close it, or leave its `with`, when the last one has stopped."""

    def __init__(
        self, make: Callable[[Task], Sandbox], on_close: Callable[[], None] = lambda: None
    ):
        self._make, self._on_close = make, on_close

    def __call__(self, task: Task) -> Sandbox:
        return self._make(task)

    def close(self) -> None:
        self._on_close()

    def __exit__(self, *error: object) -> None:
        self.close()


def sandbox_maker(
    config: ml_collections.ConfigDict, backend: str = '', *, run: str = '', worker: str = ''
) -> SandboxMaker:
    """Makes sandboxes of `sandbox.backend`, or of `backend` if it is given.

    `run` and `worker` label what a Docker engine keeps; what a dead process with the same labels
    left there is removed. Raises SandboxError if this machine allows no such sandbox, ValueError if
    the recipe asks for what is not installed or not known.
    """
    backend = backend or config.sandbox.backend
    how = {'processes': config.sandbox.processes, 'shell': config.sandbox.shell}
    if backend == 'local':
        local.check()
        return SandboxMaker(functools.partial(local.LocalSandbox, **how))
    if backend == 'docker':
        return _docker_maker(config, how, run, worker)
    if backend == 'harbor':
        from echo_jax.sandbox import harbor  # here, since Harbor is optional

        environment = config.sandbox.harbor_environment
        harbor.check(environment)
        make = functools.partial(
            harbor.HarborSandbox, environment=environment, shell=config.sandbox.shell
        )
        return SandboxMaker(make)
    raise ValueError(f"sandbox.backend is {backend!r}; expected 'local', 'docker' or 'harbor'")


def docker_images(config: ml_collections.ConfigDict, run: str = '', worker: str = '') -> 'Images':
    """The images of the engine at DOCKER_HOST.

    Raises SandboxError if no engine answers, ValueError if the Docker SDK is not installed.
    """
    try:  # here, since no other backend needs the SDK
        from echo_jax.sandbox.docker import engine, images
    except ModuleNotFoundError as error:
        raise ValueError(
            f"sandbox.backend='docker' needs the Docker SDK ({error}); pip install docker tenacity"
        ) from error
    return images.Images(
        engine.Engine(run=run, worker=worker),
        user=config.sandbox.user if config.sandbox.hardening == 'strict' else None,
        network=config.sandbox.build_network,
    )


def _docker_maker(
    config: ml_collections.ConfigDict, how: dict[str, Any], run: str, worker: str
) -> SandboxMaker:
    hardening = config.sandbox.hardening
    if hardening not in ('docker', 'strict'):
        raise ValueError(f"sandbox.hardening is {hardening!r}; expected 'docker' or 'strict'")
    images = docker_images(config, run, worker)
    from echo_jax.sandbox import docker  # here, since the SDK is optional
    from echo_jax.sandbox.docker import containers

    containers.check_runtime(images.engine, config.sandbox.runtime)
    containers.sweep(images.engine)

    def close() -> None:
        images.close()
        containers.sweep(images.engine, own=True)
        images.engine.close()

    how = how | {'images': images, 'runtime': config.sandbox.runtime}
    if hardening == 'strict':
        return SandboxMaker(functools.partial(docker.StrictSandbox, **how), close)
    kill = config.verifier.kill_agent_processes
    return SandboxMaker(
        functools.partial(docker.PlainSandbox, kill_agent_processes=kill, **how), close
    )
