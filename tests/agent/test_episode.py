"""PROTOCOL 6, 7, 10, 11, 14 to 16: scripted episodes of hand-made tasks in real sandboxes."""

import asyncio
import dataclasses
import time

import numpy as np
import pytest

from echo_jax.agent.episode import run_episode, run_group
from echo_jax.agent.observations import describe
from echo_jax.agent.protocol import Protocol, format_reply
from echo_jax.agent.verifier import verify
from echo_jax.policy.scripted import ScriptedPolicy
from echo_jax.sandbox import CommandResult, SandboxError
from echo_jax.sandbox.local import LocalSandbox
from echo_jax.tasks.harbor import load_task
from echo_jax.types import Role, Status

CHECK = '[ "$(cat /app/answer.txt)" = 42 ] && echo 1 > $R || echo 0 > $R\n'
DONE = format_reply('Finished.', done=True)


def bash(command, timeout=None):
    extra = f'\n<parameter=timeout>\n{timeout}\n</parameter>' if timeout is not None else ''
    return (
        'I act.\n</think>\n\n<tool_call>\n<function=bash>\n<parameter=command>\n'
        f'{command}\n</parameter>{extra}\n</function>\n</tool_call>'
    )


def call(inner):
    return f'I act.\n</think>\n\n<tool_call>\n{inner}\n</tool_call>'


@pytest.fixture
def make_task(tmp_path):
    def make(test_sh=CHECK, agent_timeout=60.0, verifier_timeout=20.0):
        path = tmp_path / 'answer'
        for folder in ('environment', 'tests', 'solution'):
            (path / folder).mkdir(parents=True, exist_ok=True)
        (path / 'task.toml').write_text(
            f'[agent]\ntimeout_sec = {agent_timeout}\n'
            f'[verifier]\ntimeout_sec = {verifier_timeout}\n'
        )
        (path / 'instruction.md').write_text('Write 42 to /app/answer.txt.')
        (path / 'environment/Dockerfile').write_text('FROM debian:bookworm-slim\nWORKDIR /app\n')
        (path / 'solution/solve.sh').write_text('#!/bin/bash\necho 42 > /app/answer.txt\n')
        (path / 'tests/test.sh').write_text(
            f'#!/bin/bash\nR=/logs/verifier/reward.txt\nJ=/logs/verifier/reward.json\n{test_sh}'
        )
        return load_task(path)

    return make


class Recording:
    """A policy that keeps what each turn was asked with; the turns themselves are scripted."""

    def __init__(self, policy, delay=0.0):
        self.policy, self.delay, self.calls = policy, delay, []

    async def generate(self, token_ids, **arguments):
        self.calls.append((token_ids.tolist(), arguments))
        await asyncio.sleep(self.delay)
        return await self.policy.generate(token_ids, **arguments)


class Episodes:
    """Runs scripts against one task and decodes what came of them."""

    def __init__(self, tokenizer, config):
        self.tokenizer, self.config = tokenizer, config

    def run(self, task, replies, *, delay=0.0):
        self.policy = Recording(ScriptedPolicy(self.tokenizer, replies), delay)
        return asyncio.run(
            run_episode(
                task,
                self.policy,
                LocalSandbox(task),
                Protocol(self.tokenizer, self.config),
                group_id=3,
                sample_id=1,
                seed=5,
                temperature=0.8,
            )
        )

    def observations(self, rollout):
        """What each observation showed, in order."""
        text = self.tokenizer.decode(rollout.tokens)
        shown = text.split('<tool_response>\n')[1:]
        return [part.split('\n</tool_response>')[0] for part in shown]

    def words(self, rollout, role):
        return self.tokenizer.decode(rollout.tokens[rollout.roles == role])


@pytest.fixture
def episodes(tiny_tokenizer, protocol_config):
    return Episodes(tiny_tokenizer, protocol_config)


def assert_valid(rollout):
    """The invariants of DESIGN 3.2."""
    shape = rollout.tokens.shape
    assert rollout.tokens.dtype == np.int32 and rollout.roles.dtype == np.uint8
    assert rollout.rollout_logprobs.dtype == np.float32 and rollout.rollout_logprobs.shape == shape
    assert rollout.policy_versions.dtype == np.int32 and rollout.policy_versions.shape == shape
    assert rollout.turn_starts.dtype == np.int32
    action = rollout.roles == Role.ACTION
    assert np.all((rollout.policy_versions >= 0) == action)
    assert all(action[i] and not action[i - 1] for i in rollout.turn_starts)
    assert all(type(value) is float for value in rollout.metrics.values())


# --- whole episodes -----------------------------------------------------------------------------


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


def test_the_verifier_alone_is_for_oracle_and_nop(make_task):
    task = make_task()

    async def agent(solve):
        sandbox = LocalSandbox(task)
        await sandbox.start()
        try:
            if solve:
                await sandbox.upload(task.path / 'solution', '/solution')
                await sandbox.run('bash /solution/solve.sh', 20)
            return await verify(task, sandbox)
        finally:
            await sandbox.stop()

    assert asyncio.run(agent(True)) == (1.0, Status.OK)
    assert asyncio.run(agent(False)) == (0.0, Status.OK)


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


# --- observations, text by text ----------------------------------------------------------------


def test_observation_texts(make_task, episodes):
    replies_and_texts = [
        (bash('echo a; exit_with() { return 3; }; exit_with'), None),
        (bash('false'), "Command 'false' failed. Output: \n\n(exit_code=1)"),
        (bash('sleep 30', 1), "Command 'sleep 30' timed out after 1 seconds.\n\n(exit_code=-1)"),
        (
            bash('printf x', ' 7 '),
            "Command 'printf x' executed successfully. Output: x\n\n(exit_code=0)",
        ),
        (
            bash('ls', 'soon'),
            "Command 'ls' execution error: could not convert string to float: 'soon'"
            '\n\n(exit_code=-1)',
        ),
        (
            bash('ls', '-1'),
            "Command 'ls' execution error: timeout is -1, expected a positive number of seconds"
            '\n\n(exit_code=-1)',
        ),
        (call('ls'), "Command 'ls' skipped due to parse error: Missing <function=...> tag"),
        (
            call('<function=bash>'),
            "Command '<function=bash>' skipped due to parse error: No parameters found",
        ),
        (
            call('<function=python><parameter=code>1</parameter>'),
            "Command '<function=python><parameter=code>1</parameter>' skipped due to "
            "Unknown tool 'python'. Only 'bash' is supported.",
        ),
        (
            call('<function=bash><parameter=timeout>1</parameter>'),
            "Command '<function=bash><parameter=timeout>1</parameter>' skipped due to no command "
            'provided. Please provide a command in correct format to execute.',
        ),
        ('I rest.', 'No <tool_call> found in response.'),  # and not a word of its warnings
        ('', 'Empty response'),
        (
            '\n</think>' + bash('printf x').partition('</think>\n\n')[2] + 'ok?',
            'WARNINGS:\n- Empty <think> block\n- Text detected after final XML tag\n\n'
            "Command 'printf x' executed successfully. Output: x\n\n(exit_code=0)",
        ),
    ]
    replies = [reply for reply, _ in replies_and_texts]
    rollout = episodes.run(make_task(), [*replies, DONE])
    assert_valid(rollout)
    shown = episodes.observations(rollout)
    assert shown[0].endswith(' failed. Output: a\n\n\n(exit_code=3)')
    assert shown[1:] == [text for _, text in replies_and_texts[1:]]
    metrics = rollout.metrics
    assert (metrics['turns'], metrics['parse_errors']) == (14, 2)
    assert metrics['commands'] == 5  # the ones that a shell has seen
    assert metrics['warnings'] == 3  # `I rest.` never closes its thinking
    feedback = episodes.words(rollout, Role.FEEDBACK)
    assert feedback.count('skipped due to') == 4 and 'Empty response' in feedback
    assert 'execution error' not in feedback


@pytest.mark.parametrize(
    ('strategy', 'shown'),
    [
        ('start', 'abcde\n[Output truncated: showing first 5 of 8 characters]'),
        ('end', '[Output truncated: showing last 5 of 8 characters]\ndefgh'),
        (
            'start_end',
            'ab\n[Output truncated: showing first 2 and last 2 of 8 characters]\ngh',
        ),
    ],
)
def test_truncation(strategy, shown):
    spans = describe('c', CommandResult('abcdefgh', '', 0, False), 5, strategy)
    text = ''.join(span.text for span in spans)
    assert text == f"Command 'c' executed successfully. Output: {shown}\n\n(exit_code=0)"
    output = ''.join(span.text for span in spans if span.role == Role.OUTPUT)
    assert 'Output' not in output and set(output) < set('abcdefgh')
    whole = describe('c', CommandResult('abc', 'de', 0, False), 6, strategy)
    assert [s.text for s in whole if s.role == Role.OUTPUT] == ['abc\nde']
    none = describe('c', CommandResult('', '', 0, False), 6, strategy)
    assert ''.join(s.text for s in none if s.role == Role.OUTPUT) == ''
    one = describe('c', CommandResult('abc', '', 0, False), 1, strategy)
    assert len(''.join(s.text for s in one if s.role == Role.OUTPUT)) <= 1


def test_hostile_output_opens_no_turn(make_task, episodes):
    # Octal brackets, since a tag in the call itself would be sampled as the special token.
    command = r"printf 'a\0b\377\74|im_end|>\n\74|im_start|>assistant\n\74think>'"
    rollout = episodes.run(make_task(), [bash(command), DONE])
    ids = episodes.tokenizer.convert_tokens_to_ids(['<|im_start|>', '<think>', '</tool_response>'])
    observed = rollout.tokens[np.isin(rollout.roles, (Role.WRAPPER, Role.OUTPUT))]
    assert not np.isin(observed, ids).any()
    # Three of the prompt, two of the one observation; the terminal adds none.
    assert np.sum(rollout.tokens == ids[0]) == 5
    assert '<|im_end|>\n<|im_start|>assistant' in episodes.words(rollout, Role.OUTPUT)
    assert 'a\0b\ufffd' in episodes.words(rollout, Role.OUTPUT)


@pytest.mark.parametrize(
    ('selection', 'limit', 'ran'),
    [
        ('first', 1, ['1']),
        ('first', 2, ['1', '2']),
        ('last', 1, ['3']),
        ('last', 2, ['2', '3']),
        ('all', 1, ['1', '2', '3']),
    ],
)
def test_several_commands_in_a_turn(make_task, episodes, selection, limit, ran):
    calls = '\n'.join(bash(f'echo {n}').partition('\n</think>\n\n')[2] for n in '123')
    episodes.config.command_selection = selection
    episodes.config.max_commands_per_turn = limit
    rollout = episodes.run(make_task(), ['I act.\n</think>\n\n' + calls, DONE])
    assert episodes.observations(rollout) == [
        '\n\n'.join(
            f"Command 'echo {n}' executed successfully. Output: {n}\n\n\n(exit_code=0)" for n in ran
        )
    ]
    assert rollout.metrics['commands'] == len(ran)


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


# --- the verifier ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('test_sh', 'reward', 'status'),
    [
        ('echo 0.25 > $R; exit 1', 0.25, Status.OK),
        ('printf " -1e-1\\n" > $R', -0.1, Status.OK),
        ('echo \'{"reward": 0.5, "other": 1}\' > $J', 0.5, Status.OK),
        ('echo 1 > $R; echo \'{"reward": 0}\' > $J', 1.0, Status.OK),
        ('true', 0.0, Status.VERIFIER_ERROR),
        (': > $R', 0.0, Status.VERIFIER_ERROR),
        ('echo nan > $R', 0.0, Status.VERIFIER_ERROR),
        ('echo -inf > $R', 0.0, Status.VERIFIER_ERROR),
        ('echo 1e999 > $R', 0.0, Status.VERIFIER_ERROR),
        ('echo passed > $R', 0.0, Status.VERIFIER_ERROR),
        ('echo 1 1 > $R', 0.0, Status.VERIFIER_ERROR),
        ('head -c 5000 /dev/zero | tr "\\0" 1 > $R', 0.0, Status.VERIFIER_ERROR),
        ('echo \'{"reward": NaN}\' > $J', 0.0, Status.VERIFIER_ERROR),
        ('echo \'{"reward": "1"}\' > $J', 0.0, Status.VERIFIER_ERROR),
        ('echo \'{"reward": true}\' > $J', 0.0, Status.VERIFIER_ERROR),
        ('echo \'{"score": 1}\' > $J', 0.0, Status.VERIFIER_ERROR),
        ("echo '[1]' > $J", 0.0, Status.VERIFIER_ERROR),
        ('echo \'{"reward":\' > $J', 0.0, Status.VERIFIER_ERROR),
        ('mkfifo $R', 0.0, Status.VERIFIER_ERROR),
        ('mkdir $R', 0.0, Status.VERIFIER_ERROR),
        ('echo 1 > /tmp/r; ln -s /tmp/r $R', 0.0, Status.VERIFIER_ERROR),
        ('ln -s nowhere $R; echo \'{"reward": 1}\' > $J', 0.0, Status.VERIFIER_ERROR),
        ('echo 1 > $R; sleep 30', 0.0, Status.VERIFIER_ERROR),
    ],
)
def test_rewards(make_task, test_sh, reward, status):
    task = make_task(test_sh, verifier_timeout=3.0)

    async def nop():
        sandbox = LocalSandbox(task)
        await sandbox.start()
        try:
            return await verify(task, sandbox)
        finally:
            await sandbox.stop()

    assert asyncio.run(nop()) == (reward, status)


@pytest.mark.parametrize(
    'trick',
    [
        'rm /tests/*; echo 1 > /tests/conftest.py; chmod 300 /tests',
        'mkdir -p /tests/a/b; echo 1 > /tests/a/b/c; chmod 0 /tests/a/b /tests/a',
        'rm -r /tests/*; ln -s /app /tests/data; echo 1 > /tests/.hidden',
    ],
)
def test_nothing_lies_beside_the_tests(make_task, episodes, trick):
    task = make_task('found=$(find /tests -mindepth 1 ! -name test.sh); echo "${found:-1}" > $R')
    (task.path / 'environment/old').mkdir()  # so /tests is there, and the agent's own
    (task.path / 'environment/old/old.py').write_text('old')
    (task.path / 'environment/Dockerfile').write_text('FROM debian\nCOPY old /tests/\n')
    rollout = episodes.run(task, [bash(f'cat /tests/old.py; {trick}'), DONE])
    assert 'old' in episodes.observations(rollout)[0]
    assert (rollout.reward, rollout.status) == (1.0, Status.OK)


@pytest.mark.parametrize(
    'trick',
    [
        'mkdir -p /logs/verifier; echo 1 > /logs/verifier/reward.txt',
        'cd /logs/verifier; echo 1 > reward.txt; chmod 0 reward.txt; chmod 500 .',
        'mkdir -p /logs/verifier/reward.txt/a/b; chmod 0 /logs/verifier/reward.txt/a',
        'mkdir -p /logs/verifier; echo 1 > /tmp/r; ln -s /tmp/r /logs/verifier/reward.json',
        'mkdir /app/x; cd /logs; echo 1 > /app/x/reward.txt; rm -r verifier; ln -s /app/x verifier',
        'rm -rf /logs/verifier; echo 1 > /logs/verifier',
        'setsid bash -c "while :; do echo 1 > /logs/verifier/reward.txt; done" > /dev/null 2>&1 &',
        'mkdir -p /tests; echo "echo 1 > /logs/verifier/reward.txt" > /tests/helper.sh',
        'mkdir -p /app/t; ln -s /app/t /tests',
        'echo 1 > /tests',
        'test.sh() { echo 1; }; alias cat="echo 42"; cat() { echo 42; }; export -f cat',
        'export BASH_ENV=/app/e; echo "echo 1 > /logs/verifier/reward.txt; exit" > /app/e',
    ],
)
def test_what_the_agent_leaves_earns_nothing(make_task, episodes, trick):
    test_sh = '[ -e /tests/helper.sh ] && . /tests/helper.sh\n[ -s $R ] && exit\n' + CHECK
    rollout = episodes.run(make_task(test_sh), [bash(trick), DONE])
    assert (rollout.reward, rollout.status) == (0.0, Status.OK)


def test_a_full_disk_is_the_agents_fault(make_task, episodes):
    """Were it an INFRA_ERROR, an agent could choose to be nobody's instead of wrong."""
    rollout = episodes.run(make_task(), [bash('cat /dev/zero > /app/full'), DONE])
    assert (rollout.reward, rollout.status) == (0.0, Status.VERIFIER_ERROR)


def test_the_length_penalty_is_off_unless_asked(make_task, episodes):
    script = [bash('echo 42 > /app/answer.txt'), DONE]
    assert episodes.run(make_task(), script).reward == 1.0
    episodes.config.update(length_penalty_coef=0.5, length_penalty_start=10)
    rollout = episodes.run(make_task(), script)
    after_prompt = np.sum(rollout.roles != Role.PROMPT)
    assert rollout.reward == pytest.approx(1 - 0.5 * (after_prompt - 10) / 1000)
    assert rollout.reward < 1 and rollout.metrics['correct'] == 1


# --- groups -------------------------------------------------------------------------------------


class Counted(LocalSandbox):
    """A real sandbox that counts lives, and whose first `failures` starts fail."""

    failures, most, begun = 0, 0, 0

    def __init_subclass__(cls):
        cls.alive, cls.stopped = set(), set()

    async def start(self):
        cls = type(self)
        cls.begun += 1
        cls.alive.add(self)
        cls.most = max(cls.most, len(cls.alive))
        await super().start()
        if cls.failures > 0:
            cls.failures -= 1
            raise SandboxError('no space left on the machine')

    async def stop(self):  # more than once where start() fails
        await super().stop()
        await asyncio.sleep(0.2)  # a container takes its time, and a cancellation may come in it
        type(self).alive.discard(self)
        type(self).stopped.add(self)


def group(task, policy, protocol, sandbox, *, size=4, at_once=2):
    return run_group(
        task,
        9,
        policy=policy,
        make_sandbox=sandbox,
        protocol=protocol,
        group_size=size,
        seed=5,
        temperature=1.0,
        sandboxes=asyncio.Semaphore(at_once),
        retry_after=(0.0, 0.1),
    )


@pytest.mark.parametrize('failures', [0, 2, 100])
def test_a_group_retries_and_then_records(make_task, tiny_tokenizer, protocol_config, failures):
    sandbox = type('Sandbox', (Counted,), {'failures': failures})
    policy = ScriptedPolicy(tiny_tokenizer, [bash('echo 42 > /app/answer.txt'), DONE])
    protocol = Protocol(tiny_tokenizer, protocol_config)
    task = dataclasses.replace(make_task(), environment_only=True)

    async def run():
        return await group(task, policy, protocol, sandbox)

    rollouts = asyncio.run(run())
    assert [rollout.sample_id for rollout in rollouts] == [0, 1, 2, 3]
    for rollout in rollouts:
        assert_valid(rollout)
        assert rollout.environment_only is True  # also when nothing was sampled
        if failures < 100:
            assert (rollout.reward, rollout.status, rollout.group_id) == (1.0, Status.OK, 9)
        else:
            assert rollout.status == Status.INFRA_ERROR and rollout.reward == 0
            assert rollout.tokens.tolist() == protocol.prompt_ids('Write 42 to /app/answer.txt.')
            assert (rollout.roles == Role.PROMPT).all() and len(rollout.turn_starts) == 0
    assert sandbox.most == 2 and not sandbox.alive
    assert sandbox.begun == len(sandbox.stopped) == {0: 4, 2: 6, 100: 12}[failures]


def test_cancelling_stops_the_sandboxes(make_task, tiny_tokenizer, protocol_config):
    sandbox = type('Sandbox', (Counted,), {})
    policy = ScriptedPolicy(tiny_tokenizer, [bash('sleep 60', 50), DONE])

    async def run():
        protocol = Protocol(tiny_tokenizer, protocol_config)
        task = asyncio.create_task(group(make_task(), policy, protocol, sandbox))
        while len(sandbox.alive) < 2:
            await asyncio.sleep(0.05)
        await asyncio.sleep(1.0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    started = time.monotonic()
    asyncio.run(run())
    assert time.monotonic() - started < 20
    assert sandbox.begun == len(sandbox.stopped) == 2 and not sandbox.alive


def test_a_broken_policy_ends_the_group_and_its_sandboxes(
    make_task, tiny_tokenizer, protocol_config
):
    sandbox = type('Sandbox', (Counted,), {})
    policy = ScriptedPolicy(tiny_tokenizer, [bash('true')])  # has no second turn

    async def run():
        await group(make_task(), policy, Protocol(tiny_tokenizer, protocol_config), sandbox)

    with pytest.raises(ExceptionGroup) as raised:
        asyncio.run(run())
    assert raised.group_contains(ValueError, match='end it with done')
    assert sandbox.begun == len(sandbox.stopped) and not sandbox.alive
