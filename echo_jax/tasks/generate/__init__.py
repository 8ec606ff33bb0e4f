"""Seeded generator of small Harbor task directories, for runs and tests that must be short.

    python -m echo_jax.tasks.generate --output=DIR --split=train --count=500 --seed=0

A task is a function of (seed, split, index) alone. Every family needs a look at a file or folder
before its answer is known; the instruction names the candidates, so that little of what the
terminal prints cannot be predicted. Split 'explore' holds terminal sessions without a goal, on
training words: text for language modelling of the terminal, not tasks to be solved. This module
runs no command and tokenizes nothing.
"""

from echo_jax.tasks.generate.drafts import FAMILIES, Draft
from echo_jax.tasks.generate.words import NUMBERS, SPLITS, SYLLABLES, WORDS, is_heldout
from echo_jax.tasks.generate.write import (
    HABITS,
    demonstration,
    draft_task,
    generate_tasks,
    practice,
    write_task,
)

__all__ = [
    'FAMILIES',
    'HABITS',
    'NUMBERS',
    'SPLITS',
    'SYLLABLES',
    'WORDS',
    'Draft',
    'demonstration',
    'draft_task',
    'generate_tasks',
    'is_heldout',
    'practice',
    'write_task',
]
