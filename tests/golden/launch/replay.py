"""Runs the commands of the transcripts that lie beside it; `python replay.py` writes them anew.

A transcript is what a terminal would show: lines `$ command`, each with what the command printed,
errors included. Commands run in the repository's root with nothing in their environment, and with
no gcloud and no nvidia-smi on their PATH: a dry run needs neither.
"""

import pathlib
import shutil
import subprocess
import tempfile

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[2]
TRANSCRIPTS = sorted(HERE.glob('*.txt'))
NEEDED = ('bash', 'dirname', 'env', 'sed', 'sort', 'tr', 'uniq')


def commands(transcript: str) -> list[str]:
    return [line[2:] for line in transcript.splitlines() if line.startswith('$ ')]


def run(command: str, cwd: pathlib.Path = ROOT) -> str:
    """What the command prints, and then its exit code if that is not 0."""
    with tempfile.TemporaryDirectory() as path:
        for program in NEEDED:
            pathlib.Path(path, program).symlink_to(shutil.which(program))
        done = subprocess.run(
            ['bash', '-c', command],
            cwd=cwd,
            env={'PATH': path},
            text=True,
            timeout=60,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
    return done.stdout + (f'exit code {done.returncode}\n' if done.returncode else '')


def replay(transcript: str) -> str:
    return ''.join(f'$ {command}\n{run(command)}\n' for command in commands(transcript))


if __name__ == '__main__':
    for file in TRANSCRIPTS:
        file.write_text(replay(file.read_text()))
