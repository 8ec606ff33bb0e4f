"""Terminal sessions without a goal: text for language modelling of the terminal.

They use the commands of the solutions of generated tasks and more, on random files, with the words
that the instruction names. Nothing that they print depends on the time or the machine. Writes
nothing to disk.
"""

import dataclasses
import random
from collections.abc import Callable

from echo_jax.tasks.generate.drafts import Draft


@dataclasses.dataclass
class _Session:
    """What a session's actions share."""

    rng: random.Random
    now: dict[str, list[str]]  # the files and their lines after the actions so far
    words: list[str]
    fresh: str  # a file that is not there at first
    folder: str  # likewise

    def any_file(self) -> str:
        return self.rng.choice(sorted(self.now))


# An action gives a command and changes `session.now` as the command changes the files. It gives
# None, and changes nothing, if its command would make no sense now.
Action = Callable[[_Session], str | None]


def explore(rng: random.Random, w: list[str], _numbers: list[str]) -> Draft:
    """A session of three commands: some 320 tokens with the small tokenizer."""
    names = [f'{word}.txt' for word in w[:2]]
    words = w[2:6]
    files = {name: rng.choices(words, k=rng.randint(1, 3)) for name in names}
    now = {name: list(lines) for name, lines in files.items()}
    session = _Session(rng, now, words, f'{w[6]}.txt', w[7])
    commands: list[str] = []
    while len(commands) < 3:
        command = rng.choice(_ACTIONS)(session)
        if command is not None:
            commands.append(command)
    return Draft(
        f'Look at {" and ".join(names)}. Words: {", ".join(words)}.',
        {name: '\n'.join(lines) for name, lines in files.items()},
        commands,
        {},
    )


def _on_file(form: str, change: Callable[[list[str], str, str], list[str]] | None = None) -> Action:
    """An action on a file {f} that is there, with a word {a} of it and any word {b}.

    `change` gives the file's new lines from its lines, {a} and {b}.
    """

    def action(session: _Session) -> str:
        name = session.any_file()
        lines = session.now[name]
        old, new = session.rng.choice(lines), session.rng.choice(session.words)
        if change:
            session.now[name] = change(lines, old, new)
        return form.format(f=name, a=old, b=new)

    return action


def _move(session):
    if session.fresh in session.now:
        return None
    name = session.any_file()
    session.now[session.fresh] = session.now.pop(name)
    return f'mv {name} {session.fresh}; ls'


def _copy(session):
    if session.fresh in session.now:
        return None
    name = session.any_file()
    session.now[session.fresh] = session.now[name]
    return f'cp {name} {session.fresh}; cat {session.fresh}'


def _remove(session):
    if len(session.now) < 2:
        return None
    name = session.any_file()
    del session.now[name]
    return f'rm {name}; ls'


def _into_folder(session):
    folder = session.folder
    if len(session.now) < 2 or any(name.startswith(folder) for name in session.now):
        return None
    name = session.any_file()
    session.now[f'{folder}/{name}'] = session.now.pop(name)
    return f'mkdir {folder}; mv {name} {folder}; ls {folder}'


_ACTIONS: list[Action] = [
    _on_file('cat {f}'),
    _on_file('echo {b} > {f}; cat {f}', lambda lines, old, new: [new]),
    _on_file('echo {b} >> {f}; cat {f}', lambda lines, old, new: [*lines, new]),
    _on_file(
        'sed -i s/{a}/{b}/ {f}; cat {f}',
        lambda lines, old, new: [new if line == old else line for line in lines],
    ),
    _on_file('echo {b}={a} > {f}; grep {b} {f}', lambda lines, old, new: [f'{new}={old}']),
    _on_file('grep {a} {f}'),
    _on_file('grep -A1 {a} {f}'),
    _on_file('head -n1 {f}'),
    _on_file('tail -n1 {f}'),
    _on_file('wc -l < {f}'),
    _on_file('grep -l {a} *.txt'),
    lambda session: 'ls',
    lambda session: None if session.fresh in session.now else f'cat {session.fresh}',
    lambda session: f'echo {"-".join(session.rng.sample(session.words, 2))}',
    _move,
    _copy,
    _remove,
    _into_folder,
]
