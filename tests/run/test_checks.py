"""Recipes that are refused before a run begins, and that they are refused for a reason."""

import dataclasses
from typing import ClassVar

import pytest

from configs import tiny
from echo_jax.model.families import FAMILIES
from echo_jax.model.huggingface import recipe_config
from echo_jax.run.checks import check_config
from echo_jax.run.workdir import read_tokenizer


@pytest.mark.parametrize(
    'values, says',
    [
        ({'group_size': 0}, 'group_size is 0; expected at least 1'),
        ({'sandbox.at_once': 0}, 'sandbox.at_once is 0; expected at least 1'),
        ({'tasks.train_count': 0}, 'tasks.train_count is 0; expected at least 1'),
        ({'tasks.heldout_count': 0}, 'tasks.heldout_count is 0; expected at least 1'),
        ({'warm_start.explorations': 0}, 'warm_start.explorations is 0; expected at least 1'),
        ({'policy.temperature': 0.0}, 'policy.temperature is 0.0; expected more than 0'),
        ({'policy.backend': 'torch'}, "policy.backend is 'torch'; expected 'jax' or 'vllm'"),
        (
            {'policy.swap': 'wait', 'policy.backend': 'vllm'},
            "policy.swap is 'wait'; expected one of ('recompute', 'keep', 'drain')",
        ),
        ({'seed': -1}, 'seed is -1; expected 0 to 2147483647'),
        ({'seed': 1 << 31}, 'seed is 2147483648; expected 0 to 2147483647'),
        ({'batch.updates': 0}, 'batch.updates is 0; expected at least 1'),
        ({'batch.updates': 3}, 'batch.updates=3 does not divide the 8 groups of a batch'),
        (
            {'batch.mini': 'rows', 'batch.updates': 2},
            "batch.mini is 'rows'; expected one of ('groups', 'rollouts')",
        ),
        ({'loss.equal_groups': 'forget'}, "loss.equal_groups is 'forget'; expected one of"),
        (
            {'loss.equal_groups': 'redraw', 'loss.redraw_limit': 0},
            'loss.redraw_limit is 0; expected at least 1',
        ),
        ({'logging.rollouts': -1}, 'logging.rollouts is -1; expected 0 or more steps'),
        ({'max_staleness': -1}, 'max_staleness is -1; expected 0 or more steps'),
        ({'max_staleness': 2}, 'max_staleness is 2; the embedded policy draws one step ahead'),
        (
            {'loss.policy': 'ppo'},
            "loss.policy is 'ppo'; expected one of ('clip', 'dual_clip', 'gspo'",
        ),
        ({'loss.dual_clip': 1.0}, 'loss.dual_clip is 1.0; expected more than 1'),
        (
            {
                'loss.policy': 'gspo',
                'loss.mismatch': 'token',
                'loss.old_logprobs': 'recomputed',
                'batch.updates': 2,
            },
            "loss.policy='gspo', loss.mismatch='token' make no sense together",
        ),
        ({'batch.seq_len': 287}, 'batch.seq_len=287 cannot hold a rollout'),
        ({'policy.slots': 7}, 'policy.slots=7 cannot hold a group of 8 rollouts'),
        ({'eval.samples': 65}, 'policy.slots=64 cannot hold a group of 65 rollouts'),
        ({'warm_start.explore_steps': 211}, 'warm_start.explore_steps=211 is not among the'),
        ({'loss.targets': 'all'}, "loss.targets is 'all'; expected one of"),
        ({'loss.max_env_tokens': -1}, 'loss.max_env_tokens is -1; expected 0 or more'),
        ({'loss.env_filter.min_clean': 1.5}, 'loss.env_filter.min_clean is 1.5; expected a share'),
        ({'loss.drop_surprising.top': -0.1}, 'loss.drop_surprising.top is -0.1; expected a share'),
        (
            {'loss.drop_surprising.top': 0.5, 'loss.drop_surprising.bottom': 0.5},
            'top=0.5 and bottom=0.5 leave no target',
        ),
        ({'loss.env_coef': -0.1}, 'loss.env_coef is -0.1; expected 0 or more'),
        ({'loss.env_schedule.name': 'cosine'}, "loss.env_schedule.name is 'cosine'; expected one"),
        ({'loss.env_schedule.name': 'steps'}, 'steps=() and coefs=(); expected as many coefs'),
        (
            {
                'loss.env_schedule.name': 'steps',
                'loss.env_schedule.steps': (5, 5),
                'loss.env_schedule.coefs': (0.1, 0.0),
            },
            'loss.env_schedule.steps=(5, 5); expected steps that rise',
        ),
        ({'loss.env_adaptive.every': -1}, 'loss.env_adaptive.every is -1; expected 0 or more'),
        (
            {'loss.env_adaptive.every': 5, 'loss.env_coef': 0.0},
            'loss.env_adaptive.every=5 adapts a loss.env_coef of 0',
        ),
        (
            {'loss.env_adaptive.every': 5, 'loss.env_adaptive.smoothing': 1.0},
            'expected a target above 0 and a smoothing of 0 or more, below 1',
        ),
        (
            {'loss.env_adaptive.every': 5, 'loss.env_adaptive.low': 0.06},
            'loss.env_adaptive.low=0.06 and high=0.1 do not hold loss.env_coef=0.05',
        ),
        (
            {'loss.env_adaptive.every': 5, 'loss.env_schedule.name': 'linear'},
            "loss.env_adaptive.every=5 and loss.env_schedule.name='linear' both move",
        ),
        (
            {'tasks.heldout': 'one,two:environment_only'},
            "tasks.heldout='one,two:environment_only' marks tasks as environment_only",
        ),
        ({'mesh.data': 2}, 'mesh data=2, fsdp=-1, context=1, tensor=1 does not fit'),
        ({'model.path': '/nowhere'}, '/nowhere/config.json is missing'),
    ],
    ids=str,
)
def test_what_the_learner_cannot_do(values, says):
    config = tiny.get_config()
    config.update_from_flattened_dict(values)
    with pytest.raises(ValueError) as error:
        check_config(config)
    assert says in str(error.value)


def test_a_tokenizer_without_a_chat_template_is_refused(tmp_path, tiny_tokenizer):
    tiny_tokenizer.save_pretrained(tmp_path)
    assert read_tokenizer(tmp_path).chat_template
    for file in (*tmp_path.glob('*.jinja'), tmp_path / 'tokenizer_config.json'):
        file.unlink()
    with pytest.raises(
        ValueError, match=r'\(model\.path\) has a tokenizer without a chat template'
    ):
        read_tokenizer(tmp_path)


def test_sizes_are_given_or_found():
    config = tiny.get_config()
    check_config(config)
    config.model.hidden_size = config.model.rope_theta = None
    with pytest.raises(ValueError, match=r'model\.hidden_size, model\.rope_theta is None'):
        check_config(config)


def test_a_recipe_chooses_the_family_and_gives_the_sizes_that_it_has(monkeypatch):
    config = tiny.get_config()
    config.model.model_type = 'qwen3'
    check_config(config)
    config.model.model_type = 'toy'
    with pytest.raises(
        ValueError, match=r"model\.model_type is 'toy'; expected one of \['qwen3'\]"
    ):
        check_config(config)

    @dataclasses.dataclass(frozen=True)
    class Family:  # a Qwen3 without RoPE has no base of it
        model_type: ClassVar[str] = 'toy'
        hidden_size: int
        dtype: str

    monkeypatch.setitem(FAMILIES, 'toy', Family)
    model = config.model.copy_and_resolve_references()
    for key in set(model) - {'path', 'model_type', 'hidden_size', 'dtype', 'rope_theta'}:
        model[key] = None
    with pytest.raises(ValueError, match=r'model\.rope_theta is given, which a toy model does not'):
        recipe_config(model)
    model.rope_theta = None
    assert recipe_config(model) == Family(hidden_size=128, dtype='float32')
    config.model = model
    config.model.hidden_size = None
    with pytest.raises(
        ValueError, match=r'^model\.hidden_size is None and there is no model\.path'
    ):
        check_config(config)
