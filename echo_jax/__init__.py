"""ECHO on JAX: policy gradient on the agent's tokens, cross-entropy on the terminal's."""

import os

# When transformers is imported it says that there is no PyTorch; nothing here wants PyTorch. It is
# said here because every module of ours that imports transformers imports this one first.
os.environ.setdefault('TRANSFORMERS_NO_ADVISORY_WARNINGS', '1')
