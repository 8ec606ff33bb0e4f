"""view as a process: what it prints, what it refuses in one line, and how it ends."""

import json
import re
import signal
import socket
import urllib.error
import urllib.request

import pytest

from echo_jax.viewer.site import Site
from tests.support.viewed_run import make_run, write_group, write_rows


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    work = make_run(tmp_path_factory.mktemp('viewed') / 'run')
    write_group(work, 0)
    write_rows(work, 1, 2)
    return work.path


def status(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=20) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_it_serves_until_it_is_stopped(programs, run, number):
    before = {file: file.stat().st_mtime_ns for file in sorted(run.rglob('*'))}
    process = programs.start('view', f'--workdir={run}', '--port=0')
    line = process.stdout.readline()
    address = re.fullmatch(r'open (http://127\.0\.0\.1:\d+/) \(Ctrl-C ends it\)\n', line)[1]
    assert status(address) == 200 and status(f'{address}data/run-0/rows-0.json') == 200
    assert status(f'{address}data/run-0/rollout-train-0-0.json') == 200
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == (1 if number == signal.SIGINT else -number), stderr
    assert 'Traceback' not in stderr
    # It has written nothing to the run.
    assert {file: file.stat().st_mtime_ns for file in sorted(run.rglob('*'))} == before


def test_elsewhere_it_makes_a_token_and_takes_one(programs, run):
    flags = (f'--workdir={run}', '--port=0', '--host=0.0.0.0')
    process = programs.start('view', *flags)
    link = process.stdout.readline().split()[1]
    bare, token = re.fullmatch(r'(http://0\.0\.0\.0:\d+/)\?token=(\S{20,})', link).groups()
    assert status(bare) == 403 and status(f'{bare}?token={token[:-1]}') == 403
    opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
    assert opener.open(link).status == 200  # by the redirect and its cookie
    assert opener.open(f'{bare}data/site.json').status == 200
    process.kill()
    process = programs.start('view', *flags, '--token=of-these-tests')
    assert process.stdout.readline().split()[1].endswith('/?token=of-these-tests')
    process.kill()


def test_bad_input_is_one_line(programs, run, tmp_path):
    fails = programs.fails
    assert 'nothing holds no run; name the --workdir' in fails('view', '--workdir=runs/nothing')
    assert '--workdir names no run' in fails('view', '--workdir=,')
    assert 'names a run twice' in fails('view', f'--workdir={run},{run}')
    with socket.create_server(('127.0.0.1', 0)) as taken:
        port = taken.getsockname()[1]
        line = fails('view', f'--workdir={run}', f'--port={port}')
        assert f'127.0.0.1:{port} cannot be listened on (Address already in use)' in line
    line = fails('view', f'--workdir={run}', '--host=no-such-host.invalid')
    assert 'no-such-host.invalid:8008 cannot be listened on' in line
    assert 'fewer than 8 characters' in fails('view', f'--workdir={run}', '--token=x')
    (tmp_path / 'file').write_text('mine')
    line = fails('view', f'--workdir={run}', f'--export={tmp_path}')
    assert f'{tmp_path} is there already and is not empty' in line
    line = fails('view', f'--workdir={run}', f'--export={tmp_path / "new"}', '--port=8010')
    assert '--port has no effect with --export' in line and not (tmp_path / 'new').exists()


def test_a_run_of_train_is_shown_whole(finished):
    site = Site([str(finished)])
    [run] = site.runs
    while run.index.look():
        pass
    documents = {name: site.document(name) for name in site.names()}
    assert None not in documents.values() and run.index.problems == {}
    json.dumps(documents, allow_nan=False)
    glance = documents['run-0/glance']
    assert glance['finished'] and glance['step'] == glance['steps'] == 6
    assert 0 <= glance['summary']['solve_rate_after'] <= 1 and glance['reward'] is not None
    rollouts = [d for name, d in documents.items() if '/rollout-' in name]
    stores = {rollout['store'] for rollout in rollouts}
    assert {'train', 'heldout_before', 'heldout_after', 'warm_start_explore'} <= stores
    for rollout in rollouts:
        text = ''.join(rollout['text'])
        assert text.startswith('<|im_start|>system\n') and '\ufffd' not in text[:60]
        if rollout['store'] == 'train' and rollout['status'] != 'infra_error':
            assert rollout['advantage'] is not None and 1 <= rollout['step'] <= 6


def test_an_export_says_what_it_costs(programs, run, tmp_path):
    done = programs.run('view', f'--workdir={run}', f'--export={tmp_path / "page"}')
    assert done.returncode == 0, done.stderr
    tokens = re.search(r'3 rollouts of (\d+) tokens, a file each: about 5 MB', done.stdout)
    assert int(tokens[1]) > 300
    # The site, the glance, three logs, three rollouts.
    assert re.search(r'8 documents, 5 MB: open \S+/page/index.html', done.stdout)
    assert (tmp_path / 'page' / 'index.html').exists()
