"""Harbor's trial of one task, held open while an episode is its agent. All of Harbor's API is here.

What a trial does, in which order and with which limits, is Harbor's. Ours are its configuration,
what an episode cannot have, and how its result reads as a verdict.
"""

import asyncio
import contextlib
import functools
import json
import logging
import os
import pathlib
import sys
import threading
from collections.abc import Coroutine
from typing import Any

from echo_jax.sandbox import SandboxError, Verdict, verifier
from echo_jax.types import Task

_NO_LIMIT_SEC = 1e8  # three years; the episode's own clock ends the agent's part
# Errors of Harbor's that a task's tests can cause, or the agent, even with a verifier of their own.
_FAULTS_OF_TESTS = {
    'RewardFileNotFoundError',
    'RewardFileEmptyError',
    'VerifierOutputParseError',
    'VerifierTimeoutError',
    'ValidationError',  # a reward file of another shape
}


def check(environment: str) -> None:
    """ValueError if Harbor is missing, knows no such environment, or lacks what that needs."""
    os.environ['HARBOR_TELEMETRY'] = '0'
    try:
        from harbor.environments.factory import EnvironmentFactory
        from harbor.models.environment_type import EnvironmentType
    except ModuleNotFoundError as error:
        version = '.'.join(map(str, sys.version_info[:2]))
        raise ValueError(
            f"sandbox.backend='harbor' needs Harbor ({error}): pip install harbor, for Python 3.12 "
            f'or newer; this is {version}'
        ) from error
    # A trial writes its log into its folder. Nothing of it belongs among our own lines.
    logger = logging.getLogger('harbor')
    logger.addHandler(logging.NullHandler())
    logger.propagate = False
    known = [kind.value for kind in EnvironmentType]
    if environment not in known and ':' not in environment:
        raise ValueError(
            f'sandbox.harbor_environment is {environment!r}; expected MODULE:CLASS or one of '
            f'{", ".join(known)}'
        )
    own = environment if ':' in environment else None
    try:
        EnvironmentFactory.run_preflight(None if own else EnvironmentType(environment), own)
    except (SystemExit, ValueError) as error:  # credentials, a program or a class are missing
        raise ValueError(f'sandbox.harbor_environment={environment!r}: {error}') from error


async def on_harbors_loop(work: Coroutine) -> Any:
    """What `work` returns, run in the one event loop that everything of Harbor's has here.

    A program of ours runs one loop after the other, and a lock or a client of an SDK that Harbor
    keeps from the first would not work in the next.
    """
    return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, _loop()))


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name='harbor', daemon=True).start()
    return loop


class Trial:
    """One trial: `begin` it, `solve` or not, and `end` it; `cancel` at any time.

    All four are to be run by `on_harbors_loop`. `folder` is for what Harbor writes; `environment`
    is one of Harbor's names, or MODULE:CLASS.
    """

    def __init__(self, task: Task, environment: str, folder: pathlib.Path):
        self._task, self._environment, self._folder = task, environment, folder
        self.of_harbor: Any = None  # of Harbor's
        self._running: asyncio.Task | None = None

    async def begin(self) -> Any:
        """Starts the environment, which is returned as Harbor has it.

        Raises ValueError for a task that Harbor refuses, SandboxError if it does not get that far.
        """
        from harbor.trial.trial import Trial as HarborTrial

        task_id = self._task.task_id
        try:
            config = _config(self._task, self._environment, self._folder)
            self.of_harbor = await HarborTrial.create(config)
        except Exception as error:  # it starts nothing: what it raises is about the task
            raise ValueError(f'{task_id}: Harbor refuses it: {one_line(error)}') from error
        self._running = asyncio.create_task(self.of_harbor.run())
        begun = self.of_harbor.agent.begun
        await asyncio.wait({self._running, begun}, return_when=asyncio.FIRST_COMPLETED)
        if not begun.done():
            fault = self._running.result().exception_info
            reason = self._told(fault) if fault else 'its trial ended by itself'
            raise SandboxError(f'{task_id}: Harbor cannot start it: {reason}')
        return begun.result()

    @property
    def refusal(self) -> str:
        """What an episode cannot have of this task, though its solution can be run; else ''."""
        task = self.of_harbor.task
        wanted = {
            '[[steps]]': task.has_steps,
            '[environment] mcp_servers': task.config.environment.mcp_servers,
            '[environment] skills_dir': task.config.environment.skills_dir,
            'trajectory.json': task.paths.trajectory_path.is_file(),
        }
        return ', '.join(name for name, is_wanted in wanted.items() if is_wanted)

    @property
    def has_steps(self) -> bool:
        return self.of_harbor.task.has_steps

    async def solve(self) -> None:
        """Runs the task's own solution as Harbor's oracle does.

        With [[steps]] that is the solution and the tests of each, to the trial's end.
        """
        from harbor.agents.oracle import OracleAgent
        from harbor.models.agent.context import AgentContext

        trial, agent = self.of_harbor, self.of_harbor.agent
        oracle = OracleAgent(
            logs_dir=trial.paths.agent_dir,
            task_dir=trial.task.task_dir,
            trial_paths=trial.paths,
            logger=trial.logger,
            agent_timeout_sec=None if self.has_steps else self._task.agent_timeout_sec,
        )
        if self.has_steps:
            agent.oracle = oracle
            await self._ended()
        else:
            await oracle.run(trial.task.instruction, trial.agent_environment, AgentContext())

    def solution_output(self) -> tuple[str, int]:
        """What the solution printed, and its exit code."""
        codes = [file.read_text() for file in sorted(self._folder.rglob('exit-code.txt'))]
        return self._printed('oracle.txt'), int(codes[-1]) if codes else 0

    async def end(self) -> Verdict:
        """Lets the agent return and the tests run. Raises SandboxError if the environment fails."""
        result = await self._ended()
        rewards = result.verifier_result and result.verifier_result.rewards
        output = self._printed('test-stdout.txt')[-verifier.OUTPUT_BYTES :]
        faults = result.recorded_exceptions()
        if rewards is None and faults:
            reason = self._told(faults[0])
            is_apart = result.verifier_environment_mode == 'separate'
            if is_apart and faults[0].exception_type not in _FAULTS_OF_TESTS:
                raise SandboxError(f'{self._task.task_id}: Harbor cannot verify it: {reason}')
            return verifier.no_reward(reason, output)
        return verifier.read_verdict(f'json\n{json.dumps(rewards)}\n\x1eoutput\n{output}')

    async def cancel(self, seconds: float) -> None:
        """Ends the trial wherever it is; its environment is deleted. SandboxError if that hangs."""
        running, self._running = self._running, None
        if running is None:
            return
        running.cancel()
        await asyncio.wait({running}, timeout=seconds)
        if not running.done():
            raise SandboxError(f'{self._task.task_id}: Harbor does not delete its environment')
        with contextlib.suppress(asyncio.CancelledError, Exception):
            running.result()  # so that asyncio does not complain that nobody looked

    async def _ended(self) -> Any:
        self.of_harbor.agent.may_end.set()
        assert self._running is not None
        return await asyncio.shield(self._running)

    def _told(self, fault: Any) -> str:
        """What Harbor recorded of an exception, with the paths that the tests know."""
        text = fault.exception_message.replace(
            str(self.of_harbor.paths.verifier_dir), '/logs/verifier'
        )
        return one_line(f'{fault.exception_type}: {text}')

    def _printed(self, name: str) -> str:
        files = sorted(self._folder.rglob(name))
        return '\n'.join(file.read_text(errors='replace') for file in files)


def one_line(error: object) -> str:
    """An error's text in one line; of a long one the middle is left out."""
    text = ' '.join(str(error).split()) or type(error).__name__
    return text if len(text) <= 600 else f'{text[:200]} [...] {text[-400:]}'


def _config(task: Task, environment: str, folder: pathlib.Path) -> Any:
    """A trial's configuration. What a recipe does not override is left to Harbor and the task."""
    from harbor.models.task.task import Task as HarborTask
    from harbor.models.trial import config as trial

    theirs = HarborTask(task.path)
    own_agent_sec = theirs.config.agent.timeout_sec or 600.0

    def changed(ours: float | None, task_has: float | None) -> Any:
        return ours if ours != task_has else None

    is_class = ':' in environment
    wanted = theirs.config.environment
    return trial.TrialConfig(
        task=trial.TaskConfig(path=task.path),
        trials_dir=folder,
        agent=trial.AgentConfig(
            import_path='echo_jax.sandbox.harbor.agent:EpisodeAgent',
            override_timeout_sec=(
                changed(task.agent_timeout_sec, own_agent_sec)
                if theirs.has_steps
                else _NO_LIMIT_SEC
            ),
        ),
        environment=trial.EnvironmentConfig(
            type=None if is_class else environment,
            import_path=environment if is_class else None,
            override_cpus=changed(task.cpus, wanted.cpus),
            override_memory_mb=changed(task.memory_mb, wanted.memory_mb),
            override_storage_mb=changed(task.storage_mb, wanted.storage_mb),
        ),
        verifier=trial.VerifierConfig(
            override_timeout_sec=changed(
                task.verifier_timeout_sec, theirs.config.verifier.timeout_sec
            )
        ),
    )
