"""Whole episodes in real sandboxes: turns (docs/protocol.md#a-turn) and budgets."""

import dataclasses
import time

import numpy as np
import pytest

from echo_jax.agent.protocol import format_reply
from echo_jax.types import Role, Status
from tests.support.episodes import CHECK, DONE, assert_valid, bash


def test_an_episode_that_solves_its_task(make_task, episodes):
    rollout = episodes.run(
        make_task(),
        [
            bash('cd /tmp; x=42; pwd'),
            bash('echo "$x in $PWD"; ls /tests /solution; echo oops >&2'),
            bash('echo $x > /app/answer.txt; cat /app/answer.txt'),
            DONE,
        ],
    )
    assert_valid(rollout)
    assert (rollout.reward, rollout.status) == (1.0, Status.OK)
    assert (rollout.task_id, rollout.group_id, rollout.sample_id) == ('answer', 3, 1)
    first, second, third = episodes.observations(rollout)
    assert first == (
        "Command 'cd /tmp; x=42; pwd' executed successfully. Output: /tmp\n\n\n(exit_code=0)"
    )
    # Variables and the directory last; the tests and the solution are not there.
    assert 'Output: 42 in /tmp\n' in second and second.endswith('oops\n\n\n(exit_code=0)')
    assert "cannot access '/tests'" in second or 'No such file' in second
    assert third.endswith('Output: 42\n\n\n(exit_code=0)')
    metrics = rollout.metrics
    assert (metrics['turns'], metrics['commands'], metrics['parse_errors']) == (4, 3, 0)
    assert (metrics['warnings'], metrics['correct'], metrics['stop/done']) == (0, 1, 1)
    for name in ('seconds_sampling', 'seconds_executing', 'seconds_verifying'):
        assert 0 < metrics[name] < 30
    assert len(rollout.turn_starts) == 4
    # The last turn closes the rollout: its sampled end, and nothing that the harness added.
    assert episodes.tokenizer.decode(rollout.tokens[-1:]) == '<|im_end|>'
    assert rollout.roles[-1] == Role.ACTION


def test_a_rollout_says_whether_its_task_is_environment_only(make_task, episodes):
    task = make_task()
    assert episodes.run(task, [DONE]).environment_only is False
    marked = dataclasses.replace(task, environment_only=True)
    rollout = episodes.run(marked, [DONE])
    assert rollout.environment_only is True
    assert 'environment_only' not in rollout.metrics  # metrics are for people; nothing reads them


def test_what_the_policy_is_asked_with(make_task, episodes):
    episodes.config.thinking = 'strip_rollout'
    episodes.config.max_total_tokens = 1000
    rollout = episodes.run(make_task(), [bash('echo hi'), DONE])
    (first, one), (second, two) = episodes.policy.calls
    assert one['temperature'] == 0.8 and one['max_tokens'] == 1000 - len(first)
    assert one['seed'] != two['seed']
    decode = episodes.tokenizer.decode
    assert decode(second).startswith(decode(first) + '</think>\n\n<tool_call>')  # no `I act.`
    assert 'I act.' in decode(rollout.tokens)
    assert len(second) < rollout.turn_starts[1]  # shorter than the rollout, which keeps all
    assert [episodes.tokenizer.convert_ids_to_tokens(i) for i in one['stop_token_ids']] == [
        '<|im_end|>',
        '<|endoftext|>',
    ]


def test_done_runs_the_command_before_it_and_shows_nothing(make_task, episodes):
    reply = format_reply('I act.', 'echo 42 > /app/answer.txt; echo shown', done=True)
    rollout = episodes.run(make_task(), [reply])
    assert (rollout.reward, rollout.status) == (1.0, Status.OK)
    assert not np.isin(rollout.roles, (Role.OUTPUT, Role.WRAPPER, Role.SCAFFOLD)).any()
    assert (rollout.metrics['turns'], rollout.metrics['commands']) == (1, 1)


def test_parse_after_think(make_task, episodes):
    thinking_call = bash('echo 1').partition('\n</think>\n\n')[2]
    reply = f'maybe {thinking_call}\n</think>\n\n' + DONE.partition('</think>\n\n')[2]
    assert episodes.run(make_task(), [reply]).metrics['commands'] == 1
    episodes.config.parse_after_think = True
    assert episodes.run(make_task(), [reply]).metrics['commands'] == 0


def test_the_length_penalty_is_off_unless_asked(make_task, episodes):
    script = [bash('echo 42 > /app/answer.txt'), DONE]
    assert episodes.run(make_task(), script).reward == 1.0
    episodes.config.update(length_penalty_coef=0.5, length_penalty_start=10)
    rollout = episodes.run(make_task(), script)
    after_prompt = np.sum(rollout.roles != Role.PROMPT)
    assert rollout.reward == pytest.approx(1 - 0.5 * (after_prompt - 10) / 1000)
    assert rollout.reward < 1 and rollout.metrics['correct'] == 1


# --- budgets ------------------------------------------------------------------------------------


def test_max_turns_appends_the_last_observation(make_task, episodes):
    episodes.config.max_turns = 2
    rollout = episodes.run(make_task(), [bash('echo 42 > /app/answer.txt')] * 2)
    assert (rollout.reward, rollout.status) == (1.0, Status.TRUNCATED)  # still verified
    assert rollout.metrics['stop/max_turns'] == 1 and rollout.metrics['turns'] == 2
    assert len(episodes.observations(rollout)) == 2


def test_max_context_tokens(make_task, episodes):
    whole = episodes.run(make_task(), [bash('seq 50'), DONE])
    episodes.config.max_context_tokens = int(whole.turn_starts[1])  # reached exactly
    rollout = episodes.run(make_task(), [bash('seq 50'), DONE])
    assert rollout.metrics['stop/max_context_tokens'] == 1
    assert (rollout.status, rollout.metrics['turns']) == (Status.TRUNCATED, 1)
    episodes.config.max_context_tokens += 1
    assert episodes.run(make_task(), [bash('seq 50'), DONE]).status == Status.OK


def test_max_total_tokens_cuts_the_observation_and_ends(make_task, episodes):
    whole = episodes.run(make_task(), [bash('seq 50'), DONE])
    limit = int(whole.turn_starts[1]) - 60
    episodes.config.max_total_tokens = limit
    rollout = episodes.run(make_task(), [bash('seq 50'), DONE])
    (shown,) = episodes.observations(rollout)
    assert episodes.observations(whole)[0].startswith(shown) and shown.split()[-1].isdigit()
    assert limit - 3 <= len(rollout.tokens) <= limit
    assert rollout.status == Status.TRUNCATED


def test_an_observation_that_cannot_fit_is_dropped(make_task, episodes):
    whole = episodes.run(make_task(), [bash('seq 50'), DONE])
    turn_end = int(np.flatnonzero(whole.roles == Role.SCAFFOLD)[0])
    episodes.config.max_total_tokens = turn_end + 5
    rollout = episodes.run(make_task(), [bash('echo 42 > /app/answer.txt; seq 50'), DONE])
    episodes.config.max_total_tokens = len(rollout.tokens)
    assert rollout.metrics['stop/max_total_tokens'] == 1
    assert rollout.roles[-1] == Role.ACTION


def test_max_turn_tokens_ends_the_turn_for_the_policy(make_task, episodes):
    episodes.config.max_turn_tokens = 12
    episodes.config.max_turns = 1
    rollout = episodes.run(make_task(), [bash('echo hello')])
    assert np.sum(rollout.roles == Role.ACTION) == 12
    after = rollout.tokens[rollout.turn_starts[0] + 12 :]
    assert episodes.tokenizer.decode(after).startswith('<|im_end|>\n<|im_start|>user\n')
    assert (rollout.roles[-len(after) :][:2] == Role.SCAFFOLD).all()


def test_agent_timeout_in_a_command(make_task, episodes):
    started = time.monotonic()
    command = 'echo 42 > /app/answer.txt; sleep 60'
    rollout = episodes.run(make_task(agent_timeout=2.0), [bash(command, 50), DONE])
    assert time.monotonic() - started < 15
    assert (rollout.reward, rollout.status) == (1.0, Status.AGENT_TIMEOUT)  # still verified
    assert rollout.metrics['turns'] == 1 and rollout.roles[-1] == Role.ACTION


def test_agent_timeout_while_sampling(make_task, episodes):
    rollout = episodes.run(make_task(agent_timeout=0.5), [DONE], delay=20.0)
    assert rollout.status == Status.AGENT_TIMEOUT and rollout.reward == 0
    assert len(rollout.turn_starts) == 0
    assert 0.4 < rollout.metrics['seconds_sampling'] < 5


SOLVES = 'echo 42 > /app/answer.txt'


def test_a_spent_total_is_discarded_without_a_test(make_task, episodes):
    """As in the released code: reward 0, no verifier, and the tokens are kept to train on."""
    task = make_task('touch /app/tested; ' + CHECK)
    whole = episodes.run(task, [bash(f'{SOLVES}; seq 50'), DONE])
    episodes.config.max_total_tokens = int(whole.turn_starts[1]) - 60
    verified = episodes.run(task, [bash(f'{SOLVES}; seq 50'), DONE])
    assert (verified.reward, verified.status) == (1.0, Status.TRUNCATED)
    episodes.config.at_max_total_tokens = 'discard'
    discarded = episodes.run(task, [bash(f'{SOLVES}; seq 50'), DONE])
    assert (discarded.reward, discarded.status) == (0.0, Status.TRUNCATED)
    assert 'no test was run' in discarded.reason and discarded.metrics['seconds_verifying'] == 0
    np.testing.assert_array_equal(discarded.tokens, verified.tokens)
    np.testing.assert_array_equal(discarded.roles, verified.roles)


@pytest.mark.slow
@pytest.mark.parametrize(
    'test_sh, commands, delay',
    [
        (CHECK, [f'{SOLVES}; sleep 60'], 0.0),  # in a command
        (CHECK, [SOLVES], 60.0),  # while it samples
        ('sleep 60; ' + CHECK, [SOLVES], 0.0),  # in the tests, which count too
    ],
)
def test_an_agent_that_is_late_is_discarded_whole(make_task, episodes, test_sh, commands, delay):
    """As in the released code: reward 0 and nothing to train on, but a rollout that counts."""
    episodes.config.at_agent_timeout = 'discard'
    replies = [*(bash(command, 50) for command in commands), DONE]
    started = time.monotonic()
    rollout = episodes.run(make_task(test_sh, agent_timeout=3.0), replies, delay=delay)
    assert time.monotonic() - started < 20
    assert (rollout.reward, rollout.status) == (0.0, Status.AGENT_TIMEOUT)
    assert (rollout.roles == Role.PROMPT).all() and len(rollout.turn_starts) == 0
    assert rollout.metrics['stop/agent_timeout'] == 1 and 'discarded' in rollout.reason


@pytest.mark.slow
def test_the_starts_time_counts_only_if_a_late_episode_is_discarded(make_task, episodes):
    task = make_task(agent_timeout=4.0)
    (task.path / 'environment' / 'Dockerfile').write_text('FROM x\nRUN sleep 6\nWORKDIR /app\n')
    assert episodes.run(task, [bash(SOLVES), DONE]).status == Status.OK
    episodes.config.at_agent_timeout = 'discard'
    assert episodes.run(task, [bash(SOLVES), DONE]).status == Status.AGENT_TIMEOUT


def test_the_tests_of_an_environment_only_task_are_not_run(make_task, episodes):
    script = [bash('echo 42 > /app/answer.txt'), DONE]
    assert episodes.run(make_task(), script).reward == 1.0
    marked = dataclasses.replace(make_task(), environment_only=True)
    rollout = episodes.run(marked, script)
    assert (rollout.reward, rollout.status, rollout.tests_output) == (0.0, Status.OK, '')
    assert 'correct' not in rollout.metrics and rollout.metrics['seconds_verifying'] < 0.1
    # How the agent's part ended is its status as ever.
    episodes.config.max_turns = 1
    assert episodes.run(marked, script).status == Status.TRUNCATED
