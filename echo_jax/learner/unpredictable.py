"""Finds what nobody can predict in terminal output, for `loss.drop_unpredictable`.

Clock times and dates, process ids, hashes and UUIDs, temporary names, memory addresses and
durations: a model that is trained on them learns noise. The patterns are searched in bytes, because
one character may be several tokens and one token a part of a character; a token is dropped if a
match touches it. What stood in the rollout before can be copied from there, and stays. No JAX.
"""

import re
from collections.abc import Iterator

import numpy as np
import transformers

from echo_jax.learner.targets import runs
from echo_jax.types import Role, Rollout

_MONTH = r'(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)[a-z]*'
_DAY = r'(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun)[a-z]*'
# A pattern drops its named group if it has one, and all that it matches otherwise; the rest of a
# pattern is what tells, say, a process id from any other number.
PATTERNS = {
    # 2026-11-28, 2026/11/28, 2026-11-28T17:05:28.123Z, 28/11/2026
    'date': r'(?<![\w/.-])\d{4}([-/])[01]\d\1[0-3]\d(?![\d/])|(?<![\w/])\d\d/\d\d/\d{4}(?![\d/])',
    # Sat Nov 28, Nov 28 2026, Nov  5, Saturday, November 28, 2026
    'named date': rf'\b(?:{_DAY},? +)?{_MONTH} +[0-3]?\d(?:,? +(?:19|20)\d\d)?\b',
    # Sat, 28 Nov 2026
    'dated name': rf'\b(?:{_DAY},? +)?[0-3]?\d[ -]{_MONTH}[ -](?:19|20)\d\d\b',
    # 17:05, 7:05:28, 17:05:28.123; with the zone, and the year that date(1) puts behind it
    'time': (
        r'(?<![\w:.])(?:[01]\d|2[0-3]):[0-5]\d(?![\w:])'
        r'|(?<![\w:.])(?:T)?(?:[01]?\d|2[0-3]):[0-5]\d:[0-5]\d(?:[.,]\d+)?(?![\w:])'
        r'(?: [AP]M)?(?: [A-Z]{3,5}(?: 20\d\d)?)?'
    ),
    'time of a date': r'(?<=\d)T[0-2]\d:[0-5]\d(?::[0-5]\d(?:[.,]\d+)?)?(?:Z|[+-]\d\d:?\d\d)?',
    # seconds since 1970, from 2014 to 2033, with a fraction, or in milliseconds
    'epoch': r'(?<![\w.])1[4-9]\d{8}(?:\d{3}|\.\d+)?(?![\w.])',
    # real 0m0.012s, in 0.53s, took 12.5 seconds, 35 ms
    'duration': (
        r'\b\d+m\d+[.,]\d+s\b'
        r'|\b(?:in|took|after|time:?) (?P<x>\d+(?:\.\d+)?) ?(?:ms|s|secs?|seconds)\b'
    ),
    # [1] 12345, as a shell says of a job
    'job': r'^\[\d+\][ +-]+(?P<x>\d{2,7})\b',
    'pid': r'\b(?:[Pp]id|PID|process(?: id)?|Process(?: ID)?)[ :=#(]*(?P<x>\d+)',
    # `kill: (12345) - No such process`, `line 3: 12345 Killed`
    'kill': r'\((?P<x>\d+)\) - (?:No such process|Operation not permitted)',
    'killed': r': line \d+: +(?P<x>\d+) (?:Killed|Terminated|Aborted|Segmentation|Hangup)',
    # ps, ps -ef, ps aux
    'ps': r'^ *(?P<x>\d+) +(?:pts/\d+|tty\w*|\?) +',
    'ps -ef': r'^[\w+-]+ +(?P<x>\d+ +\d+) +\d+ +\S+ +(?:pts/\d+|tty\w*|\?) ',
    'ps aux': r'^[\w+-]+ +(?P<x>\d+) +\d+\.\d +\d+\.\d +(?:\d+ +\d+)',
    '/proc': r'/proc/(?P<x>\d+)\b',
    'uuid': r'\b[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}\b',
    # MD5 and longer, as hexadecimal or behind the name of the algorithm as base64
    'hash': r'\b(?=[a-f]*\d)(?=\d*[a-f])[0-9a-f]{32,128}\b',
    'integrity': r'\b(?:sha1|sha256|sha384|sha512|SHA256|MD5)[-:](?P<x>[A-Za-z0-9+/]{27,}={0,2})',
    # git: commit 1a2b3c4, index 1a2b3c4..5d6e7f8, [main 1a2b3c4], HEAD is now at 1a2b3c4
    'commit': (
        r'\b(?:commit|index|Merge:|at) (?P<x>[0-9a-f]{7,40}(?:\.\.[0-9a-f]{7,40})?)\b'
        r'|^\[[\w/.-]+(?: \(root-commit\))? (?P<y>[0-9a-f]{7,40})\]'
    ),
    # mktemp's, and those of Python's tempfile
    'temporary': r'\btmp\.(?P<x>[A-Za-z0-9]{6,})|/tmp/tmp(?P<y>[a-z0-9_]{8})\b',
    'address': r'\b0x[0-9a-f]{6,16}\b',
}
_PATTERNS = [re.compile(pattern.encode(), re.MULTILINE) for pattern in PATTERNS.values()]
_PROBE = 'a b\n\t12:30 é ☃ \U0001f600 <x>\r\n  end'


def unpredictable_spans(text: bytes) -> Iterator[tuple[int, int]]:
    """(start, end) in bytes of what nobody can predict in `text`, in no order; they may overlap."""
    for pattern in _PATTERNS:
        for match in pattern.finditer(text):
            named = [name for name, value in match.groupdict().items() if value is not None]
            yield match.span(named[0] if named else 0)


def token_bytes(tokenizer: transformers.PreTrainedTokenizerFast) -> list[bytes]:
    """What each id of the vocabulary stands for.

    Raises ValueError unless it is a byte-level tokenizer, as Qwen's and ours are: with others, a
    token alone does not say what it becomes in a text.
    """
    added = {i: token.content for i, token in tokenizer.added_tokens_decoder.items()}
    table = []
    for i, token in enumerate(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))):
        if i in added or token is None:
            table.append(added.get(i, '').encode())
        else:
            table.append(bytes(_BYTES[c] for c in token if c in _BYTES))
    ids = tokenizer.encode(_PROBE, add_special_tokens=False)
    if b''.join(table[i] for i in ids) != _PROBE.encode():
        raise ValueError(
            f'tokenizer {tokenizer.name_or_path!r} is not byte-level, so tokens cannot be matched '
            'with their text; set loss.drop_unpredictable=False'
        )
    return table


class Unpredictable:
    """The rule of `loss.drop_unpredictable`, for `targets.choose_targets`.

    Called with a rollout, it returns bool [T]: its OUTPUT tokens that nobody can predict.
    """

    def __init__(self, tokenizer: transformers.PreTrainedTokenizerFast):
        self._table = token_bytes(tokenizer)

    def __call__(self, rollout: Rollout) -> np.ndarray:
        roles = rollout.roles
        pieces = [self._table[i] if i < len(self._table) else b'' for i in rollout.tokens]
        ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
        starts = ends - [len(piece) for piece in pieces]
        text = b''.join(pieces)
        dropped = np.zeros(len(roles), bool)
        # An observation is searched as a whole, since the words around an output may tell what a
        # number in it is; but only OUTPUT is dropped.
        for first, last in runs(~np.isin(roles, (Role.PROMPT, Role.ACTION))):
            offset = int(starts[first])
            for start, end in unpredictable_spans(text[offset : int(ends[last - 1])]):
                start, end = offset + start, offset + end
                if text.find(text[start:end], 0, start) < 0:
                    dropped[first:last] |= (starts[first:last] < end) & (ends[first:last] > start)
        return dropped & (roles == Role.OUTPUT)


def _byte_letters() -> dict[str, int]:
    """The letter that a byte-level vocabulary writes for each byte, the other way round.

    Visible characters of Latin-1 stand for themselves; the other bytes, in order, for what follows
    U+0100.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in set(visible)]
    letters = {chr(byte): byte for byte in visible}
    return letters | {chr(0x100 + i): byte for i, byte in enumerate(hidden)}


_BYTES = _byte_letters()
