"""A conversation's budgets, thinking and prompts (docs/protocol.md), its seeds and its config."""

import itertools
import json
import subprocess
import sys

import pytest

from echo_jax.agent.encoding import Span
from echo_jax.agent.protocol import Protocol, turn_seed
from echo_jax.types import Role
from tests.support.conversations import generation, observation

# --- budgets --------------------------------------------------------------------------------------


@pytest.mark.parametrize('room', [*range(0, 34), 40, 60, 100, 1000])
def test_an_observation_is_cut_to_the_budget_or_dropped(tokenizer, protocol_config, room):
    protocol = Protocol(tokenizer, protocol_config)
    conversation = protocol.start('x')
    conversation.append_turn(generation(tokenizer, 'y'))
    start = len(conversation.tokens)
    protocol.config.max_total_tokens = start + room
    spans = observation('a) \n' * 50, ['w'])
    whole = len(protocol.encoder.encode_framed(protocol.encoder.observation_frame, spans).ids)
    appended = conversation.append_observation(spans)
    if not appended:
        assert len(conversation.tokens) == start and room < 34
        return
    assert len(conversation.tokens) <= start + room
    text = tokenizer.decode(conversation.tokens[start:])
    shown = text.split('<tool_response>\n')[1].split('\n</tool_response>')[0]
    full = ''.join(span.text for span in spans)
    assert full.startswith(shown) and shown == shown.strip() and shown
    assert (shown == full) == (whole + len(protocol.turn_end_ids) <= room)
    # No room is wasted: at most the joins at the cut and its white space.
    assert shown == full or start + room - len(conversation.tokens) <= 3


# --- thinking -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('sampled', 'kept'),
    [
        ('thought\n</think>\n\ncall', '</think>\n\ncall'),
        ('a</think>b<think>c</think>d', '</think>bd'),
        ('<think>a</think>b', '</think>b'),
        ('a</think>b<think>c', '</think>b<think>c'),  # never closed: it was parsed, so it stays
        ('never closed', 'never closed'),
        ('a</think>b</think>c', '</think>b</think>c'),
    ],
)
def test_stripped_thinking(tokenizer, protocol_config, sampled, kept):
    sampled, kept = sampled + '<|im_end|>', kept + '<|im_end|>'
    results = {}
    for mode in ('keep_all', 'strip_rollout', 'strip_all'):
        protocol_config.thinking = mode
        conversation = Protocol(tokenizer, protocol_config).start('x')
        start = len(conversation.tokens)
        conversation.append_turn(generation(tokenizer, sampled))
        conversation.append_observation([Span(Role.OUTPUT, 'out')])
        results[mode] = [
            tokenizer.decode(ids[start:]).split('\n<|im_start|>')[0]
            for ids in (conversation.tokens, conversation.context)
        ]
        sampled_by_policy = [role == Role.ACTION for role in conversation.roles]
        actions = list(itertools.compress(conversation.logprobs, sampled_by_policy))
        assert len(actions) == len(tokenizer.encode(results[mode][0]))
        assert 0 not in actions and actions == sorted(actions, reverse=True)
    assert results['keep_all'] == [sampled, sampled]
    assert results['strip_rollout'] == [sampled, kept]
    assert results['strip_all'] == [kept, kept]


# --- prompts, seeds, config -----------------------------------------------------------------------


def test_the_full_prompt_has_its_parts(tiny_tokenizer, protocol_config):
    protocol_config.system_prompt = 'full'
    protocol = Protocol(tiny_tokenizer, protocol_config)
    text = tiny_tokenizer.decode(protocol.prompt_ids('Count the files.'))
    system, user = text.split('<|im_end|>\n<|im_start|>user\n')
    assert system.startswith('<|im_start|>system\n# Tools\n')
    schemas = system.split('<tools>\n')[1].split('\n</tools>')[0].split('\n')
    bash, done = (json.loads(schema)['function'] for schema in schemas)
    assert bash['name'] == 'bash' and bash['parameters']['required'] == ['command']
    assert bash['parameters']['properties']['timeout']['type'] == 'integer'
    assert done['name'] == 'done' and done['parameters']['properties'] == {}
    assert system.index('</tools>') < system.index('<tool_call>') < system.index('<IMPORTANT>')
    assert '\n\nTask: Count the files.<|im_end|>\n' in user
    assert user.endswith('<|im_start|>assistant\n<think>\n')


def test_the_brief_prompt_is_brief(qwen_tokenizer, protocol_config):
    text = qwen_tokenizer.decode(Protocol(qwen_tokenizer, protocol_config).prompt_ids(''))
    for tag in ('<|im_start|>', '<|im_end|>', '<think>'):
        text = text.replace(tag, ' ')
    assert len(text.split()) < 20


def test_seeds_are_stable_and_apart():
    code = 'from echo_jax.agent.protocol import turn_seed; print(turn_seed(1, 2, 3, 4))'
    other = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert int(other.stdout.splitlines()[-1]) == turn_seed(1, 2, 3, 4)
    seeds = {turn_seed(*key) for key in itertools.product(range(9), repeat=4)}
    assert len(seeds) == 9**4
    assert all(0 <= seed < 2**63 for seed in seeds) and max(seeds) > 2**62


@pytest.mark.parametrize(
    ('key', 'value'),
    [
        ('dialect', 'hermes'),
        ('system_prompt', 'long'),
        ('thinking', 'none'),
        ('truncation', 'middle'),
        ('command_selection', 'best'),
        ('max_commands_per_turn', 0),
    ],
)
def test_unknown_choices_are_errors(tiny_tokenizer, protocol_config, key, value):
    protocol_config[key] = value
    with pytest.raises(ValueError, match=f'protocol.{key}'):
        Protocol(tiny_tokenizer, protocol_config)
