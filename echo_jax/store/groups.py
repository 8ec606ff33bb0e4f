"""Groups by their numbers: the keys under which rollouts and scores lie, `groups/000000000012`."""

import re

import tensorstore as ts


def group_key(group_id: int) -> str:
    return f'groups/{group_id:012d}'


def check_number(group_id: int) -> None:
    """Raises ValueError for a number that no key can have."""
    if not 0 <= group_id < 10**12:
        raise ValueError(f'group_id is {group_id}; expected 0 to 10**12 - 1')


def list_groups(kvstore: ts.KvStore, first: int = 0) -> list[int]:
    """The numbers, from `first` on, of the groups that are there, ascending."""
    found = kvstore.list(ts.KvStore.KeyRange(group_key(first), 'groups0')).result()
    matches = (re.fullmatch(rb'groups/(\d{12})', key) for key in found)
    return sorted(int(match[1]) for match in matches if match)
