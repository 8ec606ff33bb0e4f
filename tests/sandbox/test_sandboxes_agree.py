"""The same commands through the local and the Docker sandbox give the same observation text."""

import asyncio

import pytest

from echo_jax import types
from echo_jax.agent.dialects.qwen3_xml import Command
from echo_jax.agent.observations import execute
from echo_jax.sandbox import UID, SandboxError, local

# In this order in one sandbox: what one leaves behind, the next ones see.
COMMANDS = [
    'pwd; whoami; id; umask; hostname',
    'env | sort',
    'echo $$ | grep -c .; echo $0 $# $- $SHLVL $?',
    'mkdir -p a/b && cd a/b && echo 1 > f && x=5 && g() { echo "g $x"; }; alias ll=ls',
    'g; pwd; echo oops >&2; (exit 7)',
    'echo $?',
    'printf "no newline"; printf "\\xff\\x00é" >&2',
    'echo a\nnope\necho b',
    'if (',
    'echo "unbalanced',
    "cat <<'EOF'\n$x `y` \\\nEOF\necho end",
    """printf '%s|' "it's" 'a\\b' "q\\"q" 'é' $'t\\tt'""",
    'echo a\0b',
    'printf %s "a\rb"',
    ' ',
    'cat; read x; echo "[$x]"; cat /dev/stdin; tty',
    'x=' + 'y' * 100_000 + '; echo ${#x}',
    'ls -la --time-style=+ .; stat -c "%A %U %n" /app /logs/* /tmp',
    'ls /proc/self/fd | wc -l',
    'nope | cat; echo ${PIPESTATUS[@]}; false',
    '(sleep 0.3; echo late) & echo now',
    'wait; echo after',
    'exit 3',
    'pwd; echo out; echo err >&2',
    'exec nonesuch',
    'exec echo replaced',
    'set -e; false',
    'kill -9 $$',
    'exec 1>&- 2>&-; echo lost',
    'exec </dev/null >/app/moved; echo x',
    'break; return 4',
    'trap "echo bye" EXIT; trap "" TERM; kill $$; exit 5',
    'set -x; echo traced; g() { :; }',
    'g; set +x',
    'cd /logs/agent; sleep 100',
    'pwd; jobs',
    'kill -9 -1; echo still',
    'seq 100000 | tail -c 2000000',
    'touch /usr/x /x; mkdir /etc/y; echo $?',
    'cat /etc/hostname; head -c 4 /dev/zero | wc -c; readlink /dev/fd /dev/stdin /dev/stderr',
    'ln -s /etc/passwd link; cut -d: -f1,3,6,7 link | grep agent; rm -rf /app/* .[!.]*; ls -A /app',
    'echo $((1/0)); echo "${nonesuch?unset}"; echo not reached',
]


def test_forty_commands(daemon, tmp_path, protocol_config):
    try:
        local.check()
    except SandboxError as error:
        pytest.skip(str(error))
    from echo_jax.sandbox import docker
    from echo_jax.sandbox.docker import engine, images
    from tests.support.docker_engine import BASE

    task = types.Task('agree', tmp_path, 'x', docker_image=BASE, env={'NAME': "it's\n2"})

    async def observe(sandbox) -> list:
        await sandbox.start()
        try:
            seen = []
            for command in COMMANDS:
                timeout = 0.5 if 'sleep 100' in command else 30
                call = Command('bash', {'command': command, 'timeout': str(timeout)})
                deadline = asyncio.get_running_loop().time() + 60
                seen.append(await execute([call], sandbox, protocol_config, deadline))
            return seen
        finally:
            await sandbox.stop()

    async def main():
        used = engine.Engine(daemon.url)
        made = images.Images(used, network=False, user=UID)
        try:
            return [
                await observe(local.LocalSandbox(task)),
                await observe(docker.StrictSandbox(task, images=made)),
            ]
        finally:
            made.close()
            used.close()

    ours, theirs = asyncio.run(main())
    assert len(COMMANDS) >= 40
    differ = {c: (a, b) for c, a, b in zip(COMMANDS, ours, theirs, strict=True) if a != b}
    assert differ == {}
    text = ''.join(span.text for spans, _ in ours for span in spans)
    for words in ('g 5\n/app/a/b', 'oops', 'timed out after 0.5', 'still', 'divi', 'ff' * 0 + '�'):
        assert words in text
