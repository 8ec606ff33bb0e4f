"""The two terms' gradients on a mesh of two devices, against backward passes of their own.

In a process of its own, in float64; test_mesh.py runs it. The balance is measured as in a run, with
the parameters divided and four micro-batches. The two passes see the whole batch at once, on one
device.
"""

import jax
import numpy as np
from flax import nnx

from echo_jax.learner import sharding
from echo_jax.learner.losses import finish_metrics
from echo_jax.learner.step import ShardedModel, make_loss, micro_batches
from tests.support.mesh_step import SHARDING, SIZES, draw_batch
from tests.support.random_rollouts import small_config


def recipe(env_coef):
    config = small_config(
        groups=4, group_size=2, seq_len=16, micro_rows=2, pack=False, env_coef=env_coef
    )
    config.model.update(SIZES | {'dtype': 'float64'})
    config.loss.kl_coef, config.policy.temperature = 0.1, 0.7
    config.mesh.update({'data': 1, 'fsdp': 2, 'context': 1, 'tensor': 1})
    with config.unlocked():
        config.sharding = SHARDING
    return config


def main():
    config = recipe(0.0)  # GRPO has a balance too
    sharded = ShardedModel.of(config)
    assert len(jax.devices()) == sharded.mesh.size == 2
    rng = np.random.default_rng(0)

    def draw():
        return jax.tree.map(lambda x: rng.normal(0.3, 0.4, x.shape), sharded.abstract)

    params, frozen = draw(), draw()
    batch = draw_batch(config)
    assert micro_batches(batch, config.batch.micro_rows)[1] == 4

    alone, _ = nnx.split(nnx.eval_shape(lambda: sharded.model.build(nnx.Rngs(0))))
    loss = make_loss(alone, config)

    @jax.jit
    def gradient(params, env_coef):
        grads, _ = jax.grad(loss, has_aux=True)(params, batch, env_coef, frozen)
        return grads

    def flat(env_coef):
        return np.concatenate([np.ravel(x) for x in jax.tree.leaves(gradient(params, env_coef))])

    policy = flat(0.0)
    env = flat(1.0) - policy
    norms = np.linalg.norm(policy), np.linalg.norm(env)
    expected = {
        'grad_norm_policy': norms[0],
        'grad_norm_env': norms[1],
        'grad_cosine': policy @ env / (norms[0] * norms[1]),
    }
    placed, held = (jax.device_put(tree, sharded.placed) for tree in (params, frozen))
    on_mesh = sharding.put_batch(batch, sharded.mesh)
    found = finish_metrics(sharded.balance()(placed, on_mesh, held))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert abs(value) > 1e-3, (name, value)
        np.testing.assert_allclose(found[name], value, rtol=1e-12, err_msg=name)


if __name__ == '__main__':
    main()
