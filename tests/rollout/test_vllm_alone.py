"""How vLLM is started, refused and divided over ranks: tests that share no engine."""

import asyncio
import logging

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip('vllm', reason='vLLM is not installed here; `make rollout` makes .venv-rollout')


from echo_jax.policy import PolicyError
from echo_jax.policy.vllm import VllmPolicy
from echo_jax.policy.vllm_engine import check_interface
from echo_jax.policy.vllm_rank import read_published, share, silent_about, torch_tensor
from tests.support.qwen3_learner import published
from tests.support.vllm_rig import PROMPTS, Rig

pytestmark = pytest.mark.timeout(900)  # an engine starts in half a minute, on an idle machine


def test_shares_by_hand():
    """4 heads of 32 over 2 key-value heads, an inner axis of 128, 500 rows padded to 512."""
    arrays = read_published(published(kv_heads=2, tied=False))

    def of(name, rank, size):
        return share(arrays[name].split, rank, size)

    shares = [
        of('layers/wq', 1, 2),
        of('layers/wk', 1, 2),
        of('layers/wv', 1, 4),  # ranks 0 and 1 share head 0
        of('layers/wv', 2, 4),
        of('layers/wo', 1, 2),
        of('layers/w_up', 3, 4),
        of('layers/w_down', 0, 4),
        of('head', 1, 2),
    ]
    assert shares == [
        (0, 64, 128, 128),
        (0, 32, 64, 64),
        (0, 0, 32, 64),
        (0, 32, 64, 64),
        (1, 64, 128, 128),
        (0, 96, 128, 128),
        (1, 0, 32, 128),
        (0, 256, 500, 500),
    ]
    assert of('layers/attention_norm', 1, 2) is None
    assert of('final_norm', 1, 2) is None
    assert of('layers/w_up', 0, 1) is None


def test_a_model_that_vllm_refuses_is_one_line(tmp_path):
    (tmp_path / 'config.json').write_text('{"architectures": ["NoSuch"], "model_type": "nosuch"}')
    work = VllmPolicy.start(tmp_path, '', dtype='float32', max_model_len=8, max_num_seqs=1)
    with pytest.raises(PolicyError, match=f'^vLLM does not start with {tmp_path}: .+$') as refused:
        asyncio.run(work)
    assert '\n' not in str(refused.value)
    with pytest.raises(ValueError, match="dtype is 'auto'"):
        asyncio.run(VllmPolicy.start(tmp_path, '', dtype='auto', max_model_len=8, max_num_seqs=1))


def test_a_vllm_without_what_swaps_need_is_refused(monkeypatch):
    from vllm.v1.engine.async_llm import AsyncLLM

    monkeypatch.delattr(AsyncLLM, 'update_weight_version')
    with pytest.raises(PolicyError, match=r'^vLLM .* has no AsyncLLM\.update_weight_version, .*'):
        check_interface()


def test_only_layers_that_have_no_weights_fail_to_load_them_in_silence():
    from vllm.model_executor.model_loader.reload.layerwise import logger

    told, handler = [], logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage().split(':')[0])
    logger.addHandler(handler)
    for known in ({'RotaryEmbedding'}, set()):
        with silent_about(known):
            for layer in ('RotaryEmbedding', 'QKVParallelLinear'):
                logger.warning('%s: Failed to load weights', layer)
            logger.warning('and what has no arguments')
    logger.removeHandler(handler)
    other = 'and what has no arguments'
    assert told == ['QKVParallelLinear', other, 'RotaryEmbedding', 'QKVParallelLinear', other]


@pytest.mark.parametrize('dtype', [np.float32, ml_dtypes.bfloat16])
def test_arrays_of_a_store_become_tensors_without_a_warning(dtype):
    array = np.arange(6).reshape(2, 3).astype(dtype)
    array.flags.writeable = False  # as some that are read are
    tensor = torch_tensor(np.swapaxes(array, 0, 1))
    assert tensor.float().tolist() == [[0, 3], [1, 4], [2, 5]]
    assert tensor.data_ptr() == array.ctypes.data


def test_two_ranks_read_their_shares(tmp_path, monkeypatch):
    """There are fewer key-value heads than ranks, and the vocabulary is padded."""
    monkeypatch.setenv('VLLM_CPU_OMP_THREADS_BIND', 'nobind')  # more ranks than NUMA nodes
    rig = Rig(tmp_path, tied=False, kv_heads=1, tensor_parallel_size=2)
    for _ in range(2):
        rig.swap()
        for prompt, generation in zip(PROMPTS, rig.generate(PROMPTS)):
            assert rig.gap(prompt, generation) < 1e-4
    rig.run(rig.policy.close())
    rig.loop.close()
