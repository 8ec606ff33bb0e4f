"""What a worker says if vLLM is not installed, as in the learner's environment."""

import asyncio
import importlib.util

import pytest

from echo_jax.policy import PolicyError
from echo_jax.policy.vllm import VllmPolicy


@pytest.mark.skipif(bool(importlib.util.find_spec('vllm')), reason='vLLM is installed here')
def test_a_missing_vllm_is_one_line_that_says_what_to_install(tmp_path, monkeypatch):
    for name in ('HF_HUB_OFFLINE', 'TRANSFORMERS_OFFLINE'):
        monkeypatch.delenv(name, raising=False)
    work = VllmPolicy.start(tmp_path, '', dtype='float32', max_model_len=8, max_num_seqs=1)
    with pytest.raises(PolicyError, match=r'^vLLM cannot be imported .* `make rollout`.*$'):
        asyncio.run(work)
