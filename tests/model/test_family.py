"""A second family goes all the way through its table alone, and the table of Qwen3 by hand.

The family is tests/support/toy_family.py's: no module of echo_jax knows it.
"""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from echo_jax.model import safetensors
from echo_jax.model.family import count_params, published_arrays
from echo_jax.model.qwen3 import Qwen3Config
from echo_jax.planner.estimate import model_flops
from echo_jax.policy.vllm_rank import Share, our_slices, read_published, share
from tests.support.qwen3_learner import VOCAB, published
from tests.support.toy_family import SIZES, ToyConfig

ROOT = pathlib.Path(__file__).parents[2]
TOY = ToyConfig(**SIZES)


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """{mesh axis: (model directory, what the program found)}, with that axis over two devices."""
    folders = {axis: tmp_path_factory.mktemp(axis) for axis in ('fsdp', 'tensor')}
    flags = '--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0'
    environment = {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': flags, 'PYTHONPATH': str(ROOT)}
    script = ROOT / 'tests/support/toy_family.py'
    for axis, folder in folders.items():
        subprocess.run(
            [sys.executable, script, folder, json.dumps({axis: 2})],
            env=os.environ | environment,
            check=True,
            timeout=280,
        )
    return {
        axis: (folder / 'model', dict(np.load(folder / 'found.npz')))
        for axis, folder in folders.items()
    }


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_step_of_a_second_family(runs):
    """It starts at random, learns, is written and read, and is the same on either mesh."""
    found, other = runs['fsdp'][1], runs['tensor'][1]
    assert found['target_tokens'] == 24 and found['loss'] > 0.1 and found['grad_norm'] > 0.1
    for name in ('loss', 'grad_norm', 'entropy', 'env_ce'):
        np.testing.assert_allclose(found[name], other[name], rtol=1e-4)


@pytest.mark.slow
def test_muon_takes_the_matrices_of_the_table(runs):
    """One is not stacked over layers. No bias, norm or table of words or places is among them."""
    layers = [f'layers/{name}' for name in ('down', 'key', 'out', 'query', 'up', 'value')]
    assert runs['fsdp'][1]['muon'].tolist() == ['exit', *layers]


@pytest.mark.slow
def test_the_directory_is_that_of_the_table(runs):
    model, found = runs['fsdp']
    config = json.loads((model / 'config.json').read_text())
    assert config['model_type'] == 'toy' and config['architectures'] == ['ToyForCausalLM']
    assert config['width'] == 16 and config['n_places'] == 32
    tensors = safetensors.open_tensors(model)
    assert len(tensors) == 2 + 3 * 10 + 1
    np.testing.assert_array_equal(tensors['h.2.attn.q.weight'][...], found['layers/query'][2])
    np.testing.assert_array_equal(tensors['h.1.attn.o.weight'][...], found['layers/out'][1].T)
    np.testing.assert_array_equal(tensors['h.0.attn.q.bias'][...], found['layers/query_bias'][0])
    np.testing.assert_array_equal(tensors['exit.weight'][...], found['exit'].T)


@pytest.mark.slow
def test_ranks_load_their_parts_of_a_second_family(runs):
    """What two ranks of vLLM read from the published arrays, against the directory's tensors."""
    model, found = runs['fsdp']
    tensors = safetensors.open_tensors(model)
    said = read_published(json.loads(json.dumps(published_arrays(TOY))))
    assert said['words'].split.padded  # so that vLLM must be asked how it is split
    shares = {
        name: [share(a.split, r, 2) for r in (0, 1)] for name, a in said.items() if name != 'words'
    }
    # 4 heads of 8, 2 key-value heads of 8, an inner axis of 24.
    assert shares['layers/query'] == [Share(1, 0, 16, 32), Share(1, 16, 32, 32)]
    assert shares['layers/query_bias'] == [Share(0, 0, 16, 32), Share(0, 16, 32, 32)]
    assert shares['layers/value'] == [Share(1, 0, 8, 16), Share(1, 8, 16, 16)]
    assert shares['layers/out'] == [Share(1, 0, 16, 32), Share(1, 16, 32, 32)]
    assert shares['layers/down'] == [Share(0, 0, 12, 24), Share(0, 12, 24, 24)]
    whole = {name for name, parts in shares.items() if parts == [None, None]}
    assert whole == {'places', 'layers/norm', 'layers/norm_bias', 'exit'}
    for name in shares.keys() - whole:
        for part in shares[name]:
            ours = found[name][our_slices(said[name], part)][1]  # the second layer's
            theirs = tensors[said[name].name.format(1)][...]
            expected = np.take(theirs, range(part.start, part.stop), part.axis)
            np.testing.assert_array_equal(ours.T if said[name].transposed else ours, expected)


def test_counts_of_a_second_family():
    """A layer's matrices 2 x 16 x 32, 2 x 16 x 16 and 2 x 16 x 24, the exit 16 x 16, words 64 x 16.

    Beside these 8,192 that multiply, a layer's vectors are 2 x 16, 32 and 24, and places 32 x 16.
    """
    assert count_params(TOY) == (8192 + 3 * 88 + 512, 8192)
    # Attention, forward: 2 x 2 x 5 x 5 x 8 a head, half of it seen; 4 heads, 3 layers, 2 rows.
    attention = 3 * (2 * 2 * 5 * 5 * 8) / 2 * 4 * 3 * 2
    assert model_flops(TOY, rows=2, seq_len=5) == 6 * 8192 * 10 + attention


@pytest.mark.parametrize('tied', [True, False])
@pytest.mark.parametrize('kv_heads', [1, 2])
def test_what_is_published_of_a_qwen3(kv_heads, tied):
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        head_dim=32,
        tie_word_embeddings=tied,
    )
    assert published_arrays(config) == published(kv_heads, tied)


def test_what_a_rank_does_not_understand():
    arrays = published(kv_heads=2, tied=True)
    for wrong in (
        {'embedding': 'model.embed_tokens.weight'},  # as versions before these said it
        arrays | {'embedding': arrays['embedding'] | {'permuted': True}},
        arrays | {'embedding': {'name': 'model.embed_tokens.weight', 'split': None}},
    ):
        with pytest.raises(ValueError, match='the published array embedding is described by'):
            read_published(wrong)
