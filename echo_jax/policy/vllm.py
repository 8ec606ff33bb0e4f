"""The policy on GPUs: vLLM's asynchronous engine, whose weights are swapped in place and proven.

It takes tokens and gives tokens; vLLM batches, caches prefixes and decodes. A turn is sampled by
one version: `load` reads the new weights while the engine goes on, waits for the running turns to
end, loads, drops the prefix cache, and scores a probe whose log-probabilities the learner published
with the version. The probe is needed: vLLM has reported success when it had kept an old head, and
when it served old entries of its cache. This module needs vLLM, in an environment of its own, and
no JAX; `vllm_rank.py` runs inside vLLM.
"""

import asyncio
import contextlib
import itertools
import logging
import os
import time
from collections.abc import AsyncIterator
from typing import NamedTuple

import numpy as np

from echo_jax.policy import Generation, PolicyError, vllm_rank
from echo_jax.store.kvstore import CorruptError, MissingError
from echo_jax.store.weights import WeightStore
from echo_jax.types import Batch

# vLLM reads these when it is imported. VLLM_CPU_KVCACHE_SPACE is in GiB.
_ENVIRONMENT = {
    'VLLM_NO_USAGE_STATS': '1',
    'DO_NOT_TRACK': '1',
    'HF_HUB_OFFLINE': '1',
    'TRANSFORMERS_OFFLINE': '1',
    'VLLM_LOGGING_LEVEL': 'WARNING',
    'VLLM_LOGGING_STREAM': 'ext://sys.stderr',  # stdout is the program's own
    'VLLM_CPU_KVCACHE_SPACE': '1',
}
# The mean absolute gap of the probe, in nats, that rounding alone can explain.
PROBE_TOLERANCE = {'float32': 1e-3, 'bfloat16': 0.05, 'float16': 0.01}
_SAME = 1e-6  # nats; log-probabilities that differ by less may be those of the same weights
_POLL_SECONDS = 0.05
_CPU_BATCH_TOKENS = 2048  # the engine may prefill at least this many tokens at one time
_CACHE_SECONDS = 5.0  # within which the blocks of aborted requests must be free
_STORE_ERRORS = {error.__name__: error for error in (CorruptError, MissingError, ValueError)}


class Swap(NamedTuple):
    """How long the last `load` took, and how well its probe agreed."""

    version: int
    probe_gap: float  # nats, mean over the probe's tokens of |engine - learner|
    read_seconds: float  # the engine sampled on meanwhile
    drain_seconds: float  # until the turns that ran had ended
    load_seconds: float  # in which the engine sampled nothing


class _Probe(NamedTuple):
    tokens: list[int]
    learner: np.ndarray  # float32 [n - 1], of all tokens but the first
    engine: np.ndarray


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
        version: int = -1,
    ):
        """version: of the weights that the engine has; -1: none, `load` brings the first."""
        self.engine, self._store = engine, store
        self._max_model_len, self._probe_tolerance = max_model_len, probe_tolerance
        self.version = version
        self.swap: Swap | None = None
        # Why it does not sample; '' if it does.
        self._refusal = '' if version >= 0 else 'the policy has no weights yet; call load first'
        self._proven: _Probe | None = None
        self._numbers = itertools.count()
        self._loading = asyncio.Lock()
        self._open, self._idle = asyncio.Event(), asyncio.Event()
        self._open.set()
        self._idle.set()
        self._running = 0

    @classmethod
    async def start(
        cls,
        model_dir: str | os.PathLike,
        weights_url: str | None,
        *,
        dtype: str,
        max_model_len: int,
        max_num_seqs: int,
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
        probe_tolerance: nats; by default the dtype's in PROBE_TOLERANCE.
        engine_args: other arguments of vLLM's AsyncEngineArgs, such as tensor_parallel_size; they
            replace those that are set here.

        Raises PolicyError if vLLM is missing or refuses the model.
        """
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
        engine = _start_engine(arguments | engine_args)
        store, version = WeightStore(weights_url or 'memory://'), -1 if weights_url else 0
        policy = cls(engine, store, max_model_len, probe_tolerance, version)
        await policy._call('end_with', os.getpid())
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
        """Samples until a stop token, which is in the result, or `max_tokens`, from one version.

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
        async with self._turn():
            version = self.version
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
        if completion.finish_reason not in ('stop', 'length'):
            raise PolicyError(f'vLLM ended a turn with {completion.finish_reason!r}')
        tokens = np.array(completion.token_ids, np.int32)
        return Generation(
            tokens,
            np.array(completion.logprobs.logprobs, np.float32),
            np.full(len(tokens), version, np.int32),
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
        """Swaps to a published version; running turns end first, and turns that begin then wait.

        The version's `about` holds 'arrays', which `vllm_rank.read_published` reads, and 'probe':
        its 'tokens', and their 'logprobs' under the published weights at temperature 1, the first
        of which is 0. A swap that did not take is done once more. If that does not take either,
        PolicyError is raised, and `generate` raises it too until a later `load` succeeds.
        MissingError, CorruptError and the ValueError for an `about` that is not understood come
        before anything has changed, and the version that was there goes on sampling.
        """
        async with self._loading, _engine_errors():
            about = await asyncio.to_thread(self._store.about, version)
            _check(about, version)
            started = time.monotonic()
            await self._fetch(version, about['arrays'])
            read = time.monotonic()
            self._open.clear()
            try:
                await self._idle.wait()
                drained = time.monotonic()
                gap = await self._swap(version, about)
            finally:
                self._open.set()
            seconds = read - started, drained - read, time.monotonic() - drained
            self.swap = Swap(version, gap, *seconds)

    async def close(self) -> None:
        """Ends the engine and its processes; turns that still run raise PolicyError."""
        self._refusal = 'the policy is closed'
        self.engine.shutdown()

    @contextlib.asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """Holds one turn: it waits while weights are swapped, and the next swap waits for it."""
        while not self._open.is_set():
            await self._open.wait()
        if self._refusal:
            raise PolicyError(self._refusal)
        self._running += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()

    async def _request(self, context: list[int], **sampling):
        """Asks the engine for one request, and returns vLLM's whole output."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            **sampling,
            detokenize=False,
            flat_logprobs=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        prompt = {'prompt_token_ids': context}
        async with _engine_errors():
            outputs = self.engine.generate(prompt, params, str(next(self._numbers)))
            return [output async for output in outputs][-1]

    async def _prompt_logprobs(self, tokens: list[int]) -> np.ndarray:
        """float32 [n - 1], at temperature 1: of all tokens but the first."""
        output = await self._request(tokens, max_tokens=1, temperature=0.0, prompt_logprobs=0)
        return np.array(output.prompt_logprobs.logprobs, np.float32)

    async def _fetch(self, version: int, arrays: dict[str, dict]) -> None:
        """Has every rank read its part; raises the store's errors as the store does."""
        await self._call('begin_fetch', self._store.url, version, arrays)
        while any(state == vllm_rank.READING for state, _ in await self._call('fetch_state')):
            await asyncio.sleep(_POLL_SECONDS)
        for error, message in await self._call('fetch_state'):
            if error:
                raise _STORE_ERRORS.get(error, PolicyError)(message)

    async def _swap(self, version: int, about: dict) -> float:
        """Loads what was fetched until it is proven, at most twice; returns the probe's gap."""
        # From here on the engine's weights are of no version, until the probe says that they are.
        self._refusal = f'version {version} was not loaded to its end; load a version again'
        gap, problem = await self._try(version, about['probe'])
        if problem:
            logging.warning('version %d: %s; loading it once more', version, problem)
            # It is fetched again too, and loaded as a whole: that alone mends half an update.
            await self._fetch(version, about['arrays'])
            gap, problem = await self._try(version, about['probe'])
        if problem:
            self._refusal = f'version {version} of {self._store.url} did not take: {problem}'
            raise PolicyError(self._refusal)
        self.version, self._refusal = version, ''
        return gap

    async def _try(self, version: int, probe: dict) -> tuple[float, str]:
        """Loads what was fetched and scores the probe; (the probe's gap, what is wrong or '')."""
        try:
            await self._call('load_fetched')
        except Exception as error:  # vLLM raises a bare one for whatever went wrong in a rank
            return np.inf, f'loading failed with {error}'
        if not await self._drop_prefixes():
            return np.inf, 'the prefix cache of the version before could not be dropped'
        tokens, learner = probe['tokens'], np.asarray(probe['logprobs'], np.float32)[1:]
        engine = await self._prompt_logprobs(tokens)
        gap = float(np.abs(engine - learner).mean())
        if not gap <= self._probe_tolerance:  # a NaN is no success
            return gap, (
                f"the probe's log-probabilities are {gap:.2g} nats off the learner's, more than "
                f'{self._probe_tolerance:g}'
            )
        before = self._proven
        if (
            before is not None
            and before.tokens == tokens
            and np.abs(before.learner - learner).max() > _SAME
            and np.array_equal(before.engine, engine)
        ):
            return gap, f"the learner's probe changed since version {self.version}, vLLM's did not"
        self._proven = _Probe(tokens, learner, engine)
        return gap, ''

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


def _start_engine(arguments: dict):
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        from vllm import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.async_llm import AsyncLLM
    except ImportError as error:
        raise PolicyError(
            f'vLLM cannot be imported ({error}); install requirements-rollout.txt, or on a CPU '
            'run `make rollout`, and start the worker in that environment'
        ) from error
    if current_platform.is_cpu():
        # On a CPU a prompt that is prefilled in parts kills the engine (0.32): vLLM then sets the
        # random generator of the request's seed back, which PyTorch's for CPUs cannot do.
        batch = max(arguments['max_model_len'], _CPU_BATCH_TOKENS)
        arguments = dict(enable_chunked_prefill=False, max_num_batched_tokens=batch) | arguments
    try:
        return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
    except (ValueError, OSError, RuntimeError) as error:
        reason = str(error).strip().partition('\n')[0]
        raise PolicyError(f'vLLM does not start with {arguments["model"]}: {reason}') from error


@contextlib.asynccontextmanager
async def _engine_errors() -> AsyncIterator[None]:
    from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

    try:
        yield
    except (EngineDeadError, EngineGenerateError) as error:
        raise PolicyError(f"vLLM's engine failed: {error or type(error).__name__}") from error


def _check(about: dict, version: int) -> None:
    probe = about.get('probe', {})
    tokens, logprobs = probe.get('tokens', ()), probe.get('logprobs', ())
    if not about.get('arrays') or not 1 < len(tokens) == len(logprobs):
        raise ValueError(
            f'version {version} says {sorted(about)} of itself; a swap needs arrays, and a probe '
            f'with as many logprobs ({len(logprobs)}) as tokens ({len(tokens)})'
        )
    vllm_rank.read_published(about['arrays'])  # refuses what a rank would not understand
    if probe.get('temperature', 1.0) != 1.0:
        raise ValueError(
            f"version {version}'s probe is at temperature {probe['temperature']}, not 1"
        )
