"""Harbor's verifier (docs/protocol.md#verifier): the tests run after the agent and give the reward.

Everything that the agent left behind (processes, files in the way, a reward of its own) is removed
first. If something cannot be removed, there is no reward. Knows no tokens and no policy.
"""

import json
import math
import shlex

from echo_jax.sandbox import Sandbox, SandboxError, read_script
from echo_jax.types import Status, Task

_MAX_REWARD_BYTES = 4096
_SETUP_SECONDS = 30.0


async def verify(task: Task, sandbox: Sandbox) -> tuple[float, Status]:
    """(reward, OK), or (0, VERIFIER_ERROR) if there is no finite number in time.

    Leaves the sandbox running with the tests in it. SandboxError passes through.
    """
    await sandbox.reset()
    cleared = await sandbox.run(_in_child('verifier_clear'), _SETUP_SECONDS)
    if cleared.exit_code != 0:
        return 0.0, Status.VERIFIER_ERROR
    try:
        await sandbox.upload(task.path / 'tests', '/tests')
    except SandboxError:
        # A sandbox that still answers was made unfit by the agent (a full disk): that is no
        # INFRA_ERROR, or the agent could choose to have no reward instead of a bad one.
        await sandbox.run('true', _SETUP_SECONDS)
        return 0.0, Status.VERIFIER_ERROR
    tested = await sandbox.run(_in_child('verifier_run'), task.verifier_timeout_sec)
    if tested.timed_out:
        return 0.0, Status.VERIFIER_ERROR
    # A command of its own, in a shell that is there whatever the tests killed.
    read = _in_child('verifier_read', str(_MAX_REWARD_BYTES + 1))
    written = await sandbox.run(read, _SETUP_SECONDS)
    kind, _, text = written.stdout.partition('\n')
    reward = None if written.timed_out else parse_reward(kind, text)
    return (0.0, Status.VERIFIER_ERROR) if reward is None else (reward, Status.OK)


def parse_reward(kind: str, text: str) -> float | None:
    """The finite number in a reward file of kind 'txt' or 'json', None if there is none."""
    if len(text) > _MAX_REWARD_BYTES:
        return None
    try:
        value = json.loads(text)['reward'] if kind == 'json' else float(text)
        if type(value) not in (int, float):  # true and "1" are no numbers
            return None
        return float(value) if math.isfinite(value) else None
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def _in_child(script: str, *arguments: str) -> str:
    """Runs a script of sandbox/scripts in a subshell, so that `exit` and open files end with it."""
    return f'(set -- {shlex.join(arguments)}\n{read_script(script)})'
