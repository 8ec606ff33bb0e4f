"""A second dialect, which only tests have: a call is JSON between tool_call tags.

Tags with nothing between them are no call, and no error either. Thinking is written as in
qwen3_xml, nothing else is shared. This file and one line in DIALECTS are all that a new dialect
takes.
"""

import json

from echo_jax.agent.dialects.dialect import Command, ParsedResponse
from echo_jax.agent.dialects.qwen3_xml import (
    TAGS,
    THINK_OPEN,
    THINK_TAGS,
    strip_thinking,
    text_after_thinking,
)

__all__ = ['TAGS', 'THINK_OPEN', 'THINK_TAGS', 'strip_thinking', 'text_after_thinking']


def parse_response(text):
    commands, is_done = [], False
    parts = text.split('<tool_call>')[1:]
    for part in parts:
        raw = part.partition('</tool_call>')[0].strip()
        if not raw:
            continue
        try:
            call = json.loads(raw)
        except ValueError:
            commands.append(Command('', {}, 'The call is not JSON', raw))
            continue
        if call['name'] == 'done':
            is_done = True
        else:
            commands.append(Command(call['name'], call['arguments'], '', raw))
    error = '' if parts else 'Call a tool.'
    return ParsedResponse(commands, is_done, error)


def format_warnings(text):
    return [] if '</think>' in text else ['Think first']


def write_response(thought, command, done):
    calls = []
    if command is not None:
        calls.append({'name': 'bash', 'arguments': {'command': command}})
    if done:
        calls.append({'name': 'done'})
    blocks = '\n'.join(f'<tool_call>{json.dumps(call)}</tool_call>' for call in calls)
    return f'{thought}\n</think>\n\n{blocks}'


def tools_prompt(tools):
    return f'Tools: {json.dumps(tools)}\nCall one by <tool_call>JSON</tool_call>.'
