"""score as a process, on a random model of several devices and paddings, and its checks."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from echo_jax.learner.step import token_scores
from echo_jax.model import huggingface
from echo_jax.model import params as model_params
from echo_jax.model.qwen3 import Qwen3, Qwen3Config
from echo_jax.run.scoring import check_tokens, read_tokens, score_tokens
from echo_jax.types import Batch

CONFIG = Qwen3Config(
    vocab_size=50,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    initializer_range=0.5,
)
LENGTHS = [9, 1, 4, 9, 7]
PAD = 49


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    """The directory of a model, and its tokens: rows of LENGTHS, filled up with PAD."""
    folder = tmp_path_factory.mktemp('score')
    params = nnx.state(Qwen3(CONFIG, rngs=nnx.Rngs(0)))
    flat = model_params.flatten(params).items()
    huggingface.write_model(folder / 'model', flat, CONFIG, dtype='float32')
    tokens = np.random.default_rng(0).integers(0, 49, (5, 9), np.int32)
    tokens[0, 3] = PAD  # inside a row it is a token like any other
    for row, length in zip(tokens, LENGTHS):
        row[length:] = PAD
    np.save(folder / 'tokens.npy', tokens)
    return folder, tokens


def alone(tokens, temperature):
    """The reference: [T] of one row, by the model's logits."""
    graphdef, params = nnx.split(Qwen3(CONFIG, rngs=nnx.Rngs(0)))
    row, here = tokens[None], np.arange(len(tokens))[None]
    model = nnx.merge(graphdef, params)
    hidden = model(row, here, np.ones_like(row))[0]
    scores = jax.nn.log_softmax(hidden @ model.unembedding.T / temperature)
    return np.r_[0, np.asarray(scores)[np.arange(len(tokens) - 1), tokens[1:]]]


@pytest.mark.parametrize('devices', [1, 4])
def test_rows_of_any_length(programs, model, tmp_path, devices):
    folder, tokens = model
    output = tmp_path / 'new' / 'logprobs.npy'
    done = programs.run(
        'score',
        f'--model={folder / "model"}',
        f'--tokens={folder / "tokens.npy"}',
        f'--output={output}',
        '--temperature=0.7',
        f'--pad_id={PAD}',
        '--rows=2',  # three batches, the last of them half empty; on four devices two
        XLA_FLAGS=f'--xla_force_host_platform_device_count={devices}',
    )
    assert (done.returncode, done.stderr) == (0, '') and 'score 5/5' in done.stdout
    logprobs = np.load(output)
    assert logprobs.dtype == np.float32 and logprobs.shape == (5, 9)
    assert [path.name for path in output.parent.iterdir()] == ['logprobs.npy']
    for row, found, length in zip(tokens, logprobs, LENGTHS):
        np.testing.assert_allclose(found[:length], alone(row[:length], 0.7), rtol=0, atol=1e-5)
        assert not found[length:].any()


def test_flags_that_contradict_each_other(programs, model, tmp_path):
    folder, _ = model
    files = [f'--tokens={folder / "tokens.npy"}', f'--output={tmp_path / "out.npy"}']
    directory = f'--model={folder / "model"}'
    for flags, says in (
        ([], 'expected either --model, a directory, or --workdir, a run'),
        ([directory, '--step=1'], '--step is of a run'),
    ):
        assert says in programs.fails('score', *files, *flags)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    'array, says',
    [
        (np.zeros((2, 3), np.float32), r'is float32 \(2, 3\); expected integers \[N, T\]'),
        (np.zeros((2, 3), bool), r'is bool \(2, 3\)'),
        (np.zeros(3, np.int32), r'is int32 \(3,\)'),
        (np.zeros((0, 3), np.int32), r'is of shape \(0, 3\); expected at least one token'),
        (np.array([[1, 2], [50, 3]]), r'token 50 at \[1, 0\]; expected ids from 0 to 49'),
        (np.array([[1, 2], [3, -1]]), r'token -1 at \[1, 1\]'),
        (np.array([[None]]), r'is not a \.npy array'),
    ],
)
def test_tokens_that_are_none(tmp_path, array, says):
    np.save(file := tmp_path / 'tokens.npy', array)
    with pytest.raises(ValueError, match=says):
        check_tokens(read_tokens(file), CONFIG.vocab_size)


def test_files_that_are_no_array(tmp_path):
    file = tmp_path / 'tokens.npy'
    for write in (lambda: file.write_text('[[1]]'), lambda: file.write_bytes(b'')):
        write()
        with pytest.raises(ValueError, match=r'is not a \.npy array'):
            read_tokens(file)
    with file.open('wb') as opened:
        np.savez(opened, a=np.zeros((1, 1), int))
    with pytest.raises(ValueError, match='is an archive'):
        read_tokens(file)


def test_any_integers_and_any_padding(tmp_path):
    np.save(file := tmp_path / 'tokens.npy', np.array([[1, 2, -100], [3, -100, -100]], np.int64))
    check_tokens(tokens := read_tokens(file), 50, pad_id=-100)
    for not_at_the_end in ([[-100, 1, 2]], [[1, -100, 2]]):
        with pytest.raises(ValueError, match=r'token -100 at \[0, [01]\]'):
            check_tokens(np.array(not_at_the_end), 50, pad_id=-100)
    seen = []

    def score(batch: Batch):
        seen.append(batch)
        return np.full(batch.tokens.shape, -2.0, np.float32)

    scores = score_tokens(score, tokens, rows=3, length=4, pad_id=-100)
    np.testing.assert_array_equal(scores, [[-2, -2, 0], [-2, 0, 0]])
    np.testing.assert_array_equal(seen[0].tokens, [[1, 2, 0, 0], [3, 0, 0, 0], [0] * 4])
    np.testing.assert_array_equal(seen[0].segment_ids, [[1, 1, 0, 0], [1, 0, 0, 0], [0] * 4])
    assert seen[0].tokens.dtype == seen[0].positions.dtype == np.int32


@pytest.mark.slow
def test_scores_that_are_not_finite_are_an_error(model):
    _, tokens = model
    config = dataclasses.replace(CONFIG, tie_word_embeddings=False)
    graphdef, params = nnx.split(Qwen3(config, rngs=nnx.Rngs(0)))
    params['final_norm'][...] = params['final_norm'][...].at[0].set(np.inf)

    def score(batch):
        return token_scores(graphdef, params, batch, 1.0).logprobs

    with pytest.raises(FloatingPointError, match='rows 0 to 1 have a log-probability that is not'):
        score_tokens(score, tokens, rows=2, length=9)
