"""Sandboxes that are containers of a Docker engine (`sandbox.backend='docker'`)."""

from echo_jax.sandbox.docker.containers import sweep
from echo_jax.sandbox.docker.plain import PlainSandbox
from echo_jax.sandbox.docker.strict import StrictSandbox

__all__ = ['PlainSandbox', 'StrictSandbox', 'sweep']
