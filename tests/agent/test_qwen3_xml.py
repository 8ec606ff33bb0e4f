"""The released dialect (docs/protocol.md#parser, docs/protocol.md#warnings), text by text."""

import time

import pytest

from echo_jax.agent.dialects.qwen3_xml import (
    Command,
    format_warnings,
    parse_response,
    strip_thinking,
    text_after_thinking,
)
from echo_jax.agent.protocol import format_reply

CALL = (
    '<tool_call>\n<function=bash>\n<parameter=command>\nls -l\n</parameter>\n</function>\n'
    '</tool_call>'
)
DONE = '<tool_call>\n<function=done>\n</function>\n</tool_call>'
CLEAN = 'I look.\n</think>\n\n' + CALL


def commands(text):
    return [(c.name, c.arguments, c.error) for c in parse_response(text).commands]


def call(inner):
    return f'<tool_call>{inner}</tool_call>'


# --- parser -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('text', 'error'),
    [
        ('', 'Empty response'),
        ('I am done.', 'No <tool_call> found in response.'),
        ('<function=bash><parameter=command>ls</parameter>', 'No <tool_call> found in response.'),
        ('</tool_call>', 'No <tool_call> found in response.'),
        ('<TOOL_CALL><function=bash></TOOL_CALL>', 'No <tool_call> found in response.'),
    ],
)
def test_whole_response_errors(text, error):
    parsed = parse_response(text)
    assert (parsed.error, parsed.commands, parsed.is_done) == (error, [], False)


@pytest.mark.parametrize(
    ('inner', 'expected'),
    [
        ('', ('', {}, 'Missing <function=...> tag')),
        ('ls', ('', {}, 'Missing <function=...> tag')),
        ('<function=>', ('', {}, 'Missing <function=...> tag')),
        ('<function=ba sh>', ('', {}, 'Missing <function=...> tag')),
        ('<function=bash>', ('bash', {}, 'No parameters found')),
        ('<function=bash><parameter=command>ls', ('bash', {}, 'No parameters found')),
        (
            '<function=bash><parameter=a-b>ls</parameter>',
            ('bash', {}, 'No parameters found'),
        ),
        (
            '<function=my.tool-2><parameter=x>1</parameter>',
            ('my.tool-2', {'x': '1'}, ''),
        ),
        (
            '<function=bash><parameter=command>\n\n  a \n b\t\n\n</parameter>',
            ('bash', {'command': 'a \n b'}, ''),
        ),
        ('<function=bash><parameter=command></parameter>', ('bash', {'command': ''}, '')),
        (
            '<function=bash><parameter=command>a</parameter><parameter=command>b</parameter>',
            ('bash', {'command': 'b'}, ''),
        ),
        (  # an opening inside a value is part of the value
            '<function=bash><parameter=command>a<parameter=x>b</parameter></parameter>',
            ('bash', {'command': 'a<parameter=x>b'}, ''),
        ),
        (  # the first function counts, and takes all parameters
            '<function=bash><function=done><parameter=command>x</parameter>',
            ('bash', {'command': 'x'}, ''),
        ),
        (  # a parameter before its function is still found
            '<parameter=command>x</parameter><function=bash>',
            ('bash', {'command': 'x'}, ''),
        ),
        (
            '\r\n<function=bash>\r\n<parameter=command>\r\nls\r\n</parameter>\r\n',
            ('bash', {'command': 'ls'}, ''),
        ),
    ],
)
def test_one_call(inner, expected):
    assert commands(call(inner)) == [expected]


def test_call_ends_with_the_text():
    text = '<tool_call>\n<function=bash>\n<parameter=command>\nls\n</parameter>\n'
    assert parse_response(text).commands == [
        Command(
            'bash',
            {'command': 'ls'},
            '',
            '<function=bash>\n<parameter=command>\nls\n</parameter>',
        )
    ]


def test_nested_opening_belongs_to_the_outer_call():
    inner = '<function=bash><parameter=command>echo <tool_call> x</parameter>'
    assert commands(call(inner) + 'tail </tool_call>') == [
        ('bash', {'command': 'echo <tool_call> x'}, '')
    ]


def test_several_calls_and_done_anywhere():
    parsed = parse_response(DONE + CALL + 'text' + call('<function=python>') + call('x'))
    assert parsed.is_done
    assert [c.name for c in parsed.commands] == ['bash', 'python', '']
    assert [c.error for c in parsed.commands] == [
        '',
        'No parameters found',
        'Missing <function=...> tag',
    ]


@pytest.mark.parametrize('inner', ['<function=done>', '<function=done><parameter=x>1</parameter>'])
def test_done_needs_no_parameters(inner):
    parsed = parse_response(call(inner))
    assert parsed.is_done and parsed.commands == [] and parsed.error == ''


# --- thinking -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('text', 'stripped'),
    [
        ('a<think>b</think>c', 'ac'),
        ('<think>b</think> c <think>d', 'c'),
        ('thought\n</think>\n\nx', 'thought\n</think>\n\nx'),  # the opening tag is not sampled
        ('<think>a<think>b</think>c</think>d', 'c</think>d'),
        ('<th<think>x</think>ink>y', ''),  # the join opens a block that never closes
        ('a<th<think>x</think>ink>y</think>z', 'a'),
        ('</think><think>', '</think>'),
        (' \n x \n', 'x'),
    ],
)
def test_strip_thinking(text, stripped):
    assert strip_thinking(text) == stripped


def test_call_in_the_thinking_is_executed_but_not_with_parse_after_think():
    text = 'maybe ' + CALL + '\n</think>\n\n' + DONE
    assert [c.name for c in parse_response(strip_thinking(text)).commands] == ['bash']
    parsed = parse_response(text_after_thinking(text))
    assert parsed.commands == [] and parsed.is_done
    assert parse_response(text_after_thinking('no end ' + CALL)).error == 'Empty response'


# --- warnings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('text', 'warnings'),
    [
        ('', []),
        (CLEAN, []),
        (CLEAN.replace('\n', '\r\n'), []),
        ('done\n</think>\n' + CALL + '\n' + DONE, []),
        ('I think', ['Unclosed <think> tag']),
        (
            CALL,
            ['Unclosed <think> tag', '<tool_call> nested inside unclosed <think>'],
        ),
        (
            '\n</think>' + CALL,
            ['Empty <think> block'],
        ),
        (
            '<think>a</think>' + CALL,
            [
                'Found 2 <think> blocks, expected 1',
                'Unclosed <think> tag',
                '<think> nested inside unclosed <think>',
            ],
        ),
        (
            'a</think><tool_call> \n</tool_call>',
            ['Empty <tool_call> block'],
        ),
        (  # the final tag is the final closing tag
            'a</think><tool_call>x',
            ['Unclosed <tool_call> tag', 'Text detected after final XML tag'],
        ),
        (
            'a</think>' + CALL + ' so long',
            ['Text detected after final XML tag'],
        ),
        (
            'a</think>b' + CALL + 'c' + CALL,
            ['Text detected between XML tags'],
        ),
        (  # a second closing tag is text between a close and the next open
            'a</think></think>' + CALL,
            ['Text detected between XML tags'],
        ),
        (  # counts balance, so nothing is unclosed; the nesting is still seen
            'a</think><tool_call><think></tool_call></think>',
            [
                'Found 2 <think> blocks, expected 1',
                '<think> nested inside unclosed <tool_call>',
            ],
        ),
        (  # all of them, in their order
            '</think>x<tool_call></tool_call><think><think><tool_call></tool_call>y',
            [
                'Found 3 <think> blocks, expected 1',
                'Unclosed <think> tag',
                'Empty <think> block',
                'Empty <tool_call> block',
                '<think> nested inside unclosed <think>',
                'Text detected between XML tags',
                'Text detected after final XML tag',
            ],
        ),
    ],
)
def test_warnings(text, warnings):
    assert format_warnings(text) == warnings


def test_warnings_that_need_a_template_without_the_opening():
    assert format_warnings(CALL, opening='') == ['Missing <think> block']
    assert format_warnings('hi <think>a</think>b' + CALL, opening='') == [
        'Text detected before first XML tag'  # and not the text between as well
    ]
    assert format_warnings('', opening='') == []


# --- format_reply -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('command', 'done'),
    [('ls', False), (None, True), ('a\n\nb <tag> & "q"', True), ('echo é\x00日', False)],
)
def test_format_reply_reads_back(command, done):
    reply = format_reply('Ich denke.', command, done)
    parsed = parse_response(strip_thinking(reply))
    assert format_warnings(reply) == []
    assert [c.arguments for c in parsed.commands] == ([{'command': command}] if command else [])
    assert parsed.is_done == done


@pytest.mark.parametrize(
    ('thought', 'command', 'done'),
    [
        ('', 'ls', False),
        ('hm', None, False),
        ('hm <think>', 'ls', False),
        ('hm', ' ls', False),
        ('hm', 'cat <<< "</parameter>"', False),
        ('hm', 'echo "<think>x</think>"', False),
        (CALL, 'ls', False),
    ],
)
def test_format_reply_refuses_what_would_not_read_back(thought, command, done):
    with pytest.raises(ValueError, match='clean turn'):
        format_reply(thought, command, done)


# --- hostile input ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'unit',
    [
        '<think>',
        '</think>',
        '<tool_call>',
        '<tool_call></tool_call>',
        '</think><think>',
        '</tool_call>x',
        '<parameter=a>',
        '<function=a',
        '<tool_call><function=a><parameter=b>',
        '<think> \n',
        '<parameter=',
        ' ',
        '\r\n',
    ],
)
def test_a_megabyte_takes_linear_time(unit):
    text = '<tool_call><function=bash>' + unit * (1_000_000 // len(unit))
    started = time.process_time()
    parse_response(strip_thinking(text))
    parse_response(text)
    format_warnings(text)
    assert time.process_time() - started < 3  # quadratic would take hours
