"""Agents without a model: 'oracle' runs each task's own solution, 'nop' does nothing.

The oracle must earn the reward and the nop must not, or something is wrong with the task.
"""

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import ml_collections
import tenacity

from echo_jax.agent.verifier import verify
from echo_jax.run import entry
from echo_jax.run.report import CONSOLE, Progress
from echo_jax.sandbox import Sandbox, SandboxError
from echo_jax.sandbox.make import sandbox_maker
from echo_jax.types import SOLVED_REWARD, Status, Task

_TRIES = 3  # sandboxes that may fail on a task, one after the other
_SHOWN = 20  # failures that are listed


class Outcome(NamedTuple):
    """How one sample of an agent without a model ended."""

    task_id: str
    sample_id: int
    reward: float
    status: Status
    reason: str = ''  # one line that explains an INFRA_ERROR


async def run_solution(task: Task, sandbox: Sandbox, oracle: bool) -> tuple[float, Status]:
    """Reward and status of a task's own solution, or of nothing at all, in a fresh sandbox.

    As in Harbor, the solution has the agent's time, and is verified even if it takes longer. Raises
    ValueError if there is no solution, SandboxError if the sandbox fails.
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
    """The outcomes of oracle or nop, task by task; at most `at_once` sandboxes live at one time.

    A task that the sandboxes refuse, or whose sandboxes fail several times, is an INFRA_ERROR with
    a reason; the other tasks go on.
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
    # Only SandboxError is tried again: after a ValueError no other sandbox will take the task.
    @tenacity.retry(
        stop=tenacity.stop_after_attempt(_TRIES),
        retry=tenacity.retry_if_exception_type(SandboxError),
        reraise=True,
    )
    async def in_a_fresh_sandbox() -> tuple[float, Status]:
        return await run_solution(task, make_sandbox(task), oracle)

    try:
        reward, status = await in_a_fresh_sandbox()
    except (SandboxError, ValueError) as error:
        reason = entry.printable(' '.join(str(error).split()))
        return Outcome(task.task_id, sample_id, 0.0, Status.INFRA_ERROR, reason)
    return Outcome(task.task_id, sample_id, reward, status)


def run_agent(
    stop: entry.Stop,
    tasks: Sequence[Task],
    config: ml_collections.ConfigDict,
    agent: str,
    samples: int = 1,
) -> list[Outcome]:
    """The outcomes of 'oracle' or 'nop' in the config's sandboxes, with a progress bar."""
    outcomes: list[Outcome] = []

    def on_outcome(outcome: Outcome) -> None:
        outcomes.append(outcome)
        progress.show(len(outcomes), reward=sum(o.reward for o in outcomes) / len(outcomes))

    async def run() -> None:
        ordered = await run_without_model(
            tasks,
            make_sandbox,
            oracle=agent == 'oracle',
            at_once=config.sandbox.at_once,
            samples=samples,
            on_outcome=on_outcome,
        )
        outcomes[:] = ordered

    sandboxes = contextlib.closing(sandbox_maker(config))
    with Progress(agent, len(tasks) * samples) as progress, sandboxes as make_sandbox:
        stop.run(run())
    return outcomes


def faults(outcomes: Sequence[Outcome], agent: str) -> dict[str, str]:
    """What is wrong with each task whose oracle or nop did not end as it should, by task id."""
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
    """Prints the first failures, a line each, and how many more there are."""
    for task_id, reason in list(failures.items())[:_SHOWN]:
        CONSOLE.print(entry.printable(f'{task_id}: {reason}'), style='red', markup=False)
    if len(failures) > _SHOWN:
        CONSOLE.print(f'and {len(failures) - _SHOWN} more')
