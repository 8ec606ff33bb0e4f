"""The words and numbers that generated tasks are made of, and which of them are held out."""

import hashlib

# Syllables are the pieces that a small tokenizer cuts names into. Those that are words of the
# instructions or of the shell, or make such words, are left out.
SYLLABLES = tuple(
    consonant + vowel
    for consonant in 'bdfgklmnprstvz'
    for vowel in 'aeiou'
    if consonant + vowel not in ('do', 'go', 'no', 'so', 'to', 'be', 'me', 're', 'le', 'ne')
)
# Words of two such syllables that instructions or prompts may use, and words nobody wants to read.
# fmt: off
RESERVED = frozenset((
    'base', 'data', 'date', 'give', 'life', 'like', 'made', 'make', 'move', 'late',
    'rate', 'ride', 'safe', 'save', 'side', 'size', 'take', 'tape', 'used', 'wide',
    'dike', 'fake', 'fuku', 'gaza', 'kike', 'nazi', 'nude', 'pena', 'peni', 'puta',
    'rape', 'suka', 'para',
))
# fmt: on
SPLITS = ('train', 'heldout')


def is_heldout(name: str) -> bool:
    """Whether a word or number is for held-out tasks: a fifth is, by a hash that never changes."""
    return hashlib.sha256(name.encode()).digest()[0] < 51


def _parts(names: list[str]) -> dict[str, tuple[str, ...]]:
    return {
        'train': tuple(n for n in names if not is_heldout(n)),
        'heldout': tuple(n for n in names if is_heldout(n)),
    }


WORDS = _parts([a + b for a in SYLLABLES for b in SYLLABLES if a != b and a + b not in RESERVED])
NUMBERS = _parts([str(n) for n in range(10, 100)])
