"""Containers as Docker makes them, on a real engine: what of the image and of the task holds."""

import asyncio
import dataclasses
import itertools

import pytest
import requests

from echo_jax import types
from echo_jax.sandbox import SandboxError, docker
from tests.support import docker_engine
from tests.support.processes import soon
from tests.support.sandboxes import SEC, opened

ENTRY = (
    '#!/bin/bash\\ncd /srv/box; touch started\\n(while :; do date >beat; sleep 0.2; done) &\\n'
    'exec "$@"\\n'
)


@pytest.fixture
def built(tmp_path):
    """built(Dockerfile's lines after FROM, **fields of Task): a task that builds its image."""

    numbers = itertools.count()

    def built(lines: str, **fields) -> types.Task:
        path = tmp_path / str(next(numbers))
        environment = path / 'environment'
        environment.mkdir(parents=True)
        (environment / 'Dockerfile').write_text(f'FROM {docker_engine.BASE}\n{lines}')
        return types.Task('built', path, 'x', **fields)

    return built


@pytest.fixture
def say(container):
    """say(task, commands..., shell=): what the commands print in one plain sandbox."""

    async def main(task, commands, options) -> list[str]:
        async with opened(container(None, task, **options)) as sandbox:
            found = [await sandbox.run(command, SEC) for command in commands]
            return [result.stdout + result.stderr for result in found]

    return lambda task, *commands, **options: asyncio.run(main(task, commands, options))


def test_what_an_image_says_holds(built, say):
    task = built(
        'WORKDIR /srv/box\nENV NAME=value BASH_ENV=/env PATH=/opt/bin:$PATH\n'
        f"RUN printf '{ENTRY}' >/entry && chmod +x /entry && echo 'echo sourced' >/env\n"
        'RUN useradd -m deploy && chmod 777 .\n'
        'USER deploy\nENTRYPOINT ["/entry"]\nCMD ["no"]\n',
        env={'NAME': "it's\n2"},
    )
    first, who, entry, modes = say(
        task,
        'pwd; echo "$NAME $PATH $USER"; bash -c true',
        'id -un; echo $HOME; cat /proc/1/comm',
        'ls; a=$(stat -c %z beat); sleep 0.6; [ "$a" != "$(stat -c %z beat)" ] && echo on',
        'stat -c "%a %n" /logs /logs/*',
    )
    assert first.startswith("/srv/box\nit's\n2 /opt/bin:/usr/local/sbin:") and 'sourced' in first
    assert who == 'deploy\n/home/deploy\nbash\n'
    assert entry == 'beat\nstarted\non\n'
    assert modes == '755 /logs\n777 /logs/agent\n777 /logs/artifacts\n777 /logs/verifier\n'


@pytest.mark.parametrize('user', [None, 1000, 0])
def test_files_beside_an_image_that_is_taken_as_it_is(tmp_path, container, user):
    """Harbor lays environment/ into the working directory if nothing says how to build an image."""
    (tmp_path / 'environment' / 'data').mkdir(parents=True)
    (tmp_path / 'environment' / 'data' / 'f').write_text('laid\n')
    image = docker_engine.BASE
    task = types.Task('taken', tmp_path, 'x', docker_image=image, workdir='/app')

    async def main(task):
        async with opened(container(user, task)) as sandbox:
            return (await sandbox.run('pwd; cat data/f', SEC)).stdout

    assert asyncio.run(main(task)) == '/app\nlaid\n'
    (tmp_path / 'environment' / 'Dockerfile').write_text(f'FROM {image}\n')
    assert asyncio.run(main(task)) == '/app\n'


def test_what_docker_allows(task, say):
    """Tasks that need one of Docker's capabilities, or a setuid program."""
    commands = {
        'chown nobody /tmp; stat -c %U /tmp': 'nobody\n',
        'useradd -m deploy && stat -c %U /home/deploy': 'deploy\n',
        'su -s /bin/sh nobody -c "id -un"': 'nobody\n',
        'cp /usr/bin/id /tmp/id; chmod 4755 /tmp/id; su -s /bin/sh nobody -c "/tmp/id -u"': '0\n',
        'mknod /tmp/n c 1 3 && echo x > /tmp/n; chroot / id -u': '0\n',
        'perl -MSocket -e "socket(S, PF_INET, SOCK_RAW, 1) and print qq(raw\\n)"': 'raw\n',
    }
    assert say(task, *commands) == list(commands.values())


def test_users_workdir_and_limits_of_the_task(task, say):
    asking = dataclasses.replace(
        task, agent_user='nobody', workdir='/opt/other', memory_mb=100, cpus=0.5, network=False
    )
    who, where, memory = say(
        asking,
        'id -un; echo $HOME',
        'pwd',
        'cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/memory/memory.limit_in_bytes 2>/dev/null',
        shell='fresh',
    )
    assert (who, where, memory) == ('nobody\n/nonexistent\n', '/opt/other\n', f'{100 << 20}\n')


def test_an_image_that_is_not_healthy_or_ends(built, container):
    async def start(task) -> None:
        async with opened(container(None, task)):
            pass

    healthy = built('HEALTHCHECK --interval=0.2s CMD [ -e /ok ] || { touch /ok; exit 1; }\n')
    asyncio.run(start(healthy))
    ill = built('HEALTHCHECK --interval=0.1s --retries=1 CMD echo no luck; exit 1\n')
    with pytest.raises(SandboxError, match=r"built: the image's HEALTHCHECK fails; .*no luck"):
        asyncio.run(start(ill))
    ended = built('ENTRYPOINT ["/bin/sh", "-c", "echo good bye >&2; exit 3"]\n')
    with pytest.raises(SandboxError, match=r'built: the container ended at its start.*good bye'):
        asyncio.run(start(ended))
    no_bash = built('RUN rm -f /bin/bash /usr/bin/bash\n')
    with pytest.raises(SandboxError, match='the image has no bash; install it'):
        asyncio.run(start(no_bash))


def test_the_tasks_own_healthcheck(task, container):
    async def start(command: str, retries: int = 2, start_period_sec: float = 0.0) -> None:
        check = types.Healthcheck(
            command,
            interval_sec=0.05,
            start_interval_sec=0.05,
            retries=retries,
            start_period_sec=start_period_sec,
        )
        async with opened(container(None, dataclasses.replace(task, healthcheck=check))):
            pass

    asyncio.run(start('[ -e /ok ] || { touch /ok; false; }'))
    # As in Harbor, a run that begins in the start period does not count, whenever it ends.
    asyncio.run(start('[ -e /ok ] || { touch /ok; sleep 1; false; }', 1, 0.5))
    with pytest.raises(SandboxError, match=r'the healthcheck .* failed 2 times .*: no luck$'):
        asyncio.run(start('echo no luck; false'))


def test_a_late_command_takes_along_what_it_started_and_no_more(task, container):
    async def main():
        async with opened(container(None)) as sandbox:
            await sandbox.run(
                '(while :; do echo x >> /tmp/beat; sleep 0.1; done) & sleep 333 &', SEC
            )
            await asyncio.sleep(0.1)
            late = await sandbox.run(
                'setsid bash -c "sleep 61 & exec sleep 62" & (setsid sleep 63 &); sleep 64', 0.5
            )
            left = await sandbox.run('cat /proc/[0-9]*/cmdline | tr "\\0" " "', SEC)
            beat = await sandbox.run(
                'a=$(wc -l </tmp/beat); sleep 0.5; echo $(($(wc -l </tmp/beat) - a))', SEC
            )
            return late.timed_out, left.stdout, int(beat.stdout)

    timed_out, left, beats = asyncio.run(main())
    assert timed_out and beats > 1
    assert 'sleep 333' in left and 'sleep 6' not in left


@pytest.mark.parametrize('user', [0, None])
def test_an_agent_that_removes_bash_has_no_shell_but_a_verdict(task, container, user):
    tests = task.path / 'tests'
    tests.mkdir()
    (tests / 'test.sh').write_text('#!/bin/sh\necho 1 > /logs/verifier/reward.txt\n')

    async def main():
        async with opened(container(user, shell='fresh')) as sandbox:
            await sandbox.run('rm /bin/bash; kill -9 $PPID', SEC)
            return await sandbox.run('true', SEC), await sandbox.verify()

    after, verdict = asyncio.run(main())
    assert after.exit_code in (126, 127) and verdict.status == types.Status.VERIFIER_ERROR


@pytest.mark.parametrize(
    ('command', 'calls', 'reason'),
    [
        ('exit 3', ['exec_inspect'], 'read timed out'),
        ('sleep 60', ['exec_create', 'create_container'], 'cannot be ended'),
    ],
)
def test_an_engine_that_fails_is_not_the_agents_fault(
    container, used, monkeypatch, command, calls, reason
):
    """One that is so busy that a call runs out of time, though it lives, as the container does.
    That is made up, since no real engine is late when a test wants it.
    """

    def late(*arguments, **options):
        raise requests.exceptions.ReadTimeout('read timed out')

    async def main():
        async with opened(container(None)) as sandbox:
            for call in calls:
                monkeypatch.setattr(used.client.api, call, late)
            with pytest.raises(SandboxError, match=reason):
                await sandbox.run(command, 2.0)
            assert await sandbox.is_alive()

    asyncio.run(main())


def test_uploads_are_as_docker_makes_them(task, container, tmp_path):
    (tmp_path / 'up' / 'sub').mkdir(parents=True)
    (tmp_path / 'up' / 'sub' / 'key').write_text('k')
    (tmp_path / 'up' / 'sub' / 'key').chmod(0o600)

    async def main():
        async with opened(container(None)) as sandbox:
            await sandbox.run('mkdir -m 711 /srv/a; ln -s / /srv/link; echo x > /file', SEC)
            await sandbox.upload(tmp_path / 'up', '/srv/a/b/c d')
            await sandbox.upload(tmp_path / 'up' / 'sub' / 'key', '/srv/link/srv/it')
            with pytest.raises(SandboxError, match='cannot unpack into /file'):
                await sandbox.upload(tmp_path / 'up', '/file')
            return await sandbox.run(
                'stat -c "%a %U %n" /srv/a /srv/a/b "/srv/a/b/c d/sub/key"; cat /srv/it', SEC
            )

    assert asyncio.run(main()).stdout == (
        '711 root /srv/a\n755 root /srv/a/b\n600 root /srv/a/b/c d/sub/key\nk'
    )


def test_the_solution(task, container):
    solution = task.path / 'solution'
    solution.mkdir()
    (solution / 'solve.sh').write_text('#!/usr/bin/perl\nprint "$0 $ENV{A} ", `id -un`, `pwd`;\n')
    (solution / 'solve.sh').chmod(0o600)
    asking = dataclasses.replace(task, agent_user='nobody', solution_env={'A': 'x y'})

    async def main():
        async with opened(container(None, asking)) as sandbox:
            unreadable = await sandbox.solve()
            (solution / 'solve.sh').chmod(0o644)
            return unreadable, await sandbox.solve()

    unreadable, solved = asyncio.run(main())
    assert unreadable.exit_code != 0  # as in Harbor: the modes are the task's
    assert solved.stdout == '/solution/solve.sh x y nobody\n/\n'


def test_what_strict_does_not_follow_is_refused(task, made):
    asking = dataclasses.replace(task, agent_user='nobody', healthcheck=types.Healthcheck('true'))
    with pytest.raises(ValueError, match=r'task has \[agent\] user, \[environment.healthcheck\]'):
        docker.StrictSandbox(asking, images=made[1000])


def test_stop_leaves_nothing(task, container, used):
    def left() -> list[str]:
        return [c['Id'] for c in used.client.api.containers(all=True)]

    before = left()

    async def main():
        async with opened(container(None)) as sandbox:
            await sandbox.run('setsid sleep 100 & trap "" TERM HUP', SEC)
            assert len(left()) == len(before) + 1

    asyncio.run(main())
    assert soon(lambda: left() == before)
