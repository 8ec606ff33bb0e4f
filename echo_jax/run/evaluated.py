"""The model that is evaluated: what `--model` names, and what samples and scores with it.

evaluated_jax.py opens it in this process, evaluated_vllm.py in an engine. No JAX here, since an
environment has either JAX or vLLM.
"""

import json
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import ml_collections
import numpy as np
import transformers

from echo_jax.policy import Policy
from echo_jax.run.workdir import Workdir, read_tokenizer
from echo_jax.store.weights import WeightStore
from echo_jax.types import Batch

# Of a recipe's model: how it is computed. The rest says what the model is.
_HOW = ('dtype', 'attention', 'remat')


class Place(NamedTuple):
    """Where a model lies."""

    name: str  # as a person named it
    run: Workdir | None  # None: `name` is a Hugging Face directory
    version: int  # the step of the run, when it was found; 0 for a directory
    is_saved: bool = False  # read it from a checkpoint, not from the published weights

    def tokenizer(self) -> transformers.PreTrainedTokenizerFast:
        return self.run.tokenizer() if self.run else read_tokenizer(self.name)

    def in_recipe(self, config: ml_collections.ConfigDict) -> ml_collections.FrozenConfigDict:
        """The recipe with this model in the place of its own, computed as the recipe says."""
        model = self.run.config.model.to_dict() if self.run else {'path': self.name}
        changed = config.to_dict()
        changed['model'] = model | {key: config.model[key] for key in _HOW}
        return ml_collections.FrozenConfigDict(changed)


class Opened(NamedTuple):
    """A model that is ready to sample."""

    policy: Policy
    collect: Callable  # draws groups with the policy: agent.collect.collect, or in waves
    score: Callable[[Batch], np.ndarray]  # float32 [R, T] at temperature 1; it blocks


def find_model(place: str, step: int | None = None) -> Place:
    """The model at `place`: a run, of `step` or its newest weights, or a Hugging Face directory.

    Raises ValueError if it is neither, or a run that has published nothing.
    """
    file = pathlib.Path(place, 'config.json')
    if '://' not in place and file.is_file() and 'model_type' in _read_json(file):
        if step is not None:
            raise ValueError(f'--step is of a run, and {place} is a model directory; leave it out')
        return Place(place, None, 0)
    if not Workdir.holds_run(place):
        raise ValueError(
            f'{place} is neither a run nor a model: it has no config.json; name the --workdir of '
            'echo_jax.train, or a Hugging Face directory'
        )
    run = Workdir.open(place)
    if step is not None:
        return Place(place, run, step, is_saved=True)
    version = WeightStore(run.url('weights')).latest()
    if version is None:
        raise ValueError(f'{place} has published no weights yet; run echo_jax.train on it first')
    return Place(place, run, version)


def _read_json(file: pathlib.Path) -> dict:
    try:
        found = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f'{file} is no JSON ({error}); copy the model or the run again') from error
    return found if isinstance(found, dict) else {}
