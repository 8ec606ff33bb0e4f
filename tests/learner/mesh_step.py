"""One device against meshes of four, in a process of its own; test_mesh.py runs it.

Prints a JSON line a mesh: the loss, the largest difference of an updated value from the one that a
single device computes, and the largest share of a layer's matrix that one device holds.
"""

import json

import jax
import numpy as np
from flax import nnx
from random_rollouts import make_rollout, small_config

from echo_jax.learner import sharding
from echo_jax.learner.batching import make_batch
from echo_jax.learner.optimizer import make_optimizer
from echo_jax.learner.step import init_state, make_step
from echo_jax.model.qwen3 import Qwen3, Qwen3Config

MODEL = Qwen3Config(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    dtype='float64',
    remat=True,
)
RULES = {
    'embed': 'fsdp',
    'heads': 'tensor',
    'kv_heads': 'tensor',
    'mlp': 'tensor',
    'vocab': 'tensor',
}
MESHES = [{'fsdp': 4, 'tensor': 1}, {'fsdp': 2, 'tensor': 2}]


def draw_batch(config):
    bodies = ['AAARROOSAAROO', 'AAWFFSAOAAAOO', 'AAAAROOORSAAA', 'AASAAROOAAOOO']
    rollouts = [
        make_rollout('PP' + roles, float(i % 2), i // 2, i % 2, first_token=1 + 15 * i)
        for i, roles in enumerate(bodies)
    ]
    return make_batch(rollouts, config)


def main():
    config = small_config(groups=2, group_size=4, seq_len=16, micro_rows=4, pack=False)
    config.mesh.update({'data': 1, 'context': 1})
    optimizer = make_optimizer(config.optimizer)
    graphdef, params = nnx.split(nnx.eval_shape(lambda: Qwen3(MODEL, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(0.3, 0.4, x.shape), params)
    step = make_step(graphdef, optimizer, config)
    batch = draw_batch(config)
    init = lambda p: init_state(p, optimizer)  # noqa: E731
    alone, sums = jax.jit(step)(jax.jit(init)(params), batch, 0.3)

    for sizes in MESHES:
        config.mesh.update(sizes)
        mesh = sharding.make_mesh(config)
        shapes = jax.eval_shape(init, params)
        placed = sharding.param_shardings(shapes.params, mesh, RULES)
        shardings = sharding.state_shardings(shapes, placed, mesh)
        state = jax.jit(init, out_shardings=shardings)(params)
        spread = jax.jit(
            step,
            in_shardings=(shardings, sharding.batch_sharding(mesh), None),
            out_shardings=(shardings, None),
            donate_argnums=0,
        )
        state, mesh_sums = spread(state, sharding.put_batch(batch, mesh), 0.3)
        apart = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - np.asarray(b)).max(), state, alone)
        held = [
            x.addressable_shards[0].data.size / x.size
            for x in jax.tree.leaves((state.params, state.opt_state))
            if x.ndim == 3
        ]
        line = {
            'loss': [float(sums['loss']), float(mesh_sums['loss'])],
            'grad_norm': [float(sums['grad_norm']), float(mesh_sums['grad_norm'])],
            'apart': float(max(jax.tree.leaves(apart))),
            'held': max(held),
        }
        print(json.dumps(sizes | line), flush=True)


if __name__ == '__main__':
    main()
