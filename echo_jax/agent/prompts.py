"""What the policy is told before the task (docs/protocol.md#prompt, docs/protocol.md#tools).

The released prompt's content and tags in our own words. How a call is written is the dialect's to
say; this module knows no tokenizer and no template.
"""

from typing import Any

from echo_jax.agent.dialects.dialect import Dialect

_BASE = """\
You are a highly capable Linux terminal agent. You complete the user's task by running commands in \
a shell, one step at a time, and by reading what they print. Check that the task is solved before \
you stop, then call done."""

_BRIEF = 'Solve the task in bash.'

_USER_PREFIX = """\
Think first inside {thinking}, then make your call. The result of a command comes back before \
your next turn. Call done only when you have seen that the task is complete; nothing can be done \
after it.

Task: """


def _tools(command_timeout: int) -> list[dict[str, Any]]:
    """The JSON schemas of `bash` and `done`."""
    command = {'type': 'string', 'description': 'The command to run in the shell.'}
    timeout = {
        'type': 'integer',
        'description': f'Seconds until the command is killed (default {command_timeout}).',
        'default': command_timeout,
    }
    bash = {
        'name': 'bash',
        'description': 'Run a command in the bash shell of the terminal and return its output.',
        'parameters': {
            'type': 'object',
            'properties': {'command': command, 'timeout': timeout},
            'required': ['command'],
        },
    }
    done = {
        'name': 'done',
        'description': 'Say that the task is complete. It takes no parameters.',
        'parameters': {'type': 'object', 'properties': {}, 'required': []},
    }
    return [{'type': 'function', 'function': function} for function in (bash, done)]


def messages(
    instruction: str, style: str, command_timeout: int, dialect: Dialect
) -> list[dict[str, str]]:
    """System and user message of a task; style 'full' (some 400 tokens) or 'brief' (a dozen).

    `command_timeout` is in seconds. Raises ValueError for another style.
    """
    if style == 'brief':
        system, prefix = _BRIEF, ''
    elif style == 'full':
        system = f'{dialect.tools_prompt(_tools(command_timeout))}\n\n{_BASE}'
        prefix = _USER_PREFIX.format(thinking=''.join(dialect.THINK_TAGS))
    else:
        raise ValueError(f"protocol.system_prompt is 'full' or 'brief', not {style!r}")
    return [
        {'role': 'system', 'content': system},
        {'role': 'user', 'content': prefix + instruction},
    ]
