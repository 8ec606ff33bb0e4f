"""The recipes under configs/: keys, values, variants, and the page that describes them."""

import importlib
import os
import pathlib
import re
import subprocess
import sys

import pytest

from configs import base, machine
from docs import make_configuration
from echo_jax.model import huggingface
from echo_jax.model.family import count_params
from echo_jax.run.inert import check_inert, flat
from echo_jax.run.workdir import Workdir
from echo_jax.tasks.generate import FAMILIES
from tests.support.small_run import ROOT

LARGE = sorted(path.stem for path in ROOT.glob('configs/qwen3_*.py'))
ALL = ['tiny', 'machine', *LARGE]
# Parameters of the public models, a tied table counted once.
PARAMETERS = {
    'qwen3_0p6b': 596_049_920,
    'qwen3_1p7b': 1_720_574_976,
    'qwen3_4b': 4_022_468_096,
    'qwen3_8b': 8_190_735_360,
    'qwen3_14b': 14_768_307_200,
    'qwen3_32b': 32_762_123_264,
}


def get_config(name: str, *variant: str):
    return importlib.import_module(f'configs.{name}').get_config(*variant)


def test_every_size_has_a_recipe():
    assert set(LARGE) == set(PARAMETERS)
    assert set(ALL) == set(make_configuration.RECIPES)


@pytest.mark.parametrize('name', ALL)
def test_a_recipe(name):
    config, defaults = get_config(name), flat(base.get_config())
    values = flat(config)
    assert values.keys() <= defaults.keys()
    # Only an axis of the sharding's table may be left out.
    assert {key.partition('.')[0] for key in defaults.keys() - values.keys()} <= {'sharding'}
    assert config.batch.groups * config.group_size % config.batch.micro_rows == 0
    assert config.batch.seq_len >= config.protocol.max_total_tokens
    check_inert(config)
    check_inert(get_config(name, 'grpo'))


@pytest.mark.parametrize('name', LARGE)
def test_the_models_are_the_public_ones(name):
    assert count_params(huggingface.recipe_config(get_config(name).model))[0] == PARAMETERS[name]


@pytest.mark.parametrize('name', ALL)
def test_a_recipe_says_only_what_differs_from_the_defaults(name):
    source = (ROOT / 'configs' / f'{name}.py').read_text()
    values, defaults = flat(get_config(name)), flat(base.get_config())
    said = [key for key in re.findall(r'^    c\.([\w.]+) = ', source, re.M) if key in defaults]
    assert [key for key in said if values[key] == defaults[key]] == []


@pytest.mark.parametrize('name', ALL)
def test_grpo_differs_in_the_environment_term_alone(name):
    echo, grpo = flat(get_config(name)), flat(get_config(name, 'grpo'))
    assert {key for key in echo if echo[key] != grpo[key]} == {'loss.env_coef'}
    weight = 0.3 if name == 'machine' else 0.05
    assert (echo['loss.env_coef'], grpo['loss.env_coef']) == (weight, 0.0)
    with pytest.raises(ValueError, match=r"variants .*'echo'.*'grpo'.*, not 'nope'"):
        get_config(name, 'nope')


@pytest.mark.parametrize('variant', machine.VARIANTS)
def test_variants_of_the_machine(variant):
    values, echo = flat(get_config('machine', variant)), flat(get_config('machine'))
    differ = {key: values[key] for key in values if values[key] != echo[key]}
    assert differ == machine.VARIANTS[variant]
    check_inert(get_config('machine', variant))


def test_families_are_generated_ones():
    assert base.get_config().tasks.families == tuple(FAMILIES)


def test_sizes_differ_in_the_model_and_rows_alone():
    reference = flat(get_config('qwen3_8b'))
    for name in LARGE:
        values = flat(get_config(name))
        differ = {key for key in values if values[key] != reference[key]}
        assert {key.partition('.')[0] for key in differ - {'batch.micro_rows'}} <= {'model'}


def test_a_recipe_cannot_misspell_a_key():
    config = base.get_config()
    with pytest.raises(AttributeError, match='clip_hihg'):
        config.loss.clip_hihg = 0.28
    with pytest.raises(TypeError):
        config.loss.clip_high = 'wide'


def test_a_recipe_without_sizes_takes_those_of_its_model(tmp_path):
    large = huggingface.recipe_config(get_config('qwen3_0p6b').model)
    huggingface.write_config(tmp_path / 'model', large)
    config = base.get_config()
    config.model.path = str(tmp_path / 'model')
    assert huggingface.recipe_config(config.model) == large
    config.model.hidden_size = 512
    with pytest.raises(ValueError, match=r'model\.hidden_size is 512 but 1024 in'):
        huggingface.recipe_config(config.model)


def test_a_run_from_before_a_key_existed_names_it(tmp_path):
    old = base.get_config()
    with old.unlocked():
        del old.sandbox.runtime
    Workdir(tmp_path / 'run', old)
    with pytest.raises(ValueError, match=r"sandbox\.runtime is 'absent' there, None here"):
        Workdir(tmp_path / 'run', base.get_config())


@pytest.mark.parametrize('name', ['tiny', 'qwen3_4b'])
def test_a_recipe_is_found_from_another_folder(name, tmp_path):
    program = (
        'from ml_collections import config_flags\n'
        'from echo_jax.run import entry\n'
        'config = config_flags.DEFINE_config_file("config")\n'
        'entry.run(lambda _: print(config.value.num_steps))'
    )
    (tmp_path / 'installed').mkdir()
    (tmp_path / 'installed' / 'echo_jax').symlink_to(ROOT / 'echo_jax')
    flags = [f'--config={ROOT}/configs/{name}.py:grpo', '--config.num_steps=7']
    done = subprocess.run(
        [sys.executable, '-c', program, *flags],
        cwd=tmp_path,
        env=os.environ | {'PYTHONPATH': str(tmp_path / 'installed')},  # without configs
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (0, '7\n'), done.stderr


# ---------------------------------------------------------------------------- docs/configuration.md


def test_every_key_is_described():
    said, defaults = make_configuration.comments(), flat(base.get_config())
    copied = {key for key in defaults if key.startswith('warm_start.optimizer.')}
    assert defaults.keys() - copied <= said.keys()
    assert all(text.endswith('.') for text in said.values())
    # A key that a comment names exists.
    named = re.findall(r'`([a-z_]+\.[a-z_.]+)', ' '.join(said.values()))
    sections = {key.rpartition('.')[0] for key in defaults}
    assert len(named) > 15 and [key for key in named if key not in {*defaults, *sections}] == []


def test_the_page_is_fresh():
    page = pathlib.Path(make_configuration.PAGE).read_text()
    assert page == make_configuration.page(), 'run `python -m docs.make_configuration`'
