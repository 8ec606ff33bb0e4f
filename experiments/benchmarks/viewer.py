"""The viewer on many rollouts: how soon a page, a filter and a rollout are there, and memory.

    python experiments/benchmarks/viewer.py [--rollouts=5000 --tokens=2000] [--run=FOLDER]

It makes a run of that size (or takes the one that it made in --run before), in groups of 8, whose
newest 100 groups have the learner's scores; starts `python -m echo_jax.view` on it, and opens the
page in chromium without a window. Times are the browser's own (performance.now), in ms, the median
and the worst of --repeats: from the navigation, the key or the click until the frame after the new
elements is drawn. `index_seconds` is from the start of the program until all rollouts are in the
table. RSS is the largest of the server's process. One JSON line.
"""

import argparse
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from echo_jax.store.rollouts import RolloutStore
from tests.support.browser import Visit, browsing, wait_until
from tests.support.viewed_run import conversation, make_run, write_rows, write_scores

ROOT = pathlib.Path(__file__).parents[2]
GROUP_SIZE = 8
SCORED = 100
# Notes when `selector` first matches, and the frame after that has been drawn.
WATCH = """selector => new Promise(resolve => {
  const seen = () => document.querySelector(selector);
  const done = () => requestAnimationFrame(() => setTimeout(() => resolve(performance.now())));
  if (seen()) return done();
  const observer = new MutationObserver(() => { if (seen()) { observer.disconnect(); done(); } });
  observer.observe(document, {childList: true, subtree: true});
})"""
FILTER = """text => new Promise(resolve => {
  const input = document.querySelector('#filter');
  const start = performance.now();
  input.value = text;
  input.dispatchEvent(new Event('input'));
  requestAnimationFrame(() => setTimeout(() => resolve(performance.now() - start)));
})"""
OPEN = f"""async () => {{
  const row = document.querySelectorAll('.grid-body [role=row]')[5];
  const start = performance.now();
  row.click();
  return await ({WATCH})('.conversation .t') - start;
}}"""
FILTERS = ('reward<0.5', 'task~task-2 step>=10', 'status=ok turns>1', 'tokens>1990', 'sandbox')


def write_run(folder: pathlib.Path, rollouts: int, tokens: int) -> None:
    work, rng = make_run(folder), np.random.default_rng(0)
    store = RolloutStore(work.url('rollouts', 'train'))
    words = ['notes.txt', 'total', '0', 'root', 'Nov', '28', 'drwxr-xr-x', 'error:', 'in', 'line']
    groups = -(-rollouts // GROUP_SIZE)
    for group_id in range(groups):
        group = []
        for sample_id in range(GROUP_SIZE):
            outputs = [' '.join(rng.choice(words, 90)) + '\n' for _ in range(tokens // 200 + 2)]
            rollout = conversation(*outputs, reward=float(rng.integers(0, 2)), sample=sample_id)
            for name in ('tokens', 'roles', 'rollout_logprobs', 'policy_versions'):
                setattr(rollout, name, getattr(rollout, name)[:tokens].copy())
            assert len(rollout.tokens) == tokens
            rollout.turn_starts = rollout.turn_starts[rollout.turn_starts < tokens].copy()
            rollout.task_id, rollout.group_id = f'task-{group_id % 50}', group_id
            group.append(rollout)
        store.write_group(group)
        if group_id >= groups - SCORED:
            write_scores(work, group)
    write_rows(work, 1, groups // 2)


def wait_for_index(address: str) -> int:
    """The number of rollouts, once the viewer has read all of them."""
    while True:
        with urllib.request.urlopen(f'{address}data/run-0/glance.json') as answer:
            glance = json.load(answer)
        if 0 < glance['groups_found'] == glance['groups_read']:
            return glance['rollouts']
        time.sleep(0.1)


def peak_rss(process: subprocess.Popen) -> float:
    """MB"""
    status = pathlib.Path(f'/proc/{process.pid}/status').read_text()
    return int(status.partition('VmHWM:')[2].split()[0]) * 1024 / 1e6


def measure(address: str, rollouts: int, repeats: int) -> dict[str, float]:
    times: dict[str, list[float]] = {
        name: [] for name in ('overview', 'table', 'whole_table', 'filter', 'rollout')
    }
    with browsing() as browser:
        for repeat in range(repeats):
            visit = Visit(browser)  # with an empty cache
            page = visit.page
            page.goto(address, wait_until='commit')
            times['overview'].append(page.evaluate(WATCH, '.card'))
            visit.context.close()
            visit = Visit(browser)
            page = visit.page
            page.goto(f'{address}#tab=rollouts', wait_until='commit')
            times['table'].append(page.evaluate(WATCH, '.grid-body [role=row]'))
            wait_until(page, f"document.body.textContent.includes('of {rollouts:,} rollouts')")
            times['whole_table'].append(page.evaluate('performance.now()'))
            for text in FILTERS:
                times['filter'].append(page.evaluate(FILTER, text))
            # Another group each time, so that the server has to read it.
            page.evaluate(FILTER, f'group={50 * repeat + 7}')
            times['rollout'].append(page.evaluate(OPEN))
            wait_until(page, "document.querySelectorAll('.conversation .t').length > 50")
            assert visit.errors == []
            visit.context.close()
    medians = {f'{name}_ms': round(statistics.median(found)) for name, found in times.items()}
    return medians | {f'{name}_worst_ms': round(max(found)) for name, found in times.items()}


def main() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends all, as Ctrl-C does
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--rollouts', type=int, default=5000)
    parser.add_argument('--tokens', type=int, default=2000)
    parser.add_argument('--repeats', type=int, default=7)
    parser.add_argument('--run', type=pathlib.Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.run or pathlib.Path(temporary, 'run')
        if not folder.exists():
            write_run(folder, args.rollouts, args.tokens)
        started = time.monotonic()
        command = [sys.executable, '-m', 'echo_jax.view', f'--workdir={folder}', '--port=0']
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
            try:
                address = server.stdout.readline().split()[1]
                answers = time.monotonic() - started
                rollouts = wait_for_index(address)
                index = time.monotonic() - started
                result = measure(address, rollouts, args.repeats)
                result |= {'server_rss_mb': round(peak_rss(server))}
            finally:
                server.send_signal(signal.SIGINT)
    result |= {'starts_seconds': round(answers, 1), 'index_seconds': round(index, 1)}
    print(json.dumps(result | {'load': os.getloadavg()[0]}))


if __name__ == '__main__':
    main()
