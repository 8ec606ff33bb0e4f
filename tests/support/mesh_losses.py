"""The objective on eight devices against one, of random options; test_mesh.py runs it.

    mesh_losses.py COUNT

For each policy loss and then COUNT random combinations, it compares loss, gradient and metrics of a
batch whose rows and tokens are divided over a mesh with those of the whole batch on one device.
It needs float64 and eight devices, and prints each combination.
"""

import random
import sys

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from echo_jax.learner.batching import make_batch
from echo_jax.learner.losses import echo_loss
from echo_jax.learner.options import NAMES
from echo_jax.learner.policy_losses import SURROGATES
from tests.support.random_rollouts import make_rollout, small_config

NUMBERS = {'clip_low': 0.1, 'clip_high': 0.15, 'dual_clip': 1.1, 'dppo_tv': 0.03, 'kl_coef': 0.1}
BODIES = ['AAARROOSAAROO', 'AAWFFSAOAAAOOAA', 'AAAAROOORSAAA', 'AASAAROOAAOOO', 'AAA', 'OA', 'OOO']


def draw_batch(config):
    rollouts = [
        make_rollout('P' + roles, float(i % 2), i // 3, i % 3, first_token=1 + 17 * i)
        for i, roles in enumerate(BODIES)
    ]
    return make_batch(rollouts, config)


def compare(options):
    config = small_config(groups=4, group_size=2, seq_len=32, micro_rows=8, **options)
    batch, rng = draw_batch(config), np.random.default_rng(0)
    logprobs = -rng.uniform(0.1, 3, batch.tokens.shape)
    old, frozen, sampler = logprobs + 0.2 * rng.normal(size=(3, *batch.tokens.shape))
    arrays = (logprobs, old, frozen, batch._replace(rollout_logprobs=sampler))

    @jax.jit
    def loss_and_gradient(logprobs, old, frozen, batch):
        def loss(logprobs):
            extra = {'old_logprobs': old, 'reference_logprobs': frozen}
            return echo_loss(logprobs, batch, config, 0.3, **extra)

        return jax.value_and_grad(loss, has_aux=True)(logprobs)

    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ('rows', 'tokens'))
    divided = NamedSharding(mesh, PartitionSpec('rows', 'tokens'))
    alone = loss_and_gradient(*jax.device_put(arrays, jax.devices()[0]))
    found = loss_and_gradient(*jax.device_put(arrays, divided))
    assert np.abs(alone[1]).max() > 1e-3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-11, 1e-12), found, alone)


def main(count):
    assert len(jax.devices()) == 8
    draw = random.Random(0)
    for i in range(len(SURROGATES) + count):
        options = {key: draw.choice(names) for key, names in NAMES.items()}
        options |= NUMBERS | {'mismatch_cap': draw.choice([1.05, 1.3])}
        if i < len(SURROGATES):  # the ratio is not 1
            options |= {'policy': list(SURROGATES)[i], 'old_logprobs': 'recomputed'}
        if options['old_logprobs'] == 'rollout':
            options['mismatch'] = 'none'
        print(options, flush=True)
        compare(options)


if __name__ == '__main__':
    main(int(sys.argv[1]))
