"""The embedded policy as a source of groups, with a real model, store and sandboxes."""

import jax
import ml_collections
import numpy as np
import pytest

from configs import tiny
from echo_jax.agent.protocol import Protocol
from echo_jax.learner.step import ShardedModel
from echo_jax.run.entry import Stop
from echo_jax.run.sources import EmbeddedSource
from echo_jax.run.workdir import Workdir
from echo_jax.store.due import DueGroups
from echo_jax.store.kvstore import MissingError
from tests.support.small_run import SETTINGS

pytestmark = pytest.mark.slow


@pytest.fixture
def source_and_params(tmp_path, make_task, tiny_tokenizer):
    config = tiny.get_config()
    config.update(SETTINGS)
    config.max_staleness = 1
    config.model.vocab_size = len(tiny_tokenizer)
    config = ml_collections.FrozenConfigDict(config)
    model = ShardedModel.of(config, jax.devices()[:1])
    source = EmbeddedSource(
        Workdir(tmp_path / 'run', config),
        model,
        Protocol(tiny_tokenizer, config.protocol),
        {'train': [make_task()]},
        Stop(),
    )
    yield source, model.random_params()
    source.close()


def due(version: int) -> DueGroups:
    return DueGroups('train', 'train', 0, ('answer',), 2, 1.0, version)


@pytest.mark.parametrize('published, drawn', [((3, 4, 5), 4), ((3, 5), 5)])
def test_a_version_that_is_gone_is_replaced_by_the_newest(source_and_params, published, drawn):
    """A resumed run may lack the version before that of its state."""
    source, params = source_and_params
    for version in published:
        source.publish(params, version)
    source.post(due(4))
    [group] = source.wait(due(4))
    for rollout in group:
        acting = rollout.action_versions
        np.testing.assert_array_equal(acting, np.full(len(acting), drawn))
        assert len(acting)


def test_without_any_version_nothing_is_drawn(source_and_params):
    source, _ = source_and_params
    source.post(due(4))
    with pytest.raises(MissingError):
        source.wait(due(4))
