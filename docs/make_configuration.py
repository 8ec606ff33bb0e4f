"""Writes docs/configuration.md from configs/base.py, the recipes, and the tables of inert keys and
of those that may change when a run goes on.

    python -m docs.make_configuration

The comment above a key in configs/base.py is what the page says of it. A test fails when the page
is stale.
"""

import importlib
import pathlib
import re

from configs import base
from echo_jax.run.changes import CHANGEABLE
from echo_jax.run.inert import INERT, flat, keys_of

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / 'docs' / 'configuration.md'
RECIPES = (
    'tiny',
    'machine',
    'qwen3_0p6b',
    'qwen3_1p7b',
    'qwen3_4b',
    'qwen3_8b',
    'qwen3_14b',
    'qwen3_32b',
)
TABLE = '| key | default | meaning | recipes with another value |\n|---|---|---|---|'
HEAD = """\
# Configuration

This page lists every key of a recipe. It is made from [configs/base.py](../configs/base.py) by
`python -m docs.make_configuration`: change the comments there.

A recipe is a Python file whose `get_config()` takes the defaults of `configs/base.py` and changes
some. `--config=FILE` names it, `--config=FILE:grpo` names its variant without the environment term
(configs/machine.py and configs/qwen3_8b.py list the others that they have), and
`--config.KEY=VALUE` changes one key for one run. A tuple is written as in Python:
`--config.warm_start.habits="('solve',)"`.

A key that does not exist is refused. So is a key that is set although it can have no effect with
the others chosen; the column "meaning" says when that is. A flag sets a key even to its default. A
recipe sets it to another value than the default, which is no error if a flag made it inert.

A workdir belongs to its config. `train` on a workdir of another config names the first key that
differs and stops, unless it is one of these, which change nothing that is learned but its rounding
([docs/design.md#state](design.md#state) says how a run goes on with other values):
"""


def comments() -> dict[str, str]:
    """What configs/base.py says of each key and of each section, as one line."""
    found, lines = {}, []
    for line in pathlib.Path(base.__file__).read_text().splitlines():
        line = line.strip()
        assignment = re.match(r'c\.([\w.]+) = ', line)
        if assignment and lines:
            found[assignment[1]] = ' '.join(lines)
        lines = [*lines, line[2:]] if line.startswith('# ') else []
    return found


def recipes() -> dict[str, dict[str, object]]:
    """The values of every recipe, and of its variant ':grpo', by their keys."""
    values = {}
    for name in RECIPES:
        module = importlib.import_module(f'configs.{name}')
        values[name] = flat(module.get_config())
        values[f'{name}:grpo'] = flat(module.get_config('grpo'))
    return values


def meaning(key: str, said: dict[str, str]) -> str:
    """A key's comment, and when the key is refused."""
    text = said[described_as(key, said)]
    reasons = [
        f'{" and ".join(map(repr, row.values)) or "It"} has no effect {row.reason}.'
        for row in INERT
        if keys_of(row, [key])
    ]
    return linked(' '.join([text, *reasons]))


def described_as(key: str, said: dict[str, str]) -> str:
    """The key whose comment describes it: warm_start.optimizer is a copy of optimizer."""
    return key if key in said else key.removeprefix('warm_start.')


def linked(text: str) -> str:
    """`text` with its citations of other pages, such as docs/design.md#batch, as links."""
    return re.sub(r'\bdocs/([\w-]+\.md)(#[\w-]+)?', r'[docs/\1\2](\1\2)', text)


def others(key: str, default: object, values: dict[str, dict[str, object]]) -> str:
    """The recipes whose value is not the default, those of one value together."""
    by_value = {}
    for name, recipe in values.items():
        value = f'`{recipe[key]!r}`' if key in recipe else 'left out'
        of_recipe = values[name.removesuffix(':grpo')]
        if name.endswith(':grpo') and recipe.get(key) == of_recipe.get(key):
            continue
        if key not in recipe or recipe[key] != default:
            by_value.setdefault(value, []).append(name)
    return '; '.join(f'{together(names)}: {value}' for value, names in by_value.items())


def together(names: list[str]) -> str:
    """The names of recipes, with `*` for all of a kind."""
    large = [name for name in RECIPES if name != 'tiny']
    if names == [f'{name}:grpo' for name in RECIPES]:
        return '`*:grpo`'
    if set(large) <= set(names):
        names = [name for name in names if name not in large] + ['qwen3_*']
    return ', '.join(f'`{name}`' for name in names)


def page() -> str:
    """The whole text of docs/configuration.md."""
    said, values, defaults = comments(), recipes(), flat(base.get_config())
    parts = [HEAD, changeable(), '## The run', table('', defaults, said, values)]
    for section in said:
        if section not in defaults:
            parts += [f'## {section}', linked(said[section])]
            parts += [table(section, defaults, said, values)]
    return '\n\n'.join(part.strip() for part in parts) + '\n'


def changeable() -> str:
    """The keys that may change when a run goes on, with the reasons."""
    rows = ['| may change | why |', '|---|---|']
    for row in CHANGEABLE:
        keys = ', '.join(f'`{key}`' for key in row.keys)
        only = '' if len(row.backends) > 1 else f", with `policy.backend = '{row.backends[0]}'`"
        rows.append(f'| {keys}{only} | {linked(row.reason)} |')
    return '\n'.join(rows)


def table(
    section: str,
    defaults: dict[str, object],
    said: dict[str, str],
    values: dict[str, dict[str, object]],
) -> str:
    """The keys that lie in the section itself, a row each; '' is the section of the others."""
    order = list(said)
    keys = [key for key in defaults if key.rpartition('.')[0] == section]
    rows = [TABLE]
    for key in sorted(keys, key=lambda key: order.index(described_as(key, said))):
        cells = (
            f'`{key}`',
            f'`{defaults[key]!r}`',
            meaning(key, said),
            others(key, defaults[key], values),
        )
        rows.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join(rows)


if __name__ == '__main__':
    PAGE.write_text(page())
