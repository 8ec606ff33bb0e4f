"""The optimizer of a recipe: clipping by global norm, a linear warm-up, AdamW or Muon.

Muon (optax's) orthogonalises the momentum of every matrix and leaves vectors and embeddings to
AdamW. The paper's recipe is AdamW.
"""

import jax
import ml_collections
import optax
from optax import contrib


def make_optimizer(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
    """The optax chain of a recipe's `optimizer`.

    Reads name, learning_rate, warmup_steps, decay_steps, b1, b2, weight_decay, max_grad_norm.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
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


def _matrices(params):
    """Muon's matrices: the stacked [L, in, out] ones of the layers; L is a batch."""
    matrix = contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
    return jax.tree.map(lambda p: matrix if p.ndim == 3 else None, params)
