"""Who may import whom (DESIGN 2), by the source and by what a fresh process loads."""

import ast
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
# From the bottom up; agent and learner stand side by side.
LEVELS = {'types': 0, 'model': 1, 'store': 2, 'agent': 3, 'learner': 3}
PROGRAMS = 4
JAX = {'jax', 'jaxlib', 'flax', 'optax', 'orbax'}
JAX_POLICY = 'echo_jax.policy.jax'


def modules():
    """(dotted name, file) of everything in the package."""
    for file in sorted((ROOT / 'echo_jax').rglob('*.py')):
        parts = file.relative_to(ROOT).with_suffix('').parts
        yield '.'.join(parts[:-1] if parts[-1] == '__init__' else parts), file


SOURCES = dict(modules())


def imports(name, source):
    """Dotted names that a module imports, inside functions too."""
    package = name if SOURCES[name].stem == '__init__' else name.rpartition('.')[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split('.')[: -node.level + 1 or None] if node.level else []
            base = '.'.join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f'{base}.{alias.name}'
                yield inner if inner in SOURCES else base


GRAPH = {name: set(imports(name, file.read_text())) for name, file in SOURCES.items()}


def part(name):
    """'agent' of 'echo_jax.agent.episode', and '' of the package itself."""
    return name.removeprefix('echo_jax').lstrip('.').partition('.')[0]


def level(name):
    return LEVELS.get(part(name), PROGRAMS)


def needs_no_jax(name):
    return part(name) in ('agent', 'store', 'types') and name != JAX_POLICY


def test_the_graph_is_read():
    assert 'echo_jax.learner.step' in GRAPH['echo_jax.train']
    assert 'echo_jax.worker' in GRAPH['echo_jax.train']  # from echo_jax import worker
    assert 'jax' in GRAPH[JAX_POLICY] and 'echo_jax.model.family' in GRAPH[JAX_POLICY]
    assert list(imports('echo_jax.learner.step', 'from .. import train')) == ['echo_jax.train']
    assert list(imports('echo_jax.learner', 'from . import step')) == ['echo_jax.learner.step']
    assert list(imports('echo_jax.train', 'def f():\n import jax.numpy')) == ['jax.numpy']


def test_imports_point_down():
    inside = [(name, other) for name in GRAPH for other in GRAPH[name] if other in SOURCES]
    assert len(inside) > 50
    assert [pair for pair in inside if level(pair[0]) < level(pair[1])] == []
    assert [pair for pair in inside if {*map(part, pair)} == {'agent', 'learner'}] == []


def test_agent_store_and_types_name_nothing_of_jax():
    def of_jax(other):
        return other.split('.')[0] in JAX or part(other) == 'model' or other == JAX_POLICY

    slim = [name for name in GRAPH if needs_no_jax(name)]
    assert [(name, other) for name in slim for other in GRAPH[name] if of_jax(other)] == []


def test_a_worker_without_jax_can_import_them():
    """In a process where `import jax` fails, as it does where only vLLM is installed."""
    names = [n for n in SOURCES if needs_no_jax(n) and not n.endswith('__main__')]
    assert {'echo_jax.agent.episode', 'echo_jax.sandbox.local', 'echo_jax.types'} < {*names}
    program = (
        'import importlib, sys\n'
        f'sys.modules.update(dict.fromkeys({sorted(JAX)}))\n'
        f'for name in {names}: importlib.import_module(name)\n'
        f'print(sorted(n for n in {sorted(JAX)} if sys.modules[n] is not None))\n'
    )
    done = subprocess.run(
        [sys.executable, '-c', program],
        env=os.environ | {'PYTHONPATH': str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == '[]'
