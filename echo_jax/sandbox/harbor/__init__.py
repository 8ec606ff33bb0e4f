"""Sandboxes in any of Harbor's environments, with Harbor's own verifier.

For clusters without a Docker engine, and for tasks that only Harbor runs: compose files, separate
verifiers, steps, GPUs. Harbor is optional, and needs Python 3.12.

Harbor's trial of a task builds and starts the environment, waits until it is healthy, has an agent
work in it, runs the tests and deletes the environment. `trial.py` runs one whose agent (`agent.py`)
only waits; `sandbox.py` is the shell that an episode meanwhile has in the environment. So a task
earns here what it earns under `harbor run`.
"""

from echo_jax.sandbox.harbor.sandbox import HarborSandbox
from echo_jax.sandbox.harbor.trial import check

__all__ = ['HarborSandbox', 'check']
