"""Names, ranges and clashes of `loss.*`, each by the table that the code itself has."""

import math

import pytest

from configs import base
from echo_jax.learner.options import CLASHES, NAMES, RANGES, check_clashes, check_options
from echo_jax.run.checks import check_config
from tests.support.random_rollouts import small_config

# For each row of CLASHES, by its keys: values that clash, and for each key one that mends it.
CHOICES = {
    ('policy', 'mismatch'): (
        {'policy': 'gspo', 'mismatch': 'icepop'},
        {'policy': 'cispo', 'mismatch': 'geometric'},
    ),
    ('kl', 'kl_in', 'kl_coef'): (
        {'kl': 'k1', 'kl_in': 'loss', 'kl_coef': 0.1},
        {'kl': 'k2', 'kl_in': 'reward', 'kl_coef': 0.0},
    ),
    ('advantages', 'kl_in', 'kl_coef'): (
        {'advantages': 'maxrl', 'kl_in': 'reward', 'kl_coef': 0.1},
        {'advantages': 'rloo', 'kl_in': 'loss', 'kl_coef': 0.0},
    ),
}
# Below and above what a range allows, and its ends.
ENDS = {
    'clip_low': ([-0.1, 1.1], [0.0, 1.0]),
    'clip_high': ([-0.1], [0.0, 9.0]),
    'dual_clip': ([1.0, 0.5], [1.01, 9.0]),
    'dppo_tv': ([0.0, 1.0], [0.01, 0.99]),
    'mismatch_cap': ([0.99], [1.0, 9.0]),
    'kl_coef': ([-0.1], [0.0, 9.0]),
}


def test_the_tables_are_whole():
    assert [clash.keys for clash in CLASHES] == list(CHOICES)
    assert list(RANGES) == list(ENDS)
    # Every key of `loss` that is a name is in the table.
    loss = base.get_config().loss
    assert {key for key, value in loss.items() if isinstance(value, str)} == set(NAMES)


@pytest.mark.parametrize('key', NAMES)
def test_names(key):
    for name in NAMES[key]:
        check_options(small_config(**{key: name}).loss)
    with pytest.raises(ValueError) as error:
        check_config(small_config(**{key: 'another'}))
    assert str(error.value) == f"loss.{key} is 'another'; expected one of {NAMES[key]}"


@pytest.mark.parametrize('key', RANGES)
def test_ranges(key):
    outside, inside = ENDS[key]
    for value in inside:
        check_options(small_config(**{key: value}).loss)
    for value in [*outside, math.nan]:
        with pytest.raises(ValueError, match=rf'^loss\.{key} is {value}; expected'):
            check_config(small_config(**{key: value}))


@pytest.mark.parametrize('clash', CLASHES, ids=lambda clash: '+'.join(clash.keys))
def test_what_makes_no_sense_together_is_refused_by_name(clash):
    clashing, mending = CHOICES[clash.keys]
    assert set(clashing) == set(mending) == set(clash.keys)
    # With a ratio that is not 1, or the policy loss alone would be refused.
    acting = small_config(**clashing | {'old_logprobs': 'recomputed'})
    acting.batch.epochs = 2
    with pytest.raises(ValueError) as error:
        check_config(acting)
    for key, value in clashing.items():
        assert f'loss.{key}={value!r}' in str(error.value)
    assert clash.reason in str(error.value)
    for key, value in mending.items():
        check_clashes(small_config(**clashing | {key: value}).loss)
