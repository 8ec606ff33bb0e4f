"""The optimizer of a recipe: clipping by global norm, a linear warm-up, AdamW or Muon.

Muon (optax's) orthogonalises the momentum of every matrix and leaves vectors and embeddings to
AdamW. The paper's recipe is AdamW. The table of the model's family says which parameters are
matrices (model/family.py).
"""

from typing import Any

import jax
import ml_collections
import optax
from flax import nnx
from optax import contrib


def make_optimizer(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
    """The optax chain of a recipe's `optimizer`; configs/base.py says what its keys mean."""
    peak, warmup = config.learning_rate, config.warmup_steps
    first = {'zero': 0.0, 'one': peak / (warmup + 1)}
    if config.warmup_from not in first:
        raise ValueError(
            f"optimizer.warmup_from is {config.warmup_from!r}; expected 'zero' or 'one'"
        )
    rise = optax.linear_schedule(first[config.warmup_from], peak, warmup)
    if config.decay_steps:
        rest = optax.linear_schedule(peak, 0.1 * peak, config.decay_steps)
    else:
        rest = optax.constant_schedule(peak)
    schedule = optax.join_schedules([rise, rest], [warmup])
    match config.name:
        case 'adamw':
            update = optax.adamw(schedule, config.b1, config.b2, weight_decay=config.weight_decay)
        case 'muon':
            update = contrib.muon(
                schedule,
                adam_b1=config.b1,
                adam_b2=config.b2,
                weight_decay=config.weight_decay,
                adam_weight_decay=config.weight_decay,
                consistent_rms=0.2,  # updates as large as AdamW's: one rate serves both parts
                muon_weight_dimension_numbers=_matrices,
            )
        case _:
            raise ValueError(f"optimizer.name is {config.name!r}; expected 'adamw' or 'muon'")
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), update)


def _matrices(params: optax.Params) -> Any:
    """`params`, a tree of nnx.Variables, with the numbers of a matrix's two axes for its array.

    It holds None for all that Muon is to leave to AdamW.
    """

    def dimensions(param: nnx.Variable) -> nnx.Variable:
        if param.get_metadata()['kind'] != 'matrix':
            return param.replace(None)
        # The last two axes. One before them is that of the layers, whose matrices are taken apart.
        ndim = param.get_value().ndim
        return param.replace(contrib.MuonDimensionNumbers(ndim - 2, ndim - 1))

    return jax.tree.map(dimensions, params, is_leaf=lambda x: isinstance(x, nnx.Variable))
