"""Harbor's own Docker environment: what only it runs, and a policy's episode in it.

Needs Harbor, an engine, and the plugins of `docker compose` and `docker buildx`.
"""

import asyncio
import pathlib
import subprocess

import pytest

pytest.importorskip('harbor', reason='Harbor needs Python 3.12: pip install harbor')

from echo_jax.sandbox import CommandResult, SandboxError, harbor, shell
from echo_jax.types import Status, Task
from tests.support.docker_engine import BASE
from tests.support.harbor_machine import write_task
from tests.support.sandboxes import opened

pytestmark = pytest.mark.filterwarnings('ignore::DeprecationWarning')
SEC = 60.0
COMPOSE = f"""
services:
  main:
    environment: {{ FROM_COMPOSE: "yes" }}
    volumes: ["shared:/shared"]
  beside:
    image: {BASE}
    command: ["bash", "-c", "echo from beside >/shared/word; sleep infinity"]
    volumes: ["shared:/shared"]
volumes: {{ shared: {{}} }}
"""


@pytest.fixture(autouse=True)
def docker_compose(daemon, monkeypatch):
    """Harbor calls the client, which finds the engine by DOCKER_HOST."""
    monkeypatch.setenv('DOCKER_HOST', daemon.url)
    for plugin in ('compose', 'buildx'):
        if subprocess.run(['docker', plugin, 'version'], capture_output=True).returncode:
            pytest.skip(f'docker {plugin} is missing: install docker-compose and docker-buildx')


def in_docker(task: Task, **how) -> harbor.HarborSandbox:
    harbor.check('docker')
    return harbor.HarborSandbox(task, environment='docker', **how)


async def rewards(task: Task) -> list[float]:
    """Of the task's own solution, and of nothing."""
    found = []
    for is_solved in (True, False):
        async with opened(in_docker(task)) as sandbox:
            if is_solved:
                await sandbox.solve()
            verdict = await sandbox.verify()
            assert verdict.status == Status.OK, verdict
            found.append(verdict.reward)
    return found


def left_over(path: pathlib.Path) -> str:
    """Containers and networks of a task's trials."""
    kinds = (['ps', '-a', '--format={{.Names}}'], ['network', 'ls', '--format={{.Name}}'])
    names = ''.join(subprocess.check_output(['docker', *kind], text=True) for kind in kinds)
    return ''.join(name for name in names.split() if name.startswith(path.name.lower()))


def test_a_compose_file(tmp_path):
    task = write_task(
        tmp_path / 'echo-compose',
        dockerfile=f'FROM {BASE}\nWORKDIR /app\n',
        test='diff /app/word /shared/word; echo $((!$?)) >/logs/verifier/reward.txt',
        solve='[ "$FROM_COMPOSE" = yes ] && cat /shared/word >/app/word',
        needs_harbor=('environment/docker-compose.yaml',),
    )
    (task.path / 'environment' / 'docker-compose.yaml').write_text(COMPOSE)
    assert asyncio.run(rewards(task)) == [1, 0]
    assert left_over(task.path) == ''


def test_a_separate_verifier(tmp_path):
    """Its tests are in an image of their own, and see of the agent's work the artifacts alone."""
    toml = 'artifacts = ["/app/answer"]\n[verifier]\nenvironment_mode = "separate"\n'
    task = write_task(
        tmp_path / 'echo-separate',
        toml,
        dockerfile=f'FROM {BASE}\nWORKDIR /app\n',
        test=(
            '[ "$(cat /app/answer)" = 42 ] && [ ! -e /app/other ] && [ -e /only-here ]\n'
            'echo $((!$?)) >/logs/verifier/reward.txt'
        ),
        solve='echo 42 >/app/answer; touch /app/other',
    )
    (task.path / 'tests' / 'Dockerfile').write_text(
        f'FROM {BASE}\nWORKDIR /app\nCOPY . /tests\nCOPY test.sh /only-here\n'
    )
    assert asyncio.run(rewards(task)) == [1, 0]
    assert left_over(task.path) == ''


@pytest.mark.parametrize('mode', shell.SHELLS)
def test_an_episode(tmp_path, mode):
    """The image's ENTRYPOINT runs, the agent is who the task says, and what it left stays."""
    toml = """
[agent]
user = "nobody"
[verifier]
user = "root"
[environment.env]
TOLD = "${NONESUCH:-told}"
[environment.healthcheck]
command = "test -e /srv/ready"
interval_sec = 0.2
retries = 50
"""
    task = write_task(
        tmp_path / 'echo-episode',
        toml,
        dockerfile=(
            f'FROM {BASE}\nWORKDIR /srv\nENV X=image\nCOPY --chmod=755 entry /entry\n'
            'ENTRYPOINT ["/entry"]\n'
        ),
        test=(
            'kill -0 $(cat /var/tmp/pid) && [ "$(id -un)" = root ] && [ -z "$(ls -A /tmp)" ]\n'
            'echo $((!$?)) >/logs/verifier/reward.txt; echo tested'
        ),
    )
    entry = '#!/bin/bash\n(sleep 1; touch /srv/ready) &\nexec "$@"\n'
    (task.path / 'environment' / 'entry').write_text(entry)

    async def main():
        async with opened(in_docker(task, shell=mode)) as sandbox:
            seen = await sandbox.run('id -un; pwd; echo $TOLD $X; ls; echo err >&2; exit 3', SEC)
            assert seen == CommandResult('nobody\n/srv\ntold image\nready\n', 'err\n', 3, False)
            await sandbox.run('cd /tmp; v=1', SEC)
            seen = await sandbox.run('echo $PWD $v', SEC)
            assert seen.stdout == ('/srv\n' if mode == 'fresh' else '/tmp 1\n')
            ours = 'grep -lz "[e]nd_since" /proc/*/cmdline; env | grep ECHO_JAX; echo $SHLVL'
            assert (await sandbox.run(ours, SEC)).stdout == '1\n'  # nothing of ours is seen
            late = await sandbox.run('sleep 1001 & sleep 1002', 2.0)
            assert late == CommandResult('', '', -1, True)
            await sandbox.run('sleep 1000 & echo $! >/var/tmp/pid', SEC)
            seen = await sandbox.run('grep -l "^Name:.sleep" /proc/*/status | wc -l', SEC)
            assert seen.stdout == '2\n'  # process 1, and ours
            verdict = await sandbox.verify()
            assert (verdict.reward, verdict.output) == (1, 'tested\n'), verdict

    asyncio.run(main())
    assert left_over(task.path) == ''


@pytest.mark.parametrize('mode', shell.SHELLS)
@pytest.mark.parametrize(
    ('program', 'then', 'status'),
    [
        ('base64', 'exit', Status.OK),
        ('bash', 'exit', Status.VERIFIER_ERROR),
        ('bash', 'sleep 1000', Status.VERIFIER_ERROR),
    ],
)
def test_an_agent_that_removes_what_a_shell_needs_has_a_verdict(
    tmp_path, mode, program, then, status
):
    task = write_task(
        tmp_path / 'echo-removed',
        dockerfile=f'FROM {BASE}\nWORKDIR /app\n',
        test='echo 0 >/logs/verifier/reward.txt',
    )

    async def main():
        async with opened(in_docker(task, shell=mode)) as sandbox:
            await sandbox.run(f'rm /usr/bin/{program}; {then}', 5.0)
            after = await sandbox.run('echo on', SEC)
            return after, await sandbox.verify()

    after, verdict = asyncio.run(main())
    assert after.stdout != 'on\n' and verdict[:2] == (0, status), (after, verdict)
    assert left_over(task.path) == ''


def test_an_image_that_does_not_build(tmp_path):
    task = write_task(
        tmp_path / 'echo-broken', dockerfile=f'FROM {BASE}\nCOPY nonesuch /\n', needs_harbor=('x',)
    )
    with pytest.raises(SandboxError, match='echo-broken: Harbor cannot start it: ') as caught:
        asyncio.run(rewards(task))
    assert 'nonesuch' in str(caught.value) and '\n' not in str(caught.value)
    assert left_over(task.path) == ''
