"""Harbor's verifier (docs/protocol.md#verifier): the tests run after the agent and give the reward.

`verify` is for sandboxes with one account, which kill what the agent left running. Containers with
Docker's own privileges (docker/plain.py) and Harbor's environments verify in ways of their own and
share only how a reward is read.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Protocol

from echo_jax.sandbox import CommandResult, SandboxError, Verdict, read_script
from echo_jax.types import Status, Task

# Of a reward file; more is no reward. With the tests' output it fits in the MiB of output that a
# sandbox keeps of one command.
MAX_REWARD_BYTES = 1_000_000
MAX_REWARD = 1e12  # in size: the squares of some have to fit into the numbers of a step
OUTPUT_BYTES = 4_000  # of the tests' output, its end, that are kept
_SETUP_SECONDS = 30.0


class OneAccount(Protocol):
    """What `verify` needs of a sandbox; see shell.py, which imports this module."""

    task: Task

    async def reset(self) -> None: ...

    async def restore_tests(self) -> None: ...

    async def upload(self, path: pathlib.Path, target: str) -> None: ...

    async def run_script(
        self, script: str, timeout: float, env: Mapping[str, str] | None = None
    ) -> CommandResult: ...


async def verify(sandbox: OneAccount) -> Verdict:
    """The reward of the task's tests, or 0 and why there is none.

    What the agent left behind (processes, files in the way, a reward of its own) is removed first.
    If something cannot be removed, there is no reward. SandboxError passes through.
    """
    await sandbox.reset()
    cleared = await sandbox.run_script(read_script('verifier_clear'), _SETUP_SECONDS)
    if cleared.exit_code != 0:
        return no_reward('what the agent left in /tests or /logs/verifier cannot be removed')
    try:
        await sandbox.restore_tests()
        await sandbox.upload(sandbox.task.path / 'tests', '/tests')
    except SandboxError as error:
        # A sandbox that still answers was made unfit by the agent (a full disk): that is no
        # INFRA_ERROR, or the agent could choose to have no reward instead of a bad one.
        await sandbox.run_script('true', _SETUP_SECONDS)
        return no_reward(f'the tests cannot be put into the sandbox: {error}')
    # No module of the agent's own: its site-packages would come before the system's, and Python
    # runs usercustomize.py there as it starts.
    env = {'PYTHONNOUSERSITE': '1'} | sandbox.task.verifier_env
    limit = sandbox.task.verifier_timeout_sec
    tested = await sandbox.run_script(read_script('verifier_run'), limit, env)
    # A command of its own, in a shell that is there whatever the tests killed.
    numbers = f'set -- {MAX_REWARD_BYTES} {OUTPUT_BYTES}\n'
    told = await sandbox.run_script(numbers + read_script('verifier_read'), _SETUP_SECONDS)
    return read_verdict(told.stdout, late=limit if tested.timed_out else None)


def read_verdict(text: str, late: float | None = None) -> Verdict:
    """The verdict of what scripts/verifier_read.sh printed.

    That is the suffix of the reward's file, a newline, its content, a line `output`, and the end of
    the tests' output. `late` is the verifier's time in seconds if it ran out.
    """
    kind, _, rest = text.partition('\n')
    content, _, output = rest.partition('\n\x1eoutput\n')
    if late is not None:
        return no_reward(f'the tests ran over their {late:g} seconds', output)
    try:
        rewards = parse_rewards(kind, content)
    except ValueError as error:
        return no_reward(str(error), output)
    return Verdict(overall(rewards), Status.OK, output=output, rewards=rewards)


def no_reward(reason: str, output: str = '') -> Verdict:
    return Verdict(0.0, Status.VERIFIER_ERROR, ' '.join(reason.split())[:500], output)


def parse_rewards(kind: str, text: str) -> dict[str, float]:
    """The numbers in a reward file of kind 'json' or 'txt', by their keys, as Harbor reads them.

    Raises ValueError, whose message says what is wrong with the file.
    """
    if kind == '':
        raise ValueError('the tests wrote neither /logs/verifier/reward.json nor reward.txt')
    file = f'/logs/verifier/reward.{kind.partition(" ")[0]}'
    if kind.endswith(' odd'):
        raise ValueError(f'{file} is a link or no regular file')
    if len(text) > MAX_REWARD_BYTES:
        raise ValueError(f'{file} has over {MAX_REWARD_BYTES} bytes')
    if not text.strip():
        raise ValueError(f'{file} is empty')
    try:
        values = json.loads(text) if kind == 'json' else {'reward': float(text)}
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{file} is no number or JSON: {str(error)[:200]}') from error
    if not isinstance(values, dict) or not values:
        raise ValueError(f'{file} holds {str(values)[:60]}; expected a table of numbers')
    for key, value in values.items():
        if not isinstance(value, (int, float)):  # true is 1, as in Harbor
            raise ValueError(f'{file}: {key[:60]} is {str(value)[:60]}; expected a finite number')
        if not abs(value) <= MAX_REWARD:  # nor if it is not a number
            raise ValueError(
                f'{file}: {key[:60]} is {str(value)[:60]}; expected a finite number, from '
                f'{-MAX_REWARD:g} to {MAX_REWARD:g}'
            )
    return {key: float(value) for key, value in values.items()}


def overall(rewards: dict[str, float]) -> float:
    """One number of several: `reward` if it is among them, else their mean."""
    return rewards.get('reward', sum(rewards.values()) / len(rewards))
