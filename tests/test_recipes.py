"""The recipes under configs/: the same keys everywhere, the public models' sizes, two variants."""

import importlib
import json
import pathlib

import pytest

from echo_jax.model.family import count_params
from echo_jax.model.huggingface import recipe_config

RECIPES = sorted(p.stem for p in pathlib.Path(__file__).parents[1].glob('configs/qwen3_*.py'))
# Parameters of the public models, a tied table counted once.
PARAMETERS = {
    'qwen3_0p6b': 596_049_920,
    'qwen3_1p7b': 1_720_574_976,
    'qwen3_4b': 4_022_468_096,
    'qwen3_8b': 8_190_735_360,
    'qwen3_14b': 14_768_307_200,
    'qwen3_32b': 32_762_123_264,
}


def recipe(name: str, *variant: str) -> dict:
    """Its keys, flat, as 'batch.groups'."""

    def flat(tree, prefix=''):
        for key, value in tree.items():
            if isinstance(value, dict) and prefix + key != 'sharding':
                yield from flat(value, f'{prefix}{key}.')
            else:
                yield prefix + key, value

    module = importlib.import_module(f'configs.{name}')
    return dict(flat(json.loads(module.get_config(*variant).to_json())))


def test_every_size_has_a_recipe():
    assert set(RECIPES) == set(PARAMETERS)


@pytest.mark.parametrize('name', RECIPES)
def test_a_recipe(name):
    config = recipe(name)
    assert recipe('tiny').keys() <= config.keys()
    model = importlib.import_module(f'configs.{name}').get_config().model
    assert count_params(recipe_config(model))[0] == PARAMETERS[name]
    assert config['batch.groups'] * config['group_size'] % config['batch.micro_rows'] == 0
    assert config['batch.seq_len'] >= config['protocol.max_total_tokens']


@pytest.mark.parametrize('name', ['tiny', *RECIPES])
def test_grpo_differs_in_the_environment_term_alone(name):
    echo, grpo = recipe(name), recipe(name, 'grpo')
    assert {key for key in echo if echo[key] != grpo[key]} == {'loss.env_coef'}
    assert (echo['loss.env_coef'], grpo['loss.env_coef']) == (0.05, 0.0)
    with pytest.raises(ValueError, match="variants 'echo' and 'grpo', not 'nope'"):
        recipe(name, 'nope')


def test_sizes_differ_in_the_model_and_rows_alone():
    base = recipe('qwen3_8b')
    for name in RECIPES:
        differ = {key for key, value in recipe(name).items() if value != base[key]}
        assert {key.partition('.')[0] for key in differ - {'batch.micro_rows'}} <= {'model'}
