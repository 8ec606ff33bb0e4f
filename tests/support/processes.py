"""What the host sees of a sandbox's processes."""

import contextlib
import os
import pathlib
import time
from collections.abc import Callable


def ended(pid: int) -> bool:
    """Whether the process is gone (or only waits to be reaped by someone else)."""
    try:
        return pathlib.Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] == 'Z'
    except (FileNotFoundError, ProcessLookupError):
        return True


def descendants(pid: int) -> set[int]:
    """Host pids of everything below `pid`, sandboxes' processes included."""
    parents = {}
    for entry in pathlib.Path('/proc').glob('[0-9]*/stat'):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            fields = entry.read_text()
            parents[int(fields.split()[0])] = int(fields.rpartition(')')[2].split()[1])
    found, grew = {pid}, True
    while grew:
        more = {child for child, parent in parents.items() if parent in found} - found
        found, grew = found | more, bool(more)
    return found - {pid}


def open_files() -> set[tuple[str, str]]:
    """This process's descriptors, each with what it leads to. A new one is one that was opened
    since, even if another, of an earlier test, was closed meanwhile.
    """
    found = set()
    for entry in pathlib.Path('/proc/self/fd').iterdir():
        with contextlib.suppress(FileNotFoundError):  # that of the listing itself
            found.add((entry.name, os.readlink(entry)))
    return found


def soon(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    """Whether `condition` holds before the seconds are over."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def comm(pid: int) -> str:
    with contextlib.suppress(OSError):
        return pathlib.Path(f'/proc/{pid}/comm').read_text().strip()
    return ''


def status(pid: int, key: str) -> str:
    lines = pathlib.Path(f'/proc/{pid}/status').read_text().splitlines()
    return next(line.split(':')[1].strip() for line in lines if line.startswith(key + ':'))


def marked(mark: str) -> list[str]:
    """The processes that inherited `mark` in their PATH, wherever their parent went."""
    found = []
    for entry in pathlib.Path('/proc').glob('[0-9]*'):
        with contextlib.suppress(OSError):
            if mark.encode() in (entry / 'environ').read_bytes() and not ended(int(entry.name)):
                found.append((entry / 'cmdline').read_text().replace('\0', ' ')[:80])
    return found
