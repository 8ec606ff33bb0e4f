"""The environment that a local sandbox makes of a task's Dockerfile. Linux only."""

import asyncio
import json
import os
import pathlib
import shutil

import pytest

from echo_jax import types
from echo_jax.sandbox import CommandResult, SandboxError, channels, local
from tests.support.processes import descendants, soon
from tests.support.sandboxes import SEC, opened


@pytest.fixture
def environment(task) -> pathlib.Path:
    (task.path / 'environment').mkdir()
    return task.path / 'environment'


@pytest.fixture
def made(task, environment, backend):
    """made(dockerfile, command, files): the command's result in the environment it makes."""

    def make(text: str, command: str, files: dict[str, str] = {}) -> CommandResult:  # noqa: B006
        for name, content in files.items():
            (environment / name).parent.mkdir(parents=True, exist_ok=True)
            (environment / name).write_text(content)
        (environment / 'Dockerfile').write_text(text)

        async def main():
            async with opened(local.LocalSandbox(task, backend=backend)) as sandbox:
                return await sandbox.run(command, SEC)

        return asyncio.run(main())

    return make


def test_dockerfile_is_followed(made):
    result = made(
        '# a comment\nFROM debian:bookworm\nWORKDIR /srv/box\nENV NAME=value OTHER="two words"\n'
        'COPY src/ ./src\nCOPY b.txt $NAME.txt\n'
        'RUN cat src/a.txt value.txt > made \\\n && echo $OTHER >> made && export LOST=1\n'
        'RUN ["touch", "with space"]\n',
        'pwd; ls -1; cat made; echo $NAME $LOST.; echo ok > w; cat w',
        {'src/a.txt': 'A', 'b.txt': 'B'},
    )
    expected = '/srv/box\nmade\nsrc\nvalue.txt\nwith space\nABtwo words\nvalue .\nok\n'
    assert result == CommandResult(expected, '', 0, False)


def test_new_directories_of_any_name_can_be_written(made):
    names = ['a b', r'back\slash', r'\040', 'tab\there', '#hash', 'new\nline', ' edge ']
    quoted = [channels.quote(f'/{name}') for name in names]
    made_them = ', '.join(json.dumps(f'/{name}') for name in names)
    result = made(
        f'FROM debian:bookworm\nWORKDIR /app\nRUN ["mkdir", {made_them}]\n',
        f'for d in {" ".join(quoted)}; do echo ok >"$d/w" && cat "$d/w"; done',
    )
    assert result == CommandResult('ok\n' * len(names), '', 0, False)


def test_copies_are_those_of_buildkit(made, environment):
    """The list is what BuildKit (Docker 26.1.5) made of the same files, by the same `find`."""
    for name in ('data/sub', 'd1', 'd2', 'empty', 'rootfs/usr/local/bin', 'logs'):
        (environment / name).mkdir(parents=True)
    (environment / 'data/b.txt').write_text('b')
    (environment / 'data/b.txt').chmod(0o640)
    (environment / 'data/link').symlink_to('a.txt')
    (environment / 'data/abs').symlink_to('/etc/hostname')
    (environment / 'dlink').symlink_to('data')
    (environment / 'data/sub').chmod(0o700)
    (environment / 'rootfs/usr/local/bin/tool').write_text('x')
    (environment / 'rootfs/usr/local/bin/tool').chmod(0o755)
    files = dict.fromkeys(
        ('data/a.txt', 'data/sub/c.txt', 'data/sub/deep/.d', '.hidden', 'sp ace.txt', 'd1/one'), 'x'
    )
    files |= dict.fromkeys(('d2/two', 'skip.log', 'logs/keep.log', 'logs/no.log'), 'x')
    files['.dockerignore'] = '# c\n*.log\nlogs\n!logs/keep.log\n**/deep\n'
    result = made(
        'FROM debian\nWORKDIR /app/w\nCOPY data/*.txt ./data/\nCOPY data/sub /app/sub\n'
        'COPY d[12]* /app/glob/\nCOPY ["sp ace.txt", "/app/"]\nCOPY data/a.txt /app\n'
        'COPY data/a.txt /app/renamed\nCOPY --chmod=0711 data/a.txt data/b.txt /app/mod/\n'
        'COPY --chmod=600 data/sub /app/submod\nCOPY dlink/a.txt /app/vialink.txt\n'
        'COPY dlink /app/dlinkdir\nCOPY data/link /app/linkfile\nCOPY . /app/dot\n'
        'COPY rootfs/ /\nCOPY data/?.t[x]t /app/q/\nADD d1/one /app/added\nCOPY empty /app/empty\n',
        r'cd /; find app usr/local/bin/tool -mindepth 1 \( -type l -printf "l %p %l\n" '
        r'-o -printf "%m %p\n" \) | sort -k2; find usr/local/bin/tool -printf "%m %p\n"',
        files,
    )
    assert result.stderr == ''
    assert sorted(result.stdout.splitlines()) == sorted(_COPIED.splitlines())


_COPIED = """\
644 app/a.txt
644 app/added
755 app/dlinkdir
644 app/dlinkdir/a.txt
l app/dlinkdir/abs /etc/hostname
640 app/dlinkdir/b.txt
l app/dlinkdir/link a.txt
700 app/dlinkdir/sub
644 app/dlinkdir/sub/c.txt
755 app/dot
644 app/dot/.dockerignore
644 app/dot/.hidden
644 app/dot/Dockerfile
755 app/dot/d1
644 app/dot/d1/one
755 app/dot/d2
644 app/dot/d2/two
755 app/dot/data
644 app/dot/data/a.txt
l app/dot/data/abs /etc/hostname
640 app/dot/data/b.txt
l app/dot/data/link a.txt
700 app/dot/data/sub
644 app/dot/data/sub/c.txt
l app/dot/dlink data
755 app/dot/empty
755 app/dot/logs
644 app/dot/logs/keep.log
755 app/dot/rootfs
755 app/dot/rootfs/usr
755 app/dot/rootfs/usr/local
755 app/dot/rootfs/usr/local/bin
755 app/dot/rootfs/usr/local/bin/tool
644 app/dot/sp ace.txt
755 app/empty
755 app/glob
644 app/glob/one
644 app/glob/two
644 app/linkfile
755 app/mod
711 app/mod/a.txt
711 app/mod/b.txt
755 app/q
644 app/q/a.txt
640 app/q/b.txt
644 app/renamed
644 app/sp ace.txt
755 app/sub
644 app/sub/c.txt
755 app/submod
600 app/submod/c.txt
644 app/vialink.txt
755 app/w
755 app/w/data
644 app/w/data/a.txt
640 app/w/data/b.txt
755 usr/local/bin/tool
"""


def test_run_heredocs_and_shells_are_those_of_buildkit(made):
    # `echo "a\nb"` in /bin/sh, which is dash in Debian and so in its images, is two lines.
    result = made(
        'FROM x\nWORKDIR /app\nENV A=1\nARG OWN="o w n"\n'
        'RUN <<EOF\ncat <<X > r1\n$A $OWN\nX\nprintf "%s" "$0" > r0\nEOF\n'
        "RUN cat <<EOF > r2 && cat <<'EOG' >> r2\n$A \\$A\nEOF\n$A\nEOG\n"
        'RUN <<EOF\n#!/usr/bin/env perl\nopen(F,">/app/r3"); print F "perl\\n";\nEOF\n'
        'SHELL ["/bin/bash", "-o", "pipefail", "-c"]\n'
        'RUN echo {1,2} > r4 \\\n# comment\n   && pwd >> r4\n'
        'RUN ["/bin/sh", "-c", "echo $A > r5"]\n'
        'COPY <<EOF <<"RAW" ./\nx $A \\$A\nEOF\nx $A\nRAW\n',
        'cat r0 r1 r2 r3 r4 r5 EOF RAW; ls',
    )
    assert result.stdout == (
        '/bin/sh1 o w n\n1 $A\n$A\nperl\n1 2\n/app\n1\nx 1 $A\nx $A\n'
        'EOF\nRAW\nr0\nr1\nr2\nr3\nr4\nr5\n'
    )


def test_a_dockerfile_writes_to_the_system_and_the_agent_does_not(made):
    result = made(
        'FROM x\nCOPY tool /usr/local/bin/\nCOPY tool /bin/tool2\nCOPY conf /etc/tool/\n'
        'RUN chmod +x /usr/local/bin/tool && ln -s tool /usr/local/bin/tool3 && mkdir -p /opt/a '
        '/var/lib/b && echo top > /entry && mkdir -p /usr/share/newdir\nWORKDIR /usr/src/app\n',
        'tool; tool3; cat /bin/tool2 | wc -l; cat /etc/tool/conf /entry; pwd; '
        'ls -d /usr/share/newdir; '
        'echo w > /opt/a/w && echo w > /var/lib/b/w && echo w > w && echo written; '
        'for d in / /usr/bin /usr/local/bin /etc /etc/tool; do '
        'touch $d/x 2>/dev/null && echo $d; done; '
        'ls -A / | grep "^[.]"; ls /usr/bin/env',
        {'tool': '#!/bin/sh\necho tool\n', 'conf': 'conf\n'},
    )
    assert result.stdout == (
        'tool\ntool\n2\nconf\ntop\n/usr/src/app\n/usr/share/newdir\nwritten\n/usr/bin/env\n'
    )


def test_a_runs_own_mounts_leave_nothing(made):
    result = made(
        'FROM x\nRUN --mount=type=tmpfs,target=/mnt --mount=type=cache,target=/root/.cache '
        'echo a > /mnt/a && echo b > /root/.cache/b && cat /mnt/a > /app/c\n',
        'cat /app/c; ls -A /mnt /root/.cache',
    )
    assert result.stdout == 'a\n/mnt:\n\n/root/.cache:\n'


@pytest.mark.parametrize(
    ('text', 'workdir'),
    [
        ('FROM x\n', '/'),
        ('FROM x\nWORKDIR /srv\nWORKDIR app\n', '/srv/app'),
        ('FROM x\nENV NAME=shop\nWORKDIR /srv/${NAME}\n', '/srv/shop'),
        ('FROM x\nWORKDIR "/srv/my data"\n', '/srv/my data'),
        ('FROM x AS a\nWORKDIR /src\nFROM y\nWORKDIR /srv/run\n', '/srv/run'),
        ('FROM x\nRUN true\nWORKDIR /usr/app\n', '/usr/app'),
        ('FROM x\nWORKDIR /var/tmp/a\n', '/var/tmp/a'),
    ],
)
def test_working_directories(made, text, workdir):
    result = made(text, 'pwd; [ "$PWD" = / ] || touch "$PWD/x"')
    assert result == CommandResult(f'{workdir}\n', '', 0, False)


def test_environment_is_built_without_the_tasks_own_variables(backend, tmp_path):
    (tmp_path / 'environment').mkdir()
    (tmp_path / 'environment/Dockerfile').write_text(
        'FROM x\nENV A=image\nENV B=${A}-${T} PATH=/opt/x:$PATH\nRUN echo "$A.$T" > /app/r\n'
    )
    task = types.Task('t', tmp_path, 'x', workdir='/app', env={'A': 'task', 'T': 'task'})

    async def main():
        async with opened(local.LocalSandbox(task, backend=backend)) as sandbox:
            return await sandbox.run('cat r; echo $A $B $T $PATH', SEC)

    path = '/opt/x:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin'
    assert asyncio.run(main()).stdout == f'image.\ntask image- task {path}\n'


@pytest.mark.parametrize(
    ('line', 'message'),
    [
        ('USER root', 'USER is not followed'),
        ('COPY ../../x /app/', 'leads outside'),
        ('COPY link /app/', 'leads outside'),
        ('COPY deep /app/', 'deep/link leads outside'),
        ('COPY nothing /app/', 'no such file in environment/: nothing'),
        ('COPY *.none /app/', 'nothing in environment/ matches'),
        ('COPY left.out /app/', 'which .dockerignore leaves out'),
        ('ADD a.tar /app/', 'ADD of an archive'),
        ('COPY pipe /app/', 'neither a file nor a directory'),
        ('COPY Dockerfile /proc/x', 'cannot copy to /proc/x'),
        ('COPY Dockerfile /etc/ssl/certs/', 'cannot copy to /etc/ssl/certs/: tar: '),
        ('RUN echo why >&2; false', "RUN .*'echo why.*ended with 1 in the local sandbox .*: why"),
        ('RUN chown nobody /app', 'ended with 1 .*chown'),
        pytest.param('RUN sleep 60', 'RUN did not end in the 2 s', marks=pytest.mark.slow),
    ],
)
def test_refusals(backend, tmp_path, line, message):
    environment = tmp_path / 'environment'
    (environment / 'deep').mkdir(parents=True)
    (environment / 'Dockerfile').write_text(f'FROM x\n{line}\n')
    (environment / 'link').symlink_to('/etc/hostname')
    (environment / 'deep' / 'link').symlink_to('../../secret')
    (environment / 'left.out').touch()
    (environment / '.dockerignore').write_text('left.*\n')
    shutil.make_archive(str(environment / 'a'), 'tar', environment, 'deep')
    os.mkfifo(environment / 'pipe')
    task = types.Task('t', tmp_path, 'x', build_timeout_sec=2.0)
    before = descendants(os.getpid())

    async def main():
        async with opened(local.LocalSandbox(task, backend=backend)):
            pass

    with pytest.raises((ValueError, SandboxError), match=message) as caught:
        asyncio.run(main())
    assert '\n' not in str(caught.value)
    # A build that took too long may do better in another sandbox; nothing else is tried again.
    assert isinstance(caught.value, SandboxError) == ('sleep' in line)
    assert soon(lambda: descendants(os.getpid()) <= before)


def test_files_that_are_no_utf8_are_refused(backend, tmp_path):
    (tmp_path / 'environment').mkdir()
    for name in ('Dockerfile', '.dockerignore'):
        (tmp_path / 'environment' / 'Dockerfile').write_text('FROM x\n')
        (tmp_path / 'environment' / name).write_bytes(b'FROM \xff\n')
        sandbox = local.LocalSandbox(types.Task('t', tmp_path, 'x'), backend=backend)
        with pytest.raises(ValueError, match=f'{name} is not UTF-8'):
            asyncio.run(sandbox.start())


@pytest.mark.parametrize('user', ['agent_user', 'verifier_user'])
def test_accounts_of_the_task_are_refused(tmp_path, user):
    task = types.Task('t', tmp_path, 'x', **{user: 'nobody'})
    with pytest.raises(ValueError, match=r"names the user 'nobody'.*'docker'"):
        local.LocalSandbox(task)


def test_without_a_dockerfile_the_environment_lies_in_the_working_directory(backend, tmp_path):
    (tmp_path / 'environment').mkdir()
    (tmp_path / 'environment/data').write_text('d')
    task = types.Task('t', tmp_path, 'x', docker_image='x', workdir='/work')

    async def main():
        async with opened(local.LocalSandbox(task, backend=backend)) as sandbox:
            return await sandbox.run('pwd; cat data', SEC)

    assert asyncio.run(main()).stdout == '/work\nd'


def test_modes_of_uploads_are_kept(task, backend, tmp_path):
    folder = tmp_path / 'folder'
    folder.mkdir()
    for name, mode in (('key', 0o600), ('run', 0o775), ('plain', 0o644), ('read', 0o444)):
        (folder / name).touch()
        (folder / name).chmod(mode)

    async def main():
        async with opened(local.LocalSandbox(task, backend=backend)) as sandbox:
            await sandbox.upload(folder, '/app/f')
            return await sandbox.run('cd f; stat -c "%a %n" *; cat *', SEC)

    # The agent is not root, so what it may not write would be out of its reach: 0444 is 0644 here.
    assert asyncio.run(main()).stdout == '600 key\n644 plain\n644 read\n775 run\n'


def health(**fields) -> types.Healthcheck:
    return types.Healthcheck(interval_sec=0.05, start_interval_sec=0.05, **fields)


@pytest.mark.parametrize(
    ('check', 'starts'),
    [
        (health(command='true'), True),
        (health(command='echo x >> n; [ $(wc -l < n) = 3 ]', retries=3), True),
        (health(command='echo x >> n; [ $(wc -l < n) = 3 ]', retries=2), False),
        (
            health(command='echo x >> n; [ $(wc -l < n) = 9 ]', retries=1, start_period_sec=20.0),
            True,
        ),
        # In Harbor, too, no failure counts there.
        (
            health(command='echo x >> n; [ $(wc -l < n) = 3 ]', retries=0, start_period_sec=20.0),
            True,
        ),
        (health(command='sleep 30', timeout_sec=0.2, retries=1), False),
    ],
)
def test_healthchecks(backend, tmp_path, check, starts):
    task = types.Task('t', tmp_path, 'x', healthcheck=check)

    async def main():
        async with opened(local.LocalSandbox(task, backend=backend)):
            pass

    if starts:
        asyncio.run(main())
        return
    with pytest.raises(SandboxError, match=f'the healthcheck .* failed {check.retries} times'):
        asyncio.run(main())


def test_what_the_image_has_in_tests_is_put_back(task, environment, backend):
    (environment / 'Dockerfile').write_text(
        'FROM x\nWORKDIR /app\nRUN mkdir -p /tests/data && echo fixture > /tests/data/f && '
        'chmod 600 /tests/data/f\n'
    )
    (task.path / 'tests').mkdir()
    (task.path / 'tests/test.sh').write_text(
        '#!/bin/bash\nfind /tests -type f | sort; cat /tests/data/f; stat -c %a /tests/data/f\n'
        '[ "$(cat /tests/data/f)" = fixture ] && echo 1 > /logs/verifier/reward.txt\n'
    )

    async def main():
        async with opened(local.LocalSandbox(task, backend=backend)) as sandbox:
            seen = await sandbox.run(
                'cat /tests/data/f; echo forged > /tests/data/f; touch /tests/conftest.py', SEC
            )
            return seen, await sandbox.verify()

    seen, verdict = asyncio.run(main())
    assert seen.stdout == 'fixture\n'
    assert verdict.reward == 1.0
    assert verdict.output == '/tests/data/f\n/tests/test.sh\nfixture\n600\n'
