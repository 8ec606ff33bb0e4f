"""The verifier (docs/protocol.md#verifier) in real sandboxes, and what agents try against it."""

import asyncio
import dataclasses

import pytest

from echo_jax.sandbox.local import LocalSandbox
from echo_jax.types import Status
from tests.support.episodes import CHECK, DONE, bash


def test_the_verifier_alone_is_for_oracle_and_nop(make_task):
    task = make_task()

    async def agent(solve):
        sandbox = LocalSandbox(task)
        await sandbox.start()
        try:
            if solve:
                await sandbox.solve()
            return await sandbox.verify()
        finally:
            await sandbox.stop()

    assert asyncio.run(agent(True))[:2] == (1.0, Status.OK)
    assert asyncio.run(agent(False))[:2] == (0.0, Status.OK)


def verdict_of(task, *before: str):
    """What the task's tests say after these commands of the agent's."""

    async def main():
        sandbox = LocalSandbox(task)
        await sandbox.start()
        try:
            for command in before:
                await sandbox.run(command, 20)
            return await sandbox.verify()
        finally:
            await sandbox.stop()

    return asyncio.run(main())


@pytest.mark.parametrize(
    ('test_sh', 'rewards', 'reward'),
    [
        ('echo 0.25 > $R; exit 1', {'reward': 0.25}, 0.25),
        ('printf " -1e-1\\r\\n" > $R', {'reward': -0.1}, -0.1),
        ('echo \'{"reward": 0.5, "other": 1}\' > $J', {'reward': 0.5, 'other': 1.0}, 0.5),
        ('echo 0 > $R; echo \'{"reward": 0.75}\' > $J', {'reward': 0.75}, 0.75),
        ('echo \'{"a": 1, "b": 0.5}\' > $J', {'a': 1.0, 'b': 0.5}, 0.75),
        ('echo \'{"reward": true, "b": false}\' > $J', {'reward': 1.0, 'b': 0.0}, 1.0),
        ('echo \'{"score": 1}\' > $J', {'score': 1.0}, 1.0),
        ('{ head -c 999998 /dev/zero | tr "\\0" " "; echo 1; } > $R', {'reward': 1.0}, 1.0),
    ],
)
def test_rewards(make_task, test_sh, rewards, reward):
    verdict = verdict_of(make_task(test_sh))
    assert verdict[:2] == (reward, Status.OK)
    assert verdict.rewards == rewards


@pytest.mark.parametrize(
    ('test_sh', 'reason'),
    [
        ('true', 'the tests wrote neither /logs/verifier/reward.json nor reward.txt'),
        (': > $R', 'reward.txt is empty'),
        ('echo nan > $R', 'reward is nan; expected a finite number'),
        ('echo -inf > $R', 'reward is -inf; expected a finite number'),
        ('echo 1e999 > $R', 'reward is inf; expected a finite number'),
        ('echo 1e308 > $R', 'reward is 1e+308; expected a finite number, from -1e+12 to 1e+12'),
        ('echo passed > $R', 'reward.txt is no number or JSON'),
        ('echo 1 1 > $R', 'reward.txt is no number or JSON'),
        ('head -c 1000001 /dev/zero | tr "\\0" 1 > $R', 'reward.txt has over 1000000 bytes'),
        ('echo \'{"reward": NaN}\' > $J', 'reward.json: reward is nan'),
        ('echo \'{"reward": "1"}\' > $J', 'reward.json: reward is 1; expected a finite number'),
        ('echo \'{"reward": 1, "b": null}\' > $J', 'reward.json: b is None'),
        ("echo '[1]' > $J", 'expected a table of numbers'),
        ("echo '{}' > $J", 'expected a table of numbers'),
        ('echo \'{"reward":\' > $J', 'reward.json is no number or JSON'),
        ('echo 1 > $R; : > $J', 'reward.json is empty'),
        ('mkfifo $R', 'reward.txt is a link or no regular file'),
        ('mkdir $R', 'reward.txt is a link or no regular file'),
        ('echo 1 > /tmp/r; ln -s /tmp/r $R', 'reward.txt is a link or no regular file'),
        ('ln -s nowhere $J; echo 1 > $R', 'reward.json is a link or no regular file'),
        pytest.param(
            'echo 1 > $R; sleep 30', 'the tests ran over their 3 seconds', marks=pytest.mark.slow
        ),
    ],
)
def test_no_rewards(make_task, test_sh, reason):
    verdict = verdict_of(make_task(f'echo said\n{test_sh}', verifier_timeout=3.0))
    assert verdict[:2] == (0.0, Status.VERIFIER_ERROR)
    assert reason in verdict.reason and '\n' not in verdict.reason
    assert verdict.output.startswith('said\n')


def test_the_end_of_long_output_is_kept(make_task):
    verdict = verdict_of(make_task('seq 100000; echo oops >&2; echo 1 > $R'))
    assert verdict[:2] == (1.0, Status.OK)
    assert len(verdict.output) == 4_000 and verdict.output.endswith('99999\n100000\noops\n')


@pytest.mark.parametrize(
    ('head', 'reward'),
    [
        ('#!/bin/bash\n', 1.0),
        ('', 1.0),  # the shell that starts it runs it itself
        ('#!/usr/bin/env python3\n', 1.0),
        ('#!/bin/bash\r\n', 0.0),  # the kernel finds no such interpreter, as in Harbor
    ],
)
def test_scripts_run_by_their_first_line(make_task, head, reward):
    task = make_task()
    body = 'import os; os.system("echo 1 > {}")' if 'python' in head else 'echo 1 > {}'
    for name, target in (
        ('tests/test.sh', '/logs/verifier/reward.txt'),
        ('solution/solve.sh', 's'),
    ):
        (task.path / name).write_text(head + body.format(target) + '\n', newline='')
        (task.path / name).chmod(0o644)

    async def main():
        sandbox = LocalSandbox(task)
        await sandbox.start()
        try:
            solved = await sandbox.solve()
            return solved, (await sandbox.run('cat s', 20)).stdout, await sandbox.verify()
        finally:
            await sandbox.stop()

    solved, made, verdict = asyncio.run(main())
    assert verdict.reward == reward
    assert (solved.exit_code == 0, made == '1\n') == (bool(reward), bool(reward))
    if not reward:
        assert 'bad interpreter' in verdict.output or 'not found' in verdict.output


def test_the_variables_of_the_task_reach_its_scripts(make_task):
    task = dataclasses.replace(
        make_task('[ "$WANT.$OF_ALL" = 42.all ] && cp got $R'),
        env={'OF_ALL': 'all'},
        verifier_env={'WANT': '42'},
        solution_env={'GIVEN': '0.5'},
    )
    (task.path / 'solution/solve.sh').write_text(
        '#!/bin/bash\necho "$GIVEN" > got\n'
        '[ $DEBIAN_FRONTEND.$OF_ALL.$WANT = noninteractive.all. ]\n'
    )

    async def main():
        sandbox = LocalSandbox(task)
        await sandbox.start()
        try:
            return (await sandbox.solve()).exit_code, (await sandbox.verify()).reward
        finally:
            await sandbox.stop()

    assert asyncio.run(main()) == (0, 0.5)


@pytest.mark.parametrize(
    'trick',
    [
        'rm /tests/*; echo 1 > /tests/conftest.py; chmod 300 /tests',
        'mkdir -p /tests/a/b; echo 1 > /tests/a/b/c; chmod 0 /tests/a/b /tests/a',
        'rm -r /tests/*; ln -s /app /tests/data; echo 1 > /tests/.hidden',
    ],
)
def test_nothing_lies_beside_the_tests(make_task, episodes, trick):
    # What the image has there is put back as it was; see test_local_environment.py.
    found = '$(find /tests -mindepth 1 ! -name test.sh) $(cat /tests/old.py)'
    task = make_task(f'[ "{found}" = "/tests/old.py old" ] && echo 1 > $R || echo 0 > $R')
    (task.path / 'environment/old').mkdir()  # so /tests is there, and the agent's own
    (task.path / 'environment/old/old.py').write_text('old')
    (task.path / 'environment/Dockerfile').write_text(
        'FROM debian\nWORKDIR /app\nCOPY old /tests/\n'
    )
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
