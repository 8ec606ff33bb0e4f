"""What runs inside vLLM's worker processes: reads a rank's part of published weights, loads it.

vLLM mixes `WeightLoader` into its worker class; `vllm.py` calls its methods by collective_rpc. It
decides nothing: whether a load took is for the probe to say. Its imports of torch and vLLM are in
functions, since `echo_jax.agent` is imported where they are not installed.
"""

import concurrent.futures
import os
import select
import threading
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from echo_jax.store.weights import WeightReader, WeightStore

READING = 'reading'


class Share(NamedTuple):
    """The part of a Hugging Face tensor that a rank holds: `start` to `stop` of `length`."""

    axis: int
    start: int
    stop: int
    length: int


def share(name: str, config, rank: int, size: int) -> Share | None:
    """What rank `rank` of `size` holds of the tensor `name` of a Qwen3; None where it is all.

    As vLLM's layers split them: heads and the MLP's inner axis evenly, where ranks outnumber
    key-value heads several share one, the vocabulary after it is padded. `config` is the model's
    Hugging Face config.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import (
        DEFAULT_VOCAB_PADDING_SIZE,
        pad_vocab_size,
    )

    if size == 1:
        return None
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    kv_size, kv_rank = min(size, kv_heads), rank * min(size, kv_heads) // size
    match name.split('.')[-2]:
        case 'q_proj':
            return _even(0, heads * config.head_dim, rank, size)
        case 'k_proj' | 'v_proj':
            return _even(0, kv_heads * config.head_dim, kv_rank, kv_size)
        case 'o_proj':
            return _even(1, heads * config.head_dim, rank, size)
        case 'gate_proj' | 'up_proj':
            return _even(0, config.intermediate_size, rank, size)
        case 'down_proj':
            return _even(1, config.intermediate_size, rank, size)
        case 'embed_tokens' | 'lm_head':
            length = config.vocab_size
            rows = pad_vocab_size(length, DEFAULT_VOCAB_PADDING_SIZE) // size
            return Share(0, min(rank * rows, length), min((rank + 1) * rows, length), length)
    return None  # norms


def _even(axis: int, length: int, rank: int, size: int) -> Share:
    part = length // size
    return Share(axis, rank * part, (rank + 1) * part, length)


class WeightLoader:
    """A worker's part of a swap: `begin_fetch`, `fetch_state` until it is '', `load_fetched`."""

    # What the reader reads. It stays, and this rank's part with it in host memory, since the next
    # version is a small difference.
    _source: tuple[str, Mapping[str, str]] | None = None
    _fetch: concurrent.futures.Future | None = None

    def end_with(self, pid: int) -> None:
        """Ends this process when process `pid` ends: vLLM's outlive it, and hold their GPUs."""
        descriptor = os.pidfd_open(pid)

        def wait() -> None:
            select.select([descriptor], [], [])
            os._exit(1)  # the engine's process follows those of its ranks

        threading.Thread(target=wait, daemon=True).start()

    def begin_fetch(self, weights_url: str, version: int, tensors: Mapping[str, str]) -> None:
        """Reads this rank's part of a version in a thread of its own, while the engine goes on.

        `tensors` is {our name: Hugging Face name, with {} for the number of the layer}.
        """
        if self._source != (weights_url, tensors):
            self._source = weights_url, tensors
            self._reader = self._open(weights_url, tensors)
        pool = concurrent.futures.ThreadPoolExecutor(1)
        self._fetch = pool.submit(self._reader.read, version)
        pool.shutdown(wait=False)

    def _open(self, weights_url: str, tensors: Mapping[str, str]) -> WeightReader:
        config, size = self.model_config.hf_text_config, self.parallel_config.tensor_parallel_size
        # A tied head may be published too: vLLM takes it from the embedding.
        self._tensors = {
            ours: theirs
            for ours, theirs in tensors.items()
            if not (config.tie_word_embeddings and theirs == 'lm_head.weight')
        }
        self._shares = {
            ours: share(theirs, config, self.rank % size, size)
            for ours, theirs in self._tensors.items()
        }
        slices = {ours: _slices(ours, part) for ours, part in self._shares.items() if part}
        return WeightStore(weights_url).reader(list(self._tensors), slices)

    def fetch_state(self) -> tuple[str, str]:
        """READING, or '' once the part is here; else the error's class, and what it says."""
        if not self._fetch.done():
            return READING, ''
        error = self._fetch.exception()
        return (type(error).__name__, str(error)) if error else ('', '')

    def load_fetched(self) -> None:
        """Replaces the model's weights, in place. The engine must be idle."""
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader import reload

        arrays, model = self._fetch.result(), self.get_model()
        with set_current_vllm_config(self.vllm_config):
            reload.initialize_layerwise_reload(model)
            try:
                model.load_weights(self._their_tensors(arrays))
            finally:  # half an update must be closed too, or the next one is added to it
                reload.finalize_layerwise_reload(model, self.model_config)
            self._pack_head(model)

    def _their_tensors(self, arrays: Mapping[str, np.ndarray]) -> Iterator[tuple[str, object]]:
        """(name, tensor) of Hugging Face, layer by layer, so that vLLM buffers one at a time."""
        layers = max((len(array) for name, array in arrays.items() if '/' in name), default=0)
        for name, array in arrays.items():
            if '/' not in name:
                yield self._tensors[name], _whole(array, self._shares[name])
        for layer in range(layers):
            for name, array in arrays.items():
                if '/' in name:
                    tensor = _whole(array[layer].T, self._shares[name])
                    yield self._tensors[name].format(layer), tensor

    def _pack_head(self, model) -> None:
        """On a CPU the head has a packed copy for its kernel; a reload forgets that of a tied one.

        Without it log-probabilities are those of the new layers under the old head.
        """
        from vllm.platforms import current_platform

        head = getattr(model, 'lm_head', None)
        if current_platform.is_cpu() and head is not None:
            head.quant_method.process_weights_after_loading(head)


def _slices(name: str, part: Share) -> tuple[slice, ...]:
    """Of our array: a matrix of the layers is transposed and has the layers in front."""
    chosen = slice(part.start, part.stop)
    if '/' not in name:
        return (chosen,)
    return (slice(None), slice(None), chosen) if part.axis == 0 else (slice(None), chosen)


def _whole(array: np.ndarray, part: Share | None):
    """The torch tensor that vLLM's loaders expect: of the full shape, this rank's part filled.

    The loaders read that part and nothing else, and memory never touched is never taken.
    """
    import torch

    if array.dtype.name == 'bfloat16':  # of ml_dtypes, which torch does not know
        tensor = torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    else:
        tensor = torch.from_numpy(array)
    if part is None:
        return tensor
    shape = list(tensor.shape)
    shape[part.axis] = part.length
    whole = torch.empty(shape, dtype=tensor.dtype)
    whole.narrow(part.axis, part.start, part.stop - part.start).copy_(tensor)
    return whole
