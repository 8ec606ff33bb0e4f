"""Hands tasks out in a seeded order that resumes. Reads no files (sources.py does)."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from echo_jax.types import Task


class TaskSource(Sequence[Task]):
    """The tasks whose prompts are short enough; `dropped` counts the others.

    `count_tokens(instruction)` gives the tokens of a whole prompt, template included. Raises
    ValueError if no task is left.
    """

    def __init__(
        self, tasks: Sequence[Task], count_tokens: Callable[[str], int], max_prompt_tokens: int
    ):
        self.tasks = [t for t in tasks if count_tokens(t.instruction) <= max_prompt_tokens]
        self.dropped = len(tasks) - len(self.tasks)
        if not self.tasks:
            raise ValueError(
                f'none of {len(tasks)} tasks is left, {self.dropped} prompts are over '
                f'max_prompt_tokens={max_prompt_tokens}; raise it or read other tasks'
            )

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, index):
        return self.tasks[index]


class TaskIterator(Iterator[list[Task]]):
    """Endless lists of `groups` tasks; every epoch is shuffled anew, from the seed alone.

    `get_state` gives a dict that JSON can hold; after `set_state` the iterator goes on exactly
    there, even in the middle of an epoch.
    """

    def __init__(self, tasks: Sequence[Task], *, seed: int, groups: int):
        # Imported here because grain imports JAX if it is installed, and workers read tasks too.
        import grain

        if groups < 1:
            raise ValueError(f'groups is {groups}; draw at least one task a step')
        dataset = grain.MapDataset.source(tasks).seed(seed).shuffle().repeat()
        # Without drop_remainder, grain overflows when it counts the batches of an endless dataset.
        dataset = dataset.batch(groups, drop_remainder=True, batch_fn=list)
        # Tasks are small and in memory, so reading ahead would only cost threads.
        options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        self._iterator = iter(dataset.to_iter_dataset(options))
        # A saved position means nothing among other tasks or in another order.
        text = '\n'.join(f'{t.task_id}\t{t.instruction}' for t in tasks)
        fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]
        self._identity = {'tasks': fingerprint, 'seed': seed, 'groups': groups}

    def __next__(self) -> list[Task]:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        return {**self._identity, 'position': self._iterator.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Raises ValueError for a state of other tasks, another seed or another `groups`."""
        got = {key: state.get(key) for key in self._identity}
        if got != self._identity:
            raise ValueError(
                f'the saved position is in {got}, this run reads {self._identity}; '
                'resume with the same tasks, seed and groups, or start a new workdir'
            )
        self._iterator.set_state(state['position'])
