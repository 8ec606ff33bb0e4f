"""Images of tasks on a real engine: built once, kept, fitted; and what happens when they fail."""

import asyncio
import dataclasses
import logging
import re
import time
import uuid

import pytest

from echo_jax import types
from echo_jax.sandbox import UID, SandboxError, docker
from echo_jax.sandbox.docker import images
from tests.support import docker_engine

SEC = 30.0


@pytest.fixture
def make(used):
    """make(...): Images that are closed at the end."""
    made = []

    def make(**options):
        made.append(
            images.Images(used, **{'network': False, 'backoff_sec': 0.01, 'user': UID} | options)
        )
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def task(tmp_path):
    """task(Dockerfile's lines after FROM, **fields of Task): a task that builds its image."""

    def task(lines: str, name: str = 'task', **fields) -> types.Task:
        environment = tmp_path / name / 'environment'
        environment.mkdir(parents=True, exist_ok=True)
        (environment / 'Dockerfile').write_text(f'FROM {docker_engine.BASE}\n{lines}')
        return types.Task(name, tmp_path / name, 'x', **fields)

    return task


def built(used) -> set[str]:
    return {image['Id'] for image in used.client.api.images(all=True)}


async def answers(made, task, *commands: str) -> list[str]:
    sandbox = docker.StrictSandbox(task, images=made)
    await sandbox.start()
    try:
        return [(await sandbox.run(command, SEC)).stdout for command in commands]
    finally:
        await sandbox.stop()


def test_what_a_dockerfile_says_holds_in_the_sandbox(task, make, used):
    made = task(
        'WORKDIR /srv/box\nENV NAME=value OTHER="two words" BASH_ENV=/srv/box/env\n'
        'COPY src/ ./src\nCOPY b.txt b.txt\n'
        'RUN chmod 600 b.txt && echo "echo sourced" > env && ln -s b.txt link && '
        'mkdir -p /app/deep /data && echo d > /app/deep/d && echo v > /data/v\n'
        'VOLUME /data\nHEALTHCHECK CMD touch /app/unhealthy\nUSER 4321\n'
        'ENTRYPOINT ["/bin/false"]\nCMD ["no"]\n',
        env={'NAME': "it's\n2"},
    )
    environment = made.path / 'environment'
    (environment / 'src').mkdir()
    (environment / 'src' / 'a.sh').write_text('#!/bin/sh\necho A')
    (environment / 'src' / 'a.sh').chmod(0o755)
    (environment / 'b.txt').write_text('B\n')
    volumes = used.client.api.volumes()['Volumes'] or []
    first, files, others, mine = asyncio.run(
        answers(
            make(),
            made,
            'pwd; echo "$NAME" $OTHER; id -u',
            'ls; src/a.sh; cat b.txt link; stat -c "%a %U" b.txt src/a.sh .',
            'cat /app/deep/d /data/v; ls /app; df --output=fstype /data | tail -1',
            'echo 1 > b.txt; echo 2 > /data/v; echo 3 > /app/deep/new; cat /data/v; bash -c true',
        )
    )
    assert first == "/srv/box\nit's\n2 two words\n1000\n"
    assert files == 'b.txt\nenv\nlink\nsrc\nA\nB\nB\n600 agent\n755 agent\n755 agent\n'
    assert others == 'd\nv\ndeep\ntmpfs\n'
    assert mine == '2\nsourced\n'
    assert (used.client.api.volumes()['Volumes'] or []) == volumes


def test_a_volume_of_roots_goes_with_the_container(task, make, used):
    made = task('VOLUME /data\n')
    text = asyncio.run(answers(make(user=0), made, 'echo 1 > /data/x; cat /data/x; whoami; pwd'))
    assert text == ['1\nroot\n/app\n']
    assert not (used.client.api.volumes()['Volumes'] or [])


def test_a_group_shares_one_build_and_runs_share_images(task, make, used):
    text = f'RUN echo {uuid.uuid4()} > /uuid\n'
    made, group = make(), task(text)

    async def draw(made):
        return await asyncio.gather(*(made.image(group) for _ in range(16)))

    before = built(used)
    (name,) = {image.name for image in asyncio.run(draw(made))}
    images = built(used)
    # Layers of RUN and labels, and of what is fitted to them; four builds at once would make 26.
    assert 0 < len(images - before) < 16
    assert {image.name for image in asyncio.run(draw(make()))} == {name}
    assert built(used) == images  # another run, another process: nothing is made again
    described = used.client.api.inspect_image(name)
    labels = described['Config']['Labels']
    assert labels['echo_jax.run'] == 'tests' and labels['echo_jax.task'] == 'task'

    other = task(text, 'same')
    (other.path / 'environment' / 'Dockerfile').touch()
    assert asyncio.run(make().image(other)).name == name
    (other.path / 'environment' / 'file').write_text('new')
    (other.path / 'environment' / 'Dockerfile').write_text(
        f'FROM {docker_engine.BASE}\nCOPY file /file\n'
    )
    assert asyncio.run(make().image(other)).name != name


def test_a_failure_is_tried_again_then_remembered(task, make, caplog):
    made, broken = make(attempts=3, remember_sec=2.0), task('RUN echo the reason >&2; exit 9\n')

    async def draw():
        return await asyncio.gather(
            *(made.image(broken) for _ in range(16)), return_exceptions=True
        )

    with caplog.at_level(logging.WARNING):
        errors = asyncio.run(draw())
    assert {type(error) for error in errors} == {SandboxError}
    message = str(errors[0])
    assert 'task: image not built' in message and 'the reason' in message and '\n' not in message
    assert [r.message.partition('; attempt ')[2][:9] for r in caplog.records] == [
        '2 follows',
        '3 follows',
    ]
    asyncio.run(draw())
    assert len(caplog.records) == 2  # no attempt
    time.sleep(2.0)
    task('RUN true\n')  # mended meanwhile
    assert asyncio.run(made.image(broken)).name


def test_builds_are_bounded_in_number_and_time(task, make):
    made = make(at_once=2, attempts=1)
    slow = [task(f'RUN echo {time.time()} && sleep 1\n', f'slow{number}') for number in range(4)]
    late = task('RUN sleep 60\n', 'late', build_timeout_sec=1)
    seen = []
    started = time.monotonic()
    failed = asyncio.run(made.build(slow, lambda task, error: seen.append((task.task_id, error))))
    assert failed == {} and sorted(seen) == [(f'slow{number}', None) for number in range(4)]
    assert time.monotonic() - started > 2.0
    started = time.monotonic()
    failed = asyncio.run(made.build([late]))
    assert list(failed) == ['late'] and time.monotonic() - started < 40
    assert 'imed out' in failed['late'] or 'took over 1 seconds' in failed['late']


def test_what_cannot_be_an_image(task, make, tmp_path, used):
    made = make(attempts=1)
    nothing = types.Task('nothing', tmp_path, 'x')
    with pytest.raises(ValueError, match='no image; give'):
        asyncio.run(made.image(nothing))
    link = task('COPY link /\n', 'link')
    (link.path / 'environment' / 'link').symlink_to('/etc/hostname')
    with pytest.raises(ValueError, match='leads outside'):
        asyncio.run(made.image(link))
    absent = types.Task('absent', tmp_path, 'x', docker_image='localhost:1/none:1')
    with pytest.raises(SandboxError, match='absent: image not pulled'):
        asyncio.run(made.image(absent))
    shell = task('RUN rm -f /bin/bash /usr/bin/bash\n', 'shell')
    with pytest.raises(SandboxError, match='has no bash'):
        asyncio.run(made.image(shell))


def test_one_bad_task_does_not_end_a_build(task, make):
    odd, good = task('RUN true\n', 'odd'), task('RUN true\n', 'good')
    (odd.path / 'environment' / '.dockerignore').write_text('[z-a]\n')  # re.error, from the SDK
    seen = []
    failed = asyncio.run(
        make().build([odd, good], lambda task, error: seen.append((task.task_id, type(error))))
    )
    assert list(failed) == ['odd'] and 'bad character range' in failed['odd']
    assert sorted(seen) == [('good', type(None)), ('odd', re.error)]


def test_a_build_fetches_the_image_of_the_tests(task, make, monkeypatch, caplog):
    """For plain sandboxes; with as many tries as the image of a task."""
    good = task('RUN true\n')
    assert asyncio.run(make(user=None).build([good])) == {}
    monkeypatch.setattr(images, 'TOOLS', 'localhost:1/none')
    assert asyncio.run(make().build([good])) == {}
    with caplog.at_level(logging.WARNING):
        failed = asyncio.run(make(user=None, attempts=3).build([good]))
    assert list(failed) == ['localhost:1/none']
    assert failed['localhost:1/none'].startswith('the tests: image not pulled: localhost:1/none')
    assert [r.message.partition('; attempt ')[2][:9] for r in caplog.records] == [
        '2 follows',
        '3 follows',
    ]


def test_an_image_that_the_engine_lost_is_made_again(task, make, used):
    made, lost = make(), task('RUN echo lost > /lost\n')

    async def main():
        name = (await made.image(lost)).name
        used.client.api.remove_image(name, force=True)
        with pytest.raises(SandboxError, match='try again'):
            await answers(made, lost, 'true')
        return await answers(made, lost, 'cat /lost')

    assert asyncio.run(main()) == ['lost\n']


def test_a_copy_that_does_not_fit_says_so(task, make):
    async def main():
        big = task('RUN mkdir /app && head -c 5000000 /dev/zero > /app/big\n')
        sandbox = docker.StrictSandbox(big, images=make(), disk_mb=2)
        with pytest.raises(SandboxError, match='/app does not fit in disk_mb'):
            await sandbox.start()

    asyncio.run(main())


def test_a_workdir_of_the_tasks_own(task, make):
    made = task('RUN mkdir -p "/srv/my box" && echo here > "/srv/my box/file"\n')
    made = dataclasses.replace(made, workdir='/srv/my box')
    assert asyncio.run(answers(make(), made, 'pwd; cat file; echo 1 > new; ls')) == [
        '/srv/my box\nhere\nfile\nnew\n'
    ]
