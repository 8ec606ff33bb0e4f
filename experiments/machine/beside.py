"""A finished run of configs/machine.py beside the published GRPO run of the same seed.

    python -m experiments.machine.beside --workdir=runs/machine

Prints a table, and draws both into the workdir's curves.png. GRPO is not run for that: its figures
are those of results.json, of the same tasks and of a warm start by the same program. It is run by
`python -m echo_jax.train --config=configs/machine.py:grpo --workdir=runs/machine_grpo`.
"""

import json
import pathlib

import numpy as np
import rich.table
from absl import app, flags

from echo_jax.run.report import CONSOLE
from echo_jax.run.workdir import Workdir
from experiments.machine import report, stats
from experiments.machine.arms import ARMS
from experiments.machine.results import read_run, spoiled


def both(folder: pathlib.Path, published: pathlib.Path) -> report.Results:
    """The run in `folder`, as the arm 'echo', and GRPO's of its seed out of the file `published`.

    Raises ValueError if the run is not finished, is no run of configs/machine.py as it is, or if no
    GRPO run of its seed is published.
    """
    if not (folder / 'summary.json').exists():
        raise ValueError(f'{folder} has no summary.json; let its run end first')
    seed = json.loads((folder / 'config.json').read_text())['seed']
    grpo = [run for run in json.loads(published.read_text()) if run['arm'] == 'grpo']
    same = [run for run in grpo if run['seed'] == seed]
    if not same:
        seeds = [run['seed'] for run in grpo]
        raise ValueError(f'{folder} has the seed {seed}; GRPO is published for {seeds}')
    mine = read_run(Workdir(folder, ARMS['echo'].config(seed)))
    return report.Results([{'arm': 'echo', 'seed': seed, **mine}, *same])


def table(results: report.Results) -> rich.table.Table:
    """What the two runs came to: held-out tasks by number of tools, first calls, environment CE."""
    (seed,) = results.seeds('echo', 'grpo')
    shown = rich.table.Table(title='Held-out tasks', title_justify='left')
    echo, grpo = (results.run(arm, seed) for arm in ('echo', 'grpo'))
    columns = {
        'warm start': _column(echo, 'before'),
        f'ECHO, {echo["summary"]["steps"]} steps': _column(echo, 'after'),
        f'GRPO, {grpo["summary"]["steps"]} steps': _column(grpo, 'after'),
    }
    shown.add_column('')
    for title in columns:
        shown.add_column(title, justify='right')
    for name in _column(echo, 'after'):
        shown.add_row(name, *(column[name] for column in columns.values()))
    return shown


def _column(run: dict, when: str) -> dict[str, str]:
    heldout = run['heldout']
    solved, tools = heldout[when]['solved'], heldout['tools']
    rates = {'solve rate': np.mean(solved)}
    counts = ('  one tool', '  two tools', '  three tools')
    rates |= dict(zip(counts, stats.by_count(solved, tools)))
    rates['first call right'] = np.mean(heldout[when]['first_right'])
    cells = {name: f'{rate:.1%}' for name, rate in rates.items()}
    ce = run['summary'].get(f'env_ce_output_{when}')
    return cells | {'environment CE': '-' if ce is None else f'{ce:.3f}'}


def main(_) -> None:
    folder = pathlib.Path(_WORKDIR.value)
    try:
        results = both(folder, report.HERE / 'results.json')
    except ValueError as error:
        raise SystemExit(f'error: {error}') from None
    CONSOLE.print(table(results))
    report.draw_result(results, folder / 'curves.png')
    if reason := spoiled(folder):
        CONSOLE.print(f'not comparable: {reason}', markup=False)
    CONSOLE.print(
        f'{folder}/curves.png shows both. GRPO was not run here: its figures are those of seed '
        f'{results.seeds("grpo")[0]} in experiments/machine/results.json.',
        markup=False,
    )


if __name__ == '__main__':
    _WORKDIR = flags.DEFINE_string('workdir', 'runs/machine', 'Folder of the run.')
    app.run(main)
