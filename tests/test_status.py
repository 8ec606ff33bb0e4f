"""status as a process: what it prints of real runs, what it refuses, that it writes nothing."""

import json
import shutil
import signal
import time

import pytest

from echo_jax.policy.meter import Meter
from echo_jax.store.due import DueStore
from tests.support.viewed_run import make_run, write_group, write_rows

pytestmark = pytest.mark.slow


def shown(programs, run, *flags: str) -> str:
    """What status prints at 80 columns; it must leave the run as it was."""
    before = {file: file.stat().st_mtime_ns for file in sorted(run.rglob('*'))}
    done = programs.run('status', f'--workdir={run}', *flags, COLUMNS='80')
    assert (done.returncode, done.stderr) == (0, '')
    assert {file: file.stat().st_mtime_ns for file in sorted(run.rglob('*'))} == before
    return done.stdout


def lines(text: str) -> dict[str, str]:
    """The lines below the run's place, by their first word."""
    rows = [line.split(maxsplit=1) for line in text.splitlines()[1:] if line.strip()]
    return {row[0]: row[-1].strip() for row in rows}


def test_a_finished_run_of_the_embedded_policy(programs, finished):
    text = shown(programs, finished)
    assert text.splitlines()[0] == str(finished) and max(map(len, text.splitlines()[1:])) <= 80
    found = lines(text)
    assert found['step'] == '6 of 6, finished' and found['token'] == 'age 0: 100%'
    rows = [json.loads(line) for line in (finished / 'metrics.jsonl').read_text().splitlines()]
    idle = sum(row['time/sampling'] for row in rows) / sum(row['time/step'] for row in rows)
    assert found['learner'].startswith(f'idle {idle:.0%}, ') and 0 < idle < 1
    assert found['failures'] == 'none, of 24 rollouts in 6 steps' and 'damaged' not in found
    assert 'workers' not in text and 'queue' not in found
    document = json.loads(shown(programs, finished, '--json'))
    assert document['learner_idle'] == pytest.approx(idle)
    tokens = sum(row['rollout/tokens'] * 4 for row in rows)
    rate = tokens / sum(row['time/learning'] for row in rows)
    assert document['learned_tokens_per_sec'] == pytest.approx(rate)
    # What each step says of itself is what its seconds and its rollouts say.
    for row in rows:
        assert row['system/learner_idle'] == row['time/sampling'] / row['time/step']
        assert row['time/step'] > row['time/sampling'] + row['time/learning'] > 0
        tokens = row['rollout/tokens'] * 4
        assert row['system/learned_tokens_per_sec'] == pytest.approx(tokens / row['time/learning'])
        assert 0 < row['system/engine_idle/embedded'] < 1 and row['system/engines'] == 1
        assert row['rollout/age/0'] == 1.0
    steps = [row['time/step'] for row in rows]
    assert rows[3]['time/left'] == pytest.approx(sum(steps[:4]) / 4 * 2)


def test_a_run_that_was_killed(programs, finished, tmp_path):
    """Its learner died after step 4, as it wrote the fifth row."""
    run = tmp_path / 'run'
    shutil.copytree(finished, run)
    (run / 'summary.json').unlink()
    rows = (run / 'metrics.jsonl').read_text().splitlines(keepends=True)
    (run / 'metrics.jsonl').write_text(''.join([*rows[:4], rows[4][:20]]))
    found = lines(shown(programs, run))
    assert found['step'].startswith('4 of 6, the last ') and found['step'].endswith(' left')
    assert found['failures'] == 'none, of 16 rollouts in 4 steps'


def test_workers_and_failures_fit_80_columns(programs, tmp_path):
    work = make_run(tmp_path / 'run', backend='vllm')
    more = {f'rollout/age/{age}': 1 / 12 for age in range(12)}
    more |= {'time/step': 7200.0, 'system/learned_tokens_per_sec': 98765.0}
    more |= {'rollout/error/SandboxError': 2.0, 'system/damaged_groups': 2.0}
    write_rows(work, 1, 3, **more)
    write_group(work, 0)
    meter = Meter()
    for name, ago in (('box-with-a-long-name-0', 2.0), ('box-with-a-long-name-1', 500.0)):
        values = {'version': 12345, 'rollouts': 1234567, 'failed': 1234, 'swaps': 12345}
        values |= {'idle_now': 1.0, 'swapping_now': 0.25, 'tokens_per_sec': 123456.0}
        values |= {'total_read_seconds': 12345 * 3.0, 'total_load_seconds': 12345 * 1.5}
        DueStore(work.url('fleet')).report(name, meter.read() | values | {'at': time.time() - ago})
    DueStore(work.url('fleet')).report('old', {'version': 1})  # of code before these numbers
    text = shown(programs, work.path)
    assert max(map(len, text.splitlines()[1:])) <= 80 and '…' not in text
    found = lines(text)
    assert found['sampling'] == '1 of 3 workers report, 123,456 tokens/s'
    assert found['queue'] == '0 groups due: 0 drawn now, 0 whole, 0 that nobody draws'
    assert found['failures'] == 'infra_error 6, SandboxError 6, of 18 rollouts in 3 steps'
    assert found['damaged'] == '2 groups since the start, set aside and drawn anew'
    assert '14 h left' in found['step']  # 7 steps of 2 hours
    joined = ' '.join(text.split())
    assert 'token age 0: 8%, 1: 8%, 2: 8%, 3: 8%' in joined and '10: 8%, 11: 8%' in joined
    assert '12345 100% 25% 123,456 12345 4.5 s 1234567 1234' in joined
    assert joined.count('(silent)') == 1


def test_a_wrong_workdir_is_one_line(programs, tmp_path):
    line = programs.fails('status', f'--workdir={tmp_path / "nothing"}')
    assert 'nothing holds no run; name the --workdir' in line
    (tmp_path / 'file').write_text('mine')
    assert 'holds no run' in programs.fails('status', f'--workdir={tmp_path}')
    assert list(tmp_path.iterdir()) == [tmp_path / 'file']


def test_it_looks_again_until_it_is_stopped(programs, tmp_path):
    work = make_run(tmp_path / 'run')
    write_rows(work, 1, 1)
    process = programs.start('status', f'--workdir={work.path}', '--json', '--watch=0.05')
    assert json.loads(process.stdout.readline())['step'] == 1
    write_rows(work, 2, 2)
    while json.loads(process.stdout.readline())['step'] != 2:
        pass
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (1, 'stopped\n')
