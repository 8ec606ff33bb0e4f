"""What runs inside vLLM's worker processes: reads a rank's part of published weights, loads it.

vLLM mixes `WeightLoader` into its worker class; `vllm.py` calls its methods by collective_rpc. What
each array is, the published version says itself, in the `arrays` of its `about` record. This module
decides nothing: whether a load took is for the probe to say. Its imports of torch and vLLM are in
functions, since `vllm.py` is imported where they are not installed.
"""

import concurrent.futures
import os
import select
import threading
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from echo_jax.store.versions import WeightReader
from echo_jax.store.weights import WeightStore

READING = 'reading'


class Split(NamedTuple):
    """How tensor parallelism splits a Hugging Face tensor."""

    axis: int
    length: int  # of that axis
    units: int  # what the axis consists of, none of which is cut: heads, or single numbers
    padded: bool  # whether vLLM rounds the length up before it splits, as that of a vocabulary


class Published(NamedTuple):
    """What a version says of one of its arrays; model/family.py's `published_arrays` writes it."""

    name: str  # Hugging Face's, with {} for the number of the layer
    stacked: bool  # over the layers, on a first axis of its own
    transposed: bool  # the last two axes are the other way round in the Hugging Face tensor
    split: Split | None


class Share(NamedTuple):
    """The part of a Hugging Face tensor that a rank holds: `start` to `stop` of `length`."""

    axis: int
    start: int
    stop: int
    length: int


def read_published(arrays: Mapping[str, dict]) -> dict[str, Published]:
    """The `arrays` of a version's `about`; raises ValueError if this code does not know their form.

    Ignoring what is not known could load a tensor the wrong way round.
    """
    found = {}
    for ours, said in arrays.items():
        try:
            split = said['split'] and Split(**said['split'])
            found[ours] = Published(**(dict(said) | {'split': split}))
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(
                f'the published array {ours} is described by {said!r}; expected '
                f'{Published._fields} with a split that is null or {Split._fields}: publish and '
                'load with one version of echo_jax'
            ) from error
    return found


def share(split: Split | None, rank: int, size: int) -> Share | None:
    """What rank `rank` of `size` holds of a tensor; None if it is all of it.

    These are the rules of vLLM's layers: units are split evenly; if ranks outnumber them, as they
    may the key-value heads, several ranks hold the same one; a vocabulary is split after it is
    padded, so the last ranks may hold less of it.
    """
    if split is None or size == 1:
        return None
    axis, length, units, padded = split
    if padded:
        from vllm.model_executor.layers.vocab_parallel_embedding import (
            DEFAULT_VOCAB_PADDING_SIZE,
            pad_vocab_size,
        )

        rows = pad_vocab_size(length, DEFAULT_VOCAB_PADDING_SIZE) // size
        return Share(axis, min(rank * rows, length), min((rank + 1) * rows, length), length)
    parts = min(size, units)
    part = rank * parts // size
    return Share(axis, part * length // parts, (part + 1) * length // parts, length)


class WeightLoader:
    """A rank's part of a swap: `begin_fetch`, `fetch_state` until it is '', `load_fetched`."""

    # What the reader reads. It stays, and with it this rank's part in host memory, because the next
    # version is published as a small difference to this one.
    _source: tuple[str, Mapping[str, dict]] | None = None
    _fetch: concurrent.futures.Future | None = None

    def end_with(self, pid: int) -> None:
        """Ends this process when process `pid` ends.

        By themselves vLLM's processes outlive the worker that started them, and keep their GPUs.
        """
        descriptor = os.pidfd_open(pid)

        def wait() -> None:
            select.select([descriptor], [], [])
            os._exit(1)  # the engine's process follows those of its ranks

        threading.Thread(target=wait, daemon=True).start()

    def begin_fetch(self, weights_url: str, version: int, arrays: Mapping[str, dict]) -> None:
        """Reads this rank's part of a version in a thread of its own, while the engine goes on.

        `arrays` is what the version says of them: {our name: the fields of `Published`}.
        """
        if self._source != (weights_url, arrays):
            self._source = weights_url, arrays
            self._reader = self._open(weights_url, read_published(arrays))
        pool = concurrent.futures.ThreadPoolExecutor(1)
        self._fetch = pool.submit(self._reader.read, version)
        pool.shutdown(wait=False)

    def _open(self, weights_url: str, arrays: dict[str, Published]) -> WeightReader:
        size = self.parallel_config.tensor_parallel_size
        self._arrays = arrays
        self._shares = {
            ours: share(array.split, self.rank % size, size) for ours, array in arrays.items()
        }
        slices = {
            ours: our_slices(arrays[ours], part) for ours, part in self._shares.items() if part
        }
        return WeightStore(weights_url).reader(list(arrays), slices)

    def fetch_state(self) -> tuple[str, str]:
        """(READING, ''), or ('', '') once the part is here, or an error's class and its text."""
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
            finally:  # half an update must be ended too, or the next one is added to it
                reload.finalize_layerwise_reload(model, self.model_config)
            self._pack_head(model)

    def _their_tensors(self, arrays: Mapping[str, np.ndarray]) -> Iterator[tuple[str, object]]:
        """(name, tensor) of Hugging Face, layer by layer, so that vLLM buffers one at a time."""
        stacked = [name for name in arrays if self._arrays[name].stacked]
        for name in arrays:
            if name not in stacked:
                yield self._arrays[name].name, self._tensor(name, arrays[name])
        layers = len(arrays[stacked[0]]) if stacked else 0
        for layer in range(layers):
            for name in stacked:
                yield self._arrays[name].name.format(layer), self._tensor(name, arrays[name][layer])

    def _tensor(self, name: str, array: np.ndarray):
        turned = np.swapaxes(array, -1, -2) if self._arrays[name].transposed else array
        return _whole(turned, self._shares[name])

    def _pack_head(self, model) -> None:
        """Packs the head again, of which vLLM keeps a copy for its kernel on a CPU.

        A reload forgets to, if the head is tied. The log-probabilities would be those of the new
        layers under the old head.
        """
        from vllm.platforms import current_platform

        head = getattr(model, 'lm_head', None)
        if current_platform.is_cpu() and head is not None:
            head.quant_method.process_weights_after_loading(head)


def our_slices(array: Published, part: Share) -> tuple[slice, ...]:
    """The same part of our array; the axes after the last slice are whole."""
    axis = 1 - part.axis if array.transposed else part.axis
    before = axis + 1 if array.stacked else axis
    return (slice(None),) * before + (slice(part.start, part.stop),)


def _whole(array: np.ndarray, part: Share | None):
    """The torch tensor that vLLM's loaders expect: of the full shape, with this rank's part in it.

    The loaders read that part and nothing else, and memory that is never touched is never taken.
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
