"""A disk that a test can fill, and close to writers."""

import contextlib
import os
import pathlib
import subprocess
from collections.abc import Generator

import pytest


class SmallDisk:
    """A file system in memory, mounted at `path`; only root can have one."""

    def __init__(self, path: pathlib.Path):
        self.path = path

    def fill(self) -> None:
        """Leaves no room, whatever is written meanwhile."""

        def used() -> int:
            stat = os.statvfs(self.path)
            return (stat.f_blocks - stat.f_bfree) * stat.f_frsize

        assert any(self._remount(f'size={used()}') for _ in range(1000))

    def make_room(self) -> None:
        assert self._remount('size=256M')

    def take_rights(self) -> None:
        """Nobody may write from now on, but to files that are open."""
        subprocess.run(['mount', '--bind', self.path, self.path], check=True)
        assert any(self._remount('bind,ro') for _ in range(1000))  # not while a file is written

    def give_rights(self) -> None:
        subprocess.run(['umount', self.path], check=True)

    def _remount(self, options: str) -> bool:
        command = ['mount', '-o', f'remount,{options}', self.path]
        return subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0


@contextlib.contextmanager
def small_disk(path: pathlib.Path) -> Generator[SmallDisk]:
    path.mkdir()
    command = ['mount', '-t', 'tmpfs', '-o', 'size=256M', 'tmpfs', path]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f'a file system cannot be mounted here: {done.stderr.strip()}')
    try:
        yield SmallDisk(path)
    finally:
        while path.is_mount():  # more than once, if the rights are still taken
            subprocess.run(['umount', '-l', path], check=True)
