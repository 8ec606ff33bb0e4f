"""Agents without a model: the oracle runs each task's own solution, the nop does nothing.

The one must earn the reward and the other must not, or something is wrong with the task.
"""

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import ml_collections

from echo_jax.agent.verifier import verify
from echo_jax.run import entry
from echo_jax.run.report import CONSOLE, Progress
from echo_jax.sandbox import Sandbox, SandboxError
from echo_jax.sandbox.make import sandbox_maker
from echo_jax.types import SOLVED_REWARD, Status, Task

_TRIES = 3  # sandboxes that may fail on a task, one after the other
_SHOWN = 20  # failures that are listed


class Outcome(NamedTuple):
    """What one sample of an agent without a model came to."""

    task_id: str
    sample_id: int
    reward: float
    status: Status
    reason: str = ''  # one line, of an INFRA_ERROR


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
    reason = entry.printable(' '.join(reason.split()))
    return Outcome(task.task_id, sample_id, 0.0, Status.INFRA_ERROR, reason)


def watched(
    stop: entry.Stop,
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

    sandboxes = contextlib.closing(sandbox_maker(config))
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
        CONSOLE.print(entry.printable(f'{task_id}: {reason}'), style='red', markup=False)
    if len(failures) > _SHOWN:
        CONSOLE.print(f'and {len(failures) - _SHOWN} more')
