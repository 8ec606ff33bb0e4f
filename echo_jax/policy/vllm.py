"""The policy on GPUs: vLLM's asynchronous engine, whose weights are swapped in place and proven.

It takes tokens and gives tokens; vLLM batches, caches prefixes and decodes. `load` reads the new
weights while the engine goes on, pauses the running turns or waits for their end, loads, and scores
a probe whose log-probabilities the learner published with the version. The probe is needed: vLLM
has reported success when it had kept an old head, and when it served old entries of its cache. Each
token says which version sampled it, and no turn is given out before all of its are proven. This
module needs vLLM, in an environment of its own, and no JAX; `vllm_rank.py` runs inside vLLM.
"""

import asyncio
import contextlib
import itertools
import logging
import os
import time
from collections.abc import AsyncGenerator
from typing import NamedTuple

import numpy as np

from echo_jax.policy import Generation, PolicyError, check_swap, vllm_engine, vllm_rank
from echo_jax.policy.meter import Meter, Swap
from echo_jax.policy.vllm_probe import PROBE_TOLERANCE, Judge, check_about
from echo_jax.store.kvstore import CorruptError, MissingError
from echo_jax.store.weights import WeightStore
from echo_jax.types import Batch

_POLL_SECONDS = 0.05
_CACHE_SECONDS = 5.0  # within which the blocks of aborted requests must be free
_STORE_ERRORS = {error.__name__: error for error in (CorruptError, MissingError, ValueError)}


class _Tried(NamedTuple):
    gap: float  # the probe's, nats
    problem: str  # '' if the weights are proven
    still: float  # when the engine sampled nothing any more, by time.monotonic
    loaded: float  # when it had the weights


class VllmPolicy:
    """Implements `Policy` over one engine; `start` makes it, and the first `load` gives it weights.

    docs/design.md#policy-and-sandbox

    `engine` is vLLM's AsyncLLM, for its own statistics and for calls to its ranks.
    """

    def __init__(
        self,
        engine,
        store: WeightStore,
        max_model_len: int,
        probe_tolerance: float,
        swap_mode: str,
        slots: int,
        version: int = -1,
    ):
        """slots: turns that are in the engine together.
        version: of the weights that the engine has; -1: none, `load` brings the first.
        """
        self.engine, self._store = engine, store
        self._max_model_len, self._judge = max_model_len, Judge(probe_tolerance)
        self._swap_mode = swap_mode
        self.version = version
        self.swap: Swap | None = None
        # What vLLM calls the weights that it has: the version, and which attempt to load it. The
        # spans of a turn's tokens come with these labels. Those that are refused count for nothing.
        self._label, self._refused = f'{version}.0', set[str]()
        self._settled = asyncio.Event()  # whether the label is proven or refused
        self._settled.set()
        # Why it does not sample; '' if it does.
        self._refusal = '' if version >= 0 else 'the policy has no weights yet; call load first'
        self._numbers = itertools.count()
        self._loading = asyncio.Lock()
        self._open, self._idle = asyncio.Event(), asyncio.Event()
        self._open.set()
        self._idle.set()
        self.meter = Meter()
        # In flight the probe must find room in a full engine, so turns wait for theirs out here.
        self._slots = contextlib.nullcontext() if swap_mode == 'drain' else asyncio.Semaphore(slots)

    @classmethod
    async def start(
        cls,
        model_dir: str | os.PathLike,
        weights_url: str | None,
        *,
        dtype: str,
        max_model_len: int,
        max_num_seqs: int,
        swap: str = 'recompute',
        probe_tolerance: float | None = None,
        **engine_args,
    ) -> 'VllmPolicy':
        """Starts the engine, which blocks the event loop for the minute that it takes.

        model_dir: a Hugging Face directory, of which only config.json is read if there is a store.
        weights_url: the store that `load` reads; None: the engine loads the directory's weights, as
            version 0, and takes no others.
        dtype: what the engine's weights and activations are.
        max_model_len: tokens of a context and what is sampled after it.
        max_num_seqs: turns that decode together.
        swap: what `load` does with the turns that run; docs/design.md#swaps.
        probe_tolerance: nats; by default the dtype's in PROBE_TOLERANCE.
        engine_args: other arguments of vLLM's AsyncEngineArgs, such as tensor_parallel_size; they
            replace those that are set here.

        Raises PolicyError if vLLM is missing or refuses the model.
        """
        check_swap(swap)
        if probe_tolerance is None:
            if dtype not in PROBE_TOLERANCE:
                expected = list(PROBE_TOLERANCE)
                raise ValueError(f'policy.dtype is {dtype!r}; expected one of {expected}')
            probe_tolerance = PROBE_TOLERANCE[dtype]
        arguments = dict(
            model=os.fspath(model_dir),
            # The first `load` brings real ones if there is a store.
            load_format='dummy' if weights_url else 'auto',
            skip_tokenizer_init=True,
            dtype=dtype,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            gpu_memory_utilization=0.9,
            enable_prefix_caching=True,
            logprobs_mode='processed_logprobs',  # after the temperature
            worker_extension_cls=f'{vllm_rank.__name__}.{vllm_rank.WeightLoader.__name__}',
            disable_log_stats=True,
        )
        if swap != 'drain':  # room for the probe, and the first place in the queue
            arguments |= dict(max_num_seqs=max_num_seqs + 1, scheduling_policy='priority')
        engine = vllm_engine.start_engine(arguments | engine_args)
        store, version = WeightStore(weights_url or 'memory://'), -1 if weights_url else 0
        policy = cls(engine, store, max_model_len, probe_tolerance, swap, max_num_seqs, version)
        await engine.update_weight_version(policy._label)
        return policy

    async def generate(
        self,
        token_ids: np.ndarray,
        *,
        max_tokens: int,
        temperature: float,
        seed: int,
        stop_token_ids: tuple[int, ...],
    ) -> Generation:
        """Samples until a stop token, which is in the result, or `max_tokens`.

        If weights are swapped meanwhile, the later tokens are of a newer version, unless swaps wait
        for turns. A turn with tokens of weights that are refused then is sampled again.
        Temperature 0 is greedy, with the log-probabilities of temperature 1. Cancelling the call
        frees the engine's request. Raises ValueError for a context that is empty or does not fit,
        and PolicyError if the engine died or its weights are not proven.
        """
        context = np.asarray(token_ids).tolist()
        if not 0 < len(context) <= len(context) + max_tokens <= self._max_model_len:
            raise ValueError(
                f'a context of {len(context)} tokens and max_tokens={max_tokens} do not fit '
                f'max_model_len={self._max_model_len}; raise protocol.max_total_tokens'
            )
        while True:
            async with self._turn():
                output = await self._request(
                    context,
                    max_tokens=max_tokens,
                    temperature=temperature,
                    seed=seed,
                    stop_token_ids=list(stop_token_ids),
                    ignore_eos=True,  # only the caller says what ends a turn
                    logprobs=0,  # of the sampled token
                )
            completion = output.outputs[0]
            versions = await self._versions(completion)
            if versions is not None:
                break
        if completion.finish_reason not in ('stop', 'length'):
            raise PolicyError(f'vLLM ended a turn with {completion.finish_reason!r}')
        tokens = np.array(completion.token_ids, np.int32)
        self.meter.sampled(len(tokens))
        return Generation(
            tokens,
            np.array(completion.logprobs.logprobs, np.float32),
            versions,
            completion.finish_reason,
        )

    async def score(self, batch: Batch) -> np.ndarray:
        """float32 [R, T]: the log-probability at temperature 1 of every token given those before it
        in its segment; 0 for a segment's first token and for padding.

        Only `tokens` and `segment_ids` are read. A segment has at most max_model_len - 1 tokens.
        """
        logprobs = np.zeros(batch.tokens.shape, np.float32)

        async def fill(row: int, segment: int) -> None:
            (places,) = np.nonzero(batch.segment_ids[row] == segment)
            if len(places) > 1:
                found = await self._prompt_logprobs(batch.tokens[row, places].tolist())
                logprobs[row, places[1:]] = found

        async with asyncio.TaskGroup() as running:
            for row, segments in enumerate(batch.segment_ids):
                for segment in range(1, segments.max(initial=0) + 1):
                    running.create_task(fill(row, segment))
        return logprobs

    async def load(self, version: int) -> None:
        """Swaps to a published version, in flight or not (docs/design.md#swaps).

        The version's `about` holds 'arrays', which `vllm_rank.read_published` reads, and 'probe':
        its 'tokens', and their 'logprobs' under the published weights at temperature 1, the first
        of which is 0. A swap that did not take is done once more, in an engine that is empty. If
        that does not take either, PolicyError is raised, and `generate` raises it too until a later
        `load` succeeds. MissingError, CorruptError and the ValueError for an `about` that is not
        understood come before anything has changed, and the version before goes on sampling; but if
        the store fails as a swap is done once more, turns wait for the next `load`.
        """
        async with self._loading, vllm_engine.engine_errors():
            about = await asyncio.to_thread(self._store.about, version)
            check_about(about, version)
            started = time.monotonic()
            await self._fetch(version, about['arrays'])
            read, reopens = time.monotonic(), True
            try:
                if self._swap_mode == 'drain' or self._refusal:  # or nothing can run
                    self._open.clear()
                    await self._idle.wait()
                    with self.meter.still():
                        tried = await self._try(version, about['probe'])
                else:
                    tried = await self._try(version, about['probe'], self._paused('keep'))
                still = tried.still
                if tried.problem:
                    logging.warning('version %d: %s; loading it once more', version, tried.problem)
                    await self._empty()
                    # It is fetched and loaded as a whole: that alone mends half an update.
                    with self.meter.still():
                        try:
                            await self._fetch(version, about['arrays'])
                        except (MissingError, ValueError):  # as CorruptError is
                            reopens = False
                            raise
                        tried = await self._try(version, about['probe'])
            finally:
                if reopens:
                    self._open.set()
            if tried.problem:
                raise PolicyError(self._refusal)
            seconds = read - started, still - read, tried.loaded - still
            self.swap = Swap(version, tried.gap, *seconds, time.monotonic() - tried.loaded)

    async def close(self) -> None:
        """Ends the engine and its processes; turns that still run raise PolicyError."""
        self._refusal = 'the policy is closed'
        self.engine.shutdown()
        # Its destructor does so again when Python has begun to end, where that fails, in writing.
        self.engine.shutdown = lambda: None

    @contextlib.asynccontextmanager
    async def _turn(self) -> AsyncGenerator[None]:
        """Holds one turn: it waits for a slot, and while a swap needs the engine empty."""
        async with self._slots:
            while not self._open.is_set():
                await self._open.wait()
            if self._refusal:
                raise PolicyError(self._refusal)
            self._idle.clear()
            try:
                with self.meter.turn():
                    yield
            finally:
                if not self.meter.turns:
                    self._idle.set()

    async def _versions(self, completion) -> np.ndarray | None:
        """int32 [n], the version of each sampled token; None if the turn has to be sampled again.

        It waits for the probe if that still has to prove the weights of the last tokens.
        """
        spans = completion.weight_versions
        if spans and spans[-1].version == self._label:
            await self._settled.wait()
        emptied = completion.finish_reason == 'abort' and not self._open.is_set()
        if emptied or any(span.version in self._refused for span in spans):
            return None
        versions = [int(span.version.partition('.')[0]) for span in spans]
        return np.repeat(np.array(versions, np.int32), [span.end - span.start for span in spans])

    async def _request(self, context: list[int], priority: int = 0, **sampling):
        """Asks the engine for one request, and returns vLLM's whole output."""
        # Only with 'keep' does the cache hold entries of several versions.
        salt = self._label if self._swap_mode == 'keep' else None
        number = str(next(self._numbers))
        return await vllm_engine.request(self.engine, number, context, salt, priority, **sampling)

    async def _prompt_logprobs(self, tokens: list[int], priority: int = 0) -> np.ndarray:
        """float32 [n - 1], at temperature 1: of all tokens but the first."""
        output = await self._request(
            tokens, priority, max_tokens=1, temperature=0.0, prompt_logprobs=0
        )
        return np.array(output.prompt_logprobs.logprobs, np.float32)

    async def _fetch(self, version: int, arrays: dict[str, dict]) -> None:
        """Has every rank read its part; raises the store's errors as the store does."""
        await self._call('begin_fetch', self._store.url, version, arrays)
        while any(state == vllm_rank.READING for state, _ in await self._call('fetch_state')):
            await asyncio.sleep(_POLL_SECONDS)
        for error, message in await self._call('fetch_state'):
            if error:
                raise _STORE_ERRORS.get(error, PolicyError)(message)

    @contextlib.asynccontextmanager
    async def _paused(self, mode: str) -> AsyncGenerator[None]:
        """Has the engine sample nothing; by mode, the turns that run wait ('keep') or 'abort'."""
        try:
            await self.engine.pause_generation(mode=mode, clear_cache=False)
            with self.meter.still():
                yield
        finally:
            await self.engine.resume_generation()

    async def _empty(self) -> None:
        """Ends the turns that run, which `generate` samples again when the engine is open."""
        while self.meter.turns:  # a request may have been on its way when the others were aborted
            async with self._paused('abort'):
                pass
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), _POLL_SECONDS)

    async def _try(
        self, version: int, probe: dict, pause: contextlib.AbstractAsyncContextManager | None = None
    ) -> _Tried:
        """Loads what was fetched and scores the probe.

        pause: holds the turns that run while weights are loaded; None: there are none.
        """
        label = f'{version}.{next(self._numbers)}'
        gap, problem = np.inf, 'it was not loaded to its end; load a version again'
        try:
            async with pause or contextlib.nullcontext():
                still = time.monotonic()
                # From here on the engine's weights are of no version, until the probe says so.
                self._label = label
                self._settled.clear()
                failed = await self._replace(in_flight=pause is not None)
            loaded = time.monotonic()
            if not failed:
                # It goes first: turns that have to be prefilled again take longer, and wait for it.
                engine = await self._prompt_logprobs(probe['tokens'], priority=-1)
                gap, failed = self._judge.judge(version, probe, engine)
            problem = failed
        finally:
            if self._label == label:
                self._settle(version, problem)
        return _Tried(gap, problem, still, loaded)

    def _settle(self, version: int, problem: str) -> None:
        """Says whether what is sampled under the label is `version`'s."""
        if problem:
            self._refused.add(self._label)
            self._refusal = f'version {version} of {self._store.url} did not take: {problem}'
            self._open.clear()  # `load` opens it, when it has tried again
        else:
            self.version, self._refusal = version, ''
        self._settled.set()

    async def _replace(self, in_flight: bool) -> str:
        """Loads what was fetched and drops what was cached; what is wrong or ''."""
        await self.engine.update_weight_version(self._label)
        try:
            await self._call('load_fetched')
            # With 'keep' the turns that run go on with their cache, and no other turn uses it.
            if in_flight and self._swap_mode == 'keep':
                return ''
            # Turns that run are prefilled again, with the tokens that they have.
            dropped = await (
                self.engine.reset_prefix_cache(reset_running_requests=True)
                if in_flight
                else self._drop_prefixes()
            )
        except Exception as error:  # vLLM raises a bare one for whatever went wrong in a rank
            return f'loading failed with {error}'
        return '' if dropped else 'the prefix cache of the version before could not be dropped'

    async def _drop_prefixes(self) -> bool:
        """Drops the prefix cache; returns False if it cannot be, because blocks stay in use.

        Those of an aborted request do for a little while.
        """
        deadline = time.monotonic() + _CACHE_SECONDS
        while not await self.engine.reset_prefix_cache():
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(_POLL_SECONDS)
        return True

    async def _call(self, method: str, *args) -> list:
        """Calls a method of `WeightLoader` in every rank, and returns what each returned."""
        return await self.engine.collective_rpc(method, args=args)
