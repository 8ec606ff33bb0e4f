"""export as a process, on the small run: what transformers and a next run make of its output."""

import json
import shutil

import numpy as np
import pytest

from configs.tiny import get_config
from echo_jax.learner.checkpoint import CheckpointError
from echo_jax.model import safetensors
from echo_jax.model.huggingface import SHARD_BYTES, read_config
from echo_jax.run.checks import check_config
from echo_jax.run.exporting import export_run
from echo_jax.run.workdir import Workdir
from echo_jax.store.weights import WeightStore
from tests.support.small_run import NO_WARM_START, SETTINGS

STEPS = SETTINGS['num_steps']
VOCABULARY = SETTINGS['model']['vocab_size']


def tensors(path):
    return {name: tensor[...] for name, tensor in safetensors.open_tensors(path).items()}


@pytest.fixture(scope='module')
def exported(programs, finished, tmp_path_factory):
    output = tmp_path_factory.mktemp('exported') / 'new' / 'model'
    done = programs.run('export', f'--workdir={finished}', f'--output={output}')
    assert (done.returncode, done.stderr) == (0, '')
    assert f'step {STEPS} of {finished}' in done.stdout
    return output


def score(programs, output, tokens, *flags):
    np.save(output.with_suffix('.tokens.npy'), tokens)
    files = f'--tokens={output.with_suffix(".tokens.npy")}', f'--output={output}'
    done = programs.run('score', *files, *flags)
    assert (done.returncode, done.stderr) == (0, ''), done.stderr
    return np.load(output)


def test_transformers_loads_it_with_its_tokenizer(programs, finished, exported, tmp_path):
    torch = pytest.importorskip('torch', reason='the reference is PyTorch')
    transformers = pytest.importorskip('transformers')
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    text = '<|im_start|>user\nLook in x.txt.<|im_end|>\n<|im_start|>assistant\n'
    ids = tokenizer(text, return_tensors='pt').input_ids
    assert tokenizer.decode(ids[0]) == text and tokenizer.chat_template
    model = transformers.AutoModelForCausalLM.from_pretrained(exported)
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids('<|im_end|>')
    with torch.no_grad():
        logits = torch.log_softmax(model(ids).logits / 0.8, -1)
    theirs = logits[0, :-1].gather(-1, ids[0, 1:, None])[:, 0].numpy()
    for source in (f'--model={exported}', f'--workdir={finished}'):
        ours = score(programs, tmp_path / 'out.npy', ids.numpy(), source, '--temperature=0.8')
        np.testing.assert_allclose(ours[0], np.r_[0, theirs], rtol=0, atol=2e-5)


def test_a_step_in_other_files(finished, exported, tmp_path):
    assert export_run(Workdir.open(finished), 4, tmp_path / 'm', 'bfloat16', 20_000) == 4
    assert len(list((tmp_path / 'm').glob('*.safetensors'))) > 2
    assert json.loads((tmp_path / 'm' / 'config.json').read_text())['dtype'] == 'bfloat16'
    earlier, later = tensors(tmp_path / 'm'), tensors(exported)
    assert earlier.keys() == later.keys()
    apart = [
        np.abs(earlier[name].astype(np.float32) - later[name]).max() / np.abs(later[name]).max()
        for name in earlier
    ]
    # Two steps of at most 2e-4 a value, and bfloat16's rounding.
    assert min(apart) > 0 and max(apart) < 0.02


def test_the_next_run_starts_from_it(programs, exported, tmp_path):
    """At step 0 it publishes the very parameters that it was given."""
    flags = [f'--config.model.path={exported}', '--config.num_steps=1', *NO_WARM_START]
    programs.train(tmp_path / 'run', *flags, without=['warm_start'])
    assert not (tmp_path / 'run' / 'tokenizer').exists()
    published = WeightStore(tmp_path / 'run' / 'weights').read(0)
    given = tensors(exported)
    np.testing.assert_array_equal(published['embedding'], given['model.embed_tokens.weight'])
    for layer in range(2):
        np.testing.assert_array_equal(
            published['layers/w_down'][layer].T, given[f'model.layers.{layer}.mlp.down_proj.weight']
        )
    assert export_run(Workdir.open(tmp_path / 'run'), None, tmp_path / 'm', '', SHARD_BYTES) == 1
    assert read_config(tmp_path / 'm') == read_config(exported)
    file = 'generation_config.json'
    assert (tmp_path / 'm' / file).read_text() == (exported / file).read_text()


def test_models_that_no_run_starts_from(programs, exported, tmp_path):
    def refused(folder, says, **sizes):
        config = get_config()
        config.update(SETTINGS)
        config.model.update(path=str(folder), **sizes)
        with pytest.raises(ValueError) as error:
            check_config(config)
        assert says in str(error.value)

    refused(exported, f'model.head_dim is 8 but 16 in {exported}/config.json', head_dim=8)
    refused(tmp_path, f'{tmp_path}/config.json is missing')
    model = shutil.copytree(exported, tmp_path / 'model')
    (model / 'tokenizer.json').unlink()
    refused(model, f'{model} has no tokenizer.json')
    larger = json.loads((exported / 'tokenizer.json').read_text())
    added = {'id': VOCABULARY, 'content': '<|more|>', 'special': True, 'single_word': False}
    larger['added_tokens'].append(added | dict(lstrip=False, rstrip=False, normalized=False))
    (model / 'tokenizer.json').write_text(json.dumps(larger))
    refused(model, f'it has an id {VOCABULARY}, the embedding {VOCABULARY} rows')
    flags = programs.train_flags(tmp_path / 'run', f'--config.model.path={model}')
    assert f'it has an id {VOCABULARY}' in programs.fails('train', *flags)
    assert not (tmp_path / 'run').exists()  # it is still any config's


def test_runs_that_are_not_exported(programs, finished, exported, tmp_path):
    output = tmp_path / 'out'
    with pytest.raises(ValueError, match='is there already'):
        export_run(Workdir.open(finished), None, exported, '', SHARD_BYTES)
    with pytest.raises(CheckpointError, match=r'has no step 5, only \[4, 6\]'):
        export_run(Workdir.open(finished), 5, output, '', SHARD_BYTES)
    run = shutil.copytree(finished, tmp_path / 'run')
    shutil.rmtree(run / 'checkpoints' / 'train')
    with pytest.raises(ValueError, match=r'no checkpoint is saved in .*; run echo_jax.train'):
        export_run(Workdir.open(run), None, output, '', SHARD_BYTES)
    line = programs.fails('export', f'--workdir={tmp_path}', f'--output={output}')
    assert f'{tmp_path} holds no run' in line and not output.exists()
