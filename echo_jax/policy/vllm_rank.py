"""Runs inside vLLM's worker processes: reads a rank's part of published weights and loads it.

vLLM mixes `WeightLoader` into its worker class; `vllm.py` calls its methods by collective_rpc. The
published version itself says what each array is, in the `arrays` of its `about` record. This module
does not judge whether a load took; `vllm.py` does, by the probe. It imports torch and vLLM inside
functions, because `vllm.py` can be imported without either.
"""

import concurrent.futures
import contextlib
import logging
import os
import select
import threading
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from echo_jax.store.weights import WeightStore

READING = 'reading'
RELOAD_LOG = 'vllm.model_executor.model_loader.reload.layerwise'  # vLLM's
OWNER = 'ECHO_JAX_ENGINE_OWNER'  # while an engine starts, the process that it belongs to


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
    """Reads the `arrays` of a version's `about`; raises ValueError if it does not know their form.

    To ignore what is not known could load a tensor the wrong way round.
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
    """The part of a tensor that rank `rank` of `size` holds; None if it holds all of it.

    These are the rules of vLLM's layers. Units are split evenly. If there are fewer units than
    ranks, as may happen with key-value heads, several ranks hold the same one. A vocabulary is
    split after it is padded, so the last ranks may hold less of it.
    """
    if split is None or size == 1:
        return None
    axis, length, units, padded = split
    if padded:
        from vllm.model_executor.layers import vocab_parallel_embedding as vocabulary

        rows = vocabulary.pad_vocab_size(length, vocabulary.DEFAULT_VOCAB_PADDING_SIZE) // size
        return Share(axis, min(rank * rows, length), min((rank + 1) * rows, length), length)
    parts = min(size, units)
    part = rank * parts // size
    return Share(axis, part * length // parts, (part + 1) * length // parts, length)


class WeightLoader:
    """Reads and loads one rank's part of a version.

    First comes `begin_fetch`, then `fetch_state` until it is not READING, and then `load_fetched`.
    """

    # vLLM's worker class has these, and this class is mixed into it.
    rank: int
    vllm_config: Any
    get_model: Callable[[], Any]
    # What the reader reads. It stays, and with it this rank's part in host memory, because the next
    # version is published as a small difference to this one.
    _source: tuple[str, Mapping[str, dict]] | None = None
    _fetch: concurrent.futures.Future[dict[str, np.ndarray]]

    def begin_fetch(self, weights_url: str, version: int, arrays: Mapping[str, dict]) -> None:
        """Starts to read this rank's part of a version in a thread, while the engine goes on.

        `arrays` is what the version says of its arrays: {our name: the fields of `Published`}.
        """
        if self._source != (weights_url, arrays):
            self._arrays = read_published(arrays)
            size = self.vllm_config.parallel_config.tensor_parallel_size
            self._shares = {
                ours: share(array.split, self.rank % size, size)
                for ours, array in self._arrays.items()
            }
            slices = {
                ours: our_slices(self._arrays[ours], part)
                for ours, part in self._shares.items()
                if part
            }
            self._reader = WeightStore(weights_url).reader(list(arrays), slices)
            self._source = weights_url, arrays
        pool = concurrent.futures.ThreadPoolExecutor(1)
        self._fetch = pool.submit(self._reader.read, version)
        pool.shutdown(wait=False)

    def fetch_state(self) -> tuple[str, str]:
        """(READING, ''), then ('', '') when the part is here, or an error's class and its text."""
        if not self._fetch.done():
            return READING, ''
        error = self._fetch.exception()
        return (type(error).__name__, str(error)) if error else ('', '')

    def load_fetched(self) -> None:
        """Replaces the model's weights, in place. The engine must be idle."""
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader import reload

        arrays, model = self._fetch.result(), self.get_model()
        with set_current_vllm_config(self.vllm_config), silent_about(self._not_loaded(model)):
            reload.initialize_layerwise_reload(model)
            try:
                model.load_weights(self._their_tensors(arrays))
            finally:  # half an update must be ended too, or the next one is added to it
                reload.finalize_layerwise_reload(model, self.vllm_config.model_config)
            self._pack_head(model)

    def _not_loaded(self, model) -> set[str]:
        """The classes of the layers that no published array is for: those that have nothing but
        tables, as of rotary positions, and a head that is tied to the embedding.
        """
        names = {
            type(layer).__name__
            for layer in model.modules()
            if next(layer.parameters(recurse=False), None) is None
        }
        if model.config.tie_word_embeddings:
            names.add(type(model.lm_head).__name__)
        return names

    def _their_tensors(self, arrays: Mapping[str, np.ndarray]) -> Iterator[tuple[str, object]]:
        """Yields Hugging Face's names and tensors, by layers, so that vLLM buffers one layer."""
        stacked = [name for name in arrays if self._arrays[name].stacked]
        for name in arrays:
            if name not in stacked:
                yield self._arrays[name].name, self._tensor(name, arrays[name])
        layers = len(arrays[stacked[0]]) if stacked else 0
        for layer in range(layers):
            for name in stacked:
                yield self._arrays[name].name.format(layer), self._tensor(name, arrays[name][layer])

    def _tensor(self, name: str, array: np.ndarray):
        """The torch tensor that vLLM's loaders expect: whole, with this rank's part in its place.

        The loaders read that part and nothing else. The system takes no memory for the rest, since
        it is never touched.
        """
        import torch

        part = self._shares[name]
        turned = np.swapaxes(array, -1, -2) if self._arrays[name].transposed else array
        tensor = torch_tensor(turned)
        if part is None:
            return tensor
        shape = list(tensor.shape)
        shape[part.axis] = part.length
        whole = torch.empty(shape, dtype=tensor.dtype)
        whole.narrow(part.axis, part.start, part.stop - part.start).copy_(tensor)
        return whole

    def _pack_head(self, model) -> None:
        """Packs the head again: on a CPU vLLM keeps a copy of it in the form that its kernel needs.

        If the head is tied, vLLM's reload leaves the copy as it was. The log-probabilities would be
        those of the new layers under the old head.
        """
        from vllm.platforms import current_platform

        head = getattr(model, 'lm_head', None)
        if current_platform.is_cpu() and head is not None:
            head.quant_method.process_weights_after_loading(head)


def torch_tensor(array: np.ndarray):
    """A torch tensor over the memory of the array, which nobody may write to."""
    import torch

    is_bfloat16 = array.dtype.name == 'bfloat16'  # of ml_dtypes, which torch does not know
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'The given NumPy array is not writable')
        tensor = torch.from_numpy(array.view(np.uint16) if is_bfloat16 else array)
    return tensor.view(torch.bfloat16) if is_bfloat16 else tensor


@contextlib.contextmanager
def silent_about(layers: set[str]) -> Generator[None]:
    """Keeps vLLM from warning at every swap that layers of these classes failed to load."""

    def is_news(record: logging.LogRecord) -> bool:
        return record.getMessage().partition(':')[0] not in layers

    log = logging.getLogger(RELOAD_LOG)
    log.addFilter(is_news)
    try:
        yield
    finally:
        log.removeFilter(is_news)


def our_slices(array: Published, part: Share) -> tuple[slice, ...]:
    """The slices of our array that are this part; axes after the last slice are whole."""
    axis = 1 - part.axis if array.transposed else part.axis
    before = axis + 1 if array.stacked else axis
    return (slice(None),) * before + (slice(part.start, part.stop),)


class Belongings:
    """Goes with an engine's config to each of vLLM's processes, which so import this module.

    It is for vLLM's argument `additional_config`, and says nothing in it.
    """

    def compute_hash(self) -> str:
        return ''


def _end_with(pid: int) -> None:
    """Ends this process when process `pid` ends.

    By themselves vLLM's processes outlive the worker that started them, and keep their GPUs: for
    good if they were ready, for five minutes if the engine was still starting.
    """

    def wait(descriptor: int) -> None:
        select.select([descriptor], [], [])
        os._exit(1)

    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:  # it has ended already
        os._exit(1)
    threading.Thread(target=wait, args=(descriptor,), daemon=True).start()


# When a process of vLLM's imports this module, long before anybody could call it: its worker may be
# killed while the engine starts.
if OWNER in os.environ:
    _end_with(int(os.environ[OWNER]))
