"""A traced coefficient and the balance of the two gradients on some mesh; test_mesh.py runs it.

    mesh_env_coef.py OUTPUT.npz '{"data": 2, "fsdp": 2}'

OUTPUT gets what `make_balance` measures, and of the step with each of COEFS,
`gradient/COEF/NAME` by the parameters' flat names and `metric/COEF/NAME`, the sum of each metric.
It needs float64.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from echo_jax.learner import sharding
from echo_jax.learner.losses import finish_metrics
from echo_jax.learner.step import ShardedModel
from echo_jax.model.params import flatten
from tests.support.mesh_step import draw_batch, draw_params, recipe

COEFS = (0.0, 0.25)  # whole in float32, which the traced one is


def main(output, sizes):
    config = recipe(sizes, 'float64')
    config.loss.kl_coef, config.batch.micro_rows = 0.1, 4
    config.optimizer.max_grad_norm = 1e9  # so that the first moment is the gradient, times 1 - b1
    sharded = ShardedModel.of(config)
    params = draw_params(sharded, 'float64')
    frozen = jax.tree.map(lambda x: 0.9 * x, params)
    batch = sharding.put_batch(draw_batch(config), sharded.mesh)
    arrays = finish_metrics(sharded.balance()(params, batch, frozen))
    step, _, first_state = sharded.step(config.optimizer, traced_env_coef=True)
    for coef in COEFS:
        state = first_state(jax.tree.map(jnp.copy, params))
        state, metrics = step(state, batch, jnp.float32(coef), frozen)
        gradient = optax.tree.get(state.opt_state, 'mu')
        arrays |= {
            f'gradient/{coef}/{name}': np.asarray(value) / (1 - config.optimizer.b1)
            for name, value in flatten(gradient).items()
        }
        arrays |= {f'metric/{coef}/{name}': metric.sum for name, metric in metrics.items()}
    np.savez(output, **arrays)


if __name__ == '__main__':
    main(sys.argv[1], json.loads(sys.argv[2]))
