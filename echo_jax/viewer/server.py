"""Answers a browser with the page and its documents; GET only, and nothing is written.

What a page shows is private and was partly written by strangers. So the server names what its page
may do (Content-Security-Policy: its own files, no inline script, no other host). On loopback it
answers to loopback's names alone, since another site could give its own name this address. On any
other address it wants a token.
"""

import functools
import hashlib
import hmac
import json
import pathlib
import socket
import urllib.parse

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from echo_jax.viewer.assets import TYPES, page_files, plotly_script
from echo_jax.viewer.site import Site

LOOPBACK = ('127.0.0.1', 'localhost', '::1')
# plotly.js opens an empty <style>, whose rules it then adds by script; the hash is that of nothing.
# The style of its maps is not let in, since there are none.
_POLICY = (
    "default-src 'self'; style-src 'self' "
    "'sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU='; img-src 'self' data: blob:; "
    "object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    'Content-Security-Policy': _POLICY,
    'X-Content-Type-Options': 'nosniff',
    'Referrer-Policy': 'no-referrer',
    'Cross-Origin-Resource-Policy': 'same-origin',
    'Cache-Control': 'no-cache',  # asked for again each time, and answered 304 if it is the same
}


def listen(host: str, port: int) -> socket.socket:
    """The socket to serve on. Raises OSError, in one line, if the port is in use."""
    family = socket.AF_INET6 if ':' in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        reason = str(error.strerror).partition(' (')[0]
        raise OSError(
            f'{host}:{port} cannot be listened on ({reason}); another --port may be free, '
            'and --port=0 takes any that is'
        ) from error


def link(host: str, port: int, token: str) -> str:
    """What a person opens."""
    name = f'[{host}]' if ':' in host else host
    query = f'?{urllib.parse.urlencode({"token": token})}' if token else ''
    return f'http://{name}:{port}/{query}'


def make_server(site: Site, listening: socket.socket, token: str) -> uvicorn.Server:
    """`.run(sockets=[listening])` serves until Ctrl-C or SIGTERM. `token`: '' if none is asked."""
    app = _make_app(site, token, *listening.getsockname()[:2])
    return uvicorn.Server(
        uvicorn.Config(app, log_level='warning', lifespan='off', server_header=False)
    )


def _make_app(site: Site, token: str, host: str, port: int) -> ASGIApp:
    files = page_files(live=True)

    def page(request: Request) -> Response:
        name = request.path_params.get('name', 'index.html')
        if name == 'plotly.js':
            return _answer(request, _plotly(), '.js')
        if name not in files:
            return PlainTextResponse('there is no such page\n', 404)
        return _answer(request, files[name], pathlib.PurePath(name).suffix)

    def data(request: Request) -> Response:
        name = request.path_params['name']
        document = site.document(name)
        if document is None:
            why = ''
            if '/rollout-' in name:
                why = '; the run may keep it no longer: logging.rollouts; or it is damaged'
            return PlainTextResponse(f'there is no such document{why}\n', 404)
        body = json.dumps(document, allow_nan=False, separators=(',', ':')).encode()
        return _answer(request, body, '.json')

    middleware = [Middleware(_Headers)]
    if host in LOOPBACK:
        # Starlette cuts a port off at the first colon, so [::1] arrives as its bracket.
        middleware.append(
            Middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK, '[', '[::1]'])
        )
    if token:
        middleware.append(Middleware(_Token, token=token, cookie=f'echo_jax_view_{port}'))
    return Starlette(
        routes=[
            Route('/', page, methods=['GET']),
            Route('/data/{name:path}.json', data, methods=['GET']),
            Route('/{name}', page, methods=['GET']),
        ],
        middleware=middleware,
    )


@functools.cache
def _plotly() -> bytes:
    return plotly_script()


def _answer(request: Request, body: bytes, suffix: str) -> Response:
    """The body, or 304 if the browser has it."""
    tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    headers = {'ETag': tag}
    if request.headers.get('If-None-Match') == tag:
        return Response(status_code=304, headers=headers)
    return Response(body, headers=headers, media_type=TYPES.get(suffix, 'application/json'))


class _Headers:
    """Adds the headers that every answer has."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message['type'] == 'http.response.start':
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        await self._app(scope, receive, send_with_headers)


class _Token:
    """Lets in who has the token: in the link, from where it moves into a cookie, or in the cookie.

    The cookie is Lax, so that a link in somebody's mail works; every request only reads.
    """

    def __init__(self, app: ASGIApp, token: str, cookie: str):
        self._app, self._token, self._cookie = app, token, cookie

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope['type'] != 'http':
            return
        connection = HTTPConnection(scope)
        given = connection.query_params.get('token')
        if given is not None and self._is_right(given):
            rest = [(k, v) for k, v in connection.query_params.multi_items() if k != 'token']
            path = '/' + connection.url.path.lstrip('/')  # '//host' would lead to another host
            query = f'?{urllib.parse.urlencode(rest)}' if rest else ''
            response: Response = RedirectResponse(path + query, 303)
            response.set_cookie(self._cookie, self._token, httponly=True, samesite='lax')
        elif given is None and self._is_right(connection.cookies.get(self._cookie, '')):
            await self._app(scope, receive, send)
            return
        else:
            response = PlainTextResponse(
                'the token is missing or wrong; open the printed link\n', 403
            )
        await response(scope, receive, send)

    def _is_right(self, given: str) -> bool:
        return hmac.compare_digest(given.encode('utf-8', 'replace'), self._token.encode())
