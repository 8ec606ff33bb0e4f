"""Compares ECHO with GRPO on the tiny recipe, over several seeds: a table, a plot, the raw numbers.

    python experiments/tiny/study.py --runs=runs/study --seeds=0,1,2

Each run is `python -m echo_jax.train --config=configs/tiny.py[:grpo] --config.seed=N` in a process
of its own, one after the other. The warm start does not depend on env_coef, so the GRPO run of a
seed copies the ECHO run's transcripts, warm-start checkpoint and held-out rollouts: it would make
the same ones.
Writes results.json and curves.png beside this file and prints the table for README.md.
"""

import json
import pathlib
import shutil
import subprocess
import sys

import matplotlib.figure
import numpy as np
from absl import app, flags

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
SHARED = (
    'tasks',
    'tokenizer',
    'checkpoints/warm_start',
    'rollouts/warm_start_explore',
    'rollouts/warm_start_practice',
    'rollouts/heldout_before',
)
KEYS = ('solve_rate_before', 'solve_rate_after', 'env_ce_before', 'env_ce_after', 'train_minutes')
COLOURS = {'echo': 'tab:green', 'grpo': 'tab:grey'}


def command(variant: str, seed: int, workdir: pathlib.Path) -> list[str]:
    config = 'configs/tiny.py' if variant == 'echo' else f'configs/tiny.py:{variant}'
    run_flags = [f'--config={config}', f'--config.seed={seed}', f'--workdir={workdir}']
    return [sys.executable, '-m', 'echo_jax.train', *run_flags]


def run(variant: str, seed: int, runs: pathlib.Path) -> dict:
    """Runs a variant with a seed, or resumes it. Returns its summary and metrics."""
    workdir = runs / f'{variant}_{seed}'
    if not (workdir / 'summary.json').exists():
        if variant != 'echo' and not workdir.exists():
            partial = runs / f'{variant}_{seed}.partial'
            shutil.rmtree(partial, ignore_errors=True)
            for part in SHARED:
                shutil.copytree(runs / f'echo_{seed}' / part, partial / part)
            config = json.loads((runs / f'echo_{seed}' / 'config.json').read_text())
            config['loss']['env_coef'] = 0.0
            (partial / 'config.json').write_text(json.dumps(config))
            partial.rename(workdir)
        subprocess.run(command(variant, seed, workdir), cwd=ROOT, check=True)
    rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    kept = ('step', 'rollout/reward', 'train/env_ce', 'eval/env_ce', 'eval/solve_rate')
    return {
        'variant': variant,
        'seed': seed,
        'summary': json.loads((workdir / 'summary.json').read_text()),
        'metrics': [{key: row[key] for key in kept if key in row} for row in rows],
    }


def table(results: list[dict]) -> str:
    lines = [
        '| | seed | solve rate before | after | environment CE before | after | minutes |',
        '|---|---|---|---|---|---|---|',
    ]
    for variant in ('echo', 'grpo'):
        chosen = [r for r in results if r['variant'] == variant]
        for r in chosen:
            lines.append(_line(variant.upper(), str(r['seed']), r['summary']))
        mean = {key: float(np.mean([r['summary'][key] for r in chosen])) for key in KEYS}
        lines.append(_line(f'**{variant.upper()}**', '**mean**', mean))
    return '\n'.join(lines)


def _line(name: str, seed: str, values: dict) -> str:
    before, after, ce_before, ce_after, minutes = (values[key] for key in KEYS)
    return (
        f'| {name} | {seed} | {before:.2f} | {after:.2f} | {ce_before:.2f} | {ce_after:.2f} '
        f'| {minutes:.1f} |'
    )


def plot(results: list[dict], file: pathlib.Path) -> None:
    figure = matplotlib.figure.Figure(figsize=(10, 3.6), layout='constrained')
    panels = zip(
        figure.subplots(1, 2),
        ('rollout/reward', 'eval/env_ce'),
        ('training reward (mean of 5 steps)', 'environment CE, held-out, nats a token'),
        ('', 'env_ce'),
    )
    for axes, key, title, ends in panels:
        for r in results:
            points = [(row['step'], row[key]) for row in r['metrics'] if key in row]
            if ends:
                summary = r['summary']
                points = [(0, summary['env_ce_before']), *points]
                points.append((summary['steps'], summary['env_ce_after']))
            steps, values = map(np.array, zip(*points))
            if not ends:
                values = np.convolve(values, np.ones(5) / 5, 'valid')
                steps = steps[4:]
            label = r['variant'].upper() if r['seed'] == results[0]['seed'] else None
            axes.plot(steps, values, color=COLOURS[r['variant']], label=label, linewidth=1.2)
        axes.set(title=title, xlabel='learner step')
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(file, dpi=120)


def main(_) -> None:
    runs = pathlib.Path(_RUNS.value).absolute()
    runs.mkdir(parents=True, exist_ok=True)
    seeds = [int(seed) for seed in _SEEDS.value]
    results = [run(variant, seed, runs) for seed in seeds for variant in ('echo', 'grpo')]
    (HERE / 'results.json').write_text(json.dumps(results, indent=None, separators=(',', ':')))
    plot(results, HERE / 'curves.png')
    print(table(results))


if __name__ == '__main__':
    _RUNS = flags.DEFINE_string('runs', 'runs/study', 'Folder of the runs; finished ones are kept.')
    _SEEDS = flags.DEFINE_list('seeds', ['0', '1', '2'], 'Seeds of each variant.')
    app.run(main)
