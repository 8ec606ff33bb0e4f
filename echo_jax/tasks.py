"""Looks at a set of tasks before a run does: counts, checks and packs it, and builds its images.

    python -m echo_jax.tasks --config=configs/tiny.py --workdir=runs/tiny --check
    python -m echo_jax.tasks --config=RECIPE --workdir=RUN --tasks=DIR,FILE.parquet --build
    python -m echo_jax.tasks --tasks=DIR --parquet=FILE

`--check` runs each task's own solution, which must earn the reward, and nothing at all, which must
earn 0. `--build` makes every image that the Docker sandboxes of a run will want; what is built is
not built again, so run it again after a failure. Exit code 1 where a task failed. It needs no JAX.
"""

import asyncio
import contextlib
import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import ml_collections
from absl import flags
from ml_collections import config_flags

from echo_jax import program, worker
from echo_jax.agent.protocol import Protocol
from echo_jax.agent.sandbox import Sandbox, SandboxError
from echo_jax.agent.tasks import TaskSource, load_sources
from echo_jax.agent.verifier import verify
from echo_jax.report import CONSOLE, Progress
from echo_jax.types import SOLVED_REWARD, Status, Task
from echo_jax.workdir import Workdir, read_tokenizer

_TRIES = 3  # sandboxes that may fail on a task, one after the other
_SHOWN = 20  # failures that are listed


class Outcome(NamedTuple):
    """What one sample of an agent without a model came to."""

    task_id: str
    sample_id: int
    reward: float
    status: Status
    reason: str = ''  # one line, of an INFRA_ERROR


@contextlib.contextmanager
def unpacked(work: Workdir | None) -> Iterator[pathlib.Path]:
    """Where the archives of a .parquet go: the run's folder, or one that lasts as long as this."""
    if work is not None:
        yield work.path / 'tasks' / 'unpacked'
        return
    with tempfile.TemporaryDirectory(prefix='echo_jax-tasks-') as folder:
        yield pathlib.Path(folder)


async def run_solution(task: Task, sandbox: Sandbox, oracle: bool) -> tuple[float, Status]:
    """Reward and status of a task's own solution, or of nothing at all, in a fresh sandbox.

    As Harbor has it, the solution has the agent's time, and is verified when that is over too.
    Raises ValueError where there is no solution, SandboxError where the sandbox fails.
    """
    solution = task.path / 'solution' / 'solve.sh'
    if oracle and not solution.is_file():
        raise ValueError(f'{solution} is missing; the oracle runs it')
    late = False
    try:
        await sandbox.start()
        if oracle:
            await sandbox.upload(solution.parent, '/solution')
            solved = await sandbox.run('bash /solution/solve.sh', task.agent_timeout_sec)
            late = solved.timed_out
        reward, status = await verify(task, sandbox)
    finally:
        await sandbox.stop()
    return reward, Status.AGENT_TIMEOUT if late and status == Status.OK else status


async def run_without_model(
    tasks: Sequence[Task],
    make_sandbox: Callable[[Task], Sandbox],
    *,
    oracle: bool,
    at_once: int,
    samples: int = 1,
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """The outcomes of oracle or nop, task by task; `at_once` sandboxes live at one time.

    A task whose sandboxes fail, or which they refuse, is an INFRA_ERROR with a reason, and the
    others go on.
    """
    sandboxes = asyncio.Semaphore(at_once)

    async def one(task: Task, sample_id: int) -> Outcome:
        async with sandboxes:
            outcome = await _outcome(task, sample_id, make_sandbox, oracle)
        on_outcome(outcome)
        return outcome

    async with asyncio.TaskGroup() as running:
        started = [running.create_task(one(task, i)) for task in tasks for i in range(samples)]
    return [sample.result() for sample in started]


async def _outcome(
    task: Task, sample_id: int, make_sandbox: Callable[[Task], Sandbox], oracle: bool
) -> Outcome:
    for _ in range(_TRIES):
        try:
            reward, status = await run_solution(task, make_sandbox(task), oracle)
            return Outcome(task.task_id, sample_id, reward, status)
        except SandboxError as error:
            reason = str(error)
        except ValueError as error:  # the task is at fault: no other sandbox will take it
            reason = str(error)
            break
    reason = program.printable(' '.join(reason.split()))
    return Outcome(task.task_id, sample_id, 0.0, Status.INFRA_ERROR, reason)


def watched(
    stop: program.Stop,
    tasks: Sequence[Task],
    config: ml_collections.ConfigDict,
    agent: str,
    samples: int = 1,
) -> list[Outcome]:
    """`run_without_model` of 'oracle' or 'nop' with the config's sandboxes, behind a bar."""
    outcomes: list[Outcome] = []
    ended = rewards = 0

    def on_outcome(outcome: Outcome) -> None:
        nonlocal ended, rewards
        ended, rewards = ended + 1, rewards + outcome.reward
        bar.show(ended, reward=rewards / ended)

    async def run() -> None:
        outcomes.extend(
            await run_without_model(
                tasks,
                make_sandbox,
                oracle=agent == 'oracle',
                at_once=config.sandbox.at_once,
                samples=samples,
                on_outcome=on_outcome,
            )
        )

    sandboxes = contextlib.closing(worker.sandbox_maker(config))
    with Progress(agent, len(tasks) * samples) as bar, sandboxes as make_sandbox:
        stop.run(run())
    return outcomes


def faults(outcomes: Sequence[Outcome], agent: str) -> dict[str, str]:
    """What is wrong with a task, by its id, where its oracle or its nop did not as it should."""
    wrong = {}
    for outcome in outcomes:
        if outcome.status == Status.INFRA_ERROR:
            wrong[outcome.task_id] = outcome.reason
        elif agent == 'oracle' and outcome.reward < SOLVED_REWARD:
            wrong[outcome.task_id] = f'its solution earns {outcome.reward:g} ({outcome.status})'
        elif agent == 'nop' and outcome.reward > 0:
            wrong[outcome.task_id] = f'doing nothing earns {outcome.reward:g}'
    return wrong


def show_failures(failures: dict[str, str]) -> None:
    for task_id, reason in list(failures.items())[:_SHOWN]:
        CONSOLE.print(program.printable(f'{task_id}: {reason}'), style='red', markup=False)
    if len(failures) > _SHOWN:
        CONSOLE.print(f'and {len(failures) - _SHOWN} more')


def build_images(
    stop: program.Stop, tasks: Sequence[Task], config: ml_collections.ConfigDict
) -> dict[str, str]:
    """Builds or pulls the image of every task; why not, by the id of each that failed."""
    if config.sandbox.backend != 'docker':
        raise ValueError(
            f"--build makes images for sandbox.backend='docker', which is "
            f'{config.sandbox.backend!r}; add --config.sandbox.backend=docker'
        )
    images, done, failures = worker.docker_images(config), 0, {}

    def progress(task: Task, error: Exception | None) -> None:
        nonlocal done
        done += 1
        bar.show(done)

    async def run() -> None:
        failures.update(await images.build(tasks, progress))

    with Progress('build', len(tasks)) as bar:
        try:
            stop.run(run())
        finally:
            images.close()  # a build under way ends first
            images.engine.close()
    return failures


def fitting(
    tasks: Sequence[Task], config: ml_collections.ConfigDict, work: Workdir | None
) -> list[Task]:
    """The tasks whose prompts fit, where there is a tokenizer to know that by; says what it did."""
    if not (work or config.model.path):
        CONSOLE.print('prompts not counted: the tokenizer is the one of a --workdir or model.path')
        return list(tasks)
    tokenizer = work.tokenizer() if work else read_tokenizer(config.model.path)
    protocol, limit = Protocol(tokenizer, config.protocol), config.protocol.max_prompt_tokens
    source = TaskSource(tasks, lambda text: len(protocol.prompt_ids(text)), limit)
    CONSOLE.print(f'{source.dropped} prompts over {limit} tokens dropped')
    return source.tasks


def sets_of(work: Workdir | None, cache: pathlib.Path) -> list[tuple[object, list[Task]]]:
    """(name, tasks) of what --tasks names, else of the run's own sets; lists them."""
    if _TASKS.value:
        sets = load_sources(_TASKS.value, cache)
    elif work:
        sets = [(split, work.tasks(split)) for split in ('train', 'heldout')]
    else:
        raise ValueError("no tasks named; give --tasks, or --config and --workdir for a run's own")
    for name, tasks in sets:
        mark = ', environment only' if tasks[0].environment_only else ''
        CONSOLE.print(program.printable(f'{name}: {len(tasks)} tasks{mark}'), markup=False)
    return sets


def main(argv: Sequence[str]) -> None:
    del argv
    config = _CONFIG.value and ml_collections.FrozenConfigDict(_CONFIG.value)
    if config is None and (_WORKDIR.value or _BUILD.value or _CHECK.value):
        raise ValueError('--workdir, --build and --check go by a recipe; give its --config')
    work = Workdir(_WORKDIR.value, config) if _WORKDIR.value else None
    failed: dict[str, dict[str, str]] = {}
    with unpacked(work) as cache:
        tasks = [task for _, tasks in sets_of(work, cache) for task in tasks]
        if _PARQUET.value:
            from echo_jax.agent.parquet import write_parquet  # here: directories need no pyarrow

            write_parquet(tasks, pathlib.Path(_PARQUET.value))
            CONSOLE.print(f'{len(tasks)} tasks packed into {_PARQUET.value}', markup=False)
        if config:
            tasks = fitting(tasks, config, work)
        stop = program.Stop()
        try:
            if _BUILD.value:
                failed['without an image'] = build_images(stop, tasks, config)
            for agent in ('oracle', 'nop') if _CHECK.value else ():
                failed[f'where {agent} is wrong'] = faults(
                    watched(stop, tasks, config, agent), agent
                )
        except program.Stopped:
            sys.exit('stopped')
    for what, failures in failed.items():
        show_failures(failures)
        CONSOLE.print(f'{len(failures)} of {len(tasks)} tasks {what}')
    if any(failed.values()):
        sys.exit(1)


if __name__ == '__main__':
    _CONFIG = config_flags.DEFINE_config_file('config', help_string='Recipe: FILE[:variant].')
    _WORKDIR = flags.DEFINE_string('workdir', '', 'Folder of the run that will use the tasks.')
    _TASKS = flags.DEFINE_string(
        'tasks', '', 'Directory or .parquet of tasks, or several with commas; else those of a run.'
    )
    _PARQUET = flags.DEFINE_string('parquet', '', 'File to pack the tasks into.')
    _BUILD = flags.DEFINE_bool('build', False, 'Build the images of the tasks.')
    _CHECK = flags.DEFINE_bool('check', False, 'Run oracle and nop.')
    program.run(main)
