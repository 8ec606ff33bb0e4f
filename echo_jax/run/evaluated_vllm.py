"""Opens a model to be evaluated in a vLLM engine, in the rollout environment. No JAX."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator

import ml_collections
import numpy as np

from echo_jax.agent.collect import collect
from echo_jax.policy.vllm import VllmPolicy
from echo_jax.run.evaluated import Opened, Place
from echo_jax.run.rollout_worker import engine_settings
from echo_jax.run.workdir import Workdir
from echo_jax.store.weights import WeightStore
from echo_jax.types import Batch


@contextlib.asynccontextmanager
async def open_model(place: Place, config: ml_collections.ConfigDict) -> AsyncGenerator[Opened]:
    """The directory that `place` names, or the newest weights of a run whose workers have vLLM.

    Raises ValueError if the run's weights are not for an engine, PolicyError if vLLM refuses them.
    """
    settings = engine_settings(config)
    settings['max_model_len'] += 1  # a whole rollout is scored as a prompt, with one token after it
    if place.run is None:
        policy = await VllmPolicy.start(place.name, None, **settings)
    else:
        _check_published(place.run, place)
        model, url = place.run.served_model(), place.run.url('weights')
        policy = await VllmPolicy.start(model, url, **settings)
        await policy.load(place.version)
    loop = asyncio.get_running_loop()

    def score(batch: Batch) -> np.ndarray:
        return asyncio.run_coroutine_threadsafe(policy.score(batch), loop).result()

    try:
        yield Opened(policy, collect, score)
    finally:
        await policy.close()


def _check_published(run: Workdir, place: Place) -> None:
    """Raises ValueError unless an engine can load the version of the run."""
    about = {} if place.is_saved else WeightStore(run.url('weights')).about(place.version)
    if 'probe' not in about:
        raise ValueError(
            f'{run.url()}: an engine loads the newest weights of a run with '
            "policy.backend='vllm'; for others write a directory with echo_jax.export, and give it "
            'as --model'
        )
