"""Reads what the policy wrote: calls (PROTOCOL 7.4, 8) and format warnings (PROTOCOL 9).

Runs nothing and knows no tokenizer. The text is hostile and up to megabytes long, so every scan is
linear: no lazy regular expression that restarts at each opening tag.
"""

import dataclasses
import re

THINK_OPEN = '<think>\n'  # the generation prompt ends with it; the policy never samples it
TAGS = ('think', 'tool_call')

_TAG = re.compile(r'<(/?)(think|tool_call)>')
_EMPTY = {tag: re.compile(rf'<{tag}>\s*</{tag}>') for tag in TAGS}
_FUNCTION = re.compile(r'<function=([\w.-]+)>')
_PARAMETER = re.compile(r'<parameter=(\w+)>')


@dataclasses.dataclass(frozen=True)
class Command:
    """One call that is not `done`. A call with an error still counts as a command."""

    name: str  # the function's name, '' where the tag is missing
    arguments: dict[str, str]  # stripped values by parameter name
    error: str = ''  # why it cannot be run, '' where it can
    raw: str = ''  # the call between its tags, stripped


@dataclasses.dataclass(frozen=True)
class ParsedResponse:
    commands: list[Command]
    is_done: bool = False
    error: str = ''  # of the whole response; there are no commands then


def strip_thinking(text: str) -> str:
    """Takes closed think blocks out, then an unclosed one to the end (PROTOCOL 7.4)."""
    kept, at = [], 0
    while (start := text.find('<think>', at)) >= 0:
        kept.append(text[at:start])
        end = text.find('</think>', start)
        if end < 0:
            at = len(text)
            break
        at = end + len('</think>')
    kept.append(text[at:])
    # Taking a block out can join a new opening tag; like any other it now runs to the end.
    return ''.join(kept).partition('<think>')[0].strip()


def text_after_thinking(text: str) -> str:
    """What follows the last `</think>` ('' where there is none): `parse_after_think=True`."""
    return text.rpartition('</think>')[2].strip() if '</think>' in text else ''


def parse_response(text: str) -> ParsedResponse:
    """Reads the calls of one response whose thinking has been stripped (PROTOCOL 8).

    PROTOCOL's third whole-response error, `No valid tool calls or done signal found.`, cannot
    arise in this dialect: every call is a command, be it a broken one, or done.
    """
    if not text:
        return ParsedResponse([], error='Empty response')
    calls = _calls(text)
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
            arguments = _parameters(call)
            error = '' if arguments else 'No parameters found'
            commands.append(Command(function[1], arguments, error, call.strip()))
    return ParsedResponse(commands, is_done)


def _calls(text: str) -> list[str]:
    """What stands between each `<tool_call>` and the next `</tool_call>` or the end."""
    calls, at = [], 0
    while (start := text.find('<tool_call>', at)) >= 0:
        start += len('<tool_call>')
        end = text.find('</tool_call>', start)
        if end < 0:
            return [*calls, text[start:]]
        calls.append(text[start:end])
        at = end + len('</tool_call>')
    return calls


def _parameters(call: str) -> dict[str, str]:
    """Stripped values by name; of two with one name the later counts."""
    parameters, at = {}, 0
    while (opening := _PARAMETER.search(call, at)) is not None:
        end = call.find('</parameter>', opening.end())
        if end < 0:
            break
        parameters[opening[1]] = call[opening.end() : end].strip()
        at = end + len('</parameter>')
    return parameters


def format_warnings(text: str, opening: str = THINK_OPEN) -> list[str]:
    """Warnings on one response as it was sampled, exact and in the order of PROTOCOL 9.

    `opening` is the part of the response that the generation prompt already holds; it is put
    before the text, so with the dialect's own a think block is never missing.
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
    for tag in TAGS:
        if text.count(f'<{tag}>') > text.count(f'</{tag}>'):
            warnings.append(f'Unclosed <{tag}> tag')
        if _EMPTY[tag].search(text):
            warnings.append(f'Empty <{tag}> block')
    tags = list(_TAG.finditer(text))
    return warnings + _nesting_warning(tags) + _stray_text_warnings(text, tags)


def _nesting_warning(tags: list[re.Match]) -> list[str]:
    """The first opening tag inside a tag that is still open."""
    inside = None
    for tag in tags:
        slash, name = tag.groups()
        if slash:
            inside = None if inside == name else inside
        elif inside is not None:
            return [f'<{name}> nested inside unclosed <{inside}>']
        else:
            inside = name
    return []


def _stray_text_warnings(text: str, tags: list[re.Match]) -> list[str]:
    """Text before the first opening tag, or else between tags; and after the last closing one."""
    warnings = []
    opens = [tag for tag in tags if not tag[1]]
    closes = [tag for tag in tags if tag[1]]
    if opens and text[: opens[0].start()].strip():
        warnings.append('Text detected before first XML tag')
    elif _has_text_between(text, tags):
        warnings.append('Text detected between XML tags')
    if closes and text[closes[-1].end() :].strip():
        warnings.append('Text detected after final XML tag')
    return warnings


def _has_text_between(text: str, tags: list[re.Match]) -> bool:
    """Anything but space from a closing tag to the next opening one; a second close is text too."""
    closed_at = None
    for tag in tags:
        if tag[1]:
            closed_at = tag.end() if closed_at is None else closed_at
        elif closed_at is not None:
            if text[closed_at : tag.start()].strip():
                return True
            closed_at = None
    return False
