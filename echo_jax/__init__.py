"""ECHO on JAX: policy gradient on the agent's tokens, cross-entropy on the terminal's."""
