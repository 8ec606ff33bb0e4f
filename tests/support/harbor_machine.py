"""An environment of Harbor's for tests without an engine: a local sandbox behind its interface."""

import pathlib
import shlex
import tempfile

from harbor.environments.base import BaseEnvironment, ExecResult
from harbor.environments.capabilities import EnvironmentCapabilities

from echo_jax.sandbox import harbor, local
from echo_jax.types import Task

PATH = f'{__name__}:Machine'  # for sandbox.harbor_environment
_SEC = 60.0


class Machine(BaseEnvironment):
    """`exec` is a new shell each time and keeps nothing but files and processes."""

    def __init__(self, environment_dir, *args, **kwargs):
        super().__init__(environment_dir, *args, **kwargs)
        self.sandbox = local.LocalSandbox(
            Task('machine', pathlib.Path(environment_dir).parent, '', workdir='/app')
        )

    @staticmethod
    def type() -> str:
        return 'machine'

    @property
    def capabilities(self):
        return EnvironmentCapabilities(disable_internet=True)

    def _validate_definition(self):
        pass

    async def start(self, force_build):
        await self.sandbox.start()
        with tempfile.TemporaryDirectory() as empty:  # the agent's user may not make these here
            for folder in ('/tests', '/solution'):
                await self.sandbox.upload(pathlib.Path(empty), folder)

    async def stop(self, delete):
        await self.sandbox.stop()

    async def exec(self, command, cwd=None, env=None, timeout_sec=None, user=None):
        values = self._merge_env(env) or {}
        exports = ''.join(f'export {name}={shlex.quote(value)};' for name, value in values.items())
        result = await self.sandbox.run(f'({exports}{command})', timeout_sec or _SEC)
        if result.timed_out:
            raise RuntimeError(f'Command timed out after {timeout_sec} seconds')
        return ExecResult(stdout=result.stdout, stderr=result.stderr, return_code=result.exit_code)

    async def upload_file(self, source_path, target_path):
        await self.sandbox.upload(pathlib.Path(source_path), target_path)

    async def upload_dir(self, source_dir, target_dir):
        await self.sandbox.upload(pathlib.Path(source_dir), target_dir)

    async def download_file(self, source_path, target_path):
        result = await self.sandbox.run(f'cat {shlex.quote(str(source_path))}', _SEC)
        if result.exit_code:
            raise RuntimeError(result.stderr)
        pathlib.Path(target_path).write_text(result.stdout)

    async def download_dir(self, source_dir, target_dir):
        names = await self.sandbox.run(f'cd {shlex.quote(str(source_dir))} && find . -type f', _SEC)
        for name in names.stdout.splitlines():
            file = pathlib.Path(target_dir) / name
            file.parent.mkdir(parents=True, exist_ok=True)
            await self.download_file(f'{source_dir}/{name}', file)


def write_task(
    path: pathlib.Path, toml='', test='', solve='', dockerfile='FROM scratch', **fields
) -> Task:
    """A task of Harbor's: its files, and what we know of it."""
    for name, text in {
        'task.toml': toml,
        'instruction.md': 'do it',
        'environment/Dockerfile': dockerfile,
        'tests/test.sh': f'#!/bin/bash\n{test or "echo 1 >/logs/verifier/reward.txt"}\n',
        'solution/solve.sh': f'#!/bin/bash\n{solve}\n',
    }.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text)
    return Task(path.name, path, 'do it', **fields)


def machine(task: Task, **how) -> harbor.HarborSandbox:
    harbor.check(PATH)
    return harbor.HarborSandbox(task, environment=PATH, **how)
