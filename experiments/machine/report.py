"""The tables and figures of README.md, made of results.json alone.

    python -m experiments.machine.report

Writes the tables into README.md, between its marks, and curves.png and result.png beside it.
"""

import json
import math
import pathlib
import re
from collections.abc import Sequence

import matplotlib.figure
import numpy as np
from absl import app, flags

from echo_jax.run.intervals import mean_of_values
from experiments.machine import stats
from experiments.machine.arms import ARMS

HERE = pathlib.Path(__file__).parent
PAIRS = (
    ('echo', 'grpo'),
    ('shuffled', 'grpo'),
    ('echo', 'shuffled'),
    ('one_ahead', 'echo'),
    ('four_ahead', 'echo'),
    ('tiny_four_ahead', 'tiny'),
)
# Seeds that an interval needs. That of two says little: its width is 12.7 times their difference,
# and nothing if they happen to be equal.
FEWEST = 3
WINDOW = 10  # steps, of the means of training rewards
COLOURS = {
    'echo': 'tab:green',
    'grpo': 'tab:grey',
    'shuffled': 'tab:red',
    'echo_0p05': 'tab:olive',
    'echo_1p0': 'tab:blue',
    'echo_released': 'tab:cyan',
    'grpo_no_kl': 'black',
    'env_only': 'tab:purple',
    'env_only_no_kl': 'tab:pink',
    'new_machine': 'tab:orange',
    'new_machine_grpo': 'tab:brown',
}
_MARKED = re.compile(r'(<!-- tables -->\n).*(<!-- end of tables -->)', re.DOTALL)


class Results:
    """The stored results, by arm and seed."""

    def __init__(self, results: Sequence[dict]):
        self._by_run = {(result['arm'], result['seed']): result for result in results}

    def arms(self) -> list[str]:
        return [arm for arm in ARMS if self.seeds(arm)]

    def seeds(self, *arms: str) -> list[int]:
        """The seeds of which there is a run of each of the arms."""
        seeds = sorted({seed for _, seed in self._by_run})
        return [seed for seed in seeds if all((arm, seed) in self._by_run for arm in arms)]

    def run(self, arm: str, seed: int) -> dict:
        return self._by_run[arm, seed]

    def has(self, key: str) -> bool:
        """Whether a run has this series."""
        return any(key in run['series'] for run in self._by_run.values())

    def solved(self, arm: str, seed: int, when: str = 'after') -> list[int]:
        return self.run(arm, seed)['heldout'][when]['solved']

    def rewards(self, arm: str, seed: int) -> list[float]:
        return [value for _, value in self.run(arm, seed)['series']['rollout/reward']]

    def paired(self, first: str, second: str) -> dict[int, stats.Paired]:
        """What each seed says of two arms."""
        return {
            seed: stats.paired(self.solved(first, seed), self.solved(second, seed))
            for seed in self.seeds(first, second)
        }


# ------------------------------------------------------------------------------------------ tables


def tables(results: Results) -> str:
    parts = [_arms(results)]
    for first, second in PAIRS:
        if results.seeds(first, second):
            parts.append(_pairs(results, first, second))
    return '\n\n'.join([*parts, _runs(results)])


_HEADER = '| start | end | 1 / 2 / 3 tools | first call right | environment CE |'


def _arms(results: Results) -> str:
    lines = [
        'Means over seeds; the last column is the difference to GRPO on the same seeds, with its '
        '95% interval, or with both differences if there are two seeds.\n',
        f'| arm | seeds {_HEADER} against GRPO |',
        '|---|---|---|---|---|---|---|---|',
    ]
    for arm in results.arms():
        seeds = results.seeds(arm)
        cells = [_mean(column) for column in zip(*(_numbers(results.run(arm, s)) for s in seeds))]
        against = ARMS[arm].against
        pairs = results.paired(arm, against) if arm != against else {}
        difference = _interval([pair.difference for pair in pairs.values()]) if pairs else '-'
        lines.append(_row(ARMS[arm].title, str(len(seeds)), *_cells(arm, cells), difference))
    return '\n'.join(lines)


def _pairs(results: Results, first: str, second: str) -> str:
    """The table of two arms, seed by seed."""
    pairs = results.paired(first, second)
    titles = [ARMS[arm].title for arm in (first, second)]
    lines = [
        f'**{titles[0]}** and **{titles[1]}** on the same held-out tasks, after training.\n',
        '| seed | first | second | difference (standard error) | tasks that one alone solves '
        "| sign test | first reaches the second's last reward at step |",
        '|---|---|---|---|---|---|---|',
    ]
    for seed, pair in pairs.items():
        rates = [f'{np.mean(results.solved(arm, seed)):.3f}' for arm in (first, second)]
        step = stats.steps_to_last(
            results.rewards(first, seed), results.rewards(second, seed), WINDOW
        )
        lines.append(
            _row(
                str(seed),
                *rates,
                f'{pair.difference:+.3f} ({pair.error:.3f})',
                f'{pair.only_first}, {pair.only_second}',
                f'{pair.p:.2g}',
                'never' if step is None else str(step),
            )
        )
    differences = [pair.difference for pair in pairs.values()]
    if len(pairs) > 1:
        sign = f'{stats.sign_test(differences):.2g}, over seeds'
        lines.append(_row('mean', '', '', _interval(differences), '', sign, ''))
    return '\n'.join(lines)


def _runs(results: Results) -> str:
    lines = [
        'Every run.\n',
        f'| run | seed {_HEADER} minutes |',
        '|---|---|---|---|---|---|---|---|',
    ]
    for arm in results.arms():
        for seed in results.seeds(arm):
            run = results.run(arm, seed)
            minutes = f'{run["summary"]["train_minutes"]:.0f}'
            lines.append(_row(ARMS[arm].title, str(seed), *_cells(arm, _numbers(run)), minutes))
    return '\n'.join(lines)


def _numbers(run: dict) -> list[float]:
    """Start, end, the end by number of tools, first call right and CE before and after.

    The CE is NaN if the terminal wrote nothing before training, a number of tools that no task has.
    """
    heldout, summary = run['heldout'], run['summary']
    before, after = heldout['before'], heldout['after']
    tools = stats.by_count(after['solved'], heldout['tools'])[:3]
    return [
        float(np.mean(before['solved'])),
        float(np.mean(after['solved'])),
        *(tools + [math.nan] * (3 - len(tools))),
        float(np.mean(before['first_right'])),
        float(np.mean(after['first_right'])),
        *(summary.get(f'env_ce_output_{when}', math.nan) for when in ('before', 'after')),
    ]


def _cells(arm: str, numbers: Sequence[float]) -> list[str]:
    """The cells of `_HEADER`. What asks for tools is left out of runs that have none."""
    start, end, one, two, three, right_before, right_after, ce_before, ce_after = numbers
    rates = [f'{start:.3f}', f'{end:.3f}']
    tools = [f'{one:.2f} / {two:.2f} / {three:.2f}', f'{right_before:.2f} to {right_after:.2f}']
    ce = f'{ce_before:.2f} to {ce_after:.2f}'
    has_tools = 'machine' in ARMS[arm].config(0).tasks.families[0]
    return [*rates, *(tools if has_tools else ['-', '-']), ce]


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _interval(values: Sequence[float]) -> str:
    """The mean with its 95% interval, or with the values themselves if they are too few for one."""
    found = mean_of_values(values)
    if len(values) < 2:
        return f'{found.mean:+.3f}'
    if len(values) < FEWEST:
        return f'{found.mean:+.3f} ({", ".join(f"{value:+.3f}" for value in values)})'
    return f'{found.mean:+.3f} ({found.low:+.3f} to {found.high:+.3f})'


def _row(*cells: str) -> str:
    return f'| {" | ".join(cells)} |'


# ----------------------------------------------------------------------------------------- figures


def band(axes, results: Results, arm: str, key: str, window: int = 1) -> None:
    """Draws a series of an arm: its mean over the seeds, and from the lowest to the highest."""
    runs = [dict(results.run(arm, seed)['series'].get(key, [])) for seed in results.seeds(arm)]
    steps = sorted(set.intersection(*map(set, runs))) if runs else []
    if not steps:
        return
    values = np.array([stats.smoothed([run[step] for step in steps], window) for run in runs])
    steps = steps[-values.shape[1] :]
    label = f'{ARMS[arm].title} ({len(runs)} seeds)' if len(runs) > 1 else ARMS[arm].title
    axes.plot(steps, values.mean(axis=0), color=COLOURS[arm], label=label, linewidth=1.5)
    axes.fill_between(
        steps, values.min(axis=0), values.max(axis=0), color=COLOURS[arm], alpha=0.15, linewidth=0
    )


def draw_result(results: Results, file: pathlib.Path) -> None:
    """ECHO, GRPO and the shuffled control at a glance."""
    arms = [arm for arm in ('echo', 'grpo', 'shuffled') if results.seeds(arm)]
    figure = matplotlib.figure.Figure(figsize=(14, 4), layout='constrained')
    first, reward, bars = figure.subplots(1, 3)
    for number, arm in enumerate(arms):
        band(first, results, arm, 'rollout/first_right', WINDOW)
        band(reward, results, arm, 'rollout/reward', WINDOW)
        rates = np.array([_numbers(results.run(arm, s))[1:5] for s in results.seeds(arm)])
        places = np.arange(4) + 0.27 * (number - (len(arms) - 1) / 2)
        bars.bar(places, rates.mean(axis=0), 0.25, color=COLOURS[arm], alpha=0.6)
        for rate in rates:
            bars.plot(places, rate, '.', color=COLOURS[arm], ms=5)
    start = [np.mean(results.solved(arm, s, 'before')) for arm in arms for s in results.seeds(arm)]
    if arms:
        level = [np.mean(start)] * 2
        bars.plot([-0.45, 0.45], level, '--', color='black', lw=1, label='warm start')
    first.set(title=f'first call right in training, mean of {WINDOW} steps', xlabel='learner step')
    reward.set(title=f'training reward, mean of {WINDOW} steps', xlabel='learner step')
    bars.set(title='held-out tasks solved after training; a dot is a seed')
    bars.set_xticks(range(4), ['all', 'one tool', 'two tools', 'three tools'])
    _finish(first, reward, bars)
    figure.savefig(file, dpi=120)


def draw_curves(results: Results, file: pathlib.Path) -> None:
    """All arms on the machine: the dose of the environment term above, the controls below."""
    doses = ('grpo', 'echo_0p05', 'echo', 'echo_1p0')
    controls = [arm for arm in COLOURS if arm not in ('echo_0p05', 'echo_1p0')]
    panels = [
        ('rollout/reward', f'training reward, mean of {WINDOW} steps', WINDOW),
        ('rollout/first_right', f'first call right in training, mean of {WINDOW} steps', WINDOW),
        ('eval/env_ce/output', 'environment CE (output), held-out, nats a token', 1),
        ('train/grad_cosine', "cosine between the terms' gradients", 1),
    ]
    panels = [panel for panel in panels if results.has(panel[0])]
    figure = matplotlib.figure.Figure(figsize=(5 * len(panels) + 3, 8), layout='constrained')
    for half, arms in zip(figure.subfigures(2), (doses, controls)):
        (row,) = half.subplots(1, len(panels), squeeze=False)
        for axes, (key, title, window) in zip(row, panels):
            for arm in arms:
                band(axes, results, arm, key, window)
            axes.set(title=title, xlabel='learner step')
            _finish(axes, from_zero=key != 'train/grad_cosine', has_legend=False)
        half.legend(*row[0].get_legend_handles_labels(), loc='outside right center', fontsize=9)
    figure.savefig(file, dpi=100)


def _finish(*panels, from_zero: bool = True, has_legend: bool = True) -> None:
    for axes in panels:
        if from_zero:
            axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        if has_legend and axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)


# ------------------------------------------------------------------------------------------- files


def write(folder: pathlib.Path) -> str:
    """Writes the report of results.json in `folder` beside it, and returns its tables.

    README.md gets the tables too, if it is there.
    """
    results = Results(json.loads((folder / 'results.json').read_text()))
    text = tables(results)
    page = folder / 'README.md'
    if page.exists():
        page.write_text(with_tables(page.read_text(), text))
    draw_result(results, folder / 'result.png')
    draw_curves(results, folder / 'curves.png')
    return text


def with_tables(page: str, text: str) -> str:
    """The page with `text` between its marks."""
    if not _MARKED.search(page):
        raise ValueError('the page has no <!-- tables --> and <!-- end of tables -->; add them')
    return _MARKED.sub(lambda found: f'{found[1]}{text}\n{found[2]}', page)


def main(_) -> None:
    print(write(pathlib.Path(_FOLDER.value)))


if __name__ == '__main__':
    _FOLDER = flags.DEFINE_string('folder', str(HERE), 'Where results.json is.')
    app.run(main)
