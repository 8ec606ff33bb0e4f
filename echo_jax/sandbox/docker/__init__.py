"""Sandboxes that are containers of a Docker engine (`sandbox.backend='docker'`)."""

from echo_jax.sandbox.docker.containers import sweep
from echo_jax.sandbox.docker.sandbox import DockerSandbox

__all__ = ['DockerSandbox', 'sweep']
