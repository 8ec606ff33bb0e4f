"""Agents without a model: 'oracle' runs each task's own solution, 'nop' does nothing.

The oracle must earn the reward and the nop must not, or something is wrong with the task.
"""

import asyncio
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import ml_collections

from echo_jax.run import entry
from echo_jax.run.report import CONSOLE, Progress
from echo_jax.sandbox import CommandResult, Sandbox, Verdict
from echo_jax.sandbox.make import sandbox_maker
from echo_jax.sandbox.retries import RETRY_AFTER, with_retries
from echo_jax.types import SOLVED_REWARD, Status, Task

_OUTPUT_CHARS = 2_000  # of a solution's output, its end, that are kept
_SHOWN_CHARS = 500  # of that output, in a line of a failure
_SHOWN = 20  # failures that are listed


class Outcome(NamedTuple):
    """How one sample of an agent without a model ended."""

    task_id: str
    sample_id: int
    reward: float
    status: Status
    reason: str = ''  # one line that explains an INFRA_ERROR or a VERIFIER_ERROR
    output: str = ''  # the end of what the solution and the tests printed


async def run_without_model(
    tasks: Sequence[Task],
    make_sandbox: Callable[[Task], Sandbox],
    *,
    oracle: bool,
    at_once: int,
    samples: int = 1,
    done: Collection[tuple[str, int]] = (),
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
    retry_after: Sequence[float] = RETRY_AFTER,
) -> list[Outcome]:
    """The outcomes of oracle or nop, task by task, but for those samples that are `done`,
    (task_id, sample_id); at most `at_once` sandboxes live at one time.

    A task that the sandboxes refuse, or whose sandboxes fail several times, is an INFRA_ERROR with
    a reason; the other tasks go on.
    """
    sandboxes = asyncio.Semaphore(at_once)

    async def one(task: Task, sample_id: int) -> Outcome:
        async with sandboxes:
            outcome = await _outcome(task, sample_id, make_sandbox, oracle, retry_after)
        on_outcome(outcome)
        return outcome

    async with asyncio.TaskGroup() as running:
        started = [
            running.create_task(one(task, i))
            for task in tasks
            for i in range(samples)
            if (task.task_id, i) not in done
        ]
    return [sample.result() for sample in started]


async def _outcome(
    task: Task,
    sample_id: int,
    make_sandbox: Callable[[Task], Sandbox],
    oracle: bool,
    retry_after: Sequence[float],
) -> Outcome:
    async def in_a_fresh_sandbox() -> tuple[Verdict, CommandResult | None]:
        sandbox, solved = make_sandbox(task), None
        try:
            await sandbox.start()
            if oracle:  # as in Harbor, it has the agent's time, and is verified if it takes longer
                solved = await sandbox.solve()
            return await sandbox.verify(), solved
        finally:
            await sandbox.stop()

    try:
        name = f'task {task.task_id}, sample {sample_id}'
        verdict, solved = await with_retries(in_a_fresh_sandbox, name, retry_after=retry_after)
    except Exception as error:  # one bad task never ends a check, whatever is wrong with it
        reason = ' '.join(str(error).split()) or type(error).__name__
        return Outcome(task.task_id, sample_id, 0.0, Status.INFRA_ERROR, entry.printable(reason))
    status = verdict.status
    if status == Status.OK and solved is not None and solved.timed_out:
        status = Status.AGENT_TIMEOUT
    printed = (solved.stdout + solved.stderr)[-_OUTPUT_CHARS:] if solved else ''
    output = entry.printable(f'{printed}\n{verdict.output}'.strip())
    return Outcome(task.task_id, sample_id, verdict.reward, status, verdict.reason, output)


def run_agent(
    stop: entry.Stop,
    tasks: Sequence[Task],
    config: ml_collections.ConfigDict,
    agent: str,
    samples: int = 1,
    done: Collection[tuple[str, int]] = (),
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """The outcomes of `run_without_model` in the config's sandboxes, with a progress bar."""
    rewards: list[float] = []

    def show(outcome: Outcome) -> None:
        on_outcome(outcome)
        rewards.append(outcome.reward)
        progress.show(len(done) + len(rewards), reward=sum(rewards) / len(rewards))

    total = len(tasks) * samples
    with Progress(agent, total, len(done)) as progress, sandbox_maker(config) as make_sandbox:
        return stop.run(
            run_without_model(
                tasks,
                make_sandbox,
                oracle=agent == 'oracle',
                at_once=config.sandbox.at_once,
                samples=samples,
                done=done,
                on_outcome=show,
            )
        )


def faults(outcomes: Sequence[Outcome], agent: str) -> dict[str, str]:
    """What is wrong with each task whose oracle or nop did not end as it should, by task id."""
    wrong = {}
    for outcome in outcomes:
        if outcome.status == Status.INFRA_ERROR:
            wrong[outcome.task_id] = outcome.reason
        elif agent == 'oracle' and outcome.reward < SOLVED_REWARD:
            why = f'{outcome.status}: {outcome.reason}' if outcome.reason else outcome.status
            printed = ' | '.join(filter(None, outcome.output.split('\n')))[-_SHOWN_CHARS:]
            earned = f'its solution earns {outcome.reward:g} ({why})'
            wrong[outcome.task_id] = f'{earned}; printed at the end: {printed or "nothing"}'
        elif agent == 'nop' and outcome.reward > 0:
            wrong[outcome.task_id] = f'doing nothing earns {outcome.reward:g}'
    return wrong


def show_failures(failures: dict[str, str]) -> None:
    """Prints the first failures, a line each, and how many more there are."""
    for task_id, reason in list(failures.items())[:_SHOWN]:
        CONSOLE.print(entry.printable(f'{task_id}: {reason}'), style='red', markup=False)
    if len(failures) > _SHOWN:
        CONSOLE.print(f'and {len(failures) - _SHOWN} more')
