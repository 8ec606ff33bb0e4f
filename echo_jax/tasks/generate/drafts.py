"""The families of generated tasks: what a task says, holds and asks for.

Writes nothing to disk.
"""

import dataclasses
import random
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Draft:
    """One task before it is written; paths are relative to /app."""

    instruction: str
    files: dict[str, str]  # path -> text, as the sandbox starts
    commands: list[str]  # a look first, then the action; one line each, one turn each
    # path -> text after the task is done, None if nothing may be there. Other files stay as is.
    changes: dict[str, str | None]
    tools: dict[str, str] = dataclasses.field(default_factory=dict)  # in PATH: name -> script


# A family: (random stream, eight distinct words, three distinct numbers) -> draft.
Family = Callable[[random.Random, list[str], list[str]], Draft]


def _copy(rng, w, _numbers):
    answer = rng.choice(w[1:4])
    return Draft(
        f'One of {w[1]}, {w[2]}, {w[3]} is in {w[0]}.txt. Write it to out.txt.',
        {f'{w[0]}.txt': answer},
        [f'cat {w[0]}.txt', f'echo {answer} > out.txt; cat out.txt'],
        {'out.txt': answer},
    )


def _last(rng, w, _numbers):
    lines = rng.sample(w[1:4], 3)
    which, tool, answer = rng.choice([('first', 'head', lines[0]), ('last', 'tail', lines[-1])])
    return Draft(
        f'{w[0]}.txt holds {w[1]}, {w[2]}, {w[3]}. Write its {which} line to out.txt.',
        {f'{w[0]}.txt': '\n'.join(lines)},
        [f'{tool} -n1 {w[0]}.txt', f'echo {answer} > out.txt; cat out.txt'],
        {'out.txt': answer},
    )


def _count(rng, w, _numbers):
    # So few numbers cannot be held out; the words still are.
    lines = rng.choices(w[1:4], k=rng.randint(2, 6))
    return Draft(
        f'Count the lines of {w[0]}.txt. Write the number to out.txt.',
        {f'{w[0]}.txt': '\n'.join(lines)},
        [f'wc -l < {w[0]}.txt', f'echo {len(lines)} > out.txt; cat out.txt'],
        {'out.txt': str(len(lines))},
    )


def _after(rng, w, _numbers):
    others = rng.sample(w[2:5], 3)
    place = rng.randrange(3)
    answer = others[place]
    return Draft(
        f'Which of {w[2]}, {w[3]}, {w[4]} is below {w[1]} in {w[0]}.txt? Write it to out.txt.',
        {f'{w[0]}.txt': '\n'.join([*others[:place], w[1], *others[place:]])},
        [f'grep -A1 {w[1]} {w[0]}.txt', f'echo {answer} > out.txt; cat out.txt'],
        {'out.txt': answer},
    )


def _three_files(rng, w) -> tuple[dict[str, str], str]:
    """Files named w[0..2]; the one returned holds w[3], the other two hold w[4] and w[5]."""
    names = [f'{word}.txt' for word in w[:3]]
    texts = rng.sample(w[3:6], 3)
    return dict(zip(names, texts)), names[texts.index(w[3])]


def _find(rng, w, _numbers):
    files, answer = _three_files(rng, w)
    return Draft(
        f'Which of {", ".join(files)} holds {w[3]}? Write its name to out.txt.',
        files,
        [f'grep -l {w[3]} *.txt', f'echo {answer} > out.txt; cat out.txt'],
        {'out.txt': answer},
    )


def _delete(rng, w, _numbers):
    files, answer = _three_files(rng, w)
    return Draft(
        f'One of {", ".join(files)} holds {w[3]}. Delete that file.',
        files,
        [f'grep -l {w[3]} *.txt', f'rm {answer}; ls'],
        {answer: None},
    )


def _rename(rng, w, _numbers):
    name = rng.choice(w[1:4])
    return Draft(
        f'In {w[0]} is a file {w[1]}, {w[2]} or {w[3]}. Rename it to {w[4]}.',
        {f'{w[0]}/{name}': w[5]},
        [f'ls {w[0]}', f'mv {w[0]}/{name} {w[0]}/{w[4]}; ls {w[0]}'],
        {f'{w[0]}/{name}': None, f'{w[0]}/{w[4]}': w[5]},
    )


def _folder(rng, w, _numbers):
    name, file = rng.choice(w[1:4]), f'{w[0]}.txt'
    return Draft(
        f'{file} names one of {w[1]}, {w[2]}, {w[3]}. Make that folder, move {file} into it.',
        {file: name},
        [f'cat {file}', f'mkdir {name}; mv {file} {name}; ls {name}'],
        {file: None, f'{name}/{file}': name},
    )


def _config(rng, w, numbers):
    file, key = f'{w[0]}.conf', w[1]
    one, two, new = rng.choice([w[2:5], numbers])
    old = rng.choice([one, two])
    text = '\n'.join(rng.sample([f'{key}={old}', f'{w[5]}={w[6]}'], 2))
    return Draft(
        f'In {file} {key} is {one} or {two}. Set it to {new}.',
        {file: text},
        [f'grep {key} {file}', f'sed -i s/{old}/{new}/ {file}; grep {key} {file}'],
        {file: text.replace(old, new)},
    )


def _join(rng, w, _numbers):
    first, second = rng.sample(w[2:5], 2)
    return Draft(
        f'{w[0]}.txt and {w[1]}.txt hold two of {w[2]}, {w[3]}, {w[4]}. '
        'Write both with a dash between to out.txt.',
        {f'{w[0]}.txt': first, f'{w[1]}.txt': second},
        [f'cat {w[0]}.txt {w[1]}.txt', f'echo {first}-{second} > out.txt; cat out.txt'],
        {'out.txt': f'{first}-{second}'},
    )


# Families take turns in this order.
FAMILIES: dict[str, Family] = {
    'copy': _copy,
    'find': _find,
    'rename': _rename,
    'config': _config,
    'count': _count,
    'delete': _delete,
    'after': _after,
    'folder': _folder,
    'join': _join,
    'last': _last,
}
