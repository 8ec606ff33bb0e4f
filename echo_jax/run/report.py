"""What a person sees of a run: progress, metrics, TensorBoard, tables, a rollout, curves."""

import json
import pathlib
import time
from collections.abc import Mapping, Sequence

import numpy as np
import rich.console
import rich.progress
import rich.table
import rich.text
import transformers

from echo_jax.run.entry import printable
from echo_jax.run.sinks import Sink, open_sinks
from echo_jax.run.workdir import Workdir, whole_rows, write_whole
from echo_jax.types import SOLVED_REWARD, Role, Rollout

CONSOLE = rich.console.Console(highlight=False)
_LINE_SECONDS = 10.0  # between two lines of progress, if there is no terminal
_STYLES = {
    Role.PROMPT: 'dim',
    Role.ACTION: 'bold green',
    Role.SCAFFOLD: 'dim',
    Role.WARNING: 'yellow',
    Role.FEEDBACK: 'yellow',
    Role.WRAPPER: 'blue',
    Role.OUTPUT: 'bold cyan',
}


def check_finite(step: int, values: Mapping[str, float]) -> None:
    """Raises FloatingPointError for a value that is not finite: no run goes on from there."""
    wrong = [name for name, value in values.items() if not np.isfinite(value)]
    if wrong:
        raise FloatingPointError(
            f'step {step}: {", ".join(wrong)} not finite; lower the learning rate or look at what '
            'this step read, then run again: it resumes at the last checkpoint'
        )


class Metrics:
    """metrics.jsonl, one object a step, and the same numbers as TensorBoard events.

    `resume(step)` drops what a killed run wrote after the checkpoint that it goes on from.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        name: str = 'metrics.jsonl',
        writes: bool = True,
        sinks: Sequence[Sink] = (),
    ):
        """writes: False in all processes of a learner but one. sinks: who gets each row too."""
        self._file, self._writes, self._sinks = workdir / name, writes, sinks
        if writes:
            # It loads PyTorch if that is installed, which takes seconds. Not tensorboardX's
            # SummaryWriter: that writes in a thread, whose errors, as of a full disk, are nobody's.
            from tensorboardX.event_file_writer import EventsWriter

            folder = workdir / 'tensorboard'
            folder.mkdir(exist_ok=True)
            self._events = EventsWriter(str(folder / 'events'), f'.{self._file.stem}')

    def rows(self) -> list[dict]:
        if not self._file.exists():
            return []
        return whole_rows(self._file.read_text())

    def resume(self, step: int) -> None:
        if self._writes:
            kept = [json.dumps(row) + '\n' for row in self.rows() if row['step'] <= step]
            write_whole(self._file, ''.join(kept))

    def write(self, step: int, values: dict[str, float]) -> None:
        """Raises FloatingPointError for a value that is not finite."""
        check_finite(step, values)
        if not self._writes:
            return
        with self._file.open('a') as file:
            file.write(json.dumps({'step': step, **values}) + '\n')
        self._show(step, values)

    def lacks(self, step: int, name: str) -> bool:
        """Whether there is a row of `step` without that number."""
        return any(row['step'] == step and name not in row for row in self.rows())

    def add(self, step: int, values: dict[str, float]) -> None:
        """Adds values to the row of `step`, the last."""
        if self._writes and values:
            rows = [row | values if row['step'] == step else row for row in self.rows()]
            write_whole(self._file, ''.join(json.dumps(row) + '\n' for row in rows))
            self._show(step, values)

    def _show(self, step: int, values: dict[str, float]) -> None:
        from tensorboardX.proto.event_pb2 import Event

        event = Event(step=step, wall_time=time.time())
        for name, value in values.items():
            event.summary.value.add(tag=name, simple_value=value)
        self._events.write_event(event)
        self._events.flush()  # now: a run in a bucket copies the file as it is
        for sink in self._sinks:
            sink(step, values)

    def close(self) -> None:
        if self._writes:
            self._events.close()


def open_metrics(work: Workdir, leads: bool) -> Metrics:
    """The metrics of a run's steps, which only the leading process of a learner writes."""
    if leads:
        work.take('metrics.jsonl')
    return Metrics(work.path, writes=leads, sinks=open_sinks(work) if leads else ())


class Progress:
    """A progress bar with the newest numbers and the time left.

    Without a terminal it prints a line every ten seconds instead.
    """

    def __init__(self, title: str, total: int, done: int = 0):
        self._title, self._total, self._start, self._done = title, total, time.monotonic(), done
        self._last_line = self._start  # no line at once: the first estimate would be worth nothing
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn('[bold]{task.description}'),
            rich.progress.BarColumn(bar_width=24),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TextColumn('{task.fields[numbers]}'),
            rich.progress.TextColumn('left'),
            rich.progress.TimeRemainingColumn(),
            console=CONSOLE,
            disable=not CONSOLE.is_terminal,
        )
        self._task = self._bar.add_task(title, total=total, completed=done, numbers='')

    def __enter__(self) -> 'Progress':
        self._bar.start()
        return self

    def __exit__(self, *error) -> None:
        self._bar.stop()

    def show(self, done: int, **numbers: float) -> None:
        """Shows that `done` of the total are done, and `numbers` beside the bar."""
        text = '  '.join(f'{name} {value:.3g}' for name, value in numbers.items())
        self._bar.update(self._task, completed=done, numbers=text)
        now = time.monotonic()
        due = now - self._last_line > _LINE_SECONDS or done == self._total
        if due and not CONSOLE.is_terminal:
            self._last_line = now
            left = (now - self._start) / max(done - self._done, 1) * (self._total - done)
            CONSOLE.print(f'{self._title} {done}/{self._total}  {text}  left {left:.0f} s')


def heading(text: str) -> None:
    CONSOLE.print(printable(text), style='bold', markup=False)


def results(
    work: Workdir,
    tokenizer: transformers.PreTrainedTokenizerFast,
    metrics: Metrics,
    summary: dict[str, float],
    after: Sequence[Rollout],
) -> None:
    """Writes summary.json and curves.png, and shows a solved rollout and the table.

    after: the held-out rollouts of the last weights.
    """
    write_whole(work.path / 'summary.json', json.dumps(summary, indent=1))
    before_and_after = [
        {
            'step': step,
            'eval/solve_rate': summary[f'solve_rate_{when}'],
            'eval/solve_rate/low': summary[f'solve_rate_low_{when}'],
            'eval/solve_rate/high': summary[f'solve_rate_high_{when}'],
            'eval/env_ce': summary[f'env_ce_{when}'],
            # NaN, which no curve shows, if no command of these rollouts printed anything.
            'eval/env_ce/output': summary.get(f'env_ce_output_{when}', float('nan')),
        }
        for step, when in ((0, 'before'), (summary['steps'], 'after'))
    ]
    curves(work.path / 'curves.png', [before_and_after[0], *metrics.rows(), before_and_after[1]])
    work.share('metrics.jsonl', 'tensorboard', 'curves.png', 'summary.json')
    solved = [r for r in after if r.reward >= SOLVED_REWARD]
    if solved:
        show_rollout(tokenizer, solved[0])
    show_summary(summary)


def show_summary(summary: dict) -> None:
    table = rich.table.Table(title='Held-out tasks', title_justify='left')
    table.add_column('')
    for column in ('before training', f'after {summary["steps"]} steps'):
        table.add_column(column, justify='right')
    for name, key, form in (
        ('solve rate', 'solve_rate', '{:.1%}'),
        ('environment CE, nats a token', 'env_ce', '{:.3f}'),
        ("the same, the terminal's output alone", 'env_ce_output', '{:.3f}'),
        ('turns with an imagined observation', 'imagined', '{:.1%}'),
    ):
        cells = []
        for when in ('before', 'after'):
            value, low = summary.get(f'{key}_{when}'), summary.get(f'{key}_low_{when}')
            if value is not None:  # some runs have no output to predict
                ends = (low, summary.get(f'{key}_high_{when}'))
                span = ' ({} to {})'.format(*map(form.format, ends)) if low is not None else ''
                cells.append(form.format(value) + span)
        if len(cells) == 2:
            table.add_row(name, *cells)
    CONSOLE.print(table)


def show_rollout(tokenizer: transformers.PreTrainedTokenizerFast, rollout: Rollout) -> None:
    """Prints a rollout, coloured by role, without the control codes that the terminal wrote."""
    text = rich.text.Text()
    cuts = np.flatnonzero(np.diff(rollout.roles)) + 1
    for ids, roles in zip(np.split(rollout.tokens, cuts), np.split(rollout.roles, cuts)):
        piece = tokenizer.decode(ids, skip_special_tokens=False)
        text.append(printable(str(piece)), style=_STYLES[Role(roles[0])])
    heading(f'A solved rollout of {rollout.task_id} (green: the agent; cyan: the terminal)')
    CONSOLE.print(text)


def curves(file: pathlib.Path, rows: list[dict]) -> None:
    """Draws reward, environment CE and held-out solve rate over the steps of a run.

    The environment CE is that of OUTPUT, what the terminal wrote, because the harness's own words
    are soon known. In a run in which no command has printed anything it is that of all targets.
    Around the solve rate, dotted lines are the ends of its 95% interval.
    What every step measures on its few tasks is noisy. It is drawn faint, and its running mean over
    10 steps is drawn full.
    """
    import matplotlib.figure  # only the end of a run draws

    ce, of = ('env_ce', 'targets')
    if any('train/env_ce/output' in row for row in rows):
        ce, of = ('env_ce/output', "the terminal's output")
    panels = (
        ('reward and solve rate', 'rollout/reward', 'eval/solve_rate', 'held-out solve rate'),
        (f'CE of {of}, nats a token', f'train/{ce}', f'eval/{ce}', 'held-out rollouts'),
    )
    figure = matplotlib.figure.Figure(figsize=(10, 3.6), layout='constrained')
    for axes, (title, noisy, heldout, heldout_label) in zip(figure.subplots(1, 2), panels):
        steps, values = _points(rows, noisy)
        axes.plot(steps, values, color='tab:blue', alpha=0.25, linewidth=1)
        means = [np.mean(values[max(0, i - 9) : i + 1]) for i in range(len(values))]
        axes.plot(steps, means, color='tab:blue', label='training')
        axes.plot(*_points(rows, heldout), 'o-', color='tab:orange', label=heldout_label, ms=4)
        for end in ('low', 'high'):  # of the 95% interval over tasks
            axes.plot(*_points(rows, f'{heldout}/{end}'), ':', color='tab:orange', linewidth=1)
        axes.set(title=title, xlabel='learner step')
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(file, dpi=120)


def _points(rows: list[dict], key: str) -> tuple[list[int], list[float]]:
    points = [(row['step'], row[key]) for row in rows if key in row]
    return [step for step, _ in points], [value for _, value in points]
