"""How long the learner waits when one episode in 16 takes ten times as long as the others.

    .venv/bin/python experiments/benchmarks/stragglers.py --run=runs/machine [--tail=10]

A learner and a worker with vLLM, in real sandboxes, on the tasks of the finished run `--run` of
configs/machine.py and with its model, whose agent calls tools. The first call of a tool in an
episode sleeps `--sleep` seconds, in one episode of 16 `--tail` times that. The learner goes through
each step `--epochs` times, so that it has as much to do as the engine, which is the case at full
size. Every mode is a run of its own: max_staleness 0, 1 and 4; 1 with batch.stragglers = 'wait',
which drops nothing; and 4 as others have it (`rounds`): groups are drawn ahead as well, but each
step waits for all of its own.

idle is the share of the learner's time in which it waited for groups, over `--steps` steps. The
`--skip` before them compile and fill the pipeline, and in the `max_staleness` after them there is
less and less to draw ahead. late is the share of groups that were dropped, staleness the mean over
rollouts of the age of their oldest token. One JSON line a mode.
"""

import argparse
import json
import os
import pathlib
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[2]
MODES = {'0': 0, '1': 1, '1, wait': 1, '4': 4, '4, rounds': 4}
_SLOW = '[ -e /tmp/slept ] || {{ : >/tmp/slept; (( RANDOM % 16 )) && sleep {0} || sleep {1}; }}\n'
# Steps wait for the groups of their number, although more are drawn ahead.
_ROUNDS = (
    'import runpy; from echo_jax.run import ahead; ahead.may_be_late = lambda config: False; '
    "runpy.run_module('echo_jax.train', run_name='__main__', alter_sys=True)"
)


def main() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends all, as Ctrl-C does
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--run', type=pathlib.Path, required=True)
    parser.add_argument('--steps', type=int, default=8)
    parser.add_argument('--skip', type=int, default=2)
    parser.add_argument('--sleep', type=float, default=6.0)
    parser.add_argument('--tail', type=float, default=10.0)
    parser.add_argument('--epochs', type=int, default=4)
    parser.add_argument('--modes', nargs='+', default=[*MODES], choices=[*MODES])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix='stragglers-') as name:
        folder = pathlib.Path(name)
        subprocess.run(
            [
                *(sys.executable, '-m', 'echo_jax.export'),
                *(f'--workdir={options.run}', f'--output={folder / "model"}'),
            ],
            cwd=ROOT,
            check=True,
            stdout=sys.stderr,
        )
        for split, most in (('train', None), ('heldout', 8)):
            tasks = sorted((options.run / 'tasks' / split).glob('*/'))[:most]
            slow_tasks(tasks, folder / split, options.sleep, options.tail)
        for mode in options.modes:
            print(json.dumps(measure(mode, folder, options)), flush=True)


def slow_tasks(
    tasks: list[pathlib.Path], target: pathlib.Path, seconds: float, tail: float
) -> None:
    """Copies tasks whose tools sleep before they do anything."""
    for task in tasks:
        shutil.copytree(task, target / task.name)
    for tool in target.glob('*/environment/tools/*'):
        first, _, rest = tool.read_text().partition('\n')
        tool.write_text(f'{first}\n{_SLOW.format(seconds, tail * seconds)}{rest}')


def measure(mode: str, folder: pathlib.Path, options: argparse.Namespace) -> dict:
    """Runs a learner and a worker to their end."""
    work = folder / mode.replace(', ', '_')
    staleness = MODES[mode]
    slots, steps = 64 * (staleness + 1), options.skip + options.steps + staleness
    settings = {
        'model.path': folder / 'model',
        'tasks.train': folder / 'train',
        'tasks.heldout': folder / 'heldout',
        'num_steps': steps,
        'max_staleness': staleness,
        'policy.backend': 'vllm',
        'policy.slots': slots,
        'sandbox.at_once': min(slots, 128),
        'sandbox.agent_timeout': 900.0,
        'protocol.command_timeout': 300,
        'warm_start.steps': 0,
        'warm_start.explore_steps': 0,
        'eval.every': steps,
        'batch.epochs': options.epochs,
        'loss.old_logprobs': 'recomputed',
        'checkpoint.every': steps,
    }
    if mode.endswith('wait'):
        settings['batch.stragglers'] = 'wait'
    flags = ['--config=configs/machine.py', f'--workdir={work}']
    flags += [f'--config.{key}={value}' for key, value in settings.items()]
    program = ['-c', _ROUNDS] if mode.endswith('rounds') else ['-m', 'echo_jax.train']
    with (folder / 'log').open('w') as log:
        how = dict(cwd=ROOT, stdout=log, stderr=log)
        learner = subprocess.Popen([sys.executable, *program, *flags], **how)
        rollout = ROOT / '.venv-rollout' / 'bin' / 'python'
        worker = subprocess.Popen([rollout, '-m', 'echo_jax.worker', *flags], **how)
        try:
            code = learner.wait()
        finally:
            learner.kill()
            worker.terminate()
            worker.wait()
    if code:
        sys.exit(f'{mode}: the learner ended with {code}:\n{(folder / "log").read_text()[-3000:]}')
    rows = [json.loads(line) for line in (work / 'metrics.jsonl').read_text().splitlines()]
    rows = rows[options.skip : options.skip + options.steps]
    waited = sum(row['time/sampling'] for row in rows)
    learned = sum(row['time/learning'] for row in rows)
    late = sum(row.get('rollout/late_groups', 0.0) for row in rows)
    return {
        'max_staleness': mode,
        'steps': len(rows),
        'idle': round(waited / (waited + learned), 3),
        'steps_per_hour': round(3600 * len(rows) / (waited + learned), 1),
        'step_seconds': round(
            statistics.median(r['time/sampling'] + r['time/learning'] for r in rows), 1
        ),
        'learning_seconds': round(learned / len(rows), 1),
        'late': round(late / (late + 8 * len(rows)), 3),
        'staleness': round(statistics.fmean(row['rollout/staleness'] for row in rows), 2),
    }


if __name__ == '__main__':
    os.environ.setdefault('JAX_PLATFORMS', 'cpu')
    main()
