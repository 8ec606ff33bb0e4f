"""Hands tasks out in a seeded order that resumes."""

import hashlib
from collections.abc import Callable, Iterator, Sequence

from echo_jax.types import Task


class TaskSource(Sequence[Task]):
    """Random access to tasks, for grain. Prompts that are too long are dropped, and counted.

    `count_tokens(instruction)` gives the tokens of a whole prompt, template included. Raises
    ValueError where no task is left.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        count_tokens: Callable[[str], int] | None = None,
        max_prompt_tokens: int | None = None,
    ):
        if (count_tokens is None) != (max_prompt_tokens is None):
            raise ValueError('count_tokens and max_prompt_tokens go together; give both or neither')
        self.tasks = list(tasks)
        if count_tokens is not None:
            self.tasks = [t for t in tasks if count_tokens(t.instruction) <= max_prompt_tokens]
        self.dropped = len(tasks) - len(self.tasks)  # prompts over max_prompt_tokens
        if not self.tasks:
            raise ValueError(
                f'none of {len(tasks)} tasks is left, {self.dropped} prompts are over '
                f'max_prompt_tokens={max_prompt_tokens}; raise it or read other tasks'
            )

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, index):
        return self.tasks[index]

    def fingerprint(self) -> str:
        """Names the tasks and their order: a saved position means nothing over other tasks."""
        text = '\n'.join(f'{t.task_id}\t{t.instruction}' for t in self.tasks)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class TaskIterator(Iterator[list[Task]]):
    """Endless lists of `groups` tasks; every epoch is shuffled anew, from the seed alone.

    `get_state` is a dict for JSON; `set_state` goes on exactly there, mid-epoch too.
    """

    def __init__(self, source: TaskSource, *, seed: int, groups: int):
        # Here, not above: grain imports JAX where it is installed, and workers read tasks too.
        import grain

        if groups < 1:
            raise ValueError(f'groups is {groups}; draw at least one task a step')
        dataset = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
        # drop_remainder: grain's length of an endless dataset overflows without it.
        dataset = dataset.batch(groups, drop_remainder=True, batch_fn=list)
        # Tasks are small and in memory: reading ahead would only cost threads.
        options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        self._iterator = iter(dataset.to_iter_dataset(options))
        self._identity = {'tasks': source.fingerprint(), 'seed': seed, 'groups': groups}

    def __next__(self) -> list[Task]:
        return next(self._iterator)

    def get_state(self) -> dict:
        return {**self._identity, 'position': self._iterator.get_state()}

    def set_state(self, state: dict) -> None:
        got = {key: state.get(key) for key in self._identity}
        if got != self._identity:
            raise ValueError(
                f'the saved position is in {got}, this run reads {self._identity}; '
                'resume with the same tasks, seed and groups, or start a new workdir'
            )
        self._iterator.set_state(state['position'])


def task_iterator(tasks: Sequence[Task], *, seed: int, groups: int) -> TaskIterator:
    """An endless, resumable iterator over lists of `groups` tasks; `tasks` may be a TaskSource."""
    source = tasks if isinstance(tasks, TaskSource) else TaskSource(tasks)
    return TaskIterator(source, seed=seed, groups=groups)
