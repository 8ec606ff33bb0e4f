"""Looks at sets of tasks before a run does: what can run where, checks, images, packing.

    python -m echo_jax.tasks --tasks=DIR --output=tasks.json
    python -m echo_jax.tasks --config=configs/tiny.py --workdir=runs/tiny --check
    python -m echo_jax.tasks --config=RECIPE --workdir=RUN --tasks=DIR,FILE.parquet --build
    python -m echo_jax.tasks --tasks=DIR --parquet=FILE

DIR may be a git checkout of a published set: tasks are found at any depth. A task that cannot be
read is named and left out, and for each backend it says how many tasks it can run and why not the
others (`--verbose` for every task; `--output` for a file of them).

`--check` runs each task's own solution, which must earn at least 0.5, and nothing at all, which
must earn 0. `--build` makes every image that the Docker sandboxes of a run will want, the one that
tests run in included; an image that is there is not built again, so run the same command again
after a failure. The exit code is 1 if a task or an image failed. It needs no JAX.
"""

import json
import pathlib
import sys
from collections.abc import Sequence

import ml_collections
from absl import flags
from ml_collections import config_flags

from echo_jax.agent.protocol import Protocol
from echo_jax.run import entry, survey
from echo_jax.run.inert import check_inert
from echo_jax.run.oracle import faults, run_agent, show_failures
from echo_jax.run.report import CONSOLE, Progress
from echo_jax.run.tasksets import choose
from echo_jax.run.workdir import Workdir, read_tokenizer, unpacked, write_whole
from echo_jax.sandbox.make import docker_images
from echo_jax.tasks.drawing import TaskSource
from echo_jax.tasks.sources import TaskSet, load_sources
from echo_jax.types import Task

_CONFIG = config_flags.DEFINE_config_file('config', help_string='Recipe: FILE[:variant].')
_WORKDIR = flags.DEFINE_string('workdir', '', 'Folder of the run that will use the tasks.')
_TASKS = flags.DEFINE_string(
    'tasks', '', 'Folder, .parquet or registry.json, several with commas; none: those of a run.'
)
_PARQUET = flags.DEFINE_string('parquet', '', 'File to pack the tasks into.')
_BUILD = flags.DEFINE_bool('build', False, 'Build the images of the tasks.')
_CHECK = flags.DEFINE_bool('check', False, 'Run oracle and nop.')
_VERBOSE = flags.DEFINE_bool('verbose', False, 'Name every task that a backend cannot run.')
_OUTPUT = flags.DEFINE_string('output', '', 'JSON file to write, with an object for every task.')


def build_images(
    stop: entry.Stop, tasks: Sequence[Task], config: ml_collections.ConfigDict
) -> dict[str, str]:
    """Builds or pulls all images; returns why one failed, by task id or by the name of the image
    that tests run in.
    """
    if config.sandbox.backend != 'docker':
        raise ValueError(
            f"--build makes images for sandbox.backend='docker', which is "
            f'{config.sandbox.backend!r}; add --config.sandbox.backend=docker'
        )
    images, done, failures = docker_images(config), 0, {}

    def on_image(task: Task, error: Exception | None) -> None:
        nonlocal done
        done += 1
        progress.show(done)

    async def run() -> None:
        failures.update(await images.build(tasks, on_image))

    with Progress('build', len(tasks)) as progress:
        try:
            stop.run(run())
        finally:
            images.close()  # a build under way ends first
            images.engine.close()
    return failures


def drop_long_prompts(
    tasks: Sequence[Task], config: ml_collections.ConfigDict, work: Workdir | None
) -> list[Task]:
    """The tasks whose prompts fit, if there is a tokenizer to count with; says what it did."""
    if not (work or config.model.path):
        CONSOLE.print('prompts not counted: the tokenizer is the one of a --workdir or model.path')
        return list(tasks)
    tokenizer = work.tokenizer() if work else read_tokenizer(config.model.path)
    protocol, limit = Protocol(tokenizer, config.protocol), config.protocol.max_prompt_tokens
    source = TaskSource(tasks, protocol.count_prompt_tokens, limit)
    CONSOLE.print(f'{source.dropped} prompts over {limit} tokens dropped')
    return source.tasks


def read_sets(work: Workdir | None, cache: pathlib.Path) -> list[TaskSet]:
    """The sets that --tasks names, else those of the run; says what they are."""
    if _TASKS.value:
        sets = load_sources(_TASKS.value, cache)
    elif work:
        read = {split: work.read_tasks(split) for split in ('train', 'heldout')}
        sets = [TaskSet(pathlib.Path(split), *one, {}) for split, one in read.items()]
    else:
        raise ValueError("no tasks named; give --tasks, or --config and --workdir for a run's own")
    table = survey.rows(sets)
    for one in sets:
        for line in survey.describe(one, table, _VERBOSE.value):
            CONSOLE.print(entry.printable(line), markup=False, soft_wrap=True)
    if _OUTPUT.value:
        write_whole(pathlib.Path(_OUTPUT.value), json.dumps({'tasks': table}, indent=1))
    return sets


def main(argv: Sequence[str]) -> None:
    del argv
    config = _CONFIG.value and ml_collections.FrozenConfigDict(_CONFIG.value)
    if config is None and (_WORKDIR.value or _BUILD.value or _CHECK.value):
        raise ValueError('--workdir, --build and --check go by a recipe; give its --config')
    if config:
        check_inert(config, entry.overrides())
    work = Workdir(_WORKDIR.value, config) if _WORKDIR.value else None
    failed: dict[str, dict[str, str]] = {}
    with unpacked(work) as cache:
        sets = read_sets(work, cache)
        tasks = [task for one in sets for task in one.tasks]
        if _PARQUET.value:
            from echo_jax.tasks.parquet import write_parquet  # here: directories need no pyarrow

            write_parquet(tasks, pathlib.Path(_PARQUET.value))
            CONSOLE.print(f'{len(tasks)} tasks packed into {_PARQUET.value}', markup=False)
        if config:
            chosen = choose(sets, config)
            if len(chosen.tasks) < len(tasks):
                backend = config.sandbox.backend
                CONSOLE.print(f'{len(tasks) - len(chosen.tasks)} tasks are not for {backend}')
            tasks = drop_long_prompts(chosen.tasks, config, work)
        stop = entry.Stop()
        try:
            if _BUILD.value:
                failed['without an image'] = build_images(stop, tasks, config)
            if _CHECK.value:
                for agent in ('oracle', 'nop'):
                    outcomes = run_agent(stop, tasks, config, agent)
                    failed[f'where {agent} is wrong'] = faults(outcomes, agent)
        except entry.Stopped:
            sys.exit('stopped')
    for what, failures in failed.items():
        show_failures(failures)
        count = sum(task.task_id in failures for task in tasks)
        CONSOLE.print(f'{count} of {len(tasks)} tasks {what}')
    if any(failed.values()):
        sys.exit(1)


if __name__ == '__main__':
    entry.run(main)
