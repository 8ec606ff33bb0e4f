"""Seeded generator of small Harbor task directories, for runs and tests that must be short.

A task is a function of (seed, split, index) alone. In the ten general families (drafts.py) the
answer is known only after a look at a file or folder. The instruction names the candidates, so that
most of what the terminal prints can be predicted. In the families of machine.py it is known after a
look at a usage line, and stays true. The split 'explore' holds terminal sessions, on training
words: text for language modelling of the terminal, not tasks to be solved; explore.py writes those
of the general families. This package runs no command and tokenizes nothing.
"""

from echo_jax.tasks.generate.drafts import FAMILIES
from echo_jax.tasks.generate.machine import MACHINE_FAMILIES
from echo_jax.tasks.generate.words import NUMBERS, SPLITS, SYLLABLES, WORDS
from echo_jax.tasks.generate.write import (
    demonstration,
    draft_task,
    generate_tasks,
    practice,
    usage,
    write_task,
)

__all__ = [
    'FAMILIES',
    'MACHINE_FAMILIES',
    'NUMBERS',
    'SPLITS',
    'SYLLABLES',
    'WORDS',
    'demonstration',
    'draft_task',
    'generate_tasks',
    'practice',
    'usage',
    'write_task',
]
