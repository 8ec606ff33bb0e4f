"""The whole step lowered for TPU and for CUDA on a machine with neither."""

import jax
import numpy as np
import pytest

from echo_jax.learner.step import ShardedModel
from echo_jax.types import Batch
from tests.support.random_rollouts import small_config

DTYPES = {'roles': np.uint8, 'tokens': np.int32, 'positions': np.int32, 'segment_ids': np.int32}
# The name of the kernel's call in the lowered module.
KERNELS = {
    ('tpu', 'splash'): 'tpu_custom_call',
    ('cuda', 'pallas'): 'triton',
    ('cuda', 'cudnn'): '__cudnn$fmha',
    ('tpu', 'blocks'): None,
    ('cuda', 'blocks'): None,
}


@pytest.mark.slow
@pytest.mark.parametrize('remat', ['full', 'attention', 'offload'])
@pytest.mark.parametrize('platform, kernel', KERNELS)
def test_the_step_lowers(platform, kernel, remat):
    if remat != 'full' and kernel == 'blocks':
        pytest.skip('the blocks lower to the same module everywhere')
    config = small_config(groups=2, group_size=2, seq_len=640, micro_rows=2)
    config.model.update(
        {'hidden_size': 64, 'head_dim': 128, 'num_attention_heads': 4, 'num_key_value_heads': 2}
        | {'num_hidden_layers': 2, 'dtype': 'bfloat16', 'attention': kernel, 'remat': remat}
    )
    sharded = ShardedModel.of(config)
    step, state, _ = sharded.step(config.optimizer)
    batch = Batch(
        *(jax.ShapeDtypeStruct((4, 640), DTYPES.get(name, np.float32)) for name in Batch._fields)
    )
    try:
        traced = step.trace(state, batch, 0.05, None)
        module = traced.lower(lowering_platforms=(platform,)).as_text()
    except RuntimeError as error:
        if 'cuDNN is not detected' not in str(error):
            raise
        pytest.skip('JAX lowers for cuDNN only if cuDNN is installed')
    assert '640x640' not in module  # no scores of whole rows
    if KERNELS[platform, kernel]:
        # One call in the forward pass, and one or more in the backward pass.
        assert module.count(KERNELS[platform, kernel]) >= 2
    else:
        assert not any(call in module for call in KERNELS.values() if call)
