"""The package as pip installs it: what a wheel holds, that it works away from the checkout, and
that what it imports is declared. That it installs from an index is not tested here.
"""

import ast
import importlib.metadata
import os
import pathlib
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest
from packaging.requirements import Requirement

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
# What only some users need: Harbor's sandboxes, vLLM, which brings torch, and Docker's SDK, which
# brings requests and urllib3 and raises their errors.
OPTIONAL = {
    'docker',
    'harbor',
    'prometheus_client',
    'requests',
    'torch',
    'urllib3',
    'vllm',
    'wandb',
}


def sources() -> dict[str, pathlib.Path]:
    """The files of the package, by their path in a wheel."""
    found = {}
    for file in (ROOT / 'echo_jax').rglob('*'):
        if file.is_file() and '__pycache__' not in file.parts:
            found[file.relative_to(ROOT).as_posix()] = file
    return found


def is_program(file: pathlib.Path) -> bool:
    return file.suffix == '.py' and "if __name__ == '__main__':" in file.read_text()


def module_name(path: str) -> str:
    return (
        path.removesuffix('.py')
        .removesuffix('/__init__')
        .removesuffix('/__main__')
        .replace('/', '.')
    )


# By its text, since importing two programs would define the same flags twice.
PROGRAMS = sorted(module_name(path) for path, file in sources().items() if is_program(file))


@pytest.fixture(scope='module')
def wheel(tmp_path_factory) -> pathlib.Path:
    """Built from a copy, since setuptools leaves a folder `build` beside what it builds."""
    folder = tmp_path_factory.mktemp('wheel')
    for name in ('pyproject.toml', 'README.md', 'LICENSE'):
        shutil.copy(ROOT / name, folder)
    ignore = shutil.ignore_patterns('__pycache__')
    # The neighbours are there to see that they stay out.
    for name in ('echo_jax', 'configs', 'launch', 'tests'):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    pip(folder, 'wheel', '--no-build-isolation', '.')
    (built,) = folder.glob('*.whl')
    return built


@pytest.fixture(scope='module')
def installed(wheel, tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp('site-packages')
    pip(folder, 'install', f'--target={folder}', str(wheel))
    return folder


def pip(cwd: pathlib.Path, command: str, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, '-m', 'pip', command, '--quiet', '--no-deps', '--no-index', *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def run_outside(installed: pathlib.Path, *arguments: str) -> subprocess.CompletedProcess:
    """Python in a folder that is not the checkout, with the installed package first on its path."""
    environment = os.environ | {'PYTHONPATH': str(installed), 'JAX_PLATFORMS': 'cpu'}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=installed.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_wheel_holds_the_package_with_its_data_and_nothing_else(wheel):
    held = {name for name in zipfile.ZipFile(wheel).namelist() if '.dist-info/' not in name}
    expected = set(sources())
    assert {'echo_jax/py.typed', 'echo_jax/agent/chat_template.jinja'} < expected
    assert 'echo_jax/sandbox/scripts/put.sh' in expected
    assert held == expected


def test_the_modules_import_away_from_the_checkout(installed):
    names = [
        module_name(path)
        for path, file in sources().items()
        if file.suffix == '.py' and not is_program(file)
    ]
    assert len(names) > 50
    program = (
        'import importlib\n'
        f'modules = [importlib.import_module(name) for name in {names}]\n'
        f'print([m.__file__ for m in modules if not m.__file__.startswith({str(installed)!r})])\n'
    )
    done = run_outside(installed, '-c', program)
    assert (done.returncode, done.stdout) == (0, '[]\n'), done.stderr


def test_its_data_is_found_away_from_the_checkout(installed):
    """By running what reads it: a prompt is made with the template, a page of its files."""
    program = (
        'from importlib.resources import files\n'
        "template = files('echo_jax.agent').joinpath('chat_template.jinja').read_text()\n"
        "scripts = files('echo_jax.sandbox').joinpath('scripts')\n"
        'found = [s.read_text() for s in scripts.iterdir()] if scripts.is_dir() else []\n'
        'from echo_jax.viewer.assets import page_files\n'
        "page = page_files(live=True)['index.html']\n"
        "print('<|im_start|>' in template, all(found), b'view.js' in page)\n"
    )
    done = run_outside(installed, '-c', program)
    assert (done.returncode, done.stdout) == (0, 'True True True\n'), done.stderr


def test_the_learner_says_what_it_takes(installed):
    done = run_outside(installed, '-m', 'echo_jax.train', '--help')
    assert 'Data flows one way' in done.stdout and '--workdir' in done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize('program', PROGRAMS)
def test_every_program_says_what_it_takes(program, installed):
    done = run_outside(installed, '-m', program, '--help')
    assert '--' in done.stdout and 'Traceback' not in done.stderr, done.stderr


# ------------------------------------------------------------------------------- what is declared
def declared(*extras: str) -> dict[str, Requirement]:
    lines = PROJECT['dependencies'] + [
        line for extra in extras for line in PROJECT['optional-dependencies'][extra]
    ]
    return {r.name.lower().replace('_', '-'): r for r in map(Requirement, lines)}


def test_what_is_imported_is_declared():
    """Else it works by luck: as long as another package happens to bring it."""
    distributions = importlib.metadata.packages_distributions()
    imported = set()
    for file in (ROOT / 'echo_jax').rglob('*.py'):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split('.')[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add((node.module or '').split('.')[0])
    others = imported - sys.stdlib_module_names - OPTIONAL - {'echo_jax', 'configs'}
    assert {'jax', 'tensorstore', 'rich'} < others
    undeclared = {
        name
        for name in others
        if not {d.lower().replace('_', '-') for d in distributions.get(name, [])} & set(declared())
    }
    assert undeclared == set()


def test_a_worker_needs_the_learners_versions_of_what_both_use():
    lines = (ROOT / 'requirements-worker.txt').read_text().splitlines()
    workers = [Requirement(line) for line in lines if not line.startswith('#')]
    learners = declared('docker')
    shared = [r for r in workers if r.name in learners]
    assert len(shared) > 8
    assert [str(r) for r in shared] == [str(learners[r.name]) for r in shared]
    assert {r.name for r in workers} - set(learners) == {'ray'}
    assert not {'jax', 'jaxlib', 'flax'} & {r.name for r in workers}


def test_the_requirements_files_are_doors_to_the_extras():
    for extra in ('tpu', 'cuda', 'plan', 'dev'):
        text = (ROOT / f'requirements-{extra}.txt').read_text()
        lines = [line for line in text.splitlines() if not line.startswith('#')]
        assert lines == [f'-e .[{extra}]'] and extra in PROJECT['optional-dependencies']
