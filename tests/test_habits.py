"""Habits of the tests themselves: they use the package as its users do, and not each other. And two
of all code: how long a file may be, and what threads may outlive the program.
"""

import ast
import pathlib
import re
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted((ROOT / 'tests').rglob('*.py'))
# Public although they begin with an underscore: the methods of named tuples, and the process's end.
PUBLIC = {'_replace', '_fields', '_asdict', '_make', '_exit'}
MOST_REACHES = 10


def is_private(name: object) -> bool:
    if not isinstance(name, str) or name in PUBLIC:
        return False
    return name.startswith('_') and not name.startswith('__')


def reaches(source: str) -> Iterator[tuple[int, str]]:
    """(line, code) of each use of something that another module or object keeps to itself."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Attribute(value=ast.Name(id='self' | 'cls')):
                continue
            case ast.Attribute(attr=name) if is_private(name):
                yield node.lineno, ast.unparse(node)
            case ast.ImportFrom(names=names):
                yield from ((node.lineno, alias.name) for alias in names if is_private(alias.name))
            case ast.Call(func=ast.Name(id='getattr') | ast.Attribute(attr='setattr')):
                constants = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
                if any(map(is_private, constants)):
                    yield node.lineno, ast.unparse(node)


def imported_modules(source: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = '.' * node.level + (node.module or '')
            found |= {f'{module}.{alias.name}' for alias in node.names}
    return found


def test_reaches_are_found():
    source = (
        'from echo_jax.store import _hidden, shards\n'
        'shards._limit = 1\n'
        'self._own = batch._replace(tokens=1)\n'
        "monkeypatch.setattr(shards, '_limit', 2)\n"
        'shards.__name__\n'
    )
    assert sorted(line for line, _ in reaches(source)) == [1, 2, 4]


def test_tests_seldom_reach_into_privates():
    """A test that does breaks when the code is mended and nothing that a user sees has changed."""
    found = [
        f'{file.relative_to(ROOT)}:{line}: {code}'
        for file in FILES
        for line, code in reaches(file.read_text())
    ]
    assert len(found) <= MOST_REACHES, '\n'.join([f'{len(found)} reaches:', *found])


def test_no_test_imports_another():
    """What two of them need is in tests/support."""
    support = ROOT / 'tests' / 'support'
    shared = {f'tests.support.{file.stem}' for file in support.glob('*.py')}
    for file in FILES:
        for name in imported_modules(file.read_text()):
            if name.startswith(('tests', '.')):
                allowed = name in shared or name.rpartition('.')[0] in shared
                assert allowed, f'{file.relative_to(ROOT)} imports {name}'


def test_no_file_is_long():
    for file in (*FILES, *(ROOT / 'echo_jax').rglob('*.py')):
        lines = file.read_text().count('\n')
        assert lines <= 400, (
            f'{file.relative_to(ROOT)} has {lines} lines: divide it by what it is for'
        )


# Their threads wait in Python alone: for a signal of the kernel's, a clock, and an event loop.
MAY_BE_DAEMONS = {'vllm_rank.py', 'entry.py', 'trial.py'}


def test_no_daemon_thread_can_be_inside_a_library():
    """Python ends such a thread as it comes back from C++, and C++ then aborts the process."""
    rooms = ('echo_jax', 'configs', 'launch', 'experiments', 'tests')
    for file in (file for room in rooms for file in sorted((ROOT / room).rglob('*.py'))):
        for node in ast.walk(ast.parse(file.read_text())):
            match node:
                case ast.Call(func=ast.Attribute(attr='Thread'), keywords=keywords):
                    is_daemon = any(keyword.arg == 'daemon' for keyword in keywords)
                case ast.Assign(targets=[ast.Attribute(attr='daemon')]):
                    is_daemon = True
                case _:
                    continue
            assert not is_daemon or file.name in MAY_BE_DAEMONS, f'{file}:{node.lineno}'


def test_a_script_that_starts_programs_ends_them_if_it_is_ended():
    """By Ctrl-C, an exception or SIGTERM, which by itself runs no `finally`."""
    starting = re.compile(r'\bPopen\(|\bPrograms\(|\bStudy\(')
    for file in sorted((ROOT / 'experiments').rglob('*.py')):
        text = file.read_text()
        if starting.search(text) and re.search(r'^def main\(', text, re.MULTILINE):
            assert 'signal.signal(signal.SIGTERM, signal.default_int_handler)' in text, file
