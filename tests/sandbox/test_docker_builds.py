"""Builds as `docker build` makes them, on a real engine: BuildKit, contexts, bases."""

import asyncio
import io
import pathlib
import tarfile
import textwrap
import uuid

import pytest

from echo_jax import types
from echo_jax.sandbox import SandboxError, docker
from echo_jax.sandbox.docker import builds, contexts, images
from echo_jax.sandbox.dockerfiles import parser
from tests.support import docker_engine
from tests.support.sandboxes import SEC, opened


@pytest.fixture
def environment(tmp_path) -> pathlib.Path:
    (tmp_path / 'task' / 'environment').mkdir(parents=True)
    return tmp_path / 'task' / 'environment'


@pytest.fixture
def build(used, environment):
    """build(Dockerfile, command): what the command prints in the image that was built."""
    made = images.Images(used, network=False, backoff_sec=0.01, attempts=1, remember_sec=0.0)
    task = types.Task('task', environment.parent, 'x')

    async def main(command: str) -> str:
        async with opened(docker.PlainSandbox(task, images=made)) as sandbox:
            return (await sandbox.run(command, SEC)).stdout

    def build(dockerfile: str, command: str = 'true') -> str:
        (environment / 'Dockerfile').write_text(textwrap.dedent(dockerfile))
        return asyncio.run(main(command))

    yield build
    made.close()


@pytest.fixture
def buildkit(used) -> None:
    api = used.client.api
    if api.get(f'{api.base_url}/_ping').headers.get('Builder-Version') != '2':
        pytest.skip("the engine's own builder is not BuildKit: it is older than 23.0")


def test_syntax_of_buildkit(build, environment, buildkit):
    (environment / 'file').write_text('x\n')
    printed = build(
        f"""\
        FROM {docker_engine.BASE}
        RUN <<EOF
        echo from flask import Flask > /made
        EOF
        COPY --chmod=0750 file /file
        COPY <<"TEXT" /text
        FROM nowhere $HOME
        TEXT
        RUN --mount=type=cache,target=/cache echo a > /cache/a
        """,
        'cat /made /text; stat -c %a /file; ls -A /cache',
    )
    assert printed == 'from flask import Flask\nFROM nowhere $HOME\n750\n'


def test_the_context_is_dockers(build, environment):
    """Modes as they are, and nothing that .dockerignore names."""
    for name, mode in {'key': 0o600, 'run': 0o775, 'logs/a': 0o644, 'logs/keep': 0o640}.items():
        (environment / name).parent.mkdir(exist_ok=True)
        (environment / name).write_text(name)
        (environment / name).chmod(mode)
    (environment / '.dockerignore').write_text('# a comment\n\nlogs/*\n!logs/keep\n.dockerignore\n')
    printed = build(
        f'FROM {docker_engine.BASE}\nWORKDIR /srv\nCOPY . .\n',
        'find . -type f -printf "%m %P %u\\n" | sort',
    )
    assert printed == '600 key root\n640 logs/keep root\n644 Dockerfile root\n775 run root\n'


def test_a_failure_says_what_the_step_printed(build, buildkit):
    with pytest.raises(SandboxError) as caught:
        build(f'FROM {docker_engine.BASE}\nRUN echo first\nRUN echo the reason >&2; exit 3\n')
    message = str(caught.value)
    assert 'the reason' in message and 'exit code: 3' in message and '\n' not in message
    assert 'first' not in message.replace('echo first', '')
    with pytest.raises(SandboxError, match='unknown instruction: FOO'):
        build(f'FROM {docker_engine.BASE}\nFOO bar\n')


def test_a_missing_base_is_pulled_by_its_name(build):
    with pytest.raises(SandboxError, match='image not pulled: localhost:1/none:9: '):
        build('ARG TAG=9\nFROM localhost:1/none:$TAG\n')


def test_a_base_that_was_made_anew_is_seen(used, environment):
    """By the next run; and a tag that is a task's own image, by the next sandbox."""
    name = f'echo-test-{uuid.uuid4().hex[:8]}'
    made = images.Images(used, network=False)
    tagged = types.Task('tagged', environment.parent, 'x', docker_image=name)

    def tag(text: str) -> None:
        used.client.images.build(
            fileobj=io.BytesIO(f'FROM {docker_engine.BASE}\nRUN echo {text} > /base\n'.encode()),
            tag=name,
            network_mode='none',
        )

    async def of_the_tag() -> str:
        async with opened(docker.PlainSandbox(tagged, images=made)) as sandbox:
            return (await sandbox.run('cat /base', SEC)).stdout

    try:
        for text in ('old', 'new'):
            tag(text)
            fresh = images.Images(used, network=False)
            asked = types.Task('task', environment.parent, 'x')
            (environment / 'Dockerfile').write_text(f'ARG B={name}\nFROM ${{B}} AS stage\n')

            async def from_the_base(fresh=fresh, asked=asked) -> str:
                async with opened(docker.PlainSandbox(asked, images=fresh)) as sandbox:
                    return (await sandbox.run('cat /base', SEC)).stdout

            assert asyncio.run(from_the_base()) == f'{text}\n'
            assert asyncio.run(of_the_tag()) == f'{text}\n'
            fresh.close()
    finally:
        made.close()
        used.client.api.remove_image(name, force=True)


def images_of(tmp_path, text: str) -> list[str]:
    path = tmp_path / 'Dockerfile'
    path.write_bytes(text.encode())
    return contexts.bases(parser.parse(path))


def test_the_images_that_a_dockerfile_names(tmp_path):
    text = """\
        # syntax=docker/dockerfile:1
        ARG TAG=1.23
        ARG  EMPTY= WHOLE="ubuntu:24.04" UNSET
        FROM --platform=linux/amd64 golang:${TAG} AS build
        RUN cat <<-EOF && \\
            # a comment
            true
        FROM inside
        \tEOF
        FROM ${EMPTY:-debian:bookworm-slim} as Base
        RUN <<'A' <<B
        FROM inside
        A
        COPY --from=inside x y
        B
        from \\

          $WHOLE
        RUN echo $((1<<n)) "<<E" && \\

            true
        FROM ${UNSET-unset:1}
        RUN --mount=type=bind,from=mounted:1,target=/x --mount=from=mounted:2 true
        RUN --mount=type=cache,target=/x,from=build true
        COPY --link --from=build /x /x
        COPY --from=0 /x /x
        COPY --from=busybox /x /x
        FROM scratch
        FROM base
        FROM "quoted:1"
        FROM $UNKNOWN
        FROM only-${TARGETARCH}:1
        FROM cut:${TAG#1.}
        """
    assert images_of(tmp_path, '\ufeff' + textwrap.dedent(text).replace('\n', '\r\n')) == [
        'docker/dockerfile:1',
        'golang:1.23',
        'debian:bookworm-slim',
        'ubuntu:24.04',
        'unset:1',
        'mounted:1',
        'mounted:2',
        'busybox',
        'quoted:1',
    ]
    assert images_of(tmp_path, '# escape=`\n# SYNTAX = other:1\nFROM `\n a\n') == ['other:1', 'a']


def test_a_trace_of_buildkit():
    """By hand: 0x0a is field 1 of kind 2, bytes; 0x1a field 3, 0x22 field 4, 0x3a field 7."""

    def field(number: int, content: bytes) -> bytes:
        return bytes([number << 3 | 2, len(content)]) + content

    log = builds.Log()
    log.follow(field(3, field(1, b'other') + field(4, b'no\n')))
    log.follow(
        field(3, field(1, b'step') + b'\x18\x02' + field(4, 'words é\n'.encode()))
        + field(1, field(1, b'step') + b'\x20\x01' + field(7, b'failed'))
    )
    with pytest.raises(SandboxError, match=r'^words é; failed$'):
        log.add({'error': 'failed'})


def test_an_archive_has_dockers_modes_and_owner(tmp_path):
    (tmp_path / 'a').write_text('')
    (tmp_path / 'a').chmod(0o4700)
    for keep, mode in ((True, 0o4700), (False, 0o4700)):
        content = contexts.channels.archive(tmp_path, '.', keep_modes=keep)
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            (member,) = (member for member in tar if member.isfile())
        assert (member.mode, member.uid, member.uname) == (mode, 0, '')
