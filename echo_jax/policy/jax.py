"""The embedded policy: a batched sampler in JAX whose decode batch all running episodes share.

B slots, S cached tokens a slot, C tokens of one prefill, P slots of one prefill, V vocabulary.

An episode's keys and values stay in its slot from turn to turn: a request whose context begins with
what an idle slot has cached takes that slot and prefills only what is new. Shapes are fixed, the
numbers of a slot depend on its own tokens alone, and a context is prefilled in pieces that are cut
the same way whatever else runs: so a sample depends on its seed and never on timing, as long as
there are no more episodes than slots. The device works in a thread, so sandboxes go on meanwhile.
Sampling on many GPUs is `vllm.py`'s.
"""

import asyncio
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from echo_jax.model.attention import Cache
from echo_jax.model.family import ModelConfig
from echo_jax.policy import Generation

DECODE_STEPS = 8  # tokens between two looks at the queue
PREFILL_TOKENS = 32  # C
PREFILL_SLOTS = 8  # P
MAX_STOP_TOKENS = 4


@dataclasses.dataclass
class _Request:
    context: np.ndarray  # int32 [T]
    max_tokens: int
    temperature: float
    key: np.ndarray  # uint32 [2]
    stop: np.ndarray  # int32 [MAX_STOP_TOKENS], -1 where unused
    future: asyncio.Future
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    finish_reason: str = ''


@dataclasses.dataclass
class _Slot:
    """`cached` tokens have their keys and values in the cache; `request` is None while idle."""

    cached: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))
    request: _Request | None = None
    last_used: int = 0


class JaxPolicy:
    """Implements `Policy` over a model of any family; `load` gives it weights."""

    def __init__(self, config: ModelConfig, graphdef, *, slots: int, cache_tokens: int):
        """`slots` episodes keep their caches; `cache_tokens` hold a context and what follows."""
        self._cache_tokens = cache_tokens
        self._slots = [_Slot() for _ in range(slots)]
        # A prefill writes a whole piece of C tokens, so the last one may reach past the end.
        self._cache = config.init_cache(slots, cache_tokens + PREFILL_TOKENS)
        self._prefill = functools.partial(_prefill, graphdef)
        self._decode = functools.partial(_decode, graphdef)
        self._params, self._version = None, -1
        self._next_weights: tuple | None = None
        self._waiting: list[_Request] = []
        self._runner: asyncio.Task | None = None
        self._clock = 0

    async def load(self, params: nnx.State, version: int) -> None:
        """Takes new weights once the running generations have ended; every cache is dropped."""
        self._next_weights = (params, version)
        while self._next_weights is not None:
            self._start_runner()
            await self._runner

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

        Temperature 0 is greedy, with the log-probabilities of temperature 1. Raises ValueError for
        an empty context, one that cannot fit the cache, and too many stop tokens.
        """
        context = np.asarray(token_ids, np.int32)
        if not 0 < len(context) <= len(context) + max_tokens <= self._cache_tokens:
            raise ValueError(
                f'a context of {len(context)} tokens and max_tokens={max_tokens} do not fit the '
                f'cache of {self._cache_tokens} tokens; raise protocol.max_total_tokens'
            )
        if len(stop_token_ids) > MAX_STOP_TOKENS:
            raise ValueError(f'{len(stop_token_ids)} stop tokens; at most {MAX_STOP_TOKENS}')
        stop = np.full(MAX_STOP_TOKENS, -1, np.int32)
        stop[: len(stop_token_ids)] = stop_token_ids
        key = np.array([seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF], np.uint32)
        future = asyncio.get_running_loop().create_future()
        request = _Request(context, max_tokens, temperature, key, stop, future)
        self._waiting.append(request)
        self._start_runner()
        await future
        return Generation(
            np.array(request.tokens, np.int32),
            np.array(request.logprobs, np.float32),
            np.full(len(request.tokens), self._version, np.int32),
            request.finish_reason,
        )

    def _start_runner(self) -> None:
        if self._runner is None or self._runner.done():
            self._runner = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        """Admits, advances and delivers until nothing is left; a failure goes to every request."""
        try:
            while True:
                self._admit()
                active = [slot for slot in self._slots if slot.request]
                if not active:
                    return
                await asyncio.to_thread(self._advance)
                for slot in active:
                    request = slot.request
                    if request.finish_reason and not request.future.done():
                        request.future.set_result(None)
                    if request.future.done():  # delivered, or cancelled by its episode
                        slot.request = None
        except BaseException as error:
            failed = [slot.request for slot in self._slots if slot.request] + self._waiting
            self._waiting = []
            self._next_weights = None
            for slot in self._slots:
                slot.request, slot.cached = None, np.zeros(0, np.int32)
            for request in failed:
                if not request.future.done():
                    request.future.set_exception(
                        RuntimeError(f'the sampler stopped: {type(error).__name__}: {error}')
                    )
            raise

    def _admit(self) -> None:
        busy = any(slot.request for slot in self._slots)
        if self._next_weights is not None:
            if busy:
                return
            self._params, self._version = self._next_weights
            self._next_weights = None
            for slot in self._slots:
                slot.cached = slot.cached[:0]
        if self._waiting and self._params is None:
            raise RuntimeError('the policy has no weights yet; call load first')
        while self._waiting:
            idle = [slot for slot in self._slots if slot.request is None]
            if not idle:
                return
            request = self._waiting.pop(0)
            if request.future.done():
                continue
            slot = max(idle, key=lambda s: (_begins(request.context, s.cached), -s.last_used))
            slot.cached = slot.cached[: _begins(request.context, slot.cached)]
            self._clock += 1
            slot.request, slot.last_used = request, self._clock

    def _advance(self) -> None:
        """Prefills what is missing, then decodes a few tokens in every busy slot."""
        while pending := [
            (i, slot)
            for i, slot in enumerate(self._slots)
            if slot.request and len(slot.cached) < len(slot.request.context) - 1
        ]:
            self._prefill_piece(pending[:PREFILL_SLOTS])
        self._decode_some()

    def _prefill_piece(self, pending: list[tuple[int, _Slot]]) -> None:
        # A lane without a request names a slot that does not exist: its write is dropped.
        index = np.full(PREFILL_SLOTS, len(self._slots), np.int32)
        tokens = np.zeros((PREFILL_SLOTS, PREFILL_TOKENS), np.int32)
        start = np.zeros(PREFILL_SLOTS, np.int32)
        for lane, (i, slot) in enumerate(pending):
            # The context's last token is decode's first input.
            piece = slot.request.context[:-1][len(slot.cached) :][:PREFILL_TOKENS]
            index[lane], start[lane] = i, len(slot.cached)
            tokens[lane, : len(piece)] = piece
            slot.cached = slot.request.context[: len(slot.cached) + len(piece)]
        self._cache = self._prefill(self._params, self._cache, index, tokens, start)

    def _decode_some(self) -> None:
        size = len(self._slots)
        tokens, positions = np.zeros(size, np.int32), np.zeros(size, np.int32)
        remaining, temperature = np.zeros(size, np.int32), np.ones(size, np.float32)
        keys, stop = np.zeros((size, 2), np.uint32), np.full((size, MAX_STOP_TOKENS), -1, np.int32)
        for i, slot in enumerate(self._slots):
            # An idle slot writes at its first free position, where nothing is lost.
            positions[i] = len(slot.cached)
            if request := slot.request:
                tokens[i] = request.tokens[-1] if request.tokens else request.context[-1]
                remaining[i] = request.max_tokens - len(request.tokens)
                temperature[i], keys[i], stop[i] = request.temperature, request.key, request.stop
        self._cache, out_tokens, out_logprobs = self._decode(
            self._params, self._cache, tokens, positions, remaining, temperature, keys, stop
        )
        out_tokens, out_logprobs = np.asarray(out_tokens), np.asarray(out_logprobs)
        for i, slot in enumerate(self._slots):
            if request := slot.request:
                count = int((out_tokens[:, i] >= 0).sum())
                fed = [tokens[i], *out_tokens[: count - 1, i]] if count else []
                slot.cached = np.concatenate([slot.cached, np.array(fed, np.int32)])
                request.tokens += out_tokens[:count, i].tolist()
                request.logprobs += out_logprobs[:count, i].tolist()
                if request.tokens and request.tokens[-1] in request.stop:
                    request.finish_reason = 'stop'
                elif len(request.tokens) == request.max_tokens:
                    request.finish_reason = 'length'


def _begins(context: np.ndarray, cached: np.ndarray) -> int:
    """How many cached tokens the context can use: all where it goes on from them, else 0."""
    n = len(cached)
    return n if n < len(context) and np.array_equal(context[:n], cached) else 0


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _prefill(graphdef, params, cache: Cache, index_P, tokens_PC, start_P) -> Cache:
    model = nnx.merge(graphdef, params)
    rows = jax.tree.map(lambda x: x.at[index_P].get(mode='clip'), cache)
    positions_PC = start_P[:, None] + jnp.arange(tokens_PC.shape[1])
    _, rows = model.extend(tokens_PC, positions_PC, rows)
    return jax.tree.map(lambda x, new: x.at[index_P].set(new, mode='drop'), cache, rows)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _decode(graphdef, params, cache, tokens_B, positions_B, remaining_B, temperature_B, keys, stop):
    """Up to DECODE_STEPS tokens a slot: (cache, tokens [steps, B], -1 past the end, logprobs)."""
    model = nnx.merge(graphdef, params)
    greedy_B = temperature_B == 0
    scale_B = jnp.where(greedy_B, 1.0, temperature_B)
    size = tokens_B.shape[0]

    def going_on(carry):
        step, *_, remaining_B = carry
        return (step < DECODE_STEPS) & (remaining_B > 0).any()

    def advance(carry):
        step, cache, out_tokens, out_logprobs, tokens_B, positions_B, remaining_B = carry
        hidden, cache = model.extend(tokens_B[:, None], positions_B[:, None], cache)
        logits_BV = hidden[:, 0].astype(jnp.float32) @ model.unembedding.T / scale_B[:, None]
        noise_BV = jax.vmap(_gumbel, (0, 0, None))(keys, positions_B, logits_BV.shape[1])
        noise_BV = jnp.where(greedy_B[:, None], 0.0, noise_BV)
        sampled_B = jnp.argmax(logits_BV + noise_BV, axis=-1).astype(jnp.int32)
        logprobs_B = jnp.take_along_axis(jax.nn.log_softmax(logits_BV), sampled_B[:, None], 1)[:, 0]
        active_B = remaining_B > 0
        out_tokens = out_tokens.at[step].set(jnp.where(active_B, sampled_B, -1))
        out_logprobs = out_logprobs.at[step].set(jnp.where(active_B, logprobs_B, 0.0))
        stopped_B = (sampled_B[:, None] == stop).any(-1)
        return (
            step + 1,
            cache,
            out_tokens,
            out_logprobs,
            jnp.where(active_B, sampled_B, tokens_B),
            positions_B + active_B,
            jnp.where(stopped_B, 0, remaining_B - active_B),
        )

    out_tokens = jnp.full((DECODE_STEPS, size), -1, jnp.int32)
    out_logprobs = jnp.zeros((DECODE_STEPS, size), jnp.float32)
    carry = (0, cache, out_tokens, out_logprobs, tokens_B, positions_B, remaining_B)
    _, cache, out_tokens, out_logprobs, *_ = jax.lax.while_loop(going_on, advance, carry)
    return cache, out_tokens, out_logprobs


def _gumbel(key, position, size: int):
    """Noise [V] of one position of one request: a function of its seed and the position alone."""
    key = jax.random.wrap_key_data(key, impl='threefry2x32')
    return jax.random.gumbel(jax.random.fold_in(key, position), (size,))
