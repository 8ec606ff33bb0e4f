"""The released dialect: `<think>` and `<tool_call>` tags, a call in Qwen3-Coder's XML.

The rules are in docs/protocol.md#call-format, docs/protocol.md#parser and
docs/protocol.md#warnings. The text is hostile and up to megabytes long, so every scan is linear: a
lazy pattern ends with `|\\Z`, which makes it match at each opening tag instead of searching the
rest of the text in vain and starting over at the next one.
"""

import json
import re
from typing import Any

from echo_jax.agent.dialects.dialect import Command, ParsedResponse

THINK_TAGS: tuple[str, str] = ('<think>', '</think>')
THINK_OPEN: str = '<think>\n'
TAGS: tuple[str, ...] = (*THINK_TAGS, '<tool_call>', '</tool_call>')

_NAMES = ('think', 'tool_call')
_TAG = re.compile(r'<(/?)(think|tool_call)>')
_EMPTY = {name: re.compile(rf'<{name}>\s*</{name}>') for name in _NAMES}
_THINKING = re.compile(r'<think>.*?(?:</think>|\Z)', re.DOTALL)
_CALL = re.compile(r'<tool_call>(.*?)(?:</tool_call>|\Z)', re.DOTALL)
_FUNCTION = re.compile(r'<function=([\w.-]+)>')
_PARAMETER = re.compile(r'<parameter=(\w+)>(.*?)(</parameter>|\Z)', re.DOTALL)

_CALL_FORMAT = """\
To call a function, end your answer with a call of exactly this form:

<tool_call>
<function=example_function>
<parameter=example_parameter>
value
</parameter>
<parameter=another_parameter>
a value that
spans several lines
</parameter>
</function>
</tool_call>

<IMPORTANT>
- A call is an inner <function=...></function> block inside <tool_call></tool_call> tags.
- Required parameters must be given.
- Reason in plain language before a call if you need to, never after it.
</IMPORTANT>"""


def tools_prompt(tools: list[dict[str, Any]]) -> str:
    """The `# Tools` block of the system message (docs/protocol.md#prompt)."""
    schemas = '\n'.join(json.dumps(tool) for tool in tools)
    return f'# Tools\n\nYou have these functions:\n\n<tools>\n{schemas}\n</tools>\n\n{_CALL_FORMAT}'


def write_response(thought: str, command: str | None, done: bool) -> str:
    """A response without THINK_OPEN, which the generation prompt holds, and without its end."""
    functions = []
    if command is not None:
        functions.append(
            f'<function=bash>\n<parameter=command>\n{command}\n</parameter>\n</function>'
        )
    if done:
        functions.append('<function=done>\n</function>')
    calls = '\n'.join(f'<tool_call>\n{function}\n</tool_call>' for function in functions)
    return f'{thought}\n</think>\n\n{calls}'


def strip_thinking(text: str) -> str:
    """Takes closed think blocks out, then an unclosed one to the end (docs/protocol.md#a-turn)."""
    # Taking a block out can join a new opening tag; like any other it now runs to the end.
    return _THINKING.sub('', text).partition('<think>')[0].strip()


def text_after_thinking(text: str) -> str:
    """What follows the last `</think>`, '' if there is none: for `parse_after_think=True`."""
    return text.rpartition('</think>')[2].strip() if '</think>' in text else ''


def parse_response(text: str) -> ParsedResponse:
    """Reads the calls of one response whose thinking has been stripped (docs/protocol.md#parser).

    The third whole-response error of that page, `No valid tool calls or done signal found.`, cannot
    arise here: every call is either `done` or a command, even if a broken one.
    """
    if not text:
        return ParsedResponse([], error='Empty response')
    calls = _CALL.findall(text)
    if not calls:
        return ParsedResponse([], error='No <tool_call> found in response.')
    commands, is_done = [], False
    for call in calls:
        function = _FUNCTION.search(call)
        if function is None:
            commands.append(Command('', {}, 'Missing <function=...> tag', call.strip()))
        elif function[1] == 'done':
            is_done = True
        else:
            # If two parameters have one name, the later counts. One that is never closed is none.
            found = _PARAMETER.findall(call)
            arguments = {name: value.strip() for name, value, closing in found if closing}
            error = '' if arguments else 'No parameters found'
            commands.append(Command(function[1], arguments, error, call.strip()))
    return ParsedResponse(commands, is_done)


def format_warnings(text: str, opening: str = THINK_OPEN) -> list[str]:
    """Warnings on one sampled response, exact and in the order of docs/protocol.md#warnings.

    `opening` is the part of the response that the generation prompt already holds. It is put before
    the text, so a think block can only be missing if `opening` is given as ''.
    """
    if not text:
        return []
    text = opening + text
    warnings = []
    blocks = text.count('<think>')
    if blocks == 0:
        warnings.append('Missing <think> block')
    elif blocks > 1:
        warnings.append(f'Found {blocks} <think> blocks, expected 1')
    for name in _NAMES:
        if text.count(f'<{name}>') > text.count(f'</{name}>'):
            warnings.append(f'Unclosed <{name}> tag')
        if _EMPTY[name].search(text):
            warnings.append(f'Empty <{name}> block')
    return warnings + _structure_warnings(text)


def _structure_warnings(text: str) -> list[str]:
    """The first nesting, and stray text: before the first opening tag or else between, and after.

    A tag that stands where only text could be counts as text.
    """
    pieces = _TAG.split(text)  # the text before the first tag, then slash, name and text for each
    texts, slashes, names = pieces[::3], pieces[1::3], pieces[2::3]
    warnings = []
    inside = ''
    for slash, name in zip(slashes, names):
        if slash:
            inside = '' if inside == name else inside
        elif inside:
            warnings.append(f'<{name}> nested inside unclosed <{inside}>')
            break
        else:
            inside = name
    opens = [i for i, slash in enumerate(slashes) if not slash]
    if opens and (opens[0] > 0 or texts[0].strip()):
        warnings.append('Text detected before first XML tag')
    elif any(
        i > 0 and slashes[i - 1] and (texts[i].strip() or (i > 1 and slashes[i - 2])) for i in opens
    ):
        warnings.append('Text detected between XML tags')
    if '/' in slashes and (not slashes[-1] or texts[-1].strip()):
        warnings.append('Text detected after final XML tag')
    return warnings
