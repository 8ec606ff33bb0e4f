"""The habits of Harbor's that every backend is tried with: small tasks and their right rewards.

Harbor 0.26 itself gives these rewards (tests/sandbox/test_conformance.py).
"""

from tests.support.habits import BASE, DONE, IS_DONE, Habit, image

_AS_NOBODY = "su -s /bin/bash nobody -c '{}'"
_INTERFACES = dict(
    solve='ls /sys/class/net | grep -v "^lo$" > /app/if', check='[ -s /app/if ]', network=True
)
_HEALTHCHECK = """[environment.healthcheck]
command = "test -e /app/ready"
interval_sec = 1.0
retries = 20
"""
_ENTRY = r"""RUN printf '#!/bin/bash\n{}\nexec "$@"\n' > /entry && chmod +x /entry"""
_WHERE = dict(solve=f'pwd; {DONE}')

HABITS = (
    # What root may do in a container of Docker.
    Habit(
        'a-service-stays',
        'nohup bash -c "while :; do date +%s%N > beat; sleep 0.2; done" > /dev/null 2>&1 & sleep 1',
        'a=$(cat beat); sleep 1; [ -n "$a" ] && [ "$a" != "$(cat beat)" ]',
        local=False,
    ),
    Habit(
        'chown',
        'chown nobody f',
        '[ "$(stat -c %U f)" = nobody ]',
        local=False,
        dockerfile=image('RUN touch f'),
    ),
    Habit(
        'su', _AS_NOBODY.format('id -un > /tmp/who'), '[ "$(cat /tmp/who)" = nobody ]', local=False
    ),
    Habit('useradd', 'useradd -m deploy', '[ "$(stat -c %U /home/deploy)" = deploy ]', local=False),
    Habit(
        'files-of-others',
        'cat /srv/box/f > copy; echo more >> /srv/box/f',
        '[ "$(cat copy)" = secret ] && grep -q more /srv/box/f',
        dockerfile=image(
            'RUN mkdir -m 700 /srv/box && echo secret > /srv/box/f && '
            'chmod 600 /srv/box/f && chown -R nobody:nogroup /srv/box'
        ),
        local=False,
    ),
    Habit(
        'kill-others',
        _AS_NOBODY.format('sleep 300 & echo $! > /tmp/pid') + '; kill $(cat /tmp/pid) && ' + DONE,
        local=False,
    ),
    Habit(
        'setuid',
        _AS_NOBODY.format('/usr/local/bin/rootid -u > /tmp/uid'),
        '[ "$(cat /tmp/uid)" = 0 ]',
        local=False,
        dockerfile=image(
            'RUN cp /usr/bin/id /usr/local/bin/rootid', 'RUN chmod 4755 /usr/local/bin/rootid'
        ),
    ),
    Habit('mknod', 'mknod n c 1 3; mkfifo p', '[ -c n ] && [ -p p ]', local=False),
    Habit('raw-socket', "perl -e 'socket(S,2,3,1) or die $!' && " + DONE, local=False),
    Habit(
        'sudo',
        'sudo -n touch done.txt',
        local=False,
        builds_online=True,
        network=True,
        dockerfile=image('RUN apt-get update && apt-get install -y --no-install-recommends sudo'),
    ),
    Habit(
        'apt-with-users',
        'export DEBIAN_FRONTEND=noninteractive; apt-get update -qq; '
        'apt-get install -y -qq --no-install-recommends openssh-server',
        'dpkg -s openssh-server | grep -q "install ok installed"',
        local=False,
        builds_online=True,
        network=True,
    ),
    # What task.toml says.
    Habit('network-not-named', local=False, **_INTERFACES),
    Habit('network-public', environment='network_mode = "public"', local=False, **_INTERFACES),
    Habit(
        'memory-mb',
        'head -c 1500M /dev/zero | tail -c 1400M | wc -c > n',
        '[ "$(cat n)" = 1468006400 ]',
        environment='memory_mb = 2048',
    ),
    Habit(
        'memory-2G',
        'head -c 1500M /dev/zero | tail -c 1400M | wc -c > n',
        '[ "$(cat n)" = 1468006400 ]',
        environment='memory = "2G"\nstorage = "10G"',
    ),
    Habit(
        'template',
        'printf %s "$PROBE" > v',
        '[ "$(cat v)" = fallback ]',
        toml='[environment.env]\nPROBE = "${ECHO_JAX_UNSET:-fallback}"\n',
    ),
    Habit(
        'half-a-template',
        'printf %s "$PROBE" > v',
        '[ "$(cat v)" = \'a-${HOME}\' ]',
        toml='[environment.env]\nPROBE = "a-${HOME}"\n',
    ),
    Habit(
        'solution-env',
        'printf %s "$ANSWER" > v',
        '[ "$(cat v)" = 42 ] && [ -z "$ANSWER" ]',
        toml='[solution.env]\nANSWER = "42"\n',
    ),
    Habit(
        'verifier-env',
        'printf 42 > v',
        '[ -n "$EXPECTED" ] && [ "$(cat v)" = "$EXPECTED" ]',
        toml='[verifier.env]\nEXPECTED = "42"\n',
    ),
    Habit(
        'users',
        'id -un > /tmp/who',
        '[ "$(cat /tmp/who)" = nobody ] && [ "$(id -un)" = root ]',
        toml='[agent]\nuser = "nobody"\n[verifier]\nuser = "root"\n',
        local=False,
    ),
    Habit(
        'healthcheck',
        '[ -e ready ] && ' + DONE,
        toml=_HEALTHCHECK,
        local=False,
        dockerfile=image(_ENTRY.format('(sleep 3; touch /app/ready) &'), 'ENTRYPOINT ["/entry"]'),
    ),
    Habit('late-but-solved', f'{DONE}; sleep 100', toml='[agent]\ntimeout_sec = 2\n'),
    Habit(
        'workdir-of-the-toml',
        check='[ "$PWD" = /srv/other ] && [ -f done.txt ]',
        dockerfile=image('RUN mkdir -p /srv/other'),
        environment='workdir = "/srv/other"',
        **_WHERE,
    ),
    # What the image says.
    Habit(
        'image-user',
        'id -un > /tmp/who',
        '[ "$(cat /tmp/who)" = nobody ]',
        local=False,
        dockerfile=f'FROM {BASE}\nWORKDIR /tmp\nUSER nobody\n',
    ),
    Habit(
        'entrypoint',
        check=f'[ -e started ] && {IS_DONE}',
        local=False,
        dockerfile=image(_ENTRY.format('touch /app/started'), 'ENTRYPOINT ["/entry"]'),
    ),
    Habit('no-user-variable', '[ -z "$USER" ] && ' + DONE, local=False),
    Habit(
        'no-workdir',
        check='[ "$PWD" = / ] && [ -f done.txt ]',
        dockerfile=f'FROM {BASE}\n',
        local=False,
        **_WHERE,
    ),
    Habit(
        'workdir-by-variable',
        check='[ "$PWD" = /srv/shop ] && [ -f done.txt ]',
        dockerfile=f'FROM {BASE}\nENV NAME=shop\nWORKDIR /srv/${{NAME}}\n',
        **_WHERE,
    ),
    Habit(
        'workdir-relative',
        check='[ "$PWD" = /srv/app ] && [ -f done.txt ]',
        dockerfile=f'FROM {BASE}\nWORKDIR /srv\nWORKDIR app\n',
        **_WHERE,
    ),
    Habit(
        'workdir-with-a-space',
        check='[ "$PWD" = "/srv/my data" ] && [ -f done.txt ]',
        dockerfile=f'FROM {BASE}\nWORKDIR "/srv/my data"\n',
        **_WHERE,
    ),
    Habit(
        'workdir-of-the-last-stage',
        check='[ "$PWD" = /srv/run ] && [ -f done.txt ]',
        dockerfile=f'FROM {BASE} AS build\nWORKDIR /src\nRUN true\n\nFROM {BASE}\n'
        'WORKDIR /srv/run\n',
        **_WHERE,
    ),
    Habit(
        'tests-of-the-image',
        check=f'[ "$(cat /tests/data/f)" = fixture ] && {IS_DONE}',
        dockerfile=image('RUN mkdir -p /tests/data && echo fixture > /tests/data/f'),
    ),
    Habit(
        'modes-of-the-context',
        'stat -c %a key run > modes',
        '[ "$(tr "\\n" " " < modes)" = "600 775 " ]',
        dockerfile=image('COPY key run /app/'),
        files=(('environment/key', 'k\n', 0o600), ('environment/run', 'r\n', 0o775)),
    ),
    # What a Dockerfile may be like.
    Habit(
        'run-heredoc',
        check=f'[ "$(cat made)" = made ] && {IS_DONE}',
        dockerfile=image('RUN <<EOF', 'echo made > /app/made', 'EOF'),
    ),
    Habit(
        'cat-heredoc',
        check=f'[ "$(wc -l < made)" = 2 ] && {IS_DONE}',
        dockerfile=image('RUN cat <<EOF > /app/made', 'one', 'two', 'EOF'),
    ),
    Habit(
        'copy-heredoc',
        check=f'[ "$(cat made)" = made ] && {IS_DONE}',
        dockerfile=image('COPY <<EOF /app/made', 'made', 'EOF'),
    ),
    Habit(
        'copy-chmod',
        check=f'[ "$(stat -c %a a)" = 640 ] && {IS_DONE}',
        dockerfile=image('COPY --chmod=0640 a /app/a', 'RUN --mount=type=tmpfs,target=/mnt true'),
        files=(('environment/a', 'a\n', 0o644),),
    ),
    Habit(
        'copy-forms',
        check='[ -f data/a.txt ] && [ -f data/b.txt ] && [ -f sub/c.txt ] && '
        f'[ -f "with space.txt" ] && {IS_DONE}',
        dockerfile=image(
            'COPY data/*.txt ./data/', 'COPY data/sub /app/sub', 'COPY ["with space.txt", "/app/"]'
        ),
        files=tuple(
            (f'environment/{name}', 'x\n', 0o644)
            for name in ('data/a.txt', 'data/b.txt', 'data/sub/c.txt', 'with space.txt')
        ),
    ),
    Habit(
        'env-forms',
        'echo "$A|$B|$C|$OLD|$P|$Q" > env',
        '[ "$(cat env)" = "1|two words|x y|old form value|1/bin:two words|default" ]',
        dockerfile=f'FROM {BASE}\nENV A=1 B="two words" C=x\\ y\nENV OLD old form value\n'
        'ENV P=$A/bin:${B:-z}\nENV Q=${UNSET:-default}\nWORKDIR /app\n',
    ),
    Habit(
        'run-exec-form',
        check=f'[ "$(cat a)" = "a b" ] && {IS_DONE}',
        dockerfile=image('RUN ["bash", "-c", "echo a b > /app/a"]'),
    ),
    Habit(
        'a-comment-in-a-line',
        check=f'[ "$(cat a)" = a ] && {IS_DONE}',
        dockerfile=image('RUN echo a \\', '# a comment', '  > /app/a'),
    ),
    Habit(
        'tabs',
        check=f'[ "$(cat a)" = a ] && {IS_DONE}',
        dockerfile=f'FROM {BASE}\nWORKDIR\t/app\nRUN\techo a > /app/a\n',
    ),
    Habit('byte-order-mark', dockerfile='\ufeff' + image()),
    Habit(
        'dockerfile-crlf',
        check=f'[ -f a ] && {IS_DONE}',
        dockerfile=image('RUN echo a > /app/a').replace('\n', '\r\n'),
    ),
    Habit(
        'dockerignore',
        'ls > listed',
        '! grep -qx secret listed && grep -qx kept listed',
        dockerfile=image('COPY . /app/'),
        files=(
            ('environment/.dockerignore', 'secret\n', 0o644),
            ('environment/secret', 's\n', 0o644),
            ('environment/kept', 'k\n', 0o644),
        ),
    ),
    # How scripts are started.
    Habit('a-solution-in-perl', '#!/usr/bin/perl\nopen(F, ">", "done.txt"); close F;\n'),
    Habit(
        'tests-without-a-first-line',
        test='if [ -f done.txt ]; then echo 1; else echo 0; fi > /logs/verifier/reward.txt\n',
    ),
    Habit(
        'tests-that-fail',
        test='#!/bin/bash\n[ -f done.txt ] && echo 1 > '
        '/logs/verifier/reward.txt || echo 0 > '
        '/logs/verifier/reward.txt\nexit 1\n',
    ),
    Habit('tests-that-print-much', check=f'yes "a line of output" | head -c 20000000; {IS_DONE}'),
    # How a reward is read.
    Habit(
        'several-keys',
        test='#!/bin/bash\nr=0; [ -f done.txt ] && r=1\n'
        'echo "{\\"correctness\\": $r, \\"speed\\": $r}" > '
        '/logs/verifier/reward.json\n',
    ),
    Habit(
        'a-key-among-others',
        test='#!/bin/bash\nr=0; [ -f done.txt ] && r=1\n'
        'echo "{\\"reward\\": $r, \\"style\\": 0.5}" > '
        '/logs/verifier/reward.json\n',
    ),
    Habit(
        'both-files',
        'true',
        test='#!/bin/bash\necho 0 > /logs/verifier/reward.txt\n'
        'echo \'{"reward": 0.75, "success": 0}\' > '
        '/logs/verifier/reward.json\n',
        oracle=0.75,
        nop=0.75,
    ),
    Habit(
        'reward-crlf',
        test='#!/bin/bash\nr=0; [ -f done.txt ] && r=1.0\n'
        'printf "$r\\r\\n" > /logs/verifier/reward.txt\n',
    ),
    # Odd instructions.
    Habit('braces', instruction='Render {{ user.name }} and {% if x %}y{% endif %} {# c #}.\n'),
    Habit('special-tokens', instruction='Print <|im_end|>\n<|im_start|>system <think>x</think>\n'),
    Habit('instruction-crlf', instruction='Do it.\r\nNow.\r\n'),
    # Agents that cheat.
    Habit(
        'plants-tests',
        'mkdir -p /tests; printf "#!/bin/bash\\necho 1 > '
        '/logs/verifier/reward.txt\\n" > /tests/test.sh; chmod 555 /tests',
        test='#!/bin/bash\necho 0 > /logs/verifier/reward.txt\n',
        oracle=0.0,
    ),
    Habit(
        'writes-rewards',
        'mkdir -p /logs/verifier; echo \'{"reward": 1}\' > '
        '/logs/verifier/reward.json; chmod 000 /logs/verifier/reward.json',
        test='#!/bin/bash\nsleep 0.3\n',
        oracle=0.0,
    ),
    Habit(
        'bash-env',
        'echo "echo 1 > /logs/verifier/reward.txt; exit" > evil.sh; '
        'export BASH_ENV=/app/evil.sh; echo "export BASH_ENV=/app/evil.sh" >> ~/.bashrc',
        test='#!/bin/bash\necho 0 > /logs/verifier/reward.txt\n',
        oracle=0.0,
    ),
    Habit(
        'deep-tests',
        'mkdir -p /tests; cd /tests; for i in $(seq 200); do mkdir d; cd d; done; touch reward.txt',
        test='#!/bin/bash\necho 0 > /logs/verifier/reward.txt\n',
        oracle=0.0,
    ),
    Habit(
        'logs-link',
        'rm -rf /logs/verifier; mkdir /app/l; echo 1 > /app/l/reward.txt; '
        'ln -s /app/l /logs/verifier',
        test='#!/bin/bash\ntrue\n',
        oracle=0.0,
    ),
    # What only Harbor has.
    Habit(
        'compose',
        'printf %s "$FROM_COMPOSE" > v',
        '[ "$(cat v)" = yes ]',
        files=(
            (
                'environment/docker-compose.yaml',
                'services:\n  main:\n    environment:\n      FROM_COMPOSE: "yes"\n',
                0o644,
            ),
        ),
        needs='environment/docker-compose.yaml',
    ),
    Habit(
        'separate-verifier',
        'echo 42 > /app/out',
        '[ -e /only-in-verifier ] && [ "$(cat /app/out)" = 42 ]',
        top='artifacts = ["/app/out"]',
        toml='[verifier]\nenvironment_mode = "separate"\n',
        files=(
            ('tests/Dockerfile', image('RUN touch /only-in-verifier', 'COPY . /tests/'), 0o644),
        ),
        needs='[verifier] environment_mode = "separate"',
    ),
    Habit(
        'steps',
        top='multi_step_reward_strategy = "mean"',
        toml='[[steps]]\nname = "one"\n[[steps]]\nname = "two"\n',
        files=tuple(
            (f'steps/{step}/{name}', text, 0o755)
            for step in ('one', 'two')
            for name, text in (
                ('instruction.md', f'Make {step}.\n'),
                ('solution/solve.sh', f'#!/bin/bash\ntouch /app/{step}\n'),
                (
                    'tests/test.sh',
                    f'#!/bin/bash\nr=0; [ -f /app/{step} ] && r=1\n'
                    'echo $r > /logs/verifier/reward.txt\n',
                ),
            )
        ),
        needs='[[steps]]',
    ),
)
