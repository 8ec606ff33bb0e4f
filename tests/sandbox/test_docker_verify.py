"""The tests of a task in a plain container: as in Harbor, and out of reach of what the agent left.

Each trick is tried in the tests' own container and, as far as it goes, in the agent's (`inside`),
where the tests run if the engine allows no other.
"""

import asyncio
import contextlib
import dataclasses
import threading
import time

import docker
import pytest

from echo_jax import types
from echo_jax.sandbox import SandboxError, Verdict
from echo_jax.sandbox.docker import images
from tests.support.sandboxes import SEC, opened


@pytest.fixture
def fresh(made, used, monkeypatch):
    """fresh(**options): has `judge` use Images of its own."""
    with contextlib.ExitStack() as stack:

        def fresh(**options) -> None:
            own = images.Images(used, network=False, attempts=1, **options)
            monkeypatch.setitem(made, None, stack.enter_context(contextlib.closing(own)))

        yield fresh


@pytest.fixture(params=['beside', 'inside'])
def where(request, made, fresh):
    fresh(remember_sec=600.0)
    made[None].unprotected = 'asked by a test' if request.param == 'inside' else ''
    return request.param


@pytest.fixture
def judge(task, container, made):
    """judge(test.sh, the agent's commands..., **fields of Task): the verdict."""
    (task.path / 'tests').mkdir()

    async def main(asking, commands, options) -> Verdict:
        async with opened(container(None, asking, **options)) as sandbox:
            for command in commands:
                await sandbox.run(command, SEC)
            return await sandbox.verify()

    def judge(tests: str, *commands: str, options=None, may_fall_back=False, **fields) -> Verdict:
        (task.path / 'tests' / 'test.sh').write_text(tests)
        asking = dataclasses.replace(task, **fields)
        before = made[None].unprotected
        verdict = asyncio.run(main(asking, commands, options or {}))
        assert may_fall_back or made[None].unprotected == before
        return verdict

    return judge


REWARD = '/logs/verifier/reward.txt'
LOOP = "setsid nohup bash -c 'while :; do {}; sleep 0.01; done' >/dev/null 2>&1 &"
# By a name, what an agent leaves behind so that tests that write no reward, or 0, seem to write 1.
TRICKS = {
    'a reward': f'echo 1 > {REWARD}; chmod 0 {REWARD}',
    'a loop': LOOP.format(f'echo 1 > {REWARD}'),
    'json': LOOP.format('echo {\\"reward\\": 1} > /logs/verifier/reward.json'),
    'a folder moved away': LOOP.format(
        f'mv /logs /l$RANDOM; mkdir -p /logs/verifier /tests; echo 1 > {REWARD}'
    ),
    'a link': 'rm -rf /logs; mkdir -p /x/verifier; ln -s /x /logs; echo 1 > /x/verifier/reward.txt',
    'links': 'rm -rf /logs/verifier; ln -s /proc/1/root/tmp /logs/verifier; ln -s / /tests',
    'tests': f'mkdir -p /tests; echo "echo 1 > {REWARD}" | tee /tests/test.sh /tests/conftest.py',
    'deep tests': 'mkdir -p /tests; cd /tests; for i in {1..200}; do mkdir -m 700 d; cd d; done',
}
# What reaches the tests' own container alone, and there to no avail.
LATE_TRICKS = {
    'tests, again and again': LOOP.format(f'echo "echo 1 > {REWARD}" > /tests/test.sh'),
    'after the tests appear': LOOP.format(f'[ -e /tests/test.sh ] && echo 1 > {REWARD}'),
    'a removed mountpoint': LOOP.format(
        f'rm -rf /tests /logs; mkdir -p /logs/verifier; echo 1 > {REWARD}'
    ),
    "through the tests' processes": LOOP.format(
        f'for p in /proc/[0-9]*; do echo 1 > $p/root{REWARD}; echo 1 > $p/cwd{REWARD}; '
        'for f in $p/fd/*; do echo 1 > $f; done; done'
    ),
    'ptrace': LOOP.format(
        'for p in /proc/[0-9]*; do grep -q test.sh $p/cmdline && perl -e "exit 1 if '
        'syscall(101, 16, shift, 0, 0)" ${p#/proc/} && touch /tmp/traced; done'
    ),
}  # fmt: skip
# What hinders the container of the tests.
HINDRANCES = {
    'names that come and go': 'setsid nohup perl -e \'while (1) { mkdir "/zz$_" for 1..20; '
    'rmdir "/zz$_" for 1..20 }\' >/dev/null 2>&1 & sleep 0.2',
    'killed helpers': "setsid nohup perl -e 'while (1) { for $p (</proc/[0-9]*>) { "
    'open F, "$p/comm" or next; $_ = <F>; kill 9, $p =~ /(\\d+)/ if /^(mkdir|mount|tar)$/ } }\' '
    '>/dev/null 2>&1 &',
    'no /etc': 'mv /etc /e; touch /etc',
}


@pytest.mark.parametrize('trick', TRICKS)
def test_no_reward_of_the_agents(judge, where, trick):
    verdict = judge('#!/bin/bash\nsleep 0.5\n', TRICKS[trick])
    assert verdict.reward == 0 and verdict.status == types.Status.VERIFIER_ERROR, verdict
    assert 'neither' in verdict.reason


@pytest.mark.parametrize('trick', LATE_TRICKS)
@pytest.mark.parametrize('user', [None, 'nobody'])
def test_no_reward_of_the_agents_while_tests_run(judge, trick, user):
    verdict = judge(
        f'#!/bin/bash\nsleep 1\n[ ! -e /tmp/traced ] || echo traced\n'
        f'echo 0.25 > {REWARD}\nsleep 0.2\n',
        LATE_TRICKS[trick],
        agent_user=user,
        verifier_user=user,
    )
    assert verdict[:2] == (0.25, types.Status.OK) and 'traced' not in verdict.output, verdict


@pytest.mark.parametrize('hindrance', HINDRANCES)
def test_an_agent_cannot_bring_the_tests_within_its_reach(judge, made, fresh, hindrance):
    """Neither its own nor, as `judge` looks, those of the next tasks."""
    fresh()
    tests = f'#!/bin/bash\nsleep 1\necho 0.25 > {REWARD}\nsleep 0.2\n'
    assert judge(tests).reward == 0.25 and made[None].protects  # on this engine that can be
    verdict = judge(tests, LATE_TRICKS['after the tests appear'], HINDRANCES[hindrance])
    assert verdict[:2] == (0.25, types.Status.OK), verdict


def test_a_service_of_the_image_that_hinders_the_tests(judge, fresh, task):
    """It is not ended, so there is no reward. But the next tasks have theirs."""
    fresh()
    environment = task.path / 'environment'
    environment.mkdir()
    (environment / 'hinder').write_text(
        'mkdir "/a$_" for 1..200; while (1) { rename "/a$_", "/b$_" for 1..200; '
        'rename "/b$_", "/a$_" for 1..200 }'
    )
    (environment / 'Dockerfile').write_text(
        f'FROM {task.docker_image}\nCOPY hinder /\n'
        'HEALTHCHECK --interval=1s CMD true\n'  # so that it begins before the agent may
        'ENTRYPOINT ["bash", "-c", "perl /hinder & exec \\"$@\\"", "-"]\n'
    )
    verdict = judge(f'#!/bin/bash\necho 1 > {REWARD}\n', docker_image=None)
    assert verdict[:2] == (0.0, types.Status.VERIFIER_ERROR), verdict
    assert 'no root for the tests' in verdict.reason


def test_start_up_files_of_the_agents(judge, where):
    """Nothing that a shell of the agent's would read, or find first on its PATH, is the tests'."""
    verdict = judge(
        f'#!/bin/bash\nls / >/dev/null; env | sort\necho 0.5 > {REWARD}\n',
        f'for f in ls env sort bash; do printf "#!/bin/sh\\necho 1 > {REWARD}; kill -9 \\$PPID" > '
        '/tmp/$f; chmod +x /tmp/$f; done; export PATH=/tmp:$PATH BASH_ENV=/tmp/ls ENV=/tmp/ls; '
        'cp /tmp/ls ~/.bashrc; cp /tmp/ls ~/.profile; cp /tmp/ls ~/.bash_profile; alias ls=false; '
        'ls() { false; }; export -f ls; trap "echo t" DEBUG',
        verifier_env={'A': 'x y'},
    )
    assert verdict[:2] == (0.5, types.Status.OK), verdict
    names = {line.partition('=')[0] for line in verdict.output.splitlines()}
    assert names == {'A', 'HOME', 'HOSTNAME', 'PATH', 'PWD', 'SHLVL', '_'}
    assert 'A=x y' in verdict.output and 'PATH=/usr/local/sbin' in verdict.output


@pytest.mark.parametrize(('user', 'home'), [(None, '/root'), (4321, '')])
def test_packages_of_the_accounts_own(judge, where, user, home):
    """What pip put there is the tests' too, as in Harbor, but no module that Python starts with."""
    site = f'{home}/.local/lib/python3.11/site-packages'
    verdict = judge(
        f'#!/bin/bash\nls ~/.local/lib/python3.11/site-packages\necho 1 > {REWARD}\n',
        f'mkdir -p {site}/usercustomize; cd {site}; touch six.py usercustomizes.py '
        f'usercustomize.py sitecustomize.py sitecustomize.so; chown -R {user or 0} {home}/.local; '
        f'chmod 555 {site}; chmod 111 {home}/.local/lib',
        verifier_user=user,
    )
    assert verdict.reward == 1 and verdict.output == 'six.py\nusercustomizes.py\n', verdict


def test_what_the_agent_left_running_is_there(judge, where):
    tests = f"""#!/bin/bash
a=$(cat /app/beat); sleep 0.5; [ "$a" != "$(cat /app/beat)" ] && echo beats
cat /proc/[0-9]*/comm 2>/dev/null | grep -c perl; head -1 < /dev/tcp/127.0.0.1/8080
cat /dev/shm/shared /volume/v /new/n /top; echo back > /app/back; mkdir /made && echo made
echo 1 > {REWARD}
"""
    verdict = judge(
        tests,
        'mkdir -p /app /new; (while :; do date +%N > /app/beat; sleep 0.1; done) &',
        "perl -MIO::Socket::INET -e '$s = IO::Socket::INET->new(LocalPort => 8080, Listen => 1) or "
        'die; while ($c = $s->accept) { print $c "hello\\n" }\' &',
        'echo shared > /dev/shm/shared; mkdir -p /volume; echo v > /volume/v; echo n > /new/n; '
        'echo top > /top; sleep 0.3',
    )
    assert verdict.output == 'beats\n1\nhello\nshared\nv\nn\ntop\nmade\n', verdict
    assert verdict.reward == 1


def test_what_the_agent_left_running_is_ended_if_asked(judge, where):
    verdict = judge(
        f'#!/bin/bash\ncat /proc/[0-9]*/comm 2>/dev/null | grep -c sleep\necho 1 > {REWARD}\n',
        'sleep 99 & setsid sleep 99 &',
        options={'kill_agent_processes': True},
    )
    assert verdict.output == '0\n' and verdict.reward == 1


def test_users_rights_and_place(judge, where):
    tests = f"""#!/bin/bash
id -un; echo $HOME; pwd
grep -E '^(CapBnd|Seccomp):' /proc/self/status | cut -f2 | tr '\\n' ' '; echo
stat -c "%a %U" /tests/test.sh
touch /logs/verifier/x /logs/agent/x /logs/artifacts/x && echo 1 > {REWARD}
"""
    for user in (None, 'nobody', 65534, 4321):
        verdict = judge(tests, 'touch /logs/agent/mine', verifier_user=user, workdir='/opt/it')
        assert verdict.reward == 1, verdict
        name, home, place, rights, script = verdict.output.splitlines()[-5:]
        assert name == {None: 'root', 4321: ''}.get(user, 'nobody') or user == 4321
        assert home == {None: '/root', 4321: '/'}.get(user, '/nonexistent')
        assert place == '/opt/it' and script == '755 root'
        assert rights in ('00000000a80425fb 2 ', '00000008a80425fb 2 ')  # and one more


def test_ends_of_the_tests(judge, where):
    late = judge(f'#!/bin/bash\necho 1 > {REWARD}\necho here\nsleep 60\n', verifier_timeout_sec=1.0)
    assert late.reward == 0 and 'over their 1 seconds' in late.reason and late.output == 'here\n'
    left = judge(f'#!/bin/sh\nsleep 60 &\nsetsid sleep 60 &\necho 1 > {REWARD}\nexit 3\n')
    assert left[:2] == (1.0, types.Status.OK)
    plain = judge(f'echo "[${{BASH_VERSION:+bash}}]"; echo 1 > {REWARD}')  # no first line
    assert plain.reward == 1 and plain.output == '[bash]\n'
    stopped = judge(f'#!/bin/bash\necho 1 > {REWARD}\nkill -9 $$\n')
    assert stopped.reward == 1  # as in Harbor


def test_a_tests_container_that_somebody_removes(judge, daemon):
    """Before it has started that is the engine's failure, and after that may be the agent's."""
    ended = threading.Event()

    def remove(api: docker.APIClient) -> None:
        while not ended.is_set():
            for found in api.containers(all=True, filters={'name': '-tests'}):
                with contextlib.suppress(docker.errors.APIError):
                    api.remove_container(found['Id'], force=True)

    with contextlib.closing(docker.APIClient(daemon.url)) as api:
        removing = threading.Thread(target=remove, args=(api,))
        removing.start()
        try:
            for _ in range(5):
                with contextlib.suppress(SandboxError):
                    verdict = judge(f'#!/bin/bash\necho 1 > {REWARD}\nsleep 1\n')
                    assert verdict.reward == 0 and 'were killed' in verdict.reason
        finally:
            ended.set()
            removing.join()


def test_what_the_image_has_in_tests_stays(judge, where, task):
    environment = task.path / 'environment'
    environment.mkdir()
    (environment / 'Dockerfile').write_text(
        f'FROM {task.docker_image}\nWORKDIR /w\nRUN mkdir -p /tests/own /w/data\n'
        'RUN echo own > /tests/own/a && chmod 600 /tests/own/a && chown nobody /tests/own && '
        'echo no > /tests/test.sh\nVOLUME /w/data\n'
    )
    verdict = judge(
        f'#!/bin/bash\ncat /tests/own/a; stat -c "%a %U" /tests/own/a; stat -c %U /tests/own; ls '
        f'/tests; cat /w/data/v; echo 1 > {REWARD}\n',
        'echo v > /w/data/v; echo forged > /tests/own/a; touch /tests/more',
        docker_image=None,
    )
    assert verdict.output == 'own\n600 root\nnobody\nown\ntest.sh\nv\n', verdict


def test_a_full_container_has_a_verdict(judge):
    """What the agent left in its own disk, memory and processes does not take the tests' away."""
    verdict = judge(
        f'#!/bin/bash\necho 0.5 > {REWARD}\n',
        'for i in {1..60}; do sleep 99 & done',
        options={'processes': 40},
    )
    assert verdict.reward == 0.5, verdict


@pytest.mark.parametrize(
    ('workdir', 'seen'), [('/w', 'setup.cfg\n'), ('/', 'pytest.ini\nsetup.cfg\n')]
)
def test_pytests_files_above_the_tests(judge, task, workdir, seen):
    """Those of the image stay; those of the agent do, if it is to work there."""
    environment = task.path / 'environment'
    environment.mkdir()
    (environment / 'Dockerfile').write_text(
        f'FROM {task.docker_image}\nRUN touch /setup.cfg\nWORKDIR {workdir}\n'
    )
    verdict = judge(
        f'#!/bin/bash\ncd /; ls *.ini *.cfg 2>/dev/null; echo 1 > {REWARD}\n',
        'touch /pytest.ini',
        docker_image=None,
    )
    assert verdict.output == seen


def test_without_a_trusted_image_the_tests_run_inside(judge, fresh, monkeypatch, caplog):
    fresh(remember_sec=600.0)
    monkeypatch.setattr(images, 'TOOLS', 'localhost:1/none')
    for _ in range(2):
        assert judge(f'#!/bin/bash\necho 0.5 > {REWARD}\n', may_fall_back=True).reward == 0.5
    (line,) = caplog.messages
    assert 'within the reach' in line and 'localhost:1/none' in line


def test_a_trusted_image_that_could_not_be_had_for_a_while(judge, fresh, monkeypatch):
    fresh(remember_sec=0.5)
    tests = f'#!/bin/bash\ngrep ^CapBnd: /proc/self/status | cut -f2\necho 1 > {REWARD}\n'
    with monkeypatch.context() as registry:
        registry.setattr(images, 'TOOLS', 'localhost:1/none')
        assert judge(tests, may_fall_back=True).output == '00000000a80425fb\n'
    time.sleep(0.5)
    assert judge(tests).output == '00000008a80425fb\n'  # WAKE_ALARM, in a container of their own
