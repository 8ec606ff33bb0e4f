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
    own registry, or as in Harbor from the folder that the program was started in. A folder that
    several entries lead to is one task, and goes by the first of their ids. Raises ValueError for a
    file that is no registry, for an id that two entries have, and if no task is on this machine.
    """
    entries = _entries(file)
    found: dict[str, pathlib.Path] = {}
    missing: dict[str, str] = {}
    owners: dict[str, str] = {}  # ids by the real paths of what is found
    repositories = set()
    for task_id, entry in entries.items():
        path = pathlib.Path(entry['path']).expanduser()
        places = (file.parent / path, path)
        # Not Path.exists, which raises an error for a folder that may not be entered.
        here = [place for place in places if os.path.exists(place / 'task.toml')]
        url = entry.get('git_url')
        owner = owners.setdefault(os.path.realpath(here[0]), task_id) if here else ''
        if owner == task_id:
            found[task_id] = here[0]
        elif owner:
            missing[task_id] = f'{path} is read as {owner} already'
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
    """The tasks of all sets by id, NAME, SET__NAME or SET@VERSION__NAME: the first that is unique.

    The id does not depend on what is on this machine, since results go by it.
    """
    try:
        sets = json.loads(file.read_text(encoding='utf-8'))
        # Versions of a set share most of their tasks: one entry a path.
        listed = {
            (task.get('git_url'), pathlib.Path(task['path'])): (one, task)
            for one in reversed(sets)
            for task in reversed(one['tasks'])
        }
        tasks = [(one['name'], one.get('version'), task) for one, task in listed.values()]
        names = collections.Counter(task['name'] for _, _, task in tasks)
        owned = collections.Counter((owner, task['name']) for owner, _, task in tasks)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f'{file} is no registry of Harbor, a list of {{name, version, tasks}} ({error!r})'
        ) from error
    entries: dict[str, dict[str, Any]] = {}
    for owner, version, task in reversed(tasks):
        task_id = str(task['name'])
        if owned[owner, task['name']] > 1:
            task_id = f'{owner}@{version}/{task_id}'
        elif names[task['name']] > 1:
            task_id = f'{owner}/{task_id}'
        task_id = task_id.replace('/', '__')
        if entries.setdefault(task_id, task) is not task:
            places = f'{entries[task_id]["path"]} and {task["path"]}'
            raise ValueError(
                f'{file} has two tasks with the id {task_id!r}, {places}; results go by the id: '
                'rename one, or give --tasks the folder of one'
            )
    return entries
