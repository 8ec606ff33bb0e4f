"""evaluate by JAX and by vLLM: the same random model directory, the same numbers.

Needs the environment of `make rollout`.
"""

import json
import os
import pathlib

import jax
import ml_collections
import pytest

from configs.tiny import get_config
from echo_jax.learner.step import ShardedModel
from echo_jax.model import huggingface
from echo_jax.model import params as model_params
from echo_jax.run.workdir import Workdir
from tests.support.small_run import HELDOUT, ROOT, SETTINGS, config_flags

ROLLOUT_PYTHON = pathlib.Path(
    os.environ.get('ECHO_ROLLOUT_PYTHON', ROOT / '.venv-rollout/bin/python')
)
SAMPLES = 4

pytestmark = [
    pytest.mark.skipif(
        not ROLLOUT_PYTHON.exists(), reason=f'no {ROLLOUT_PYTHON}: `make rollout` makes it'
    ),
    pytest.mark.timeout(600),
]


@pytest.fixture(scope='module')
def directory(finished, tmp_path_factory):
    """A random Qwen3 with the tokenizer of the finished run."""
    config = get_config()
    config.model.update(SETTINGS['model'] | {'head_dim': 32})  # vLLM's least on a CPU
    config.mesh.fsdp = 1
    config = ml_collections.FrozenConfigDict(config)
    model = ShardedModel.of(config, jax.devices()[:1])
    folder = tmp_path_factory.mktemp('model') / 'random'
    huggingface.write_model(
        folder,
        model_params.flatten(model.random_params()).items(),
        model.model,
        Workdir.open(finished).tokenizer(),
        dtype='float32',
    )
    return folder


@pytest.fixture(scope='module')
def evaluations(programs, finished, directory, tmp_path_factory):
    """eval.json of both, and what the programs left on stderr."""
    folder, found = tmp_path_factory.mktemp('evaluations'), {}
    for policy, python in (('jax', None), ('vllm', ROLLOUT_PYTHON)):
        output = folder / f'{policy}.json'
        process = programs.start(
            'evaluate',
            '--config=configs/tiny.py',
            *config_flags(SETTINGS),
            '--config.eval.temperature=1.0',
            f'--model={directory}',
            f'--tasks={finished}/tasks/heldout',
            f'--rollouts={finished}/heldout_before',
            f'--samples={SAMPLES}',
            f'--policy={policy}',
            f'--output={output}',
            **({'python': python} if python else {}),
        )
        _, stderr = process.communicate(timeout=500)
        assert process.returncode == 0, stderr
        found[policy] = json.loads(output.read_text())
    return found


def test_environment_ce_is_equal(evaluations):
    ours, theirs = (evaluations[policy]['env_ce_fixed'] for policy in ('jax', 'vllm'))
    assert ours.keys() == theirs.keys() and len(ours) > 2
    for role, value in ours.items():
        if role != 'rollouts':
            assert theirs[role] == pytest.approx(value, abs=1e-3), role


def test_pass_at_k_overlaps(evaluations):
    ours, theirs = (evaluations[policy]['pass@k'] for policy in ('jax', 'vllm'))
    assert list(ours) == list(theirs) == ['1', '2', '4']
    for k, rate in ours.items():
        assert rate['low'] <= theirs[k]['high'] and theirs[k]['low'] <= rate['high']
    for document in evaluations.values():
        assert len(document['results']) == HELDOUT * SAMPLES and document['version'] == 0
        assert {result['status'] for result in document['results']} <= {'ok', 'truncated'}


def test_an_engine_refuses_what_it_cannot_load_in_one_line(programs, finished, tmp_path):
    flags = ['--config=configs/tiny.py', *config_flags(SETTINGS), '--policy=vllm']
    for place, message in (
        (finished, "an engine loads the newest weights of a run with policy.backend='vllm'"),
        (tmp_path, f'{tmp_path} is neither a run nor a model'),
    ):
        process = programs.start(
            'evaluate',
            *flags,
            f'--model={place}',
            f'--tasks={finished}/tasks/heldout',
            python=ROLLOUT_PYTHON,
        )
        _, stderr = process.communicate(timeout=200)
        assert process.returncode == 1 and stderr.count('\n') == 1 and message in stderr, stderr
