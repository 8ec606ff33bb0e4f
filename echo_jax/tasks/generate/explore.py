"""Terminal sessions without a goal: text for language modelling of the terminal.

They use the commands of the families' solutions and more, on random files, with the words that the
instruction names. No output in them depends on the time or the machine.
"""

import random
from collections.abc import Callable

from echo_jax.tasks.generate.drafts import Draft


def explore(rng: random.Random, w: list[str], _numbers) -> Draft:
    """A session of three commands: some 320 tokens with the small tokenizer.

    `now` follows what the files hold, so that later commands make sense.
    """
    names = [f'{word}.txt' for word in w[:2]]
    words, fresh, folder = w[2:6], f'{w[6]}.txt', w[7]
    files = {name: rng.choices(words, k=rng.randint(1, 3)) for name in names}
    now = {name: list(lines) for name, lines in files.items()}
    commands = []
    while len(commands) < 3:
        if command := rng.choice(_STEPS)(rng, now, words, fresh, folder):
            commands.append(command)
    return Draft(
        f'Look at {" and ".join(names)}. Words: {", ".join(words)}.',
        {name: '\n'.join(lines) for name, lines in files.items()},
        commands,
        {},
    )


# A step takes the random stream, the files now, the words, the name of a file that is not there at
# first and that of a folder. It returns a command and changes `now` alike, or None if none is apt.


def _on_file(form: str, change: Callable[[list, str, str], object] | None = None):
    """An exploration step on a file `f` that exists: `a` is a word of it, `b` any word."""

    def step(rng, now, words, _fresh, _folder):
        name = rng.choice(sorted(now))
        old, new = rng.choice(now[name]), rng.choice(words)
        if change:
            change(now[name], old, new)
        return form.format(f=name, a=old, b=new)

    return step


def _overwrite(lines, _old, new):
    lines[:] = [new]


def _pair(lines, old, new):
    lines[:] = [f'{new}={old}']


def _substitute(lines, old, new):
    lines[:] = [new if word == old else word for word in lines]


def _move(rng, now, _words, fresh, _folder):
    if fresh in now:
        return None
    name = rng.choice(sorted(now))
    now[fresh] = now.pop(name)
    return f'mv {name} {fresh}; ls'


def _copy_file(rng, now, _words, fresh, _folder):
    if fresh in now:
        return None
    name = rng.choice(sorted(now))
    now[fresh] = list(now[name])
    return f'cp {name} {fresh}; cat {fresh}'


def _remove(rng, now, _words, _fresh, _folder):
    if len(now) < 2:
        return None
    name = rng.choice(sorted(now))
    del now[name]
    return f'rm {name}; ls'


def _into_folder(rng, now, _words, _fresh, folder):
    if len(now) < 2 or any(name.startswith(folder) for name in now):
        return None
    name = rng.choice(sorted(now))
    now[f'{folder}/{name}'] = now.pop(name)
    return f'mkdir {folder}; mv {name} {folder}; ls {folder}'


_STEPS = (
    _on_file('cat {f}'),
    _on_file('echo {b} > {f}; cat {f}', _overwrite),
    _on_file('echo {b} >> {f}; cat {f}', lambda lines, _old, new: lines.append(new)),
    _on_file('sed -i s/{a}/{b}/ {f}; cat {f}', _substitute),
    _on_file('echo {b}={a} > {f}; grep {b} {f}', _pair),
    _on_file('grep {a} {f}'),
    _on_file('grep -A1 {a} {f}'),
    _on_file('head -n1 {f}'),
    _on_file('tail -n1 {f}'),
    _on_file('wc -l < {f}'),
    _on_file('grep -l {a} *.txt'),
    lambda rng, now, words, fresh, folder: 'ls',
    lambda rng, now, words, fresh, folder: None if fresh in now else f'cat {fresh}',
    lambda rng, now, words, fresh, folder: f'echo {"-".join(rng.sample(words, 2))}',
    _move,
    _copy_file,
    _remove,
    _into_folder,
)
