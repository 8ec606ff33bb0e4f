"""The keys of task.toml: which are obeyed, which only Harbor has, which are refused and how."""

import dataclasses
import warnings

import pytest

from echo_jax.tasks.harbor import load_task, read_task
from echo_jax.tasks.schema import read_toml, resolve
from echo_jax.types import Healthcheck, Task
from tests.support import habits
from tests.support.harbor_habits import HABITS
from tests.support.task_folders import write

TOML = """
schema_version = "1.4"
source = "https://example.org"
artifacts = ["/app/out", { source = "/app/log", destination = "log" }]
[task]
name = "org/hello"
keywords = ["a"]
[metadata]
difficulty = "easy"
anything = { at = "all" }
[agent]
timeout_sec = 90.5
user = 1000
[verifier]
timeout_sec = 30
user = "root"
environment_mode = "shared"
[verifier.env]
EXPECTED = "42"
[solution.env]
ANSWER = "42"
[environment]
build_timeout_sec = 45.0
docker_image = "debian:bookworm-slim"
os = "Linux"
cpus = 1.5
memory_mb = 512
storage_mb = 1024.0
gpus = 0
gpu_types = ["T4"]
network_mode = "no-network"
workdir = "/srv/work"
[environment.env]
NAME = "value"
[environment.healthcheck]
command = "test -e /ready"
interval_sec = 1
retries = 20
"""


def test_every_field_is_read(tmp_path):
    path = write(tmp_path / 'hello', TOML)
    assert read_task(path) == (
        Task(
            task_id='hello',
            path=path,
            instruction='Say  hello.',
            agent_timeout_sec=90.5,
            verifier_timeout_sec=30,
            build_timeout_sec=45.0,
            docker_image='debian:bookworm-slim',
            cpus=1.5,
            memory_mb=512,
            storage_mb=1024,
            network=False,
            workdir='/srv/work',
            env={'NAME': 'value'},
            solution_env={'ANSWER': '42'},
            verifier_env={'EXPECTED': '42'},
            agent_user=1000,
            verifier_user='root',
            healthcheck=Healthcheck('test -e /ready', interval_sec=1, retries=20),
            metadata={'difficulty': 'easy', 'anything': {'at': 'all'}},
        ),
        (),
    )


def test_what_is_not_said_is_harbors_default(tmp_path):
    path = write(tmp_path / 'bare', '')
    assert load_task(path) == Task(task_id='bare', path=path, instruction='Say  hello.')
    task = load_task(path)
    assert (task.verifier_timeout_sec, task.build_timeout_sec) == (600, 600)
    assert task.network and task.memory_mb is task.cpus is task.workdir is None


@pytest.mark.parametrize(
    ('said', 'fields'),
    [
        ('memory = "2G"', {'memory_mb': 2048}),
        ('memory = "1.5g"\nmemory_mb = 1536', {'memory_mb': 1536}),
        ('memory = "512M"\nstorage = " 1048576k "', {'memory_mb': 512, 'storage_mb': 1024}),
        ('memory_mb = "2048"\ncpus = "2"', {'memory_mb': 2048, 'cpus': 2}),
        ('memory_mb = 0\nstorage_mb = 0\ncpus = 0', {}),  # Docker's word for no limit
        ('docker_image = ""\nworkdir = ""', {}),
        ('allow_internet = true', {'network': True}),
        ('allow_internet = false', {'network': False}),
        ('allow_internet = false\nnetwork_mode = "public"', {'network': True}),
        ('allow_internet = true\nnetwork_mode = "no-network"', {'network': False}),
        ('allow_internet = false\nallowed_hosts = []', {'network': True}),
    ],
)
def test_forms_of_a_value(said, fields):
    read = read_toml(f'[environment]\n{said}')
    assert read.fields == {'network': True, **fields} and not read.needs_harbor


@pytest.mark.parametrize(
    ('toml', 'names'),
    [
        ('[verifier]\nenvironment_mode = "separate"', '[verifier] environment_mode = "separate"'),
        ('[verifier.environment]\nmemory_mb = 1', '[verifier] environment_mode = "separate"'),
        ('[[verifier.collect]]\ncommand = "x"', '[[verifier.collect]]'),
        ('[environment]\ngpus = 1', '[environment] gpus'),
        ('[environment.tpu]\ntype = "v6e"', '[environment] tpu'),
        ('[environment]\nos = "windows"', '[environment] os = "windows"'),
        ('[environment]\nskills_dir = "/s"', '[environment] skills_dir'),
        ('[[environment.mcp_servers]]\nname = "x"', '[environment] mcp_servers'),
        (
            '[environment]\nnetwork_mode = "allowlist"\nallowed_hosts = ["a.b"]',
            '[environment] network_mode = "allowlist"',
        ),
        ('[agent]\nnetwork_mode = "no-network"', '[agent] network_mode = "no-network"'),
        (
            '[environment]\nallow_internet=false\n[verifier]\nnetwork_mode = "public"',
            '[verifier] network_mode = "public"',
        ),
    ],
)
def test_what_only_harbor_has_is_named(tmp_path, toml, names):
    assert load_task(write(tmp_path / 'task', toml)).needs_harbor == (names,)


def test_what_says_nothing_needs_nothing():
    said = '[agent]\nnetwork_mode = "public"\n[environment]\nmcp_servers = []\nskills_dir = ""'
    assert read_toml(f'steps = []\n{said}').needs_harbor == ()


@pytest.mark.parametrize(
    ('file', 'names'),
    [
        ('environment/docker-compose.yaml', 'environment/docker-compose.yaml'),
        ('tests/data/.harborignore', '.harborignore in tests/'),
        ('trajectory.json', 'trajectory.json'),
    ],
)
def test_files_that_only_harbor_reads_are_named(tmp_path, file, names):
    path = write(tmp_path / 'task', '')
    (path / file).parent.mkdir(parents=True, exist_ok=True)
    (path / file).touch()
    assert load_task(path).needs_harbor == (names,)


def test_a_task_of_steps_is_read_and_named(tmp_path):
    for habit in HABITS:
        if habit.needs:
            task = load_task(habits.write(habit, tmp_path))
            assert habit.needs in task.needs_harbor
    assert load_task(tmp_path / 'steps').instruction == 'Make one.'
    # The tests of a separate verifier may be in its image alone.
    (tmp_path / 'separate-verifier' / 'tests' / 'test.sh').unlink()
    load_task(tmp_path / 'separate-verifier')


def test_names_that_harbor_reads_past_are_told(tmp_path):
    toml = """
    verison = "1.0"
    schema_version = "1.10"
    [agents]
    x = 1
    [environment]
    memroy_mb = 5
    memory = 2048
    [environment.healthcheck]
    command = "true"
    interval = 3
    [metadata]
    mine = 1
    """
    assert sorted(read_task(write(tmp_path / 'task', toml)).ignored) == [
        '[environment.healthcheck] interval',
        '[environment] memory = 2048 (no text)',
        '[environment] memroy_mb',
        'agents',
        'verison',
        'what is new in schema_version = "1.10"',
    ]


@pytest.mark.parametrize(
    ('toml', 'message'),
    [
        ('[agent', 'is not TOML'),
        ('\ufeff[agent]', 'is not TOML'),
        ('agent = 3', 'agent = 3, expected a table'),
        ('version = 1.0', 'version = 1.0, expected a text'),
        ('[agent]\ntimeout_sec = "soon"', "timeout_sec = 'soon', expected a finite number above 0"),
        ('[agent]\ntimeout_sec = true', 'timeout_sec = True, expected a finite number above 0'),
        ('[verifier]\ntimeout_sec = inf', 'timeout_sec = inf, expected a finite number above 0'),
        ('[verifier]\ntimeout_sec = nan', 'timeout_sec = nan, expected a finite number above 0'),
        ('[agent]\nuser = true', '[agent] user = True, expected a name or a number'),
        ('[environment]\nmemory_mb = 1.5', 'memory_mb = 1.5, expected a whole number, 0 or more'),
        ('[environment]\nmemory_mb = true', 'memory_mb = True, expected a whole number'),
        ('[environment]\nmemory = "2GB"', "memory = '2GB', expected such as '2G'"),
        ('[environment]\nmemory = "G"', "memory = 'G', expected such as '2G'"),
        ('[environment]\nmemory = "2G"\nmemory_mb = 5', 'memory_mb = 5 are not the same'),
        ('[environment]\ncpus = -1', 'cpus = -1, expected a finite number, 0 or more'),
        ('[environment]\nallow_internet = "no"', "allow_internet = 'no', expected true or false"),
        ('[environment]\nnetwork_mode = "none"', "'none', expected one of public, no-network"),
        ('[environment]\nallowed_hosts = ["a.b"]', '[environment] allowed_hosts is for'),
        ('[agent]\nallowed_hosts = ["a.b"]', '[agent] allowed_hosts is for network_mode'),
        ('[environment]\nworkdir = "app"', "workdir = 'app', expected an absolute path"),
        ('[environment]\nos = "macos"', "os = 'macos', expected linux or windows"),
        ('[environment]\nenv = {A = 1}', "env = {'A': 1}, expected a table of texts"),
        ('[verifier]\nenv = {"a-b" = "1"}', 'expected a table of texts, by names of variables'),
        ('[environment.healthcheck]\nretries = 2', 'healthcheck] has no command'),
        ('[verifier]\nenvironment_mode = "own"', "'own', expected shared or separate"),
        ('[verifier]\nenvironment_mode = "shared"\nenvironment = {}', 'contradict each other'),
        ('steps = [1]', 'steps begins with 1, expected [[steps]] with a name'),
        ('[solution.env]\nA = "${ECHO_JAX_UNSET}"', 'needs the variable ECHO_JAX_UNSET'),
    ],
)
def test_a_wrong_value_is_one_clear_line(tmp_path, toml, message):
    path = write(tmp_path / 'bad', toml)
    with pytest.raises(ValueError) as error:
        load_task(path)
    assert message in str(error.value) and str(path / 'task.toml') in str(error.value)
    assert '\n' not in str(error.value)


def test_templates_are_filled_in_as_by_harbor(monkeypatch):
    monkeypatch.setenv('ECHO_JAX_SET', 'here')
    monkeypatch.setenv('ECHO_JAX_EMPTY', '')
    monkeypatch.delenv('ECHO_JAX_UNSET', raising=False)
    values = {
        '${ECHO_JAX_SET}': 'here',
        '${ECHO_JAX_SET:-other}': 'here',
        '${ECHO_JAX_EMPTY:-other}': '',
        '${ECHO_JAX_UNSET:-other}': 'other',
        '${ECHO_JAX_UNSET:-}': '',
        '${ECHO_JAX_UNSET:-a}b}': 'a}b',  # to the last brace
        'pre-${ECHO_JAX_SET}': 'pre-${ECHO_JAX_SET}',
        '$ECHO_JAX_SET': '$ECHO_JAX_SET',
    }
    assert resolve({str(i): said for i, said in enumerate(values)}) == {
        str(i): value for i, value in enumerate(values.values())
    }
    harbor = pytest.importorskip('harbor.utils.env', reason='Harbor is not installed')
    for said, value in values.items():
        assert harbor.resolve_env_vars({'A': said}) == {'A': value}


def test_harbor_reads_the_same(tmp_path):
    """Every habit, and the file above, by Harbor's own models."""
    harbor = pytest.importorskip('harbor.models.task.task', reason='Harbor is not installed')
    paths = [habits.write(habit, tmp_path) for habit in HABITS]
    paths.append(write(tmp_path / 'all', TOML))
    for path in paths:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of old names
            theirs = harbor.Task(path).config
        ours, environment = load_task(path), theirs.environment
        health = environment.healthcheck
        assert dataclasses.replace(ours, needs_harbor=()) == Task(
            task_id=path.name,
            path=path,
            instruction=ours.instruction,
            agent_timeout_sec=theirs.agent.timeout_sec or 600,
            verifier_timeout_sec=theirs.verifier.timeout_sec,
            build_timeout_sec=environment.build_timeout_sec,
            docker_image=environment.docker_image,
            cpus=environment.cpus,
            memory_mb=environment.memory_mb,
            storage_mb=environment.storage_mb,
            network=environment.network_mode.value != 'no-network',
            workdir=environment.workdir,
            env=resolve(environment.env),
            solution_env=theirs.solution.env,
            verifier_env=theirs.verifier.env,
            agent_user=theirs.agent.user,
            verifier_user=theirs.verifier.user,
            healthcheck=health and Healthcheck(**health.model_dump()),
            metadata=theirs.metadata,
        )


@pytest.mark.parametrize(
    ('written', 'read'),
    [
        ('<!-- a canary GUID 1 -->\n# Canary: 2\n\nDo it.\n', 'Do it.'),
        ('\ufeffDo it.\r\nNow.\r\n', 'Do it.\nNow.'),
        ('Do it.\n# canary\n', 'Do it.\n# canary'),  # marks stand at the beginning alone
        ('# A title\nDo it.', '# A title\nDo it.'),
    ],
)
def test_an_instruction_is_shown_without_marks(tmp_path, written, read):
    path = write(tmp_path / 'task')
    (path / 'instruction.md').write_bytes(written.encode())
    assert load_task(path).instruction == read
    harbor = pytest.importorskip('harbor.models.task.task', reason='Harbor is not installed')
    assert harbor.Task(path).instruction.strip('\ufeff\n') == read
