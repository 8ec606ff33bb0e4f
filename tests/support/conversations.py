"""Turns and observations for conversations that no sandbox takes part in."""

import numpy as np

from echo_jax.agent.encoding import Span
from echo_jax.agent.protocol import warning_prefix
from echo_jax.policy import Generation
from echo_jax.types import Role


def generation(tokenizer, text):
    """What a policy that samples `text` gives; its log-probabilities are -1, -2, ... nats."""
    ids = np.asarray(tokenizer.encode(text, add_special_tokens=False), np.int32)
    logprobs = -np.arange(1, len(ids) + 1, dtype=np.float32)
    return Generation(ids, logprobs, np.full(len(ids), 7, np.int32), 'stop')


def pieces(tokenizer, conversation, start=0):
    """The conversation as (text, role) runs of equal role."""
    runs = []
    for token, role in zip(conversation.tokens[start:], conversation.roles[start:], strict=True):
        if runs and runs[-1][1] == role:
            runs[-1][0].append(token)
        else:
            runs.append(([token], role))
    return [(tokenizer.decode(ids), role) for ids, role in runs]


def observation(output, warnings=()):
    """The spans of a command that printed `output`."""
    return [
        *warning_prefix(list(warnings)),
        Span(Role.WRAPPER, "Command 'ls' executed successfully. Output: "),
        Span(Role.OUTPUT, output),
        Span(Role.WRAPPER, '\n\n(exit_code=0)'),
    ]
