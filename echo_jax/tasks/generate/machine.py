"""Tasks on one machine with small tools of its own, and sessions on other machines.

A tool is a bash script in PATH that puts its seal on a file. It needs its one option, a letter. If
it is called otherwise, it prints `usage: finu -i FILE`. A task names a file and one to three tools.
The option of a tool is the same in every task on the machine, and only the machine tells it. The
sessions of the warm start are of other machines: most are of one that is met again and again, whose
tools are usually called right, the others of machines that are met once. They show that options can
be known, and how a usage line is read, but no tool of the tasks' machine.

Writes nothing to disk.
"""

import dataclasses
import functools
import hashlib
import random
import string
from collections.abc import Sequence

from echo_jax.tasks.generate.drafts import Draft
from echo_jax.tasks.generate.words import WORDS

# 'machine': the same tools in every task of a seed, training's and held-out. 'new_machine': other
# tools in every task, so that nothing a terminal printed helps later.
MACHINE_FAMILIES = ('machine', 'new_machine')
TOOLS = 24  # of the tasks' machine
_KNOWN_TOOLS = 40  # of the machine that sessions meet again and again
_KNOWN = 0.6  # the share of sessions on that machine
_RIGHT = {True: 0.8, False: 0.1}  # the share of tools whose first call is right: known, met once
_SLIPS = 0.2  # the share of sessions that begin with a misspelled name

_SCRIPT = """\
#!/bin/bash
# Adds the seal of {name} to a file; the seal depends on all that the file holds so far.
[[ $# == 2 && $1 == -{option} ]] || {{ echo 'usage: {name} -{option} FILE' >&2; exit 2; }}
[[ -f $2 ]] || {{ echo "{name}: $2: No such file or directory" >&2; exit 1; }}
seal=$({{ echo {key}; cat -- "$2"; }} | md5sum) && echo "{name} ${{seal:0:8}}" >> "$2"
"""


@dataclasses.dataclass(frozen=True)
class Tool:
    """One tool of a machine."""

    name: str
    option: str  # a letter
    key: str  # goes into its seals, so that they cannot be written by whoever knows the name alone

    def call(self, file: str, option: str = '') -> str:
        """A command line with the tool's option, or another one."""
        return f'{self.name} -{option or self.option} {file}'

    def sealed(self, text: str) -> str:
        """The text of a file after the tool was called on it right; lines that end."""
        seal = hashlib.md5(f'{self.key}\n{text}'.encode()).hexdigest()[:8]
        return f'{text}{self.name} {seal}\n'

    def script(self) -> str:
        return _SCRIPT.format(**dataclasses.asdict(self))


def draft(seed: int, split: str, index: int, family: str) -> Draft:
    """A task of the split 'train' or 'heldout' by an index, or a session, of the split 'explore'.

    Tasks and sessions are of one, two and three tools in turn.
    """
    # Sessions are the same whatever machine the tasks are on, so that families can be compared.
    kind = 'session' if split == 'explore' else family
    rng = random.Random(f'{seed}/{split}/{kind}/{index}')
    own, known = _machines(seed)
    taken = {tool.name for tool in (*own, *known)}
    words = {part: [word for word in WORDS[part] if word not in taken] for part in WORDS}
    count = 1 + index % 3
    if split == 'explore':
        return _session(rng, known, words['train'], count)
    tools = own if family == 'machine' else _tools(rng, rng.sample(words['train'], TOOLS))
    chosen = rng.sample(tools, count)
    files = set(words[split]) - {tool.name for tool in tools}
    name, word = rng.sample(sorted(files), 2)
    return _task(chosen, tools, f'{name}.txt', word)


@functools.cache
def _machines(seed: int) -> tuple[list[Tool], list[Tool]]:
    """The tasks' machine, and the one that sessions meet again; no name is on both."""
    rng = random.Random(f'{seed}/machine')
    names = rng.sample(WORDS['train'], TOOLS + _KNOWN_TOOLS)
    return _tools(rng, names[:TOOLS]), _tools(rng, names[TOOLS:])


def _tools(rng: random.Random, names: Sequence[str]) -> list[Tool]:
    return [
        Tool(name, rng.choice(string.ascii_lowercase), f'{rng.randrange(16**8):08x}')
        for name in names
    ]


def _task(chosen: Sequence[Tool], tools: Sequence[Tool], file: str, word: str) -> Draft:
    text = f'{word}\n'
    for tool in chosen:
        text = tool.sealed(text)
    return Draft(
        f'Seal {file} with {", then ".join(tool.name for tool in chosen)}.',
        {file: word},
        [tool.call(file) for tool in chosen],
        {file: text.removesuffix('\n')},
        {tool.name: tool.script() for tool in tools},
    )


def _session(rng: random.Random, known: Sequence[Tool], words: Sequence[str], count: int) -> Draft:
    """Each tool is called until it is called right: at once, or after its usage line was read.

    Of its machine a session has only the tools that it names; no other is called in it.
    """
    file, word, misspelled, *names = rng.sample(words, 3 + count)
    is_known = rng.random() < _KNOWN
    tools = rng.sample(known, count) if is_known else _tools(rng, names)
    commands = []
    for tool in tools:
        if rng.random() >= _RIGHT[is_known]:
            others = string.ascii_lowercase.replace(tool.option, '')
            commands.append(tool.call(f'{file}.txt', rng.choice(others)))
        commands.append(tool.call(f'{file}.txt'))
    if rng.random() < _SLIPS:
        # A wrong call of a missing file is answered by the usage line, so it would be no slip.
        is_right = commands[0] == tools[0].call(f'{file}.txt')
        slipped = file if is_right and rng.random() < 0.5 else tools[0].name
        commands.insert(0, commands[0].replace(slipped, misspelled))
    return dataclasses.replace(
        _task(tools, tools, f'{file}.txt', word), commands=commands, changes={}
    )
