"""Fixtures of others that the tests of run/ use."""

from tests.support.episodes import make_task  # noqa: F401  pytest finds them here
from tests.support.tokenizers import tiny_tokenizer  # noqa: F401  pytest finds it here
