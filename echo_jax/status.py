"""What is going on in a run: who waits for whom, what fails, how long it will take.

    python -m echo_jax.status --workdir=runs/tiny
    python -m echo_jax.status --workdir=gs://bucket/run --watch=30
    python -m echo_jax.status --workdir=runs/tiny --json

It reads the run's folder or bucket, as it goes on or when it has ended, and writes nothing to it.
Shares, times and failures of the learner are of its last 20 steps, those of the workers of the last
minute that they reported. It needs no accelerator, no JAX and no vLLM.
"""

import json
import time
from collections.abc import Sequence
from typing import Any

import rich.table
import rich.text
from absl import flags
from rich.filesize import decimal

from echo_jax.run import entry
from echo_jax.run.entry import printable
from echo_jax.run.report import CONSOLE
from echo_jax.run.standing import look
from echo_jax.run.workdir import Workdir

_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder or gs:// URL of the run.', required=True)
_JSON = flags.DEFINE_bool('json', False, 'Print one JSON object, a line, instead of tables.')
_WATCH = flags.DEFINE_float(
    'watch', 0.0, 'Seconds between one look and the next; 0: look once.', lower_bound=0.0
)


def show(found: dict[str, Any]) -> None:
    """Prints the numbers in at most 80 columns."""
    CONSOLE.print(printable(found['run']), style='bold', markup=False, soft_wrap=True)
    table = rich.table.Table(box=None, show_header=False, padding=(0, 1, 0, 0))
    lines = {
        'step': _progress(found),
        'learner': _learner(found),
        'sampling': _sampling(found),
        'token age': ', '.join(f'{age}: {part:.0%}' for age, part in sorted(found['ages'].items())),
        'queue': _queue(found['queue']),
        'failures': _failures(found),
        'damaged': _damaged(found),
        'disk': _disk(found['disk']),
    }
    for name, text in lines.items():
        if text:
            table.add_row(name, rich.text.Text(text))
    CONSOLE.print(table)
    if found['workers']:
        CONSOLE.print(_workers(found['workers']))


def _progress(found: dict[str, Any]) -> str:
    total = '' if found['steps'] is None else f' of {found["steps"]}'
    if found['finished']:
        return f'{found["step"]}{total}, finished'
    if not found['step']:
        warm = found['warm_start_step']
        return f'none{total} yet' + (f', warm start at step {warm}' if warm else '')
    since = found['seconds_since_a_step']
    ago = '' if since is None else f', the last {_time(since)} ago'
    return f'{found["step"]}{total}{ago}, {_time(found["seconds_left"])} left'


def _learner(found: dict[str, Any]) -> str:
    if found['learner_idle'] is None:
        return ''
    idle, rate = found['learner_idle'], found['learned_tokens_per_sec']
    return f'idle {idle:.0%}, {rate:,.0f} tokens/s, a step takes {_time(found["seconds_a_step"])}'


def _sampling(found: dict[str, Any]) -> str:
    """Of the workers if the run has any, else of the embedded policy."""
    if found['queue'] is None:
        idle, rate = found['engine_idle'].get('embedded'), found['sampled_tokens_per_sec']
        return '' if idle is None else f'idle {idle:.0%}, {rate:,.0f} tokens/s'
    heard = [each for each in found['workers'] if not each['silent'] and 'idle_now' in each]
    rate = sum(each['tokens_per_sec'] for each in heard)
    return f'{len(heard)} of {len(found["workers"])} workers report, {rate:,.0f} tokens/s'


def _queue(queue: dict[str, int] | None) -> str:
    text = '{due} groups due: {drawn} drawn now, {whole} whole, {free} that nobody draws'
    return text.format_map(queue) if queue else ''


def _failures(found: dict[str, Any]) -> str:
    counts = {name: found['statuses'][name] for name in ('infra_error', 'verifier_error')}
    counts |= {printable(kind): count for kind, count in found['errors'].items()}
    counts |= {'late groups': found['late_groups']}
    named = ', '.join(f'{name} {count}' for name, count in counts.items() if count)
    rollouts, steps = sum(found['statuses'].values()), found['recent_steps']
    return f'{named or "none"}, of {rollouts} rollouts in {steps} steps' if steps else ''


def _damaged(found: dict[str, Any]) -> str:
    count = found['damaged_groups']
    return f'{count} groups since the start, set aside and drawn anew' if count else ''


def _disk(sizes: dict[str, int] | None) -> str:
    return ', '.join(f'{name} {decimal(size)}' for name, size in (sizes or {}).items() if size)


def _workers(reports: Sequence[dict[str, Any]]) -> rich.table.Table:
    table = rich.table.Table(box=None, padding=(0, 1, 0, 0))
    table.add_column('worker', overflow='fold')
    for name in ('heard', 'version', 'idle', 'swap', 'tokens/s', 'swaps', 'each', 'done', 'failed'):
        table.add_column(name, justify='right', no_wrap=True)
    for each in reports:
        name = printable(each['worker']) + (' (silent)' if each['silent'] else '')
        if 'idle_now' not in each:  # it is older code's
            table.add_row(rich.text.Text(name))
            continue
        costs = sum(value for key, value in each.items() if key.startswith('total_'))
        cells = (
            _time(each['seconds_ago']),
            f'{each["version"]}',
            f'{each["idle_now"]:.0%}',
            f'{each["swapping_now"]:.0%}',
            f'{each["tokens_per_sec"]:,.0f}',
            f'{each["swaps"]:.0f}',
            _time(costs / each['swaps'] if each['swaps'] else None),
            f'{each["rollouts"]}',
            f'{each["failed"]}',
        )
        table.add_row(rich.text.Text(name), *cells, style='red' if each['silent'] else None)
    return table


def _time(seconds: float | None) -> str:
    if seconds is None:
        return '-'
    for size, unit in ((86400, 'd'), (3600, 'h'), (60, 'min')):
        if seconds >= 2 * size:
            return f'{seconds / size:.0f} {unit}'
    return f'{seconds:.0f} s' if seconds >= 10 else f'{max(seconds, 0):.1f} s'


def main(argv: Sequence[str]) -> None:
    del argv
    work = Workdir.open(_WORKDIR.value)
    while True:
        found = look(work)
        if _JSON.value:
            print(json.dumps(found), flush=True)
        else:
            show(found)
        if not _WATCH.value:
            return
        time.sleep(_WATCH.value)
        if not _JSON.value and CONSOLE.is_terminal:
            CONSOLE.clear()


if __name__ == '__main__':
    entry.run(main)
