"""Models that transformers wrote, read here, and the other way; PyTorch is the reference."""

import dataclasses
import functools
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import jax
import ml_collections
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from echo_jax.learner.step import make_score
from echo_jax.model import huggingface, safetensors
from echo_jax.model import params as model_params
from echo_jax.model.qwen3 import Qwen3Config
from echo_jax.types import Batch

torch = pytest.importorskip('torch', reason='the reference is PyTorch')
transformers = pytest.importorskip('transformers')

# No two sizes are alike, so that none can stand in for another.
SIZES = dict(
    vocab_size=97,
    hidden_size=40,
    intermediate_size=56,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=8,
    rms_norm_eps=1e-5,
    max_position_embeddings=512,
)
YARN = dict(rope_type='yarn', rope_theta=1e4, factor=4.0, original_max_position_embeddings=128)
MODELS = {
    'grouped': dict(tie_word_embeddings=False),
    'tied': dict(
        tie_word_embeddings=True, rope_parameters=dict(rope_type='default', rope_theta=5e5)
    ),
    'one_kv_head': dict(num_key_value_heads=1, head_dim=16, tie_word_embeddings=True),
    'all_kv_heads': dict(num_attention_heads=3, num_key_value_heads=3, head_dim=10),
    'yarn': dict(rope_parameters=YARN),
    'bfloat16': dict(dtype='bfloat16', shard='30KB'),
}


def make(path, *, dtype='float32', shard='5GB', **sizes):
    """Saves a random model, norms at random too: a scale of 1 would hide one left out."""
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES | sizes))
    for parameter in model.parameters():
        values = (
            torch.rand_like(parameter) + 0.5
            if parameter.ndim == 1
            else torch.randn_like(parameter) * 0.2
        )
        parameter.data = values
    model.to(getattr(torch, dtype)).save_pretrained(path, max_shard_size=shard)


@pytest.fixture(scope='module')
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp('models')
    for name, sizes in MODELS.items():
        make(folder / name, **sizes)
    return folder


def load(path, **options):
    """(config, graphdef, params) on one device."""
    config = huggingface.read_config(path, **options)
    graphdef, abstract = model_params.abstract(config)
    places = jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), abstract)
    return config, graphdef, huggingface.load_params(path, abstract, places)


def draw(T=130, rows=2, seed=0):
    return np.random.default_rng(seed).integers(0, SIZES['vocab_size'], (rows, T), np.int32)


def logprobs(path, tokens, temperature=1.0, **options):
    _, graphdef, params = load(path, **options)
    zeros = np.zeros(tokens.shape, np.float32)
    batch = Batch(**dict.fromkeys(Batch._fields, zeros))._replace(
        tokens=tokens,
        positions=np.tile(np.arange(tokens.shape[1], dtype=np.int32), (len(tokens), 1)),
        segment_ids=np.ones_like(tokens),
        roles=zeros.astype(np.uint8),
    )
    score = make_score(graphdef, len(tokens), temperature)
    # Without LLVM's optimizations, which take half of the compilation.
    options = {'xla_backend_optimization_level': 0}
    return np.asarray(jax.jit(score, compiler_options=options)(params, batch))


@functools.cache
def reference(path, dtype='float32'):
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))


@torch.no_grad()
def reference_logprobs(path, tokens, temperature=1.0, dtype='float32'):
    ids = torch.tensor(tokens).long()
    logits = reference(path, dtype)(ids).logits.float() / temperature
    scores = torch.log_softmax(logits, -1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    return np.pad(scores.numpy(), [(0, 0), (1, 0)])


def tensors(path):
    return {name: tensor[...] for name, tensor in safetensors.open_tensors(path).items()}


def edit(path, **changes):
    """Changes keys of config.json; a value of None takes the key out."""
    file = path / 'config.json'
    document = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in document.items() if v is not None}))


# ------------------------------------------------------------------------------------- the numbers


@pytest.mark.slow
@pytest.mark.parametrize(
    'name, temperature', [*((name, 1.0) for name in MODELS), ('grouped', 0.6), ('yarn', 0.8)]
)
def test_logprobs_are_those_of_transformers(models, name, temperature):
    tokens = draw()
    ours = logprobs(models / name, tokens, temperature)
    theirs = reference_logprobs(models / name, tokens, temperature)
    assert ours.dtype == np.float32 and theirs.std() > 1
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5)


@pytest.mark.slow
def test_bfloat16_errs_no_more_than_transformers(models):
    tokens = draw(rows=8)
    exact = reference_logprobs(models / 'bfloat16', tokens)
    theirs = np.abs(reference_logprobs(models / 'bfloat16', tokens, dtype='bfloat16') - exact)
    ours = np.abs(logprobs(models / 'bfloat16', tokens, dtype='bfloat16') - exact)
    assert 1e-3 < ours.mean() <= theirs.mean() and ours.max() <= 1.2 * theirs.max()


@pytest.mark.slow
def test_the_old_form_of_the_config_is_the_same_model(models, tmp_path):
    for name, scaling in [('tied', None), ('yarn', {'type': 'yarn', 'factor': 4.0})]:
        path = shutil.copytree(models / name, tmp_path / name)
        rope = json.loads((path / 'config.json').read_text())['rope_parameters']
        if scaling:
            scaling['original_max_position_embeddings'] = 128
        edit(path, rope_parameters=None, rope_theta=rope['rope_theta'], rope_scaling=scaling)
        assert huggingface.read_config(path) == huggingface.read_config(models / name)
        # So transformers reads it.
        np.testing.assert_allclose(
            logprobs(path, draw()), reference_logprobs(path, draw()), rtol=0, atol=2e-5
        )


def test_fields_of_the_config(models):
    config = huggingface.read_config(models / 'yarn', dtype='bfloat16', hidden_size=40)
    assert config == Qwen3Config(**SIZES, **YARN, tie_word_embeddings=False, dtype='bfloat16')
    recipe = ml_collections.ConfigDict(dict(path=str(models / 'yarn'), dtype='bfloat16'))
    assert huggingface.recipe_config(recipe) == config
    recipe = ml_collections.ConfigDict(dict(SIZES, path='', rope_theta=7.0))
    assert huggingface.recipe_config(recipe) == Qwen3Config(**SIZES, rope_theta=7.0)


# ------------------------------------------------------------------------------------ in and out


@pytest.mark.parametrize('name', ['yarn', 'tied', 'bfloat16'])
def test_what_is_written_is_what_was_read(models, tmp_path, name):
    config, _, params = load(models / name)
    dtype = 'bfloat16' if name == 'bfloat16' else 'float32'
    # In any order: the places in the files are known before.
    arrays = reversed(model_params.flatten(params).items())
    huggingface.write_model(tmp_path / 'out', arrays, config, dtype=dtype, shard_bytes=25_000)
    assert huggingface.read_config(tmp_path / 'out') == config
    before, after = tensors(models / name), tensors(tmp_path / 'out')
    assert before.keys() == after.keys()
    for key in before:
        assert before[key].dtype == after[key].dtype == dtype
        np.testing.assert_array_equal(before[key], after[key], err_msg=key)
    files = sorted((tmp_path / 'out').glob('*.safetensors'))
    assert files[0].name == f'model-00001-of-{len(files):05d}.safetensors' and len(files) > 2
    assert all(file.stat().st_size < 25_000 + 2_000 for file in files)
    index = json.loads((tmp_path / 'out' / 'model.safetensors.index.json').read_text())
    assert index['metadata']['total_size'] == sum(array.nbytes for array in before.values())
    theirs = reference_logprobs(tmp_path / 'out', draw())
    np.testing.assert_array_equal(theirs, reference_logprobs(models / name, draw()))


def test_a_single_file_and_other_dtypes(models, tmp_path):
    config, _, params = load(models / 'tied')
    flat = model_params.flatten(params)
    huggingface.write_model(tmp_path / 'out', flat.items(), config, dtype='bfloat16')
    assert {path.name for path in (tmp_path / 'out').iterdir()} == {
        *('config.json', 'generation_config.json', 'model.safetensors')
    }
    rounded = reference(models / 'tied').state_dict()['model.embed_tokens.weight'].bfloat16()
    loaded = reference(tmp_path / 'out', 'bfloat16')
    assert torch.equal(loaded.state_dict()['model.embed_tokens.weight'], rounded)
    assert loaded.config.dtype == torch.bfloat16


@pytest.mark.slow
def test_two_hosts_read_only_their_own_parts(tmp_path):
    """Every matrix lies over four devices, two to a process."""
    make(tmp_path, vocab_size=65_536, num_attention_heads=8, num_key_value_heads=4)
    with socket.socket() as free:
        free.bind(('localhost', 0))
        address = f'localhost:{free.getsockname()[1]}'
    script = pathlib.Path(__file__).parents[1] / 'support' / 'two_hosts.py'
    environment = os.environ | {
        'JAX_PLATFORMS': 'cpu',
        'PYTHONPATH': str(script.parents[2]),
        'XLA_FLAGS': '--xla_force_host_platform_device_count=2',
    }
    processes = [
        subprocess.Popen(
            [sys.executable, script, address, str(number), tmp_path],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    for process in processes:
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        # Nearly all is embedding and head, of which half is here, and what the kernel maps around.
        assert 0.45 < float(output) < 0.75, output


# --------------------------------------------------------------------------------------- bad input


def refused(path, says, **options):
    with pytest.raises(ValueError) as error:
        load(path, **options)
    assert '\n' not in str(error.value) and str(path) in str(error.value)
    assert says in str(error.value)


@pytest.mark.parametrize(
    'changes, says',
    [
        (dict(model_type='qwen3_moe'), "model_type is 'qwen3_moe'; only 'qwen3' is supported"),
        (dict(use_sliding_window=True, sliding_window=64), 'use_sliding_window is True'),
        (dict(layer_types=['full_attention', 'sliding_attention']), "{'sliding_attention'}"),
        (dict(attention_bias=True), 'attention_bias is True'),
        (dict(hidden_act='gelu'), "hidden_act is 'gelu'"),
        (dict(quantization_config=dict(quant_method='fp8')), "{'quant_method': 'fp8'}"),
        (dict(rope_parameters=dict(rope_type='linear', factor=2.0)), "rope_type is 'linear'"),
        (dict(rope_scaling=dict(type='dynamic', factor=2.0)), "rope_type is 'dynamic'"),
        (dict(rope_parameters=YARN | dict(mscale=0.7)), "{'mscale'} of RoPE are not supported"),
        (dict(num_hidden_layers=None, hidden_size=None), 'lacks hidden_size, num_hidden_layers'),
        (dict(hidden_size=48), 'embed_tokens.weight is (97, 40) in its safetensors and (97, 48)'),
        (dict(num_hidden_layers=1), 'model.layers.1.input_layernorm.weight is (40,) in'),
        (dict(num_hidden_layers=3), 'model.layers.2.input_layernorm.weight is absent in'),
    ],
    ids=lambda value: ' '.join(value) if isinstance(value, dict) else '',
)
def test_models_that_are_not_supported(models, tmp_path, changes, says):
    path = shutil.copytree(models / 'grouped', tmp_path / 'model')
    edit(path, **changes)
    refused(path, says)


def test_a_recipe_that_contradicts_its_model(models):
    refused(models / 'tied', 'model.rope_theta is 1000000.0 but 500000.0 in', rope_theta=1e6)
    refused(models / 'tied', 'model.factor is 2.0 but 1.0 in', factor=2.0)
    refused(models / 'nowhere', 'nowhere/config.json is missing')


def test_files_that_are_damaged(models, tmp_path):
    path = shutil.copytree(models / 'bfloat16', tmp_path / 'model')
    second = sorted(path.glob('*.safetensors'))[1]
    data = second.read_bytes()
    second.write_bytes(data[:-1])
    refused(path, f'{second.name} is cut short or no safetensors file')
    second.write_bytes(data[:100])
    refused(path, f'{second.name} is cut short or no safetensors file')
    second.write_bytes(b'version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 512\n')
    refused(path, f'{second.name} is cut short or no safetensors file')
    second.write_bytes(b'')
    refused(path, f'{second.name} is cut short or no safetensors file')
    second.write_bytes(data.replace(b'"BF16"', b'"I16" ', 1))
    refused(path, 'is I16; expected one of')
    second.write_bytes(data.replace(b'.weight"', b'.weighs"', 1))
    refused(path, f'{second.name} lacks model.')
    second.write_bytes(data[:8] + b'?' + data[9:])
    refused(path, f'{second.name} is cut short or no safetensors file')
    second.unlink()
    refused(path, f'{second.name} is missing')
    (path / 'model.safetensors.index.json').write_text('{"weight_map"')
    refused(path, 'model.safetensors.index.json is damaged')
    shutil.rmtree(path)
    (path := tmp_path / 'none').mkdir()
    (path / 'config.json').write_text('{"model_type"')
    refused(path, 'config.json is damaged')
    shutil.copy(models / 'tied' / 'config.json', path)
    refused(path, 'model.safetensors is missing')


def test_arrays_that_are_not_written(models, tmp_path):
    config, _, params = load(models / 'tied')
    flat = model_params.flatten(params)
    write = functools.partial(huggingface.write_model, config=config, dtype='float32')
    with pytest.raises(ValueError, match='the parameters lack final_norm, head'):
        untied = dataclasses.replace(config, tie_word_embeddings=False)
        write(tmp_path / 'a', [(k, v) for k, v in flat.items() if k != 'final_norm'], config=untied)
    with pytest.raises(ValueError, match=r'embedding \(97, 40\) is not of Qwen3Config'):
        write(tmp_path / 'b', flat.items(), config=dataclasses.replace(config, vocab_size=96))
    assert not (tmp_path / 'a').exists() and not (tmp_path / 'b').exists()
    write(tmp_path / 'b', flat.items())  # over what the failure left
    with pytest.raises(ValueError, match='b is there already'):
        write(tmp_path / 'b', flat.items())


def test_a_tokenizer_of_another_model(models):
    class Tokenizer(dict):
        name_or_path = 'another'
        get_vocab = dict.copy

    config = huggingface.read_config(models / 'tied')
    huggingface.check_tokenizer(Tokenizer(a=0, z=96), config)
    with pytest.raises(
        ValueError, match=r"another is not this model's: it has an id 97, .* 97 rows"
    ):
        huggingface.check_tokenizer(Tokenizer(a=0, z=97), config)
