"""Reads Harbor's registry.json: where the tasks of published sets are. It fetches nothing.

Every entry of the file names data sets, and each of these its tasks, by `path` within a git
repository (`git_url`) or on this machine.
"""

import collections
import json
import os
import pathlib
import tomllib
from typing import Any


def read_registry(file: pathlib.Path) -> tuple[dict[str, pathlib.Path], dict[str, str]]:
    """(task directories by id, why a task has none by id) of all sets that the file lists.

    A relative path counts from the file's folder, which is the clone of a repository that holds its
    own registry, or as in Harbor from the folder that the program was started in. Raises ValueError
    for a file that is no registry, and if no task is on this machine.
    """
    entries = _entries(file)
    found: dict[str, pathlib.Path] = {}
    missing: dict[str, str] = {}
    repositories = set()
    for task_id, entry in entries.items():
        path = pathlib.Path(entry['path']).expanduser()
        places = (file.parent / path, path)
        # Not Path.exists, which raises an error for a folder that may not be entered.
        here = [place for place in places if os.path.exists(place / 'task.toml')]
        url = entry.get('git_url')
        if here:
            found[task_id] = here[0]
        elif url:
            repositories.add(url)
            missing[task_id] = f'{path} is in a repository; git clone {url}'
        else:
            missing[task_id] = f'{path} is not there, has no task.toml, or may not be entered'
    if not found and repositories:
        clones = '; '.join(f'git clone {url}' for url in sorted(repositories)[:4])
        raise ValueError(
            f'{file} names {len(entries)} tasks in {len(repositories)} repositories, and none is '
            f'here; {clones}, and give --tasks the folder'
        )
    return found, missing


def only_references(file: pathlib.Path) -> ValueError:
    """The error for a dataset.toml, which names its tasks by what Harbor's own servers know."""
    try:
        names = tomllib.loads(file.read_text(encoding='utf-8'))
        name = names['dataset']['name']
    except (ValueError, KeyError, TypeError):
        return ValueError(f'{file} is no dataset.toml of Harbor, and there are no tasks beside it')
    return ValueError(
        f'{file} names {len(names.get("tasks", []))} tasks in the registry of Harbor, and none is '
        f'here; harbor download {name}, and give --tasks the folder'
    )


def _entries(file: pathlib.Path) -> dict[str, dict[str, Any]]:
    """The tasks of all sets by id: the name, with the set's before it if two sets have the name."""
    try:
        sets = json.loads(file.read_text(encoding='utf-8'))
        # Versions of a set share most of their tasks: one entry a path.
        listed = {
            (task.get('git_url'), pathlib.Path(task['path'])): (one['name'], task['name'], task)
            for one in reversed(sets)
            for task in reversed(one['tasks'])
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f'{file} is no registry of Harbor, a list of {{name, version, tasks}} ({error!r})'
        ) from error
    counts = collections.Counter(name for _, name, _ in listed.values())
    return {
        (name if counts[name] == 1 else f'{owner}/{name}').replace('/', '__'): task
        for owner, name, task in reversed(listed.values())
    }
