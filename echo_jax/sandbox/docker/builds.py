"""One build by an engine's own builder, and what it says of a failure.

Through the Engine API alone, without `docker buildx` and without a session: so the images that a
Dockerfile names must be on the engine beforehand (`contexts.bases`), the context must come as it is
meant to be (`contexts.pack`), and secrets and ssh mounts do not work.
"""

import base64
import collections
import json
import math
import time
from collections.abc import Iterator
from typing import Any

import docker
import requests

from echo_jax.sandbox import SandboxError
from echo_jax.sandbox.docker import engine

_KEPT_LINES = 20  # of a build's output, for a message
_TAIL_CHARS = 1_500


def build(
    used: engine.Engine,
    context: bytes,
    tag: str,
    *,
    labels: dict[str, str],
    network: bool,
    timeout_sec: float,
) -> None:
    """Builds the image `tag` from a tar archive. SandboxError with the end of the build's output.

    BuildKit does it where it is the engine's builder (since 23.0), else the builder before it.
    Leaving the answer unread, as a timeout does, makes the engine give the build up.
    """
    api = used.client.api
    ping = api.get(f'{api.base_url}/_ping', timeout=api.timeout)
    options = {
        'version': '2' if ping.headers.get('Builder-Version') == '2' else '1',
        't': tag,
        'labels': json.dumps(labels),
        'rm': '1',
        'forcerm': '1',
    }
    if not network:
        options['networkmode'] = 'none'
    deadline = time.monotonic() + timeout_sec
    response = api.post(
        f'{api.base_url}/v{api.api_version}/build',
        params=options,
        data=context,
        headers={'Content-Type': 'application/x-tar'},
        stream=True,
        timeout=math.ceil(timeout_sec),  # of silence
    )
    with response:
        try:
            response.raise_for_status()
        except requests.HTTPError as error:
            raise docker.errors.create_api_error_from_http_exception(error) from error
        log = Log()
        for line in response.iter_lines():
            log.add(json.loads(line) if line.strip() else {})
            if time.monotonic() > deadline:
                raise SandboxError(f'the build took over {timeout_sec:g} seconds')


class Log:
    """What a build printed: the classic builder in lines, BuildKit in a trace of its steps."""

    def __init__(self) -> None:
        self._lines: dict[bytes, collections.deque[str]] = {}  # by step; b'' is the classic builder
        self._failed = b''  # the step

    def add(self, event: dict) -> None:
        """Raises SandboxError if the event is a failure."""
        if event.get('id') == 'moby.buildkit.trace':
            self.follow(base64.b64decode(event['aux']))
        self._keep(b'', event.get('stream', ''))
        if 'error' in event:
            kept = self._lines.get(self._failed, ())
            tail = '; '.join(filter(None, map(str.strip, [*kept, event['error']])))
            if 'failed to read downloaded context' in tail:  # moby/moby issue 47717
                tail += "; with containerd's image store this needs Docker 28 or newer"
            raise SandboxError(tail[-_TAIL_CHARS:])

    def _keep(self, step: bytes, text: str) -> None:
        lines = self._lines.setdefault(step, collections.deque(maxlen=_KEPT_LINES))
        lines.extend(text.splitlines())

    def follow(self, status: bytes) -> None:
        """Reads a moby.buildkit.v1.StatusResponse: field 1 is a vertex, a step, with its digest
        (1) and error (7); field 3 is a piece of a vertex's log, with its digest (1) and text (4).
        """
        for number, message in _fields(status):
            if number == 1:
                vertex = dict(_fields(message))
                if vertex.get(7):
                    self._failed = vertex[1]
            elif number == 3:
                piece = dict(_fields(message))
                self._keep(piece[1], piece.get(4, b'').decode(errors='replace'))


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field of a protobuf message: varints as numbers, the rest as bytes.

    By hand, since of the whole of protobuf only this much is needed.
    """
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            value |= (message[at] & 127) << shift
            shift += 7
            at += 1
            if message[at - 1] < 128:
                return value

    while at < len(message):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
        else:
            size = {1: 8, 5: 4}.get(key & 7) or varint()
            at += size
            yield key >> 3, message[at - size : at]
