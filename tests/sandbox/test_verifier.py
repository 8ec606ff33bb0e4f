"""The verifier (docs/protocol.md#verifier) in real sandboxes, and what agents try against it."""

import asyncio

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
                await sandbox.upload(task.path / 'solution', '/solution')
                await sandbox.run('bash /solution/solve.sh', 20)
            return await sandbox.verify()
        finally:
            await sandbox.stop()

    assert asyncio.run(agent(True)) == (1.0, Status.OK)
    assert asyncio.run(agent(False)) == (0.0, Status.OK)


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
            return await sandbox.verify()
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
