"""Sandboxes from Linux namespaces: no daemon and no image (`sandbox.backend='local'`)."""

from echo_jax.sandbox.local.namespaces import check
from echo_jax.sandbox.local.sandbox import LocalSandbox

__all__ = ['LocalSandbox', 'check']
