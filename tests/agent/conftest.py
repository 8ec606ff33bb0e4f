"""The fixtures of the agent's tests."""

from tests.support.episodes import episodes, make_task  # noqa: F401  pytest finds them here
from tests.support.tokenizers import (  # noqa: F401
    protocol_config,
    qwen_tokenizer,
    tiny_tokenizer,
    tokenizer,
)
