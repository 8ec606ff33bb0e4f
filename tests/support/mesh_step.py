"""Loss and gradients of one batch on some mesh, in a process of its own; test_mesh.py runs it.

    mesh_step.py OUTPUT.npz '{"fsdp": 4, "tensor": 2}' [DTYPE] [LOSS]

LOSS has keys of `loss`, as JSON. OUTPUT gets every gradient under its flat name, the sum and the
count of every metric, and `held`, the largest share of a layer's matrix that one device holds. With
several processes, process 0 writes it.
"""

import json
import sys

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils

from echo_jax.learner import distributed, sharding
from echo_jax.learner.batching import make_batch
from echo_jax.learner.step import ShardedModel, init_state, make_step
from echo_jax.model import partition
from echo_jax.model.params import flatten
from tests.support.random_rollouts import make_rollout, small_config

SIZES = {
    'vocab_size': 64,
    'hidden_size': 16,
    'intermediate_size': 24,
    'num_hidden_layers': 2,
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
    'head_dim': 8,
    'tie_word_embeddings': False,
}
SHARDING = {
    'embed': ('fsdp', 'context'),
    'heads': 'tensor',
    'kv_heads': 'tensor',
    'mlp': 'tensor',
    'vocab': 'tensor',
}


def draw_batch(config):
    """Seven rows: of one turn and of more, one without a target token, one of padding alone."""
    bodies = [
        'AAARROOSAAROO',
        'AAWFFSAOAAAOO',
        'AAAAROOORSAAA',
        'AASAAROOAAOOO',
        'AAA',
        'AAAAS',
        'OA',
    ]
    rollouts = [
        make_rollout('PP' + roles, float(i % 2), i // 2, i % 2, first_token=1 + 7 * i)
        for i, roles in enumerate(bodies)
    ]
    return make_batch(rollouts, config)


def recipe(sizes, dtype):
    config = small_config(groups=4, group_size=2, seq_len=16, micro_rows=8, pack=False)
    config.model.update(SIZES | {'dtype': dtype})
    config.policy.temperature = 0.7
    config.mesh.update({'data': 1, 'fsdp': 1, 'context': 1, 'tensor': 1} | sizes)
    with config.unlocked():
        config.sharding = SHARDING
    return config


def draw_params(sharded, dtype):
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x, place: jax.device_put(rng.normal(0.3, 0.4, x.shape).astype(dtype), place),
        sharded.abstract,
        sharded.placed,
    )


def main(output, sizes, dtype='float32', loss='{}'):
    distributed.start()
    config = recipe(sizes, dtype)
    config.loss.update(json.loads(loss))
    # As in a step of several updates, so that the old log-probabilities go over the mesh too.
    config.batch.updates, config.loss.old_logprobs = 2, 'recomputed'
    sharded = ShardedModel.of(config)
    params = draw_params(sharded, dtype)
    optimizer = optax.trace(0.0)  # its state is the gradient
    step = make_step(sharded.graphdef, optimizer, config)

    @jax.jit
    def gradients(params, batch):
        with partition.use(sharded.layout):
            state, metrics = step(init_state(params, optimizer), batch, 0.3)
        return state.opt_state.trace, metrics

    batch = sharding.put_batch(draw_batch(config), sharded.mesh)
    batch = sharded.with_old_logprobs()(params, batch)
    grads, metrics = gradients(params, batch)
    held = max(
        x.addressable_shards[0].data.size / x.size for x in jax.tree.leaves(params) if x.ndim == 3
    )
    arrays = flatten(grads)
    for name, metric in metrics.items():
        arrays[name] = metric.sum
        if metric.count is not None:
            arrays[f'{name}/count'] = metric.count
    whole = multihost_utils.process_allgather(arrays, tiled=True)
    if jax.process_index() == 0:
        np.savez(output, held=held, **whole)


if __name__ == '__main__':
    main(sys.argv[1], json.loads(sys.argv[2]), *sys.argv[3:])
