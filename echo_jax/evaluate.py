"""pass@k and environment cross-entropy of any model, or a check of tasks without a model.

    python -m echo_jax.evaluate --config=configs/tiny.py --workdir=runs/tiny \
        --samples=4 --output=eval.json
    python -m echo_jax.evaluate --config=configs/qwen3_8b.py --model=HF_DIR --policy=vllm \
        --tasks=TASKS --samples=8 --output=eval.json --against=other.json

`--agent=policy` samples with `--model`: the newest weights of a run, one of its saved steps, or a
Hugging Face directory; by JAX in this process, or by vLLM in the rollout environment. The recipe
says how: protocol, sandboxes, temperature. `oracle` runs each task's solution/solve.sh, which must
earn the reward; `nop` does nothing, which must not.

Results are written as they come, beside `--output`, and the same command goes on where it was
stopped, INFRA_ERRORs drawn anew. These say nothing about the agent and count in no rate. The exit
code is 1 if there is one.
"""

import hashlib
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import ml_collections
import rich.table
import rich.text
from absl import flags, logging
from ml_collections import config_flags

from echo_jax.policy import PolicyError
from echo_jax.run import entry, results, tasksets
from echo_jax.run.evaluated import Place, find_model
from echo_jax.run.evaluating import evaluate_agent, evaluate_policy
from echo_jax.run.inert import check_inert
from echo_jax.run.intervals import Difference
from echo_jax.run.oracle import show_failures
from echo_jax.run.report import CONSOLE
from echo_jax.run.workdir import Workdir, unpacked, write_whole
from echo_jax.types import Status, Task

_CONFIG = config_flags.DEFINE_config_file('config', help_string='Recipe: FILE[:variant].')
_WORKDIR = flags.DEFINE_string('workdir', '', 'Run of this recipe: its model and held-out tasks.')
_MODEL = flags.DEFINE_string('model', '', 'Run or Hugging Face directory; none: the --workdir.')
_STEP = flags.DEFINE_integer('step', None, 'Saved step of the run; none: its newest weights.')
_POLICY = flags.DEFINE_enum('policy', 'jax', ['jax', 'vllm'], 'What samples and scores.')
_TASKS = flags.DEFINE_string(
    'tasks', '', "Folder, .parquet or registry.json, several with commas; none: a run's held-out."
)
_AGENT = flags.DEFINE_enum('agent', 'policy', ['policy', 'oracle', 'nop'], 'Who acts.')
_SAMPLES = flags.DEFINE_integer(
    'samples', 1, 'Rollouts of every task; 0: none, only --rollouts are scored.', lower_bound=0
)
_ROLLOUTS = flags.DEFINE_string(
    'rollouts', '', 'Fixed rollouts whose environment CE is measured too: RUN/heldout_before.'
)
_BY = flags.DEFINE_list('by', [], "Rates by 'source' or by keys of [metadata] in task.toml.")
_AGAINST = flags.DEFINE_string('against', '', 'eval.json of another model on the same tasks.')
_OUTPUT = flags.DEFINE_string('output', '', 'JSON file to write.')
flags.mark_flag_as_required('config')


def main(argv: Sequence[str]) -> None:
    del argv
    logging.set_verbosity(logging.WARNING)
    check_inert(_CONFIG.value, entry.overrides())
    samples, output = _SAMPLES.value, pathlib.Path(_OUTPUT.value) if _OUTPUT.value else None
    if output:
        if output.suffix in ('.jsonl', '.rollouts'):
            raise ValueError(
                f'--output={output}: results are kept under that name until all are there; name a '
                '.json file'
            )
        output.parent.mkdir(parents=True, exist_ok=True)  # an error now, not after all the work
    work, place = _open_run(), _find_place()
    config = place.in_recipe(_CONFIG.value) if place else _CONFIG.value
    with unpacked(work) as cache:
        tasks, left_out = _read_tasks(work or (place.run if place else None), cache)
        results.rates_by([], 1, tasks, _BY.value)  # an unknown key is refused now, not after it all
        theirs = results.read_other(_AGAINST.value, tasks) if _AGAINST.value else []
        kept = results.Results(output, _settings(config, place, tasks))
        stop, measured = entry.Stop(), {}
        try:
            if place:
                measured = stop.run(
                    evaluate_policy(
                        config, place, _POLICY.value, tasks, samples, kept, _ROLLOUTS.value
                    )
                )
            else:
                evaluate_agent(stop, config, _AGENT.value, tasks, samples, kept)
        except entry.Stopped:
            sys.exit('stopped; the same command goes on from here' if output else 'stopped')
    document = {
        'results': kept.found,
        'left_out': [one._asdict() for one in left_out],
        'pass@k': results.as_json(results.pass_rates(kept.found, samples)),
        'by': results.rates_by(kept.found, samples, tasks, _BY.value),
        'env_ce': {},
        **measured,
    }
    found = results.compared(kept.found, theirs) if theirs else None
    if found:
        document['against'] = {'evaluation': _AGAINST.value, **found._asdict()}
    if output:
        write_whole(output, json.dumps(document, indent=1))
    _show(document, len(tasks))
    if found:
        _show_difference(found)
    elif theirs:
        CONSOLE.print(
            f'no task has a result both here and in {_AGAINST.value}: nothing is compared',
            markup=False,
        )
    lost = sum(result['status'] == Status.INFRA_ERROR for result in kept.found)
    if lost:
        sys.exit(
            f'error: {lost} of {len(kept.found)} results are an infra_error; see their reasons'
        )


# ------------------------------------------------------------------------------- what is evaluated


def _open_run() -> Workdir | None:
    """The run that --workdir names, if any. Raises ValueError if it holds no run of this recipe."""
    if not _WORKDIR.value:
        return None
    if not Workdir.holds_run(_WORKDIR.value):
        raise ValueError(f'{_WORKDIR.value} holds no run; name the --workdir of echo_jax.train')
    return Workdir(_WORKDIR.value, _CONFIG.value)


def _find_place() -> Place | None:
    """The model that samples; None if the agent has none."""
    named = _MODEL.value or _WORKDIR.value
    if _AGENT.value != 'policy':
        for flag in (_MODEL, _STEP, _ROLLOUTS):
            if flag.value not in ('', None):
                raise ValueError(
                    f'--{flag.name} has no effect with --agent={_AGENT.value}, which has no model; '
                    'leave it out'
                )
        return None
    if not named:
        raise ValueError(
            '--agent=policy needs a model: --model, a run or a Hugging Face directory, or the '
            '--workdir of a run'
        )
    return find_model(named, _STEP.value)


def _read_tasks(work: Workdir | None, cache: pathlib.Path) -> tasksets.Read:
    if _TASKS.value:
        return tasksets.read(_TASKS.value, _CONFIG.value, cache)
    if work is None:
        raise ValueError(
            f'--agent={_AGENT.value} needs --tasks, a directory or .parquet of Harbor tasks, or '
            'a run for its held-out ones'
        )
    return work.read_tasks('heldout')


def _settings(
    config: ml_collections.ConfigDict, place: Place | None, tasks: Sequence[Task]
) -> dict[str, Any]:
    """What the results depend on."""
    names = '\n'.join(task.task_id for task in tasks)
    return {
        'agent': _AGENT.value,
        'samples': _SAMPLES.value,
        'tasks': f'{len(tasks)}, {hashlib.sha256(names.encode()).hexdigest()[:12]}',
        'model': place and place.name,
        'version': place and place.version,
        'policy': place and _POLICY.value,
        'config': json.loads(config.to_json()),
    }


# ------------------------------------------------------------------------------- what a person sees


def _show(document: dict[str, Any], tasks: int) -> None:
    found = document['results']
    show_failures({result['task_id']: result['reason'] for result in found if result['reason']})
    rates = ', '.join(
        f'pass@{k} {rate["mean"]:.1%} ({rate["low"]:.1%} to {rate["high"]:.1%})'
        for k, rate in document['pass@k'].items()
    )
    bad = sum(result['status'] not in (Status.OK, Status.TRUNCATED) for result in found)
    without = f' ({len(document["left_out"])} more left out)' if document['left_out'] else ''
    if found:
        CONSOLE.print(
            f'{tasks} tasks{without}, {_AGENT.value}: {rates}; {bad} with an error status'
        )
    for key, values in document['by'].items():
        table = rich.table.Table(title=f'by {key}', title_justify='left')
        for column in (key, 'tasks', *(f'pass@{k}' for k in document['pass@k'])):
            table.add_column(column)
        for value, one in values.items():
            cells = [
                f'{r["mean"]:.1%} ({r["low"]:.1%} to {r["high"]:.1%})'
                for r in one['pass@k'].values()
            ]
            table.add_row(rich.text.Text(entry.printable(value)), str(one['tasks']), *cells)
        CONSOLE.print(table)
    for name in ('env_ce', 'env_ce_fixed'):
        ce = {k: v for k, v in document.get(name, {}).items() if k != 'rollouts'}
        if ce:
            of = f' of {document[name]["rollouts"]}' if name == 'env_ce_fixed' else ''
            numbers = ', '.join(f'{role} {value:.4f}' for role, value in ce.items())
            CONSOLE.print(f'environment CE{of}, nats a token: {numbers}', markup=False)


def _show_difference(found: Difference) -> None:
    noise = '; inside the noise, the interval holds 0' if found.is_noise else ''
    CONSOLE.print(
        f'solve rate less that of {_AGAINST.value}: {found.mean:+.1%} '
        f'({found.low:+.1%} to {found.high:+.1%}){noise}',
        markup=False,
    )
    for name, tasks in (('gained', found.gained), ('lost', found.lost)):
        names = entry.printable(', '.join(tasks))
        CONSOLE.print(f'{name} {len(tasks)}: {names or "none"}', markup=False)


if __name__ == '__main__':
    entry.run(main, PolicyError)
