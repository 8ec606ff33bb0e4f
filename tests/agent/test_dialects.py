"""protocol.dialect selects how calls are written: a second dialect, from prompt to reward."""

import pytest

from echo_jax.agent.dialects import DIALECTS
from echo_jax.agent.protocol import Protocol, format_reply
from echo_jax.agent.tokenizer import training_texts
from echo_jax.types import Role, Status
from tests.support import json_dialect
from tests.support.episodes import bash


@pytest.fixture
def json_config(monkeypatch, protocol_config):
    monkeypatch.setitem(DIALECTS, 'json', json_dialect)
    protocol_config.dialect = 'json'
    return protocol_config


def reply(*parts, **options):
    return format_reply(*parts, dialect=json_dialect, **options)


def test_an_episode_in_a_second_dialect(json_config, make_task, episodes):
    assert reply('I act.', 'echo 42') == (
        'I act.\n</think>\n\n<tool_call>{"name": "bash", "arguments": {"command": "echo 42"}}'
        '</tool_call>'
    )
    rollout = episodes.run(
        make_task(),
        [
            reply('I act.', 'echo 42 > /app/answer.txt; cat /app/answer.txt'),
            'no call',
            '</think><tool_call>{</tool_call>',
            bash('echo 43 > /app/answer.txt'),  # the other dialect's call is none here
            reply('Finished.', done=True),
        ],
    )
    assert (rollout.reward, rollout.status) == (1.0, Status.OK)
    assert rollout.metrics['commands'] == 1 and rollout.metrics['stop/done'] == 1
    shown = episodes.observations(rollout)
    assert shown[0].endswith('executed successfully. Output: 42\n\n\n(exit_code=0)')
    assert shown[1:3] == [
        'Call a tool.',
        "Command '{' skipped due to parse error: The call is not JSON",
    ]
    assert shown[3].startswith("Command '<function=bash>")
    assert 'Call a tool.' in episodes.words(rollout, Role.FEEDBACK)


def test_a_turn_without_a_call_that_is_no_error_is_told_so(json_config, make_task, episodes):
    rollout = episodes.run(
        make_task(), ['I wait.<tool_call> </tool_call>', reply('Finished.', done=True)]
    )
    assert episodes.observations(rollout) == [
        'WARNINGS:\n- Think first\n\n'
        'No commands provided. Please provide commands to execute or set done.'
    ]
    assert episodes.words(rollout, Role.FEEDBACK).startswith('No commands provided. Please')
    assert rollout.metrics['parse_errors'] == rollout.metrics['commands'] == 0


def test_the_same_replies_are_no_calls_in_the_released_dialect(make_task, episodes):
    rollout = episodes.run(
        make_task(), [reply('I act.', 'echo 42'), format_reply('Finished.', done=True)]
    )
    (shown,) = episodes.observations(rollout)
    assert shown.endswith('skipped due to parse error: Missing <function=...> tag')


def test_prompt_warnings_and_the_tokenizers_texts_are_the_dialects(
    json_config, tiny_tokenizer, make_task
):
    json_config.system_prompt = 'full'
    protocol = Protocol(tiny_tokenizer, json_config)
    prompt = tiny_tokenizer.decode(protocol.prompt_ids('Count.'))
    assert prompt.startswith('<|im_start|>system\nTools: [{"type": "function"')
    assert '<function' not in prompt and 'Think first inside <think></think>' in prompt
    ids = tiny_tokenizer.encode('no thinking', add_special_tokens=False)
    assert protocol.read_turn(ids)[1] == ['Think first']
    texts = '\n'.join(training_texts([make_task()], 'brief', json_dialect))
    assert '{"name": "bash"' in texts and '<function' not in texts
