"""Makes sandboxes by the recipe: the one place that knows the three backends by name."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import ml_collections

from echo_jax.sandbox import Sandbox, local
from echo_jax.types import Task


class SandboxMaker(NamedTuple):
    """Makes the sandbox of a task; `close` it when the last one has stopped."""

    make: Callable[[Task], Sandbox]
    close: Callable[[], object] = lambda: None

    def __call__(self, task: Task) -> Sandbox:
        return self.make(task)


def sandbox_maker(
    config: ml_collections.ConfigDict, backend: str = '', *, run: str = '', worker: str = ''
) -> SandboxMaker:
    """By `sandbox.backend`, or by `backend`; fails early where this machine allows no sandbox.

    `run` and `worker` label what a Docker engine keeps for it; what a dead process of the same
    labels left there is removed.
    """
    limits = {key: config.sandbox[key] for key in ('processes', 'memory_mb', 'disk_mb')}
    match backend or config.sandbox.backend:
        case 'local':
            local.check()
            return SandboxMaker(functools.partial(local.LocalSandbox, **limits))
        case 'docker':
            images = docker_images(config, run, worker)
            from echo_jax.sandbox import docker
            from echo_jax.sandbox.docker import containers

            containers.sweep(images.engine)

            def close():
                images.close()
                containers.sweep(images.engine, own=True)
                images.engine.close()

            return SandboxMaker(
                functools.partial(docker.DockerSandbox, images=images, **limits), close
            )
        case 'harbor':
            from echo_jax.sandbox import harbor

            harbor.check(config.sandbox.harbor_environment)
            del limits['processes']
            environment = config.sandbox.harbor_environment
            return SandboxMaker(
                functools.partial(harbor.HarborSandbox, environment=environment, **limits)
            )
        case backend:
            raise ValueError(
                f"sandbox.backend is {backend!r}; expected 'local', 'docker' or 'harbor'"
            )


def docker_images(config: ml_collections.ConfigDict, run: str = '', worker: str = ''):
    """The images.Images of the engine at DOCKER_HOST; fails where it or the Docker SDK is not."""
    try:  # here: no other backend needs the SDK
        from echo_jax.sandbox.docker import engine, images
    except ModuleNotFoundError as error:
        raise ValueError(
            f"sandbox.backend='docker' needs the Docker SDK ({error}); pip install docker"
        ) from error
    return images.Images(
        engine.Engine(run=run, worker=worker),
        user=config.sandbox.user,
        network=config.sandbox.build_network,
        seed=config.seed,
    )
