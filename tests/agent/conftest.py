"""The tokenizers and the protocol config of the agent's tests, as fixtures."""

from tests.support.tokenizers import (  # noqa: F401  pytest finds fixtures by their names here
    protocol_config,
    qwen_tokenizer,
    tiny_tokenizer,
    tokenizer,
)
