"""Harbor's verifier (PROTOCOL 15): the task's tests run after the agent, and give the reward.

Everything that the agent left - processes, files in the way, a reward of its own - is taken out
first. What cannot be taken out costs the reward. Knows no tokens and no policy.
"""

import json
import math

from echo_jax.sandbox import Sandbox, SandboxError
from echo_jax.types import Status, Task

_MAX_REWARD_BYTES = 4096
_SETUP_SECONDS = 30.0

# Directories that the agent turned into links or files are made again; `find` reaches into
# directories of any mode, since it sees each before it descends. The last test fails where a
# reward stayed or anything in /tests, which tests could take for their own. Where nothing has to
# be done, which is nearly always, no program is started.
_CLEAR = """
shopt -s dotglob nullglob
for d in /logs /logs/verifier; do
  if [ -L "$d" ] || [ ! -d "$d" ]; then rm -rf "$d"; mkdir "$d"; fi
  [ -r "$d" ] && [ -w "$d" ] && [ -x "$d" ] || chmod u+rwx "$d"
done
if [ -L /tests ] || [ -e /tests ]; then
  find /tests -type d -exec chmod u+rwx {} \\;
  rm -rf /tests 2>/dev/null || find /tests -mindepth 1 -delete
fi
left=(/logs/verifier/* /tests/*)
[ ${#left[@]} = 0 ] && exit
find /logs/verifier -type d -exec chmod u+rwx {} \\;
rm -rf /logs/verifier/reward.*
[ -z "$(find /logs/verifier -name 'reward.*' -print; find /tests -mindepth 1 2>/dev/null)" ]
"""
_RUN = """
[ -x /tests/test.sh ] || chmod +x /tests/test.sh
/tests/test.sh > /logs/verifier/test-stdout.txt 2>&1 < /dev/null
"""
# Only a regular file: a pipe would block the reader, a link could lead anywhere. A command of its
# own, in a shell that is there whatever the tests killed.
_READ = f"""
for f in /logs/verifier/reward.txt /logs/verifier/reward.json; do
  if [ -L "$f" ] || [ -e "$f" ]; then
    [ -f "$f" ] && [ ! -L "$f" ] && echo "${{f##*.}}" && head -c {_MAX_REWARD_BYTES + 1} "$f"
    exit
  fi
done
"""


async def verify(task: Task, sandbox: Sandbox) -> tuple[float, Status]:
    """(reward, OK), or (0, VERIFIER_ERROR) where there is no finite number in time.

    Leaves the sandbox running with the tests in it. SandboxError passes through.
    """
    await sandbox.reset()
    cleared = await sandbox.run(_in_child(_CLEAR), _SETUP_SECONDS)
    if cleared.exit_code != 0:
        return 0.0, Status.VERIFIER_ERROR
    try:
        await sandbox.upload(task.path / 'tests', '/tests')
    except SandboxError:
        # A sandbox that still answers was made unfit by the agent (a full disk): that is no
        # INFRA_ERROR, or the agent could choose to have no reward instead of a bad one.
        await sandbox.run('true', _SETUP_SECONDS)
        return 0.0, Status.VERIFIER_ERROR
    tested = await sandbox.run(_in_child(_RUN), task.verifier_timeout_sec)
    if tested.timed_out:
        return 0.0, Status.VERIFIER_ERROR
    written = await sandbox.run(_in_child(_READ), _SETUP_SECONDS)
    kind, _, text = written.stdout.partition('\n')
    reward = None if written.timed_out else parse_reward(kind, text)
    return (0.0, Status.VERIFIER_ERROR) if reward is None else (reward, Status.OK)


def parse_reward(kind: str, text: str) -> float | None:
    """The finite number in a reward file of kind 'txt' or 'json', None where there is none."""
    if len(text) > _MAX_REWARD_BYTES:
        return None
    try:
        value = json.loads(text)['reward'] if kind == 'json' else float(text)
        if type(value) not in (int, float):  # true and "1" are no numbers
            return None
        return float(value) if math.isfinite(value) else None
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def _in_child(script: str) -> str:
    """In a subshell, so that `exit` and open files end with it."""
    return f'(\n{script}\n)'
