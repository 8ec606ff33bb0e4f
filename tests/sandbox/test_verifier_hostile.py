"""What an agent may leave for the shell, Python or pytest of its task's tests to start with.

Not stopped, because tests look there on purpose: what lies in the task's working directory, the
agent's home for `bash -l`, `bash -i` and git, and what it can write on the image's own PATH.
"""

import asyncio

import pytest

from echo_jax.sandbox.local import LocalSandbox
from echo_jax.types import Status

_EARN = 'echo 1 > /logs/verifier/reward.txt'
_PYTHON = f'import os; os.system("{_EARN}"); os._exit(0)'
_SITE = 'S=$(python3 -m site --user-site); mkdir -p $S'
_CHECK = """\
import pathlib
try:
    import checked
    reward = 1
except ImportError:
    reward = 0
pathlib.Path('/logs/verifier/reward.txt').write_text(str(reward))
"""
_TRICKS = {
    'PATH': f'mkdir b; echo "{_EARN}" > b/python3; chmod +x b/*; cp b/python3 b/bash; '
    'export PATH=$PWD/b:$PATH; hash -r',
    'rc files': f'echo "PATH=/app/b; {_EARN}; exit" | tee ~/.bashrc ~/.profile ~/.bash_profile',
    'BASH_ENV': f'echo "{_EARN}; exit" > e; export BASH_ENV=/app/e ENV=/app/e',
    'functions': f'python3() {{ {_EARN}; }}; export -f python3; alias python3="{_EARN}"; set -a',
    'environment of functions': f'export "BASH_FUNC_python3%%=() {{ {_EARN}; }}"',
    'traps and options': f'trap "{_EARN}" EXIT DEBUG ERR; set -e; PROMPT_COMMAND="{_EARN}"',
    'usercustomize': f"{_SITE}; echo '{_PYTHON}' > $S/usercustomize.py",
    'sitecustomize': f"{_SITE}; echo '{_PYTHON}' > $S/sitecustomize.py",
    'pth': f"{_SITE}; echo '{_PYTHON}' > $S/a.pth",
    'a module of the user': f'{_SITE}; touch $S/checked.py',
    'PYTHONPATH': 'mkdir m; touch m/checked.py; export PYTHONPATH=/app/m',
    'PYTHONHOME': 'export PYTHONHOME=/app PYTHONPLATLIBDIR=x',
    'PYTHONSTARTUP': f"echo '{_PYTHON}' > s.py; export PYTHONSTARTUP=/app/s.py PYTHONINSPECT=1",
    'LD_PRELOAD': 'export LD_PRELOAD=/app/evil.so LD_LIBRARY_PATH=/app LD_AUDIT=/app/evil.so',
    'locale': 'export LC_ALL=xx LANG=yy LANGUAGE=zz',
    'limits': 'ulimit -f 0; ulimit -n 4',
    'the tests beside theirs': 'mkdir -p /tests; touch /tests/checked.py',
    'the root': 'touch /checked.py /conftest.py /pytest.ini /tests/../pyproject.toml',
    'the system': 'touch /usr/lib/python3/dist-packages/checked.py /etc/ld.so.preload',
    'the output': 'ln -s /app/out /logs/verifier/test-stdout.txt',
    'an output that blocks': 'mkfifo /logs/verifier/test-stdout.txt',
    'an output in the way': 'mkdir -p /logs/verifier/test-stdout.txt/a',
    'a sleeper': f'(setsid sh -c "sleep 1; {_EARN}" &)',
}


@pytest.mark.slow
@pytest.mark.parametrize('trick', _TRICKS)
def test_the_agent_does_not_choose_how_the_tests_start(make_task, trick):
    task = make_task('python3 /tests/check.py && sleep 1 && echo finished\n')
    (task.path / 'tests/check.py').write_text(_CHECK)

    async def main():
        sandbox = LocalSandbox(task)
        await sandbox.start()
        try:
            await sandbox.run(_TRICKS[trick], 20)
            return await sandbox.verify()
        finally:
            await sandbox.stop()

    verdict = asyncio.run(main())
    assert verdict[:2] == (0.0, Status.OK), verdict
    assert verdict.output == 'finished\n'
