"""Commands that mean harm in a real container on a real engine, and a container's limits.

In strict containers, where the agent is user 1000 or a root without power, and (user None) in plain
ones, where it is Docker's root.
"""

import asyncio
import dataclasses
import os
import time

import pytest

from echo_jax.sandbox import CommandResult
from echo_jax.sandbox.docker import containers
from tests.support.sandboxes import SEC, opened, results

# Time and quantity. (What an ordinary shell does is in test_sandboxes_agree.py.)


@pytest.mark.parametrize('user', [1000, None])
def test_timeout_kills_everything_started(in_container, user):
    late, where, found = in_container(
        'cd /tmp; echo begun; setsid sleep 61 & nohup sleep 62 >/dev/null 2>&1 & (sleep 63 &) ;'
        ' trap "" TERM; while :; do sleep 64; done',
        'pwd',
        'cat /proc/[0-9]*/comm | grep -c sleep',
        timeout=1,
        user=user,
    )
    assert (late.exit_code, late.timed_out, late.stdout) == (-1, True, 'begun\n')
    assert (where.stdout, found.stdout) == ('/\n' if user is None else '/app\n', '0\n')


@pytest.mark.parametrize('user', [1000, None])
def test_a_shell_that_leaves_background_behind(in_container, user):
    ended, alive, reaped = in_container(
        'cd /tmp; sleep 71 & exit 3',
        'pwd; pgrep() { cat /proc/[0-9]*/comm | grep -c $1; }; pgrep sleep',
        'for i in {1..20}; do (true &); done; sleep 0.2; pgrep true',
        user=user,
    )
    assert ended.exit_code == 3
    # The directory is the last one that was reported.
    assert alive.stdout == ('/\n1\n' if user is None else '/app\n1\n')
    assert reaped.stdout == '0\n'  # process 1 buries orphans


@pytest.mark.parametrize('user', [1000, None])
def test_endless_output_is_cut_and_ended(in_container, user):
    yes, err, big, kept = in_container(
        'yes',
        'cat /dev/zero >&2',
        'head -c 3000000 /dev/zero | tr "\\0" x; x=kept',
        'echo $x',
        user=user,
    )
    assert yes.stdout == 'y\n' * (1 << 19) and yes.exit_code == 137
    assert len(err.stderr) == 1 << 20 and err.exit_code == 137
    assert big.stdout == 'x' * (1 << 20) and big.exit_code == 0  # finite: only cut
    assert kept.stdout == 'kept\n'


def test_a_command_that_ends_in_time_is_not_late(in_container, monkeypatch):
    """Though the engine takes longer than its time to tell how much was written."""

    def tell(*arguments) -> bool:
        time.sleep(4)
        return False

    monkeypatch.setattr(containers, 'outgrown', tell)
    commands = ('echo done', 'sleep 1; echo done')  # the second is looked at while it runs
    for result in in_container(*commands, timeout=3, user=None):
        assert result == CommandResult('done\n', '', 0, False)


@pytest.mark.slow
@pytest.mark.parametrize('user', [1000, 0, None])
def test_fork_bomb_stays_inside(container, user):
    async def main():
        async with (
            opened(container(user, processes=40)) as bombed,
            opened(container(user, processes=40)) as other,
        ):
            bomb = asyncio.create_task(bombed.run(':(){ :|:& };: ; while :; do :; done', 2))
            await asyncio.sleep(1)
            assert (await other.run('ls / | wc -l', SEC)).exit_code == 0  # it has its own count
            assert (await bomb).timed_out
            count = await bombed.run('ls -d /proc/[0-9]* | wc -l', SEC)
            assert int(count.stdout) <= 5, count

    asyncio.run(main())


@pytest.mark.parametrize('user', [1000, None])
def test_memory_hog_fails_alone(in_container, user):
    hog, many, shared = in_container(
        'tail /dev/zero',
        'for i in 1 2 3; do tail /dev/zero & done; wait; echo over',
        'cat /dev/zero > /dev/shm/fill',
        memory_mb=64 if user else 192,  # Docker's /dev/shm has 64, which count
        disk_mb=32,
        processes=20,
        user=user,
    )
    assert hog.exit_code == 137
    assert many.stdout == 'over\n' or many.exit_code == 137  # the kernel may take the shell
    assert shared.exit_code in (1, 137)  # /dev/shm is full, or it counts as memory


def test_full_disk_is_the_sandboxs_own(in_container):
    free = os.statvfs('/tmp').f_bavail
    full, elsewhere, again, inodes = in_container(
        'for d in /app /tmp /logs/agent /dev/shm /root /tests /run /var/tmp /solution; do '
        'for i in 1 2 3; do head -c 5000000 /dev/zero > $d/fill$i; done; du -sb $d | cut -f1; done',
        'for d in $(find / -xdev -type d -writable 2>/dev/null); do echo x > $d/fill && echo $d; '
        'done 2>/dev/null; true',
        'rm /app/fill* /tmp/fill*; echo room > /app/a; cat /app/a',
        'for i in $(seq 300); do : > /tmp/$i; done',
        disk_mb=8,
        files=200,
        memory_mb=256,
    )
    sizes = [int(line) for line in full.stdout.split()]
    assert len(sizes) == 9 and all(5e6 < size <= 9e6 for size in sizes)
    assert full.stderr.count('No space left') == 2 * 9
    assert elsewhere.stdout == ''  # the rest cannot be written
    assert again.stdout == 'room\n'
    assert 'No space left' in inodes.stderr
    statvfs = os.statvfs('/tmp')
    assert (free - statvfs.f_bavail) * statvfs.f_frsize < 1 << 30


@pytest.mark.parametrize('user', [0, None])
def test_full_disk_of_root(in_container, user):
    many, mended, behind, again, sparse = in_container(
        'for i in $(seq 1000); do head -c 6000000 /dev/zero > /usr/$i; sleep 0.05; done',
        'rm /usr/[0-9]*; sleep 1.1; echo done',
        '(for i in 1 2; do head -c 6000000 /dev/zero > /usr/$i; done; sleep 30) & sleep 1.2',
        'rm /usr/[0-9]*',
        # None of it takes a block.
        'sleep 1.1; truncate -s 5G /usr/sparse && sleep 1.5 && stat -c %s /usr/sparse',
        user=user,
        disk_mb=8,
    )
    assert mended.stdout == 'done\n' and mended.exit_code == 0
    assert again.exit_code in (0, 137)
    assert sparse.stdout == f'{5 << 30}\n', sparse
    for result in (many, behind):
        assert result.exit_code == 137 and 'disk limit exceeded' in result.stderr


# Out of bounds.


@pytest.mark.parametrize('user', [1000, 0, None])
def test_no_network(task, container, user):
    offline = dataclasses.replace(task, network=False)
    commands = (
        "tail -n +3 /proc/net/dev | cut -d: -f1 | tr -d ' '",
        'echo > /dev/tcp/127.0.0.1/22',
        'echo > /dev/tcp/192.0.2.1/80',
    )
    found = asyncio.run(results(container(user, offline), commands, SEC))
    interfaces, loopback, out = found
    assert interfaces.stdout == 'lo\n'
    assert loopback.exit_code == 1 and 'Connection refused' in loopback.stderr
    assert out.exit_code == 1 and 'unreachable' in out.stderr


@pytest.mark.parametrize('user', [1000, None])
def test_a_network_only_where_the_task_asks_for_one(task, container, used, user):
    async def main(allowed: bool) -> str:
        asking = dataclasses.replace(task, network=allowed)
        async with opened(container(user, asking)) as sandbox:
            described = used.client.api.inspect_container(sandbox.container_name)
            return described['HostConfig']['NetworkMode']

    assert [asyncio.run(main(allowed)) for allowed in (False, True)] == ['none', 'echo_jax']


@pytest.mark.parametrize('user', [1000, None])
def test_sandboxes_do_not_reach_each_other(container, user):
    serve = (
        "perl -MIO::Socket::INET -e '$s = IO::Socket::INET->new(LocalPort => 8080, Listen => 1, "
        'ReuseAddr => 1) or die; while ($c = $s->accept) { print $c "hello\\n" }\' & sleep 0.5'
    )

    async def main():
        async with (
            opened(container(user)) as server,
            opened(container(1000)) as strict,
            opened(container(None)) as plain,
        ):
            await server.run(serve, SEC)
            address = (await server.run('hostname -i', SEC)).stdout.split()[0]
            ask = f'timeout 2 bash -c "head -1 < /dev/tcp/{address}/8080"'
            return [(await one.run(ask, SEC)).stdout for one in (server, strict, plain)]

    assert asyncio.run(main()) == ['hello\n', '', '']


def test_a_runtime_that_has_a_network_of_its_own(used):
    """Its strict containers would find no machine by its name in ours."""
    assert containers.is_native(used, None) and containers.is_native(used, 'runc')
    assert not containers.is_native(used, 'runsc')


@pytest.mark.parametrize('user', [0, None])
def test_no_engine_and_no_host_within_reach(task, container, used, user, monkeypatch, tmp_path):
    """No socket, no bind mount, no device, no variable of the host's."""
    task = dataclasses.replace(task, network=False)
    monkeypatch.setenv('SECRET_TOKEN', 'hunter2')

    async def main():
        async with opened(container(user, task)) as sandbox:
            described = used.client.api.inspect_container(sandbox.container_name)
            return described, [
                await sandbox.run(command, SEC)
                for command in (
                    'find / -xdev -type s; ls /var/run/docker.sock /run/docker.sock; '
                    'cat /proc/net/unix | wc -l',
                    'env; cat /proc/*/environ 2>/dev/null | tr "\\0" "\\n"; ls -A /home /mnt /srv',
                    'while read -r _ _ _ root at _; do echo $root $at; done < /proc/self/mountinfo',
                    'ls /dev',
                )
            ]

    described, (sockets, environ, mounts, devices) = asyncio.run(main())
    host = described['HostConfig']
    assert described['Mounts'] == [] and not host['Binds'] and not host['Devices']
    assert not host['Privileged'] and not host['CapAdd'] and host['PidMode'] == ''
    assert host['CapDrop'] == (['ALL'] if user == 0 else None)
    assert sockets.stdout == '1\n'  # only the header of /proc/net/unix
    assert 'hunter2' not in environ.stdout and 'SECRET' not in environ.stdout
    assert 'PATH=' in environ.stdout and str(tmp_path) not in environ.stdout
    binds = {line.split()[1] for line in mounts.stdout.splitlines() if line.split()[0] != '/'}
    engines = {'/etc/hosts', '/etc/hostname', '/etc/resolv.conf'}
    assert {at for at in binds if not at.startswith(('/proc', '/sys', '/dev'))} <= engines
    assert set(devices.stdout.split()) <= {
        *('core', 'fd', 'full', 'mqueue', 'null', 'ptmx', 'pts', 'random', 'shm', 'stderr'),
        *('stdin', 'stdout', 'tty', 'urandom', 'zero'),
    }


@pytest.mark.parametrize('user', [1000, 0])
def test_proc_and_device_tricks(in_container, user):
    proc, disks, mounts, cgroup, users = in_container(
        'for f in /proc/sys/kernel/core_pattern /proc/sys/vm/drop_caches /proc/sysrq-trigger '
        '/proc/sys/kernel/hostname /proc/1/oom_score_adj /sys/kernel/uevent_helper; do '
        '(echo b > $f) 2>/dev/null && echo wrote $f; done; '
        'head -c1 /proc/kcore /proc/kmsg /proc/timer_list 2>/dev/null | tr -d "\\0"; true',
        'mknod /tmp/disk b 8 0; mknod /tmp/mem c 1 1; ls /tmp/disk /tmp/mem',
        'mount -t tmpfs t /tmp; mount -t proc p /tmp; mount -o remount,rw /; umount /proc; '
        'chroot / true; pivot_root . .; hostname x; cat /proc/mounts | grep -c " /tmp "',
        'd=$(ls -d /sys/fs/cgroup /sys/fs/cgroup/*/ | tail -1); mkdir $d/x; '
        'echo /app/x > $d/release_agent; echo $$ > $d/cgroup.procs; echo max > $d/memory.max',
        'unshare --user --map-root-user id; unshare --mount true; nsenter -t 1 -m id; echo end',
        user=user,
    )
    assert 'wrote' not in proc.stdout.replace('wrote /proc/1/oom_score_adj', '')
    assert proc.stdout.count('==>') * 5 >= len(proc.stdout.split())  # headers, no content
    assert disks.stderr.count('Operation not permitted') == 2 and disks.stdout == ''
    assert mounts.stdout == ('1\n' if user else '0\n')
    assert cgroup.exit_code != 0 and cgroup.stdout == ''
    assert users.stdout == 'end\n'


def test_dockers_root_cannot_reach_the_host(in_container):
    """What its capabilities let it try, and a strict sandbox does not."""
    proc, disks, mounts, cgroup, spaces = in_container(
        'for f in /proc/sys/kernel/core_pattern /proc/sys/vm/drop_caches /proc/sysrq-trigger '
        '/proc/sys/kernel/hostname /sys/kernel/uevent_helper /proc/sys/net/ipv4/ip_forward; do '
        '(echo b > $f) 2>/dev/null && echo wrote $f; done; '
        'head -c1 /proc/kcore /proc/kmsg /proc/timer_list 2>/dev/null | tr -d "\\0"; true',
        'mknod /tmp/disk b 8 0; mknod /tmp/vda b 254 0; mknod /tmp/mem c 1 1; '
        'for d in disk vda mem; do head -c 1 /tmp/$d; echo x > /tmp/$d; done; true',
        'mount -t tmpfs t /tmp; mount -t proc p /tmp; mount -o remount,rw /; umount /proc; '
        'mount --bind / /mnt; pivot_root . .; hostname x; cat /proc/mounts | grep -c " /tmp "',
        'd=$(ls -d /sys/fs/cgroup /sys/fs/cgroup/*/ | tail -1); mkdir $d/x; '
        'echo /app/x > $d/release_agent; echo $$ > $d/cgroup.procs; echo max > $d/memory.max',
        'unshare --user id; unshare --mount true; nsenter -t 1 -m id; dmesg; swapon /tmp/x; '
        'date -s 2000-01-01 >/dev/null; insmod x; echo end',
        user=None,
    )
    assert 'wrote' not in proc.stdout
    assert proc.stdout.count('==>') * 5 >= len(proc.stdout.split())  # headers, no content
    assert disks.stdout == '' and disks.stderr.count('Operation not permitted') == 6, disks
    assert mounts.stdout == '0\n'
    assert cgroup.exit_code != 0 and cgroup.stdout == ''
    assert spaces.stdout == 'end\n', spaces


def test_dockers_capabilities(in_container):
    """As a container of Docker's own has them, and no variable that Docker would not set."""
    rights, env = in_container(
        'grep -E "^(CapEff|CapBnd|NoNewPrivs|Seccomp):" /proc/self/status | cut -f2',
        'bash -c env | sort | cut -d= -f1',
        user=None,
    )
    assert rights.stdout.split() == ['00000000a80425fb', '00000000a80425fb', '0', '2']
    assert set(env.stdout.split()) == {'HOME', 'HOSTNAME', 'PATH', 'PWD', 'SHLVL', '_'}


@pytest.mark.parametrize('user', [1000, 0])
def test_no_capabilities_and_no_way_to_get_any(in_container, user):
    status, seccomp, setuid, nice = in_container(
        'grep -E "^(Cap|NoNewPrivs)" /proc/self/status | cut -f2 | sort -u',
        'grep ^Seccomp: /proc/self/status | cut -f2',
        'find / -xdev -perm -4000 -exec {} --help \\; >/dev/null 2>&1; '
        'su -c id; chown 5:5 /app; grep CapEff /proc/self/status | cut -f2',
        'renice -n -5 $$; date -s 2000-01-01 >/dev/null; id -u',
        user=user,
    )
    assert status.stdout == '0000000000000000\n1\n'
    assert seccomp.stdout == '2\n'
    assert setuid.stdout.splitlines()[-1] == '0000000000000000'
    assert 'Operation not permitted' in setuid.stderr
    assert nice.stdout == f'{user}\n' and 'not permitted' in nice.stderr.lower()


@pytest.mark.parametrize('user', [1000, 0])
def test_process_1_can_be_neither_killed_nor_traced(in_container, user):
    killed, supervisor, traced, chmod = in_container(
        'sh -c "kill -9 -1"; kill -9 -1; echo still',
        'kill -9 1; kill -TERM 1; kill -STOP 1; kill -CHLD 1; [ -d /proc/1 ] && cat /proc/1/comm',
        'cat /proc/1/environ /proc/1/maps /proc/1/mem; readlink /proc/1/exe /proc/1/fd/*; '
        '(echo kill > /proc/1/fd/0); head -c 1 /proc/1/fd/7; '
        'perl -e \'print syscall(101, 16, 1, 0, 0), "\\n"; print $!, "\\n"\'',  # PTRACE_ATTACH
        'cat /usr/lib/echo_jax/init | head -c 4',
        user=user,
    )
    assert killed.exit_code in (0, 137)
    assert supervisor.stdout == 'init\n'
    assert traced.stdout == '-1\nOperation not permitted\n'
    assert chmod.stdout == '' and 'Permission denied' in chmod.stderr


def test_a_command_cannot_report_for_another(in_container):
    daemon, after, forged, last, quiet = in_container(
        '(while sleep 0.05; do for i in {1..20}; do echo "0 0 /" >&$i; done; done) 2>/dev/null &',
        'sleep 0.3; echo true words; false',
        'printf "%s 0 /\\n" {0..9}{a..f}; printf "\\036x\\n" >&2; false',
        'echo mine',
        'kill %1; for p in /proc/[0-9]*; do echo "x 0 /" > $p/fd/1; echo "x 0 /" > $p/fd/8; done '
        '2>/dev/null; false',
    )
    assert daemon.exit_code == 0
    assert after.exit_code == 1 and 'true words\n' in after.stdout
    assert forged.exit_code == 1 and '0a 0 /\n' in forged.stdout
    assert last.exit_code == 0 and 'mine\n' in last.stdout
    assert quiet.exit_code == 1


@pytest.mark.parametrize('user', [1000, None])
@pytest.mark.parametrize('behind', ['', '$(printf %05000d 7) /'])
def test_a_forged_report_is_output(in_container, user, behind):
    """A trap finds the number that the report will have, and prints it with no exit code, or one of
    more digits than Python reads.
    """
    trap = f'set -- $BASH_COMMAND; [ "$2" = printf ] && [ "$6" ] && echo "$6 {behind}"'
    _, forged, _ = in_container(
        f"trap '{trap}' DEBUG", 'echo words; (exit 3)', 'trap - DEBUG', user=user
    )
    assert forged.exit_code == 3
    assert forged.stdout.startswith('words\n') and forged.stdout.count('\n') == 2
