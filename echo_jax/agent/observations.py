"""What the policy is shown of its commands: exact texts, each with its role.

Runs the selected commands of one turn in a sandbox. The texts are those of
docs/protocol.md#observation-text and docs/protocol.md#truncation. This module knows no tokens.
"""

import re
import time

import ml_collections

from echo_jax.agent.dialects.dialect import Command
from echo_jax.agent.encoding import Span
from echo_jax.sandbox import CommandResult, Sandbox
from echo_jax.types import Role

NO_COMMANDS = Span(
    Role.FEEDBACK, 'No commands provided. Please provide commands to execute or set done.'
)


# What a policy writes that plays the terminal itself: the tag that opens an observation in the chat
# template, or the words of `describe`.
_IMAGINED = re.compile(r"<tool_response>|' (?:failed|executed successfully)\. Output: ")


def imagines(text: str) -> bool:
    """Whether the text of an agent's turn holds the beginning of an observation.

    Nobody made it: a turn is the agent's own words, and no observation is appended before its end.
    """
    return _IMAGINED.search(text) is not None


def truncate(text: str, limit: int, strategy: str) -> list[Span]:
    """At most `limit` characters of the output and a notice of what is missing; 0 is no limit."""
    if limit <= 0 or len(text) <= limit:
        return [Span(Role.OUTPUT, text)]
    half = limit // 2
    shown = {
        'start': f'first {limit}',
        'end': f'last {limit}',
        'start_end': f'first {half} and last {half}',
    }
    notice = f'[Output truncated: showing {shown[strategy]} of {len(text)} characters]'
    if strategy == 'start':
        return [Span(Role.OUTPUT, text[:limit]), Span(Role.WRAPPER, f'\n{notice}')]
    if strategy == 'end':
        return [Span(Role.WRAPPER, f'{notice}\n'), Span(Role.OUTPUT, text[-limit:])]
    return [
        Span(Role.OUTPUT, text[:half]),
        Span(Role.WRAPPER, f'\n{notice}\n'),
        # Not text[-half:], which is the whole text if half is 0.
        Span(Role.OUTPUT, text[len(text) - half :]),
    ]


def refusal(command: Command) -> str:
    """What is shown for a call that cannot be run, '' if it can."""
    if command.error:
        reason = f'parse error: {command.error}'
    elif command.name != 'bash':
        reason = f"Unknown tool '{command.name}'. Only 'bash' is supported."
    elif not command.arguments.get('command'):
        reason = 'no command provided. Please provide a command in correct format to execute.'
    else:
        return ''
    return f"Command '{command.raw}' skipped due to {reason}"


def describe(command: str, result: CommandResult, limit: int, strategy: str) -> list[Span]:
    """The observation of a command that ended in time."""
    output = result.stdout + (f'\n{result.stderr}' if result.stderr else '')
    verdict = 'failed' if result.exit_code else 'executed successfully'
    return [
        Span(Role.WRAPPER, f"Command '{command}' {verdict}. Output: "),
        *truncate(output, limit, strategy),
        Span(Role.WRAPPER, f'\n\n(exit_code={result.exit_code})'),
    ]


def seconds(text: str) -> float:
    """A call's timeout; raises ValueError if it is not a positive number."""
    value = float(text)
    if not value > 0:
        raise ValueError(f'timeout is {text}, expected a positive number of seconds')
    return value


async def execute(
    commands: list[Command], sandbox: Sandbox, config: ml_collections.ConfigDict, deadline: float
) -> tuple[list[Span], int]:
    """Runs a turn's commands in order: (their observations, how many a shell has really run).

    `config` is the recipe's `protocol`; `deadline` is when the agent's time ends, in seconds of
    time.monotonic(). A command gets no more time than is left, and none is begun afterwards.
    """
    spans: list[Span] = []
    run = 0
    for command in commands:
        if spans:
            spans.append(Span(Role.WRAPPER, '\n\n'))
        reason = refusal(command)
        if reason:
            spans.append(Span(Role.FEEDBACK, reason))
            continue
        text = command.arguments['command']
        timeout = command.arguments.get('timeout', str(config.command_timeout))
        try:
            allowed = min(seconds(timeout), deadline - time.monotonic())
        except ValueError as error:
            failure = f"Command '{text}' execution error: {error}\n\n(exit_code=-1)"
            spans.append(Span(Role.WRAPPER, failure))
            continue
        if allowed <= 0:
            break
        result = await sandbox.run(text, allowed)
        run += 1
        if result.timed_out:
            late = f"Command '{text}' timed out after {timeout} seconds.\n\n(exit_code=-1)"
            spans.append(Span(Role.WRAPPER, late))
        else:
            spans.extend(describe(text, result, config.max_output_chars, config.truncation))
    return spans, run
