"""What Harbor's task.toml may say, as one table: each key is obeyed, checked, or only Harbor's.

Reads text and no files; harbor.py reads the directory around it. The definition of right is Harbor
0.26 (docs/protocol.md#tasks): a test compares the two wherever Harbor is installed.
"""

import math
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from echo_jax.types import Healthcheck

_SCHEMA = [1, 4]  # Harbor 0.26's schema_version
# A whole value that is filled in from the environment of this process: ${VAR}, ${VAR:-default}.
_TEMPLATE = re.compile(r'\$\{([^}:]+)(?::-(.*))?\}')
_VARIABLE = re.compile(r'[A-Za-z_][A-Za-z0-9_]*')
_MIB = {'G': 1024.0, 'M': 1.0, 'K': 1 / 1024}
_NETWORKS = ('public', 'no-network', 'allowlist')


class Said(NamedTuple):
    """What a task.toml says."""

    fields: dict[str, Any]  # of types.Task
    needs_harbor: tuple[str, ...]  # what only Harbor itself provides, by the names in the file
    ignored: tuple[str, ...]  # names that are not in Harbor's schema, which Harbor reads past
    has_own_tests: bool  # whether tests/test.sh must be there
    first_step: str  # the name of the first of [[steps]], whose instruction comes first; or ''


class _Key(NamedTuple):
    section: str  # '' is the top of the file
    name: str
    kind: str  # of _KINDS
    field: str = ''  # of types.Task, if it is filled as it is
    # Whether a value asks for what only Harbor has; any that is not false, empty or 0, by default.
    is_only_harbors: bool = False


_KEYS = (
    _Key('', 'schema_version', 'text'),
    _Key('', 'version', 'text'),  # the old name of schema_version
    _Key('', 'source', 'text'),
    _Key('', 'multi_step_reward_strategy', 'strategy'),
    _Key('', 'steps', 'list', is_only_harbors=True),
    # Harbor copies these to the host after a run. Only a separate verifier reads them.
    _Key('', 'artifacts', 'list'),
    _Key('', 'task', 'table'),  # for people and registries, as is metadata
    _Key('', 'metadata', 'table', 'metadata'),
    _Key('', 'agent', 'table'),
    _Key('', 'verifier', 'table'),
    _Key('', 'environment', 'table'),
    _Key('', 'solution', 'table'),
    _Key('agent', 'timeout_sec', 'seconds', 'agent_timeout_sec'),
    _Key('agent', 'user', 'user', 'agent_user'),
    _Key('agent', 'network_mode', 'network'),
    _Key('agent', 'allowed_hosts', 'texts'),
    _Key('verifier', 'timeout_sec', 'seconds', 'verifier_timeout_sec'),
    _Key('verifier', 'user', 'user', 'verifier_user'),
    _Key('verifier', 'env', 'variables', 'verifier_env'),
    _Key('verifier', 'network_mode', 'network'),
    _Key('verifier', 'allowed_hosts', 'texts'),
    _Key('verifier', 'environment_mode', 'verifier'),
    _Key('verifier', 'environment', 'table'),
    _Key('verifier', 'collect', 'list', is_only_harbors=True),
    _Key('solution', 'env', 'variables', 'solution_env'),
    _Key('environment', 'build_timeout_sec', 'seconds', 'build_timeout_sec'),
    _Key('environment', 'docker_image', 'text', 'docker_image'),
    _Key('environment', 'os', 'system'),
    _Key('environment', 'cpus', 'limit', 'cpus'),
    _Key('environment', 'memory_mb', 'whole limit', 'memory_mb'),
    _Key('environment', 'storage_mb', 'whole limit', 'storage_mb'),
    _Key('environment', 'memory', 'anything'),  # the old names: '2G', beside or instead of _mb
    _Key('environment', 'storage', 'anything'),
    _Key('environment', 'gpus', 'whole limit', is_only_harbors=True),
    _Key('environment', 'gpu_types', 'texts'),  # it says nothing without gpus
    _Key('environment', 'tpu', 'table', is_only_harbors=True),
    _Key('environment', 'mcp_servers', 'list', is_only_harbors=True),
    _Key('environment', 'skills_dir', 'text', is_only_harbors=True),
    _Key('environment', 'env', 'variables', 'env'),
    _Key('environment', 'healthcheck', 'table'),
    _Key('environment', 'workdir', 'path', 'workdir'),
    _Key('environment', 'network_mode', 'network'),
    _Key('environment', 'allowed_hosts', 'texts'),
    _Key('environment', 'allow_internet', 'bool'),  # the old name of network_mode
    _Key('environment.healthcheck', 'command', 'text'),
    _Key('environment.healthcheck', 'interval_sec', 'delay'),
    _Key('environment.healthcheck', 'timeout_sec', 'seconds'),
    _Key('environment.healthcheck', 'start_period_sec', 'delay'),
    _Key('environment.healthcheck', 'start_interval_sec', 'delay'),
    _Key('environment.healthcheck', 'retries', 'count'),
)
_SECTIONS = tuple(dict.fromkeys(key.section for key in _KEYS))


def read_toml(text: str) -> Said:
    """What a task.toml says. Raises ValueError, in one line, for what Harbor would refuse too."""
    try:
        config = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f'is not TOML ({error}); correct it') from error
    values = {section: _section(config, section) for section in _SECTIONS}
    ignored = _unknown(values) + _newer(values[''])
    environment = values['environment']
    for old, new in (('memory', 'memory_mb'), ('storage', 'storage_mb')):
        ignored += _migrate(environment, old, new)
    fields = {
        key.field: values[key.section][key.name]
        for key in _KEYS
        if key.field and values[key.section].get(key.name) is not None
    }
    fields['network'], needs = _network(values)
    for key in ('env', 'verifier_env', 'solution_env'):
        if key in fields:
            fields[key] = resolve(fields[key])
    if 'healthcheck' in environment:
        fields['healthcheck'] = _healthcheck(values['environment.healthcheck'])
    for key in _KEYS:
        if key.is_only_harbors and values[key.section].get(key.name):
            is_tables = key.kind == 'list' and key.section != 'environment'
            needs.append(f'[[{_dotted(key)}]]' if is_tables else _named(key))
    is_separate = _is_separate(values['verifier'])
    if is_separate:
        needs.append('[verifier] environment_mode = "separate"')
    is_windows = environment.get('os') == 'windows'
    if is_windows:
        needs.append('[environment] os = "windows"')
    has_own_tests = not (is_separate or is_windows or values[''].get('steps'))
    return Said(fields, tuple(needs), tuple(ignored), has_own_tests, _first_step(values['']))


def resolve(variables: Mapping[str, str]) -> dict[str, str]:
    """The variables with ${VAR} and ${VAR:-default} filled in from this process's environment.

    As in Harbor, only a value that is a template from end to end is filled in, and the default is
    for a variable that is not set, not for an empty one. Raises ValueError for a variable that is
    not set and has no default.
    """
    resolved = dict(variables)
    for name, value in variables.items():
        found = _TEMPLATE.fullmatch(value)
        if found:
            variable, default = found.groups()
            resolved[name] = os.environ.get(variable, default)
            if resolved[name] is None:
                raise ValueError(
                    f'{name} = {value!r} needs the variable {variable}, which is not set here; '
                    'export it'
                )
    return resolved


# ------------------------------------------------------------------------------- keys and values


def _section(config: dict[str, Any], section: str) -> dict[str, Any]:
    """The table's values by name, each converted as its kind says; {} if there is no table."""
    table = config
    for name in section.split('.') if section else ():
        table = table.get(name, {})
        if not isinstance(table, dict):
            raise ValueError(f'{name} is {table!r}, expected a table; correct it')
    values = dict(table)
    for key in _KEYS:
        if key.section == section and key.name in values:
            expected, convert = _KINDS[key.kind]
            try:
                values[key.name] = convert(values[key.name])
            except (TypeError, ValueError, OverflowError):
                got = f'{_named(key)} = {_short(values[key.name])}'
                raise ValueError(f'{got}, expected {expected}; correct it') from None
    return values


def _unknown(values: Mapping[str, Mapping[str, Any]]) -> list[str]:
    known = {(key.section, key.name) for key in _KEYS}
    return [
        _named(_Key(section, name, ''))
        for section, table in values.items()
        for name in table
        if (section, name) not in known
    ]


def _newer(top: Mapping[str, Any]) -> list[str]:
    """The version of the schema if it is newer than ours. Harbor itself reads on all the same."""
    said = top.get('schema_version') or top.get('version') or ''
    numbers = [int(part) for part in said.split('.') if part.isdecimal()]
    return [f'what is new in schema_version = "{said}"'] if numbers > _SCHEMA else []


def _named(key: _Key) -> str:
    return f'[{key.section}] {key.name}' if key.section else key.name


def _dotted(key: _Key) -> str:
    return f'{key.section}.{key.name}' if key.section else key.name


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f'{text[:80]}...'


def _migrate(environment: dict[str, Any], old: str, new: str) -> list[str]:
    """Takes the limit from its old name; returns the names that Harbor reads past."""
    size = environment.pop(old, None)
    if not isinstance(size, str):  # Harbor drops what is no text, such as a bare number
        return [] if size is None else [f'[environment] {old} = {size!r} (no text)']
    text = size.strip().upper()
    try:
        mib = int(_seconds(text[:-1]) * _MIB[text[-1:]])
    except (KeyError, ValueError, OverflowError):  # '1e308G' is inf MiB
        expected = "expected such as '2G' or '512M'; correct it"
        raise ValueError(f'[environment] {old} = {size!r}, {expected}') from None
    if new in environment and (environment[new] or 0) != mib:
        raise ValueError(
            f'[environment] {old} = {size!r} and {new} = {environment[new]} are not the same; '
            'leave one out'
        )
    environment[new] = mib or None
    return []


def _network(values: Mapping[str, Mapping[str, Any]]) -> tuple[bool, list[str]]:
    """Whether there is a network, and what only Harbor can do of what is said about it."""
    environment, needs = values['environment'], []
    mode, hosts = environment.get('network_mode'), environment.get('allowed_hosts')
    if mode is None and hosts is None and 'allow_internet' in environment:
        mode = 'public' if environment['allow_internet'] else 'no-network'
    mode = mode or 'public'
    if mode == 'allowlist':
        needs.append('[environment] network_mode = "allowlist"')
    elif hosts:
        raise _hosts_without_list('environment')
    for section in ('agent', 'verifier'):
        phase, hosts = (values[section].get(k) for k in ('network_mode', 'allowed_hosts'))
        if hosts if phase not in (None, 'allowlist') else hosts is not None and phase is None:
            raise _hosts_without_list(section)
        if phase is not None and (phase == 'allowlist' or phase != mode):
            needs.append(f'[{section}] network_mode = "{phase}"')
    return mode != 'no-network', needs


def _hosts_without_list(section: str) -> ValueError:
    return ValueError(
        f'[{section}] allowed_hosts is for network_mode = "allowlist" alone; leave it out'
    )


def _first_step(top: Mapping[str, Any]) -> str:
    steps = top.get('steps') or [{'name': ''}]
    if not isinstance(steps[0], dict) or not isinstance(steps[0].get('name'), str):
        raise ValueError(f'steps begins with {_short(steps[0])}, expected [[steps]] with a name')
    return steps[0]['name']


def _is_separate(verifier: Mapping[str, Any]) -> bool:
    """Whether the tests run in a container of their own."""
    mode, environment = verifier.get('environment_mode'), verifier.get('environment')
    if mode == 'shared' and environment is not None:
        raise ValueError(
            '[verifier] environment_mode = "shared" and [verifier.environment] contradict each '
            'other; leave one out'
        )
    return mode == 'separate' or environment is not None


def _healthcheck(table: Mapping[str, Any]) -> Healthcheck:
    if not table.get('command'):
        raise ValueError('[environment.healthcheck] has no command; name one')
    return Healthcheck(**{name: table[name] for name in Healthcheck._fields if name in table})


# -------------------------------------------------------------------- kinds of values: (expected,
# conversion, which raises TypeError, ValueError, or OverflowError for an int that is no float).
# True is no number here, though it is an int.


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise TypeError
    number = float(value)
    if not math.isfinite(number):
        raise ValueError
    return number


def _seconds(value: object) -> float:
    seconds = _number(value)
    if seconds <= 0:
        raise ValueError
    return seconds


def _delay(value: object) -> float:
    number = _number(value)
    if number < 0:
        raise ValueError
    return int(number) if number.is_integer() else number


def _count(value: object) -> int:
    number = _delay(value)
    if not isinstance(number, int):
        raise ValueError
    return number


def _limit(value: object) -> float | None:
    """The limit; None for 0, which Docker takes for no limit."""
    return _delay(value) or None


def _whole_limit(value: object) -> int | None:
    return _count(value) or None


def _of(*kinds: type) -> Callable[[object], Any]:
    def convert(value: object) -> object:
        if type(value) not in kinds:  # not isinstance(), since True is an int
            raise TypeError
        return value

    return convert


def _text(value: object) -> str | None:
    return _of(str)(value) or None


def _path(value: object) -> str | None:
    text = _text(value)
    if text is not None and not text.startswith('/'):
        raise ValueError
    return text


def _user(value: object) -> str | int | None:
    user = _of(str, int)(value)
    return None if user == '' else user


def _list_of_texts(value: object) -> list[str]:
    return [_of(str)(text) for text in _of(list)(value)]


def _variables(value: object) -> dict[str, str]:
    variables = _of(dict)(value)
    for name, text in variables.items():
        if not isinstance(text, str) or not _VARIABLE.fullmatch(name):
            raise ValueError
    return variables


def _system(value: object) -> str:
    return _one_of('linux', 'windows')(_of(str)(value).lower())


def _one_of(*choices: str) -> Callable[[object], str]:
    def convert(value: object) -> str:
        if value not in choices:
            raise ValueError
        return value

    return convert


_KINDS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    'anything': ('anything', lambda value: value),
    'bool': ('true or false', _of(bool)),
    'count': ('a whole number, 0 or more', _count),
    'delay': ('a finite number, 0 or more', _delay),
    'limit': ('a finite number, 0 or more', _limit),
    'list': ('a list', _of(list)),
    'network': (f'one of {", ".join(_NETWORKS)}', _one_of(*_NETWORKS)),
    'path': ('an absolute path', _path),
    'seconds': ('a finite number above 0', _seconds),
    'strategy': ('mean or final', _one_of('mean', 'final')),
    'system': ('linux or windows', _system),
    'table': ('a table', _of(dict)),
    'text': ('a text', _text),
    'texts': ('a list of texts', _list_of_texts),
    'user': ('a name or a number', _user),
    'variables': ('a table of texts, by names of variables', _variables),
    'verifier': ('shared or separate', _one_of('shared', 'separate')),
    'whole limit': ('a whole number, 0 or more', _whole_limit),
}
