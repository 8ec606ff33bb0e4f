"""The launch scripts: what they would run in a cloud, and what they do run on this machine.

No test needs a cloud or a GPU.
"""

import ast
import contextlib
import importlib.util
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib

import jax
import jax.numpy as jnp
import ml_collections
import pytest
from packaging.requirements import Requirement

from configs import tiny
from echo_jax.learner.batching import padding
from echo_jax.model import flash
from echo_jax.planner import topology
from tests.support.small_run import SETTINGS, config_flags, wait_for

ROOT = pathlib.Path(__file__).parents[1]
LAUNCH = ROOT / 'launch'
IMAGES = LAUNCH / 'images'
SCRIPTS = [
    ROOT / '.ci' / 'run',
    *(file for folder in ('launch', 'echo_jax') for file in sorted((ROOT / folder).rglob('*.sh'))),
]

_spec = importlib.util.spec_from_file_location('replay', ROOT / 'tests/golden/launch/replay.py')
replay = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(replay)


# ------------------------------------------------------------------------- what would be run
@pytest.mark.parametrize('file', replay.TRANSCRIPTS, ids=lambda file: file.stem)
def test_transcripts(file):
    assert replay.replay(file.read_text()) == file.read_text()


def test_shellcheck():
    shellcheck = shutil.which('shellcheck', path=pathlib.Path(sys.executable).parent)
    assert shellcheck, 'run: pip install -r requirements-dev.txt'
    assert len(SCRIPTS) > 5
    command = [shellcheck, '--external-sources', *SCRIPTS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, '')


@pytest.mark.slow
def test_the_commands_are_gclouds(tmp_path):
    """Google Cloud's CLI parses every command of the transcripts, which takes no network."""
    if not shutil.which('gcloud'):
        pytest.skip("Google Cloud's CLI is not installed")
    text = (replay.HERE / 'tpu_pod.txt').read_text()
    commands = {line for line in text.splitlines() if line.startswith('gcloud ')}
    listed = [{'command_string': command} for command in sorted(commands)]
    (tmp_path / 'commands.json').write_text(json.dumps(listed))
    done = subprocess.run(
        ['gcloud', 'meta', 'lint-gcloud-commands', f'--commands-file={tmp_path}/commands.json'],
        env=os.environ | {'CLOUDSDK_CONFIG': str(tmp_path), 'CLOUDSDK_CORE_DISABLE_PROMPTS': '1'},
        capture_output=True,
        text=True,
        timeout=120,
    )
    if 'Invalid choice' in done.stderr:
        pytest.skip('this version has no `meta lint-gcloud-commands`')
    verdicts = json.loads(done.stdout)
    assert len(verdicts) == len(commands) > 10
    assert {v['command_string']: v['error_message'] for v in verdicts if not v['success']} == {}


def test_the_readme_can_be_followed():
    """Runs its commands as dry runs: every line that calls `pod` or a script of launch/."""
    lines = re.findall(r'^    (.*)$', (LAUNCH / 'README.md').read_text(), re.MULTILINE)
    calls = [x for x in lines if re.match(r'pod |launch/\S+\.sh ', x)]
    assert {shlex.split(x)[1] for x in calls} >= {'queue', 'install', 'start', 'stop', 'delete'}
    define = next(x for x in lines if x.startswith('pod() {'))
    for call in calls:
        script = f'{define}\n{call}'.replace('.sh "$1"', '.sh "$1" --dry_run')
        script = re.sub(r'(?m)^(launch/\S+\.sh \w+)', r'\1 --dry_run', script)
        assert 'exit code' not in (said := replay.run(script)), (call, said)


def first_runs() -> dict[str, ml_collections.ConfigDict]:
    """The recipes that the page starts with values of its own, by topology, '' being a GPU box."""
    runs = {}
    for line in re.findall(
        r'^    (.* start .*)$', (LAUNCH / 'README.md').read_text(), re.MULTILINE
    ):
        words = shlex.split(line)
        flags = dict(word.lstrip('-').split('=', 1) for word in words if '=' in word)
        if flags.get('config') == 'configs/tiny.py':
            config = tiny.get_config()
            keys = {k[7:]: ast.literal_eval(v) for k, v in flags.items() if k.startswith('config.')}
            config.update_from_flattened_dict(keys)
            runs[flags.get('topology', '')] = config
    return runs


def test_the_first_runs_fit_what_they_are_started_on():
    pytest.importorskip('libtpu')
    runs = first_runs()
    assert {*runs} == {'v5e:2x2', ''}
    config = runs.pop('v5e:2x2')
    rows = config.batch.micro_rows, config.batch.seq_len
    step = topology.PlannedStep(config, topology.tpu_devices('v5e:2x2'), rows[0])
    step.score.trace(step.state.params, padding(*rows))  # the attention kernel is asked here
    config = runs['']
    rows = config.batch.micro_rows, config.batch.seq_len
    heads, dim = config.model.num_attention_heads, config.model.head_dim
    q, k = (
        jax.ShapeDtypeStruct((*rows, n, dim), jnp.float32)
        for n in (heads, config.model.num_key_value_heads)
    )
    jax.eval_shape(flash.pallas, q, k, k, jax.ShapeDtypeStruct(rows, jnp.int32), None)


# ------------------------------------------------------------------------- processes that are run
@pytest.fixture
def checkout(tmp_path):
    """A copy of what `install` sends, at `home/echo_jax`. Ends whatever a test started from it."""
    home = tmp_path / 'a home'
    for folder in ('launch', 'echo_jax', 'configs'):
        shutil.copytree(ROOT / folder, home / 'echo_jax' / folder)
    (home / 'echo_jax/.venv').symlink_to(sys.prefix)
    yield home / 'echo_jax'
    for file in (home / 'echo_jax/runs/launch').glob('*.pid'):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(file.read_text()), signal.SIGKILL)


def sh(command: str | list, cwd: pathlib.Path, **environment: str) -> tuple[int, str]:
    """Runs the command. Returns its exit code and all that it prints, without the host's name."""
    command = command if isinstance(command, str) else shlex.join(map(str, command))
    done = subprocess.run(
        ['bash', '-c', command],
        cwd=cwd,
        env=os.environ | environment,
        text=True,
        timeout=120,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    return done.returncode, re.sub(r'(?m)^\S+: (?=learner|other|worker)', '', done.stdout)


SLEEPER = """
import pathlib, signal, sys, time
def save(*_):
    time.sleep(float(sys.argv[1]))
    pathlib.Path('saved').write_text(str(len(sys.argv)))
    sys.exit('saved')
signal.signal(signal.SIGTERM, save)
print('ready', flush=True)
time.sleep(100)
"""


def start_sleeper(checkout, name, seconds):
    command = ['launch/process.sh', 'start', name, sys.executable, '-c', SLEEPER, seconds, 'a b']
    code, said = sh(command, checkout)
    log = checkout / 'runs/launch' / f'{name}.log'
    wait_for(lambda: 'ready' in log.read_text())
    return code, said, int((checkout / 'runs/launch' / f'{name}.pid').read_text())


@pytest.mark.slow
def test_a_process_is_started_once_and_stopped_gently(checkout):
    code, said, pid = start_sleeper(checkout, 'learner', 0.5)
    assert (code, said) == (0, f'learner started, pid {pid}, log runs/launch/learner.log\n')
    assert start_sleeper(checkout, 'learner', 0.5) == (0, f'learner runs already, pid {pid}\n', pid)
    assert sh('launch/process.sh status learner', checkout) == (
        0,
        f'learner runs, pid {pid}: ready\n',
    )

    assert sh("launch/process.sh stop 20 'l*'", checkout) == (0, 'learner stopped\n')
    assert (checkout / 'saved').read_text() == '3'  # it was waited for
    assert sh('launch/process.sh status learner', checkout) == (0, 'learner does not run\n')
    assert sh('launch/process.sh stop 20 learner', checkout) == (0, 'learner does not run\n')
    assert start_sleeper(checkout, 'learner', 0)[2] != pid


@pytest.mark.slow
def test_a_process_that_saves_for_too_long_is_left_to_it(checkout):
    pid = start_sleeper(checkout, 'learner', 30)[2]
    code, said = sh('launch/process.sh stop 1 learner', checkout)
    assert (code, said) == (1, 'learner still runs 1 s after SIGTERM; wait with the same command\n')
    os.kill(pid, 0)


def test_a_process_that_ends_at_once_says_why(checkout):
    code, said = sh('launch/process.sh start learner bash -c "echo no such mesh >&2"', checkout)
    assert (code, said) == (1, 'learner ended at once: no such mesh\n')
    assert sh('launch/process.sh stop 1 other', checkout) == (0, 'other was never started\n')


@pytest.mark.slow
def test_the_pid_of_another_process_is_never_signalled(checkout):
    """After a crash or a reboot the number in the file may be anybody's."""
    other = start_sleeper(checkout, 'other', 0)[2]
    pid = start_sleeper(checkout, 'learner', 0)[2]
    os.kill(pid, signal.SIGKILL)
    (checkout / 'runs/launch/learner.pid').write_text(f'{other}\n')
    wait_for(lambda: 'does not' in sh('launch/process.sh status learner', checkout)[1])
    assert sh('launch/process.sh stop 5 learner', checkout) == (0, 'learner does not run\n')
    os.kill(other, 0)


def remote_line(*words: str) -> str:
    """The command line that this call of tpu_pod.sh sends to the hosts of a pod."""
    command = shlex.join(['launch/tpu_pod.sh', words[0], '--dry_run', '--zone=z', *words[1:]])
    (line,) = replay.run(command).splitlines()
    return next(w for w in shlex.split(line) if w.startswith('--command=')).split('=', 1)[1]


def test_a_host_of_a_pod_runs_what_was_typed(checkout):
    """Runs the command line of a host in this machine's shell: no quote and no $ may be lost."""
    typed = ['--config.model.path=it\'s "quoted"; $HOME `id`\\', '--config.seed=1']
    flags = ["--workdir=gs://bucket/Ann's run", '--config=configs/tiny.py:grpo']
    code, said = sh(remote_line('start', *flags, '--', *typed), checkout.parent)
    assert code == 0, said
    pid = int((checkout / 'runs/launch/learner.pid').read_text())
    process = pathlib.Path('/proc', str(pid))
    arguments = (process / 'cmdline').read_bytes().decode().split('\0')[:-1]
    assert arguments == [
        *('.venv/bin/python', '-m', 'echo_jax.train'),
        *(flags[1], flags[0], *typed),
    ]
    assert b'JAX_PLATFORMS=tpu,cpu\0' in (process / 'environ').read_bytes()
    code, said = sh(remote_line('stop', '--patience=60'), checkout.parent)
    assert (code, said) == (0, 'learner stopped\n')


@pytest.mark.slow
def test_a_box_trains_stops_and_saves(checkout, tmp_path):
    """A real training run on the CPU, started and stopped by gpu_box.sh."""
    flags = shlex.join(['--config=configs/tiny.py', '--workdir=runs/my run', '--learner_gpus=none'])
    start = f'launch/gpu_box/gpu_box.sh start {flags} -- {shlex.join(config_flags(SETTINGS))}'
    code, said = sh(start, checkout)
    assert code == 0 and 'learner started' in said, said
    assert 'learner runs already' in sh(start, checkout)[1]
    log = checkout / 'runs/launch/learner.log'
    wait_for(lambda: 'transcripts' in log.read_text())
    said = sh('launch/gpu_box/gpu_box.sh stop --patience=60', checkout)
    assert said == (0, 'learner stopped\n')
    assert log.read_text().endswith('stopped; the same command goes on from here\n')
    assert json.loads((checkout / 'runs/my run/config.json').read_text())['num_steps'] == 6


def test_install_leaves_a_running_learner_its_code(checkout):
    start_sleeper(checkout, 'learner', 0)
    shutil.copytree(ROOT / 'launch', checkout.parent / 'echo_jax.new/launch')
    before = sorted(checkout.rglob('*.py'))
    code, said = sh(
        'echo_jax.new/launch/tpu_install.sh', checkout.parent, HOME=str(checkout.parent)
    )
    assert code == 1 and said.endswith('the learner runs from ~/echo_jax; stop it first\n')
    assert sorted(checkout.rglob('*.py')) == before


# ------------------------------------------------------------------------- what is installed
def pins() -> dict[str, str]:
    lines = (IMAGES / 'constraints.txt').read_text().splitlines()
    pinned = dict(line.split('==') for line in lines if not line.startswith('#'))
    return {name.lower(): version for name, version in pinned.items()}


@pytest.mark.parametrize('extra', ['tpu', 'cuda'])
def test_pins_are_within_what_is_required(extra):
    project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
    lines = project['dependencies'] + project['optional-dependencies'][extra]
    assert len(lines) > 10
    for requirement in map(Requirement, lines):
        assert requirement.specifier.contains(pins()[requirement.name.lower()]), requirement
    assert pins()['jax'] == pins()['jaxlib'] == pins()['jax-cuda13-plugin']


@pytest.mark.parametrize('kind', ['tpu', 'cuda'])
def test_images(kind):
    text = (IMAGES / f'Dockerfile.{kind}').read_text()
    lines = re.sub(r'\\\n', ' ', re.sub(r'(?m)^#.*\n', '', text)).split('\n')
    instructions = [tuple(line.split(maxsplit=1)) for line in lines if line]
    verbs = [verb for verb, _ in instructions]

    def values(name: str) -> list[str]:
        return [value for verb, value in instructions if verb == name]

    assert re.fullmatch(r'python:3\.11\.\d+-slim-bookworm', *values('FROM'))
    assert set(verbs) <= {'FROM', 'RUN', 'WORKDIR', 'COPY', 'USER', 'ENV', 'ENTRYPOINT'}

    sources = [x for copy in values('COPY') for x in copy.split()[:-1] if not x.startswith('--')]
    assert {'echo_jax', 'configs', 'pyproject.toml', f'requirements-{kind}.txt'} < set(sources)
    for source in sources:
        tracked = subprocess.run(['git', 'ls-files', source], cwd=ROOT, capture_output=True)
        assert tracked.stdout, f'{source} is not in the repository'
    (install,) = (run for run in values('RUN') if 'pip' in run)
    assert f'--requirement requirements-{kind}.txt --constraint constraints.txt' in install
    last_run = max(i for i, verb in enumerate(verbs) if verb == 'RUN')
    assert verbs.index('USER') > last_run  # which needs root
    assert values('USER') == ['echo']
    assert 'useradd --create-home --uid 1000 echo' in values('RUN')[0]
    assert json.loads(*values('ENTRYPOINT')) == ['python', '-m', 'echo_jax.train']
