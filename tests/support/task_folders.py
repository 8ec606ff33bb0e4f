"""The smallest task that Harbor takes."""

import pathlib


def write(path: pathlib.Path, toml: str = '', instruction: str = 'Say  hello.\n') -> pathlib.Path:
    """Writes a task directory, which must not be there; returns it."""
    (path / 'tests').mkdir(parents=True)
    (path / 'tests' / 'test.sh').write_text('echo 1 > /logs/verifier/reward.txt\n')
    (path / 'task.toml').write_text(toml)
    (path / 'instruction.md').write_text(instruction)
    return path
