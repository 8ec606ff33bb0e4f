"""The server as a browser, and as somebody who means harm, finds it: over a real socket."""

import http.client
import json
import socket
import urllib.parse

import ml_collections
import pytest

from echo_jax.run.workdir import Workdir
from echo_jax.viewer.server import link, listen
from echo_jax.viewer.site import Site
from tests.support.small_run import wait_for
from tests.support.viewed_run import make_run, write_group, write_rows
from tests.support.viewer_server import serving

TOKEN = 'a-token-of-these-tests'


@pytest.fixture(scope='module')
def work(tmp_path_factory):
    work = make_run(tmp_path_factory.mktemp('viewed') / 'run')
    write_group(work, 0, scored=True)
    write_rows(work, 1, 4)
    return work


@pytest.fixture(scope='module')
def open_server(work):
    with serving([work.url()]) as address:
        yield address


@pytest.fixture(scope='module')
def guarded_server(work):
    with serving([work.url()], token=TOKEN) as address:
        yield address


def ask(address, path, method='GET', **headers):
    """(status, headers, body) of one request, with nothing added to it or followed."""
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(address).netloc, timeout=20)
    connection.request(method, path, headers={k.replace('_', '-'): v for k, v in headers.items()})
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, answer.headers, body


def test_the_page_may_load_only_what_is_its_own(open_server):
    status, headers, body = ask(open_server, '/')
    assert status == 200 and b'<script src="view.js" defer>' in body
    assert headers['Content-Type'] == 'text/html; charset=utf-8'
    policy = dict(
        part.strip().split(' ', 1) for part in headers['Content-Security-Policy'].split(';')
    )
    assert policy['default-src'] == "'self'" and "'unsafe-inline'" not in str(policy)
    assert 'script-src' not in policy and policy['frame-ancestors'] == "'none'"
    assert headers['X-Content-Type-Options'] == 'nosniff'
    assert headers['Referrer-Policy'] == 'no-referrer'
    assert 'Access-Control-Allow-Origin' not in headers
    # Nothing in the page is inline, or the policy would have stopped it.
    assert b'<style' not in body and b'onclick' not in body and body.count(b'<script') == 8


def test_documents_are_json_and_asked_for_again_only_if_they_changed(open_server, work):
    status, headers, body = ask(open_server, '/data/run-0/metrics-0.json')
    assert status == 200 and headers['Content-Type'] == 'application/json'
    assert json.loads(body)['total'] == 4
    tag = headers['ETag']
    assert ask(open_server, '/data/run-0/metrics-0.json', If_None_Match=tag)[0] == 304
    assert ask(open_server, '/data/run-0/metrics-0.json', If_None_Match='"other"')[0] == 200


def test_the_glance_says_how_the_run_is(open_server):
    glance = json.loads(ask(open_server, '/data/run-0/glance.json')[2])
    assert (glance['step'], glance['steps'], glance['finished']) == (4, 10, False)
    assert glance['seconds_left'] == 6 * 4.0  # six steps, 3 s of sampling and 1 s of learning each
    assert (glance['sampling_share'], glance['learning_share']) == (0.75, 0.25)
    assert glance['reward'] == 0.4 and glance['env_ce'] == 0.5 and glance['staleness'] == 0.5
    assert glance['statuses']['infra_error'] == 8 and glance['statuses']['ok'] == 16
    assert glance['workers'] == []


def test_a_run_that_goes_on_while_it_is_looked_at(tmp_path):
    work = make_run(tmp_path / 'run')
    write_group(work, 0)
    write_rows(work, 1, 4)
    with serving([work.url()]) as address:
        assert ask(address, '/data/run-0/rollout-train-0-0.json')[0] == 200
        config = ml_collections.ConfigDict(work.config)
        config.num_steps, config.logging.rollouts = 12, 2
        Workdir(work.url(), config, is_learner=True).go_on(4)
        glance = json.loads(ask(address, '/data/run-0/glance.json')[2])
        assert (glance['steps'], glance['rollouts_of']) == (12, 2)
        status, _, body = ask(address, '/data/run-0/rollout-train-9-0.json')
        assert (status, b'no longer: logging.rollouts' in body) == (404, True)


def test_a_rollout_of_a_damaged_group_is_not_found(tmp_path):
    work = make_run(tmp_path / 'run')
    write_group(work, 0)
    with serving([work.url()]) as address:
        wait_for(lambda: json.loads(ask(address, '/data/run-0/glance.json')[2])['groups_read'] == 1)
        file = work.path / 'rollouts' / 'train' / 'groups' / f'{0:012d}'
        file.write_bytes(file.read_bytes()[:-9])
        status, _, body = ask(address, '/data/run-0/rollout-train-0-0.json')
        assert (status, b'or it is damaged' in body) == (404, True)


@pytest.mark.parametrize(
    'path',
    [
        *('/nothing', '/data/nothing.json', '/data/run-1/glance.json', '/data/run-0/.json'),
        *('/data/run-0/rollout-train-0-9.json', '/data/run-0/rollout-train-9-0.json'),
        *('/data/run-0/rollout-..-0-0.json', '/data/run-0/rollout-%2e%2e%2ftrain-0-0.json'),
        *('/../pyproject.toml', '/%2e%2e/%2e%2e/view.py', '/..%2fserver.py', '/data/site'),
        *('/data/run-0/../../config.json', '/config.json', '/page/view.js', '//view.js'),
    ],
)
def test_what_is_not_there_is_not_found(open_server, path):
    assert ask(open_server, path)[0] == 404


@pytest.mark.parametrize('method', ['POST', 'PUT', 'DELETE', 'PATCH', 'OPTIONS'])
def test_it_only_reads(open_server, method):
    assert ask(open_server, '/data/site.json', method)[0] == 405
    assert ask(open_server, '/', method)[0] == 405


@pytest.mark.parametrize(
    'host, status',
    [
        ('localhost:1', 200),
        ('127.0.0.1', 200),
        ('evil.example', 400),
        ('127.0.0.1.evil.example', 400),
        ('localhost.evil.example:8008', 400),
    ],
)
def test_another_name_that_leads_to_loopback_is_refused(open_server, host, status):
    """DNS rebinding: a page of evil.example that asks its own name, which is 127.0.0.1 by now."""
    assert ask(open_server, '/data/site.json', Host=host)[0] == status


@pytest.mark.skipif(not socket.has_ipv6, reason='this machine has no IPv6')
def test_loopback_by_ipv6(work):
    try:
        with listen('::1', 0):
            pass
    except OSError:
        pytest.skip('this machine has no address ::1')
    with serving([work.url()], host='::1') as address:
        assert address.startswith('http://[::1]:') and ask(address, '/data/site.json')[0] == 200
        assert ask(address, '/data/site.json', Host='evil.example')[0] == 400


# ------------------------------------------------------------------------------------- the token


@pytest.mark.parametrize(
    'path', ['/', '/data/site.json', '/view.js', '/nothing', '/?token=', '/?x']
)
def test_without_the_token_nothing_is_told(guarded_server, path):
    status, _, body = ask(guarded_server, path)
    assert status == 403 and b'token is missing or wrong' in body and b'script' not in body


@pytest.mark.parametrize('wrong', ['', 'x', TOKEN[:-1], TOKEN + 'x', TOKEN.upper(), '%ff', 'é'])
def test_a_wrong_token_is_refused_wherever_it_stands(guarded_server, wrong):
    path = f'/?token={urllib.parse.quote(wrong, safe="%")}'
    assert ask(guarded_server, path)[0] == 403
    port = urllib.parse.urlsplit(guarded_server).port
    cookie = f'echo_jax_view_{port}={urllib.parse.quote(wrong, safe="%")}'
    assert ask(guarded_server, '/', Cookie=cookie)[0] == 403
    # A right cookie does not excuse a wrong link.
    assert ask(guarded_server, path, Cookie=f'echo_jax_view_{port}={TOKEN}')[0] == 403


def test_the_token_moves_from_the_link_into_a_cookie(guarded_server):
    parts = urllib.parse.urlsplit(guarded_server)
    assert parts.query == f'token={TOKEN}'
    status, headers, _ = ask(guarded_server, f'/?{parts.query}&a=b')
    assert (status, headers['Location']) == (303, '/?a=b')  # the address bar shows no token
    name, _, rest = headers['Set-Cookie'].partition('=')
    assert name == f'echo_jax_view_{parts.port}'  # the cookies of all ports of a host are one jar
    assert 'HttpOnly' in rest and 'samesite=lax' in rest.lower()
    cookie = f'{name}={rest.partition(";")[0]}'
    for path in ('/', '/view.js', '/data/site.json'):
        assert ask(guarded_server, path, Cookie=cookie)[0] == 200


def test_the_link_does_not_lead_to_another_host(guarded_server):
    _, headers, _ = ask(guarded_server, f'//evil.example/?token={TOKEN}')
    assert headers['Location'] == '/evil.example/'


def test_refusals_have_the_headers_too(guarded_server):
    assert 'Content-Security-Policy' in ask(guarded_server, '/')[1]


# ------------------------------------------------------------------------------------ what is said


def test_a_port_in_use_is_one_line():
    with listen('127.0.0.1', 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(OSError, match=rf'127.0.0.1:{port} cannot be listened on \(Address'):
            listen('127.0.0.1', port)


def test_links():
    assert link('127.0.0.1', 80, '') == 'http://127.0.0.1:80/'
    assert link('::1', 80, 'a b') == 'http://[::1]:80/?token=a+b'


def test_the_same_run_twice_and_no_run_are_refused(work, tmp_path):
    with pytest.raises(ValueError, match='names a run twice'):
        Site([work.url(), work.url()])
    with pytest.raises(ValueError, match='holds no run'):
        Site([str(tmp_path / 'nothing')])
    assert not (tmp_path / 'nothing').exists()


def test_runs_of_one_name_are_told_apart(tmp_path):
    for folder in ('a', 'b'):
        make_run(tmp_path / folder / 'run')
    site = Site([str(tmp_path / 'a' / 'run') + '/', str(tmp_path / 'b' / 'run')])
    assert [run.name for run in site.runs] == ['run', 'run (2)']
