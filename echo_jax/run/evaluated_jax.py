"""Opens a model to be evaluated in this process, on the recipe's mesh."""

import contextlib
import functools
from collections.abc import AsyncGenerator

import jax
import ml_collections
from flax import nnx

from echo_jax.learner.step import ShardedModel
from echo_jax.model import params as model_params
from echo_jax.policy.jax import JaxPolicy
from echo_jax.run.evaluated import Opened, Place
from echo_jax.run.scoring import load_params
from echo_jax.run.sources import draw_in_waves
from echo_jax.store.weights import WeightStore


@contextlib.asynccontextmanager
async def open_model(place: Place, config: ml_collections.ConfigDict) -> AsyncGenerator[Opened]:
    """The model of `place.in_recipe`. Raises ValueError if its weights are not there."""
    model = ShardedModel.of(config)
    policy = JaxPolicy(
        model.model,
        model.graphdef,
        slots=config.policy.slots,
        cache_tokens=config.protocol.max_total_tokens,
    )
    params = _weights(place, model)
    await policy.load(params, place.version)
    score = functools.partial(model.score(), params)
    yield Opened(policy, draw_in_waves, score)


def _weights(place: Place, model: ShardedModel) -> nnx.State:
    """The parameters as a sampler has them."""
    if place.run and not place.is_saved:
        arrays = WeightStore(place.run.url('weights')).read(place.version)
        return jax.device_put(model_params.unflatten(model.abstract, arrays), model.placed)
    return model.serving()(load_params(model, place.run, place.version))
