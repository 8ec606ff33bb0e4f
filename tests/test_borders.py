"""Who may import whom (docs/design.md#rooms), by the source and by what a fresh process loads."""

import ast
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator, Mapping

import pytest

ROOT = pathlib.Path(__file__).parents[1]
# What each room may import, besides itself. The programs stand above all of them.
ROOMS = {
    'types': set(),
    'model': {'types'},
    'store': {'types'},
    'sandbox': {'store', 'types'},
    'policy': {'store', 'types'},
    'tasks': {'store', 'types'},
    'agent': {'sandbox', 'policy', 'tasks', 'store', 'types'},
    'learner': {'model', 'types'},
    'planner': {'learner', 'model', 'types'},
    'run': {'agent', 'sandbox', 'policy', 'tasks', 'store', 'learner', 'model', 'types'},
    'viewer': {'run', 'learner', 'store', 'types'},
}
EXCEPTIONS = {('echo_jax.policy.jax', 'model')}  # the embedded policy samples from the model
PROGRAMS = {
    'echo_jax.train',
    'echo_jax.worker',
    'echo_jax.evaluate',
    'echo_jax.score',
    'echo_jax.plan',
    'echo_jax.export',
    'echo_jax.view',
    'echo_jax.status',
    'echo_jax.tasks.__main__',
    'echo_jax.tasks.generate.__main__',
}
JAX = {'jax', 'jaxlib', 'flax', 'optax', 'orbax'}
ROOMS_WITH_JAX = {'learner', 'model', 'planner'}
MODULES_WITH_JAX = {
    'echo_jax.policy.jax',
    'echo_jax.run.checks',
    'echo_jax.run.env_term',
    'echo_jax.run.evaluated_jax',
    'echo_jax.run.learning',
    'echo_jax.run.exporting',
    'echo_jax.run.heldout',
    'echo_jax.run.scoring',
    'echo_jax.run.redraw',
    'echo_jax.run.ahead',
    'echo_jax.run.pace',
    'echo_jax.run.arrivals',
    'echo_jax.run.sources',
    'echo_jax.run.warm_start',
}
# What may be imported inside a function: it is optional, or takes long to load for few.
LATE = {
    'configs',
    'docker',
    'grain',
    'harbor',
    'matplotlib',
    'prometheus_client',
    'plotly',
    'tensorboardX',
    'torch',
    'vllm',
    'wandb',
    'echo_jax.model.flash',
    'echo_jax.policy.vllm',
    'echo_jax.run.evaluated_jax',
    'echo_jax.run.evaluated_vllm',
    'echo_jax.sandbox.docker',
    'echo_jax.sandbox.harbor',
    'echo_jax.tasks.parquet',
}


def find_modules() -> Iterator[tuple[str, pathlib.Path]]:
    """(dotted name, file) of every module of the package."""
    for file in sorted((ROOT / 'echo_jax').rglob('*.py')):
        parts = file.relative_to(ROOT).with_suffix('').parts
        yield '.'.join(parts[:-1] if parts[-1] == '__init__' else parts), file


SOURCES = dict(find_modules())


def imports(name: str, source: str, only_late: bool = False) -> Iterator[str]:
    """Dotted names that a module imports; with `only_late`, those inside its functions alone."""
    is_package = name in SOURCES and SOURCES[name].stem == '__init__'
    package = name if is_package else name.rpartition('.')[0]
    tree = ast.parse(source)
    nodes = list(ast.walk(tree))
    if only_late:
        functions = [n for n in nodes if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
        nodes = [node for function in functions for node in ast.walk(function)]
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split('.')[: -node.level + 1 or None] if node.level else []
            base = '.'.join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f'{base}.{alias.name}'
                yield inner if inner in SOURCES else base


GRAPH = {name: set(imports(name, file.read_text())) for name, file in SOURCES.items()}


def room(name: str) -> str:
    """'agent' of 'echo_jax.agent.episode'; '' of a program and of the package itself."""
    if name in PROGRAMS:
        return ''
    return name.removeprefix('echo_jax').lstrip('.').partition('.')[0]


def imported_programs(graph: Mapping[str, set[str]]) -> list[tuple[str, str]]:
    return [(name, other) for name in graph for other in graph[name] if other in PROGRAMS]


def forbidden(graph: Mapping[str, set[str]]) -> list[tuple[str, str]]:
    """Imports that run upward, or into a room beside one's own."""
    found = []
    for name, others in graph.items():
        here = room(name)
        for other in others:
            there = room(other)
            if not here or not other.startswith('echo_jax.') or there == here:
                continue
            if there not in ROOMS[here] and (name, there) not in EXCEPTIONS:
                found.append((name, other))
    return found


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """The first circle of imports that is met from each module."""
    found, finished = [], set()

    def visit(name: str, path: list[str]) -> None:
        if name in path:
            found.append([*path[path.index(name) :], name])
        elif name not in finished and name in graph:
            for other in sorted(graph[name]):
                visit(other, [*path, name])
            finished.add(name)

    for name in sorted(graph):
        visit(name, [])
    return found


def test_the_graph_is_read():
    assert 'echo_jax.learner.step' in GRAPH['echo_jax.train']
    assert 'echo_jax.run.entry' in GRAPH['echo_jax.train']  # from echo_jax.run import entry
    assert 'jax' in GRAPH['echo_jax.policy.jax'] and GRAPH.keys() >= PROGRAMS
    assert list(imports('echo_jax.learner.step', 'from .. import train')) == ['echo_jax.train']
    assert list(imports('echo_jax.learner', 'from . import step')) == ['echo_jax.learner.step']
    assert list(imports('echo_jax.train', 'def f():\n import jax.numpy')) == ['jax.numpy']
    assert list(imports('x', 'import a\ndef f():\n import b', only_late=True)) == ['b']


def test_every_module_is_in_a_room_or_a_program():
    assert {room(name) for name in SOURCES} == {'', *ROOMS}
    at_the_top = {name for name in SOURCES if name.count('.') == 1 and name not in PROGRAMS}
    assert {name.partition('.')[2] for name in at_the_top} == set(ROOMS)


def test_no_program_is_imported():
    assert imported_programs(GRAPH) == []
    for folder in ('tests', 'launch', 'experiments', 'configs'):
        for file in sorted((ROOT / folder).rglob('*.py')):
            here = {str(file.relative_to(ROOT)): set(imports('', file.read_text()))}
            assert imported_programs(here) == []


def test_imports_point_down():
    assert forbidden(GRAPH) == []
    planners = {name for name in GRAPH if any(room(o) == 'planner' for o in GRAPH[name])}
    assert {name for name in planners if room(name) != 'planner'} == {'echo_jax.plan'}
    viewers = {name for name in GRAPH if any(room(o) == 'viewer' for o in GRAPH[name])}
    assert {name for name in viewers if room(name) != 'viewer'} == {'echo_jax.view'}


def test_no_imports_in_a_circle():
    assert circles(GRAPH) == []


def test_imports_inside_functions_are_of_what_is_optional_or_slow():
    late = [
        (name, other)
        for name, file in SOURCES.items()
        for other in imports(name, file.read_text(), only_late=True)
    ]
    assert len(late) > 5
    assert [
        (name, other)
        for name, other in late
        if not any(other == known or other.startswith(f'{known}.') for known in LATE)
    ] == []


@pytest.mark.parametrize(
    'check, name, other',
    [
        (imported_programs, 'echo_jax.evaluate', 'echo_jax.worker'),
        (imported_programs, 'echo_jax.run.sources', 'echo_jax.train'),
        (forbidden, 'echo_jax.sandbox.shell', 'echo_jax.agent.episode'),  # upward
        (forbidden, 'echo_jax.agent.episode', 'echo_jax.learner.batching'),  # beside
        (forbidden, 'echo_jax.policy.vllm', 'echo_jax.model.qwen3'),
        (forbidden, 'echo_jax.run.sources', 'echo_jax.planner.hlo'),
        (forbidden, 'echo_jax.run.report', 'echo_jax.viewer.text'),
        (circles, 'echo_jax.tasks.harbor', 'echo_jax.tasks.parquet'),
    ],
)
def test_each_check_finds_what_it_is_for(check, name, other):
    assert check(GRAPH | {name: GRAPH[name] | {other}}) != []


def needs_no_jax(name: str) -> bool:
    if name in PROGRAMS:
        without = 'worker', 'view', 'status', 'tasks.__main__'
        return name in {f'echo_jax.{program}' for program in without}
    return room(name) not in ROOMS_WITH_JAX and name not in MODULES_WITH_JAX


@pytest.mark.parametrize('program', ['worker', 'status'])
def test_a_program_without_jax_can_import_what_it_needs(program):
    """In a process where `import jax` fails, as it does where only vLLM is installed."""
    names = [name for name in SOURCES if needs_no_jax(name) and name not in PROGRAMS]
    assert {'echo_jax.agent.episode', 'echo_jax.run.rollout_worker', 'echo_jax.types'} < {*names}
    script = (
        'import importlib, sys\n'
        f'sys.modules.update(dict.fromkeys({sorted(JAX)}))\n'
        f'for name in {names}: importlib.import_module(name)\n'
        f'importlib.import_module("echo_jax.{program}")\n'  # the program too
        f'print(sorted(n for n in {sorted(JAX)} if sys.modules[n] is not None))\n'
    )
    done = subprocess.run(
        [sys.executable, '-c', script],
        env=os.environ | {'PYTHONPATH': str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == '[]'
