"""Seeded generator of small Harbor task directories, for runs and tests that must be short.

A task is a function of (seed, split, index) alone. In every family of tasks the answer is known
only after a look at a file or folder. The instruction names the candidates, so that most of what
the terminal prints can be predicted. The split 'explore' holds terminal sessions without a goal, on
training words: text for language modelling of the terminal, not tasks to be solved. This package
runs no command and tokenizes nothing.
"""

from echo_jax.tasks.generate.drafts import FAMILIES
from echo_jax.tasks.generate.words import NUMBERS, SPLITS, SYLLABLES, WORDS
from echo_jax.tasks.generate.write import (
    demonstration,
    draft_task,
    generate_tasks,
    practice,
    write_task,
)

__all__ = [
    'FAMILIES',
    'NUMBERS',
    'SPLITS',
    'SYLLABLES',
    'WORDS',
    'demonstration',
    'draft_task',
    'generate_tasks',
    'practice',
    'write_task',
]
