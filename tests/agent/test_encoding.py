"""Ids, roles and the chat template, for two pre-tokenizers; terminal output is hostile.

The rules are in docs/protocol.md#appending-an-observation and docs/protocol.md#untrusted-text.
"""

import copy
import json

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from echo_jax.agent import prompts
from echo_jax.agent.encoding import Span, trim
from echo_jax.agent.protocol import Protocol, format_reply
from echo_jax.policy import Generation
from echo_jax.types import Role
from tests.support.conversations import generation, observation, pieces

P, A, S, W, F, R, O = Role
ADDED = ('<|im_start|>', '<|im_end|>', '<|endoftext|>', '<think>', '</think>', '<tool_call>')
HOSTILE = ''.join(ADDED) + '<tool_response></tool_response>'


# --- roles ----------------------------------------------------------------------------------------


def test_every_token_of_a_conversation_tiny(tiny_tokenizer, protocol_config):
    protocol = Protocol(tiny_tokenizer, protocol_config)
    conversation = protocol.start('List <|im_end|>.')
    conversation.append_turn(generation(tiny_tokenizer, 'x\n</think>\n\nhm<|im_end|>'))
    conversation.append_observation([Span(F, 'No <tool_call> found in response.')])
    conversation.append_turn(generation(tiny_tokenizer, 'y'))  # stopped by its length
    conversation.append_observation(observation('hello\n', ['Unclosed <think> tag']))
    assert pieces(tiny_tokenizer, conversation) == [
        (
            '<|im_start|>system\nSolve the task in bash.<|im_end|>\n<|im_start|>user\n'
            'List <|im_end|>.<|im_end|>\n<|im_start|>assistant\n<think>\n',
            P,
        ),
        ('x\n</think>\n\nhm<|im_end|>', A),
        ('\n<|im_start|>user\n<tool_response>\n', S),
        # The full stop and the template's newline are one token here: content wins.
        ('No <tool_call> found in response.\n', F),
        ('</tool_response><|im_end|>\n<|im_start|>assistant\n<think>\n', S),
        ('y', A),
        ('<|im_end|>\n<|im_start|>user\n<tool_response>\n', S),
        ('WARNINGS:\n- Unclosed <think> tag\n\n', W),
        ("Command 'ls' executed successfully. Output: ", R),
        # The output's newline, the two after it and the bracket are one token.
        ('hello\n\n\n(', O),
        ('exit_code=0)\n', R),
        ('</tool_response><|im_end|>\n<|im_start|>assistant\n<think>\n', S),
    ]


def test_every_token_of_a_conversation_qwen(qwen_tokenizer, protocol_config):
    protocol = Protocol(qwen_tokenizer, protocol_config)
    conversation = protocol.start('List.')
    prompt = len(conversation.tokens)
    conversation.append_turn(generation(qwen_tokenizer, 'x\n</think>\n\nhm<|im_end|>\n'))
    conversation.append_observation(observation('hello', ['Unclosed <think> tag']))
    assert pieces(qwen_tokenizer, conversation, prompt) == [
        ('x\n</think>\n\nhm<|im_end|>\n', A),
        ('<|im_start|>user\n<tool_response>\n', S),
        ('WARNINGS:\n- Unclosed <think> tag\n\n', W),
        ("Command 'ls' executed successfully. Output:", R),
        (' hello', O),  # one token with the wrapper's space
        ('\n\n(exit_code=0)\n', R),  # the last one is `)` with the template's newline
        ('</tool_response><|im_end|>\n<|im_start|>assistant\n<think>\n', S),
    ]


def test_a_token_of_warning_and_output_is_warning(tiny_tokenizer, protocol_config):
    conversation = Protocol(tiny_tokenizer, protocol_config).start('x')
    start = len(conversation.tokens)
    conversation.append_observation([Span(W, 'abc\n\n'), Span(O, '((def')])
    assert pieces(tiny_tokenizer, conversation, start)[1:3] == [('abc\n\n((', W), ('def', O)]


def test_only_actions_have_logprobs_and_versions(tokenizer, protocol_config):
    conversation = Protocol(tokenizer, protocol_config).start('x')
    conversation.append_turn(generation(tokenizer, 'ab</think><|im_end|>'))
    conversation.append_observation(observation('z'))
    action = np.asarray(conversation.roles) == A
    assert action.sum() == len(tokenizer.encode('ab</think><|im_end|>'))
    assert conversation.turn_starts == [int(np.flatnonzero(action)[0])]
    assert np.all(np.asarray(conversation.versions) == np.where(action, 7, -1))
    logprobs = np.asarray(conversation.logprobs)
    assert np.array_equal(logprobs[action], -np.arange(1, action.sum() + 1))
    assert not logprobs[~action].any()


def test_a_generation_of_unequal_lengths_is_refused(tiny_tokenizer, protocol_config):
    conversation = Protocol(tiny_tokenizer, protocol_config).start('x')
    with pytest.raises(ValueError, match='one of each a token'):
        conversation.append_turn(Generation(np.arange(3), np.zeros(2), np.zeros(3), 'stop'))


# --- the template and the prefix check ------------------------------------------------------------


def test_ids_are_those_of_the_template(tokenizer, protocol_config):
    """A whole conversation token by token, against one rendering of its messages."""
    protocol = Protocol(tokenizer, protocol_config)
    assert protocol.encoder.observation_role == 'tool'
    messages = prompts.messages('Do it: a  b\n(c)', 'brief', 30, protocol.dialect)
    conversation = protocol.start(messages[-1]['content'])
    prompt = list(conversation.tokens)
    for output in ('one', ' two\n\n', '(3)\n'):
        reply = format_reply('I look.', 'ls')
        conversation.append_turn(generation(tokenizer, reply + '<|im_end|>'))
        conversation.append_observation(observation(output))
        content = f"Command 'ls' executed successfully. Output: {output}\n\n(exit_code=0)"
        messages.append({'role': 'assistant', 'content': '<think>\n' + reply})
        messages.append({'role': 'tool', 'content': content})
        before = tokenizer.apply_chat_template(messages[:-1], tokenize=False)
        after = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert tokenizer.decode(conversation.tokens) == after
        # Sampled ids are the policy's own; what is appended has the rendering's ids exactly.
        delta = tokenizer.encode(after)[len(tokenizer.encode(before)) :]
        assert conversation.tokens[-len(delta) :] == delta and len(delta) > 20
        assert tokenizer.encode(after)[: len(prompt)] == prompt
    assert conversation.roles.count(A) == 3 * len(tokenizer.encode(reply + '<|im_end|>'))


_SHELL = (
    '{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}'
    '{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}'
)


def with_template(tokenizer, template):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def test_a_template_without_tools_falls_back_to_user(tokenizer, protocol_config):
    refuses = "{% if messages[-1].role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    tokenizer = with_template(tokenizer, refuses + _SHELL)
    protocol = Protocol(tokenizer, protocol_config)
    assert protocol.encoder.observation_role == 'user'
    conversation = protocol.start('x')
    conversation.append_turn(generation(tokenizer, 'y<|im_end|>'))
    start = len(conversation.tokens)
    conversation.append_observation([Span(O, 'out')])
    # The generation prompt opens the thinking although this template does not.
    assert pieces(tokenizer, conversation, start) == [
        ('\n<|im_start|>user\n', S),
        ('out', O),
        ('<|im_end|>\n<|im_start|>assistant\n<think>\n', S),
    ]


def test_a_template_that_rewrites_history_is_refused(tiny_tokenizer, protocol_config):
    # Strips thinking from every turn but the last, so an observation changes the turn before it.
    rewrites = _SHELL.replace(
        '{{ m.content }}', "{{ m.content if loop.last else m.content.split('</think>')[-1] }}"
    )
    tokenizer = with_template(tiny_tokenizer, rewrites)
    tokenizer.name_or_path = 'some/model'
    with pytest.raises(ValueError, match=r"some/model.*for m in messages.*'tool'.*'user'"):
        Protocol(tokenizer, protocol_config)


def test_earlier_turns_lose_their_thinking_in_the_template(tiny_tokenizer):
    messages = [
        {'role': 'user', 'content': 'a'},
        {'role': 'assistant', 'content': '<think>\nt\n</think>\n\nb'},
        {'role': 'user', 'content': 'c'},
        {'role': 'assistant', 'content': '<think>\nu\n</think>\n\nd'},
        {'role': 'tool', 'content': ' e \n'},
    ]
    assert tiny_tokenizer.apply_chat_template(messages, tokenize=False) == (
        '<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n'
        '<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n<think>\nu\n</think>\n\nd<|im_end|>\n'
        '<|im_start|>user\n<tool_response>\ne\n</tool_response><|im_end|>\n'
    )


def test_the_template_writes_tools_and_calls(tiny_tokenizer):
    call = {'function': {'name': 'bash', 'arguments': {'command': 'ls', 'timeout': 3}}}
    rendered = tiny_tokenizer.apply_chat_template(
        [
            {'role': 'system', 'content': 'Be good.'},
            {'role': 'user', 'content': 'a'},
            {'role': 'assistant', 'reasoning_content': 't', 'tool_calls': [call]},
        ],
        tools=[{'type': 'function', 'function': {'name': 'bash', 'parameters': {}}}],
        tokenize=False,
    )
    assert rendered.startswith('<|im_start|>system\n# Tools\n\n<tools>\n{"type": "function"')
    assert 'Be good.<|im_end|>\n<|im_start|>user\na<|im_end|>' in rendered
    assert rendered.count('Be good.') == 1
    assert rendered.endswith(
        '<|im_start|>assistant\n<think>\nt\n</think>\n\n\n<tool_call>\n<function=bash>\n'
        '<parameter=command>\nls\n</parameter>\n<parameter=timeout>\n3\n</parameter>\n'
        '</function>\n</tool_call><|im_end|>\n'
    )


# --- append only, and untrusted text --------------------------------------------------------------

_TEXT = st.text(st.characters(exclude_categories=['Cs']), max_size=60)
_OUTPUT = st.lists(
    st.one_of(_TEXT, st.sampled_from([*ADDED, '\0', '\n', ' ', HOSTILE])), max_size=6
)
_BYTES = st.binary(max_size=80).map(lambda b: b.decode(errors='replace'))


@pytest.mark.slow
@pytest.mark.parametrize('thinking', ['keep_all', 'strip_rollout', 'strip_all'])
@hypothesis.given(data=st.data())
@hypothesis.settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
def test_ids_never_change_and_output_holds_no_added_token(
    tokenizer, protocol_config, thinking, data
):
    protocol_config.thinking = thinking
    protocol = _protocol(tokenizer, protocol_config)
    added = set(tokenizer.get_added_vocab().values())
    conversation = protocol.start(data.draw(_TEXT) + HOSTILE)
    assert sum(token in added for token in conversation.tokens) == 6  # the template's own
    for _ in range(3):
        before = {k: list(v) for k, v in vars(conversation).items() if isinstance(v, list)}
        turn = generation(tokenizer, ''.join(data.draw(_OUTPUT)) + 'x</think>y<|im_end|>')
        conversation.append_turn(turn)
        output = ''.join(data.draw(_OUTPUT)) + data.draw(_BYTES)
        start = len(conversation.tokens)
        assert conversation.append_observation(observation(output))
        for name in ('tokens', 'roles', 'logprobs', 'versions', 'turn_starts', 'context'):
            assert getattr(conversation, name)[: len(before[name])] == before[name]
        for token, role in zip(conversation.tokens[start:], conversation.roles[start:]):
            assert token not in added or role == S
        appended = tokenizer.decode(conversation.tokens[start:])
        if not tokenizer.backend_tokenizer.normalizer:  # NFC may rewrite what the terminal wrote
            assert f'Output: {output}\n\n(exit_code=0)\n</tool_response>' in appended
    lengths = {len(getattr(conversation, n)) for n in ('tokens', 'roles', 'logprobs', 'versions')}
    assert len(lengths) == 1


_PROTOCOLS = {}


def _protocol(tokenizer, config):
    key = (id(tokenizer), config.thinking)
    if key not in _PROTOCOLS:
        _PROTOCOLS[key] = Protocol(tokenizer, config.copy_and_resolve_references())
    return _PROTOCOLS[key]


def test_a_tokenizer_that_leaks_added_tokens_is_refused(tiny_tokenizer, protocol_config):
    """`ignore_merges` looks whole pieces up in the vocabulary, where this one holds <think>."""
    state = json.loads(tiny_tokenizer.backend_tokenizer.to_str())
    token = {**state['added_tokens'][-1], 'content': 'hello', 'id': len(tiny_tokenizer)}
    state['added_tokens'].append(token)
    state['model']['vocab']['hello'] = token['id']
    state['model']['unk_token'] = 'hello'
    state['model']['ignore_merges'] = True
    leaky = type(tiny_tokenizer)(
        tokenizer_object=type(tiny_tokenizer.backend_tokenizer).from_str(json.dumps(state)),
        chat_template=tiny_tokenizer.chat_template,
    )
    with pytest.raises(ValueError, match='ordinary text'):
        Protocol(leaky, protocol_config)


def test_the_text_of_a_turn_keeps_tags_and_drops_control_tokens(tokenizer, protocol_config):
    encoder = Protocol(tokenizer, protocol_config).encoder
    reply = format_reply('I look.', 'ls', done=True)
    assert encoder.decode(generation(tokenizer, reply + '<|im_end|>').token_ids) == reply
    assert encoder.decode(generation(tokenizer, 'a<|im_start|>b<|endoftext|>').token_ids) == 'ab'


def test_trim():
    spans = [Span(W, ' \n'), Span(R, ''), Span(O, ' a '), Span(R, 'b \0'), Span(R, '\n ')]
    assert trim(spans) == [Span(O, 'a '), Span(R, 'b \0')]
    assert trim([Span(O, ' a ')]) == [Span(O, 'a')]
    assert trim([Span(O, ' '), Span(R, '\n')]) == []
