"""The embedded policy: a sampler in JAX that decodes all running episodes as one batch.

B slots, C tokens of one prefill, P slots of one prefill, V vocabulary.

An episode's keys and values stay in its slot from turn to turn: a request whose context begins with
what an idle slot has cached takes that slot and prefills only what is new. Shapes are fixed, the
numbers of a slot depend on its own tokens alone, and a context is prefilled in pieces that are cut
the same way whatever else runs. So a sample depends on its seed and never on timing, as long as
there are no more episodes than slots. The device works in a thread of its own, so sandboxes run in
the meantime. This module trains nothing; policy/vllm.py samples on many GPUs.
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
from echo_jax.policy.meter import Meter

# All four are shapes of compiled functions, so every request is served without another compilation.
DECODE_TOKENS = 8  # decoded in a slot between two looks at the queue of requests
PREFILL_TOKENS = 32  # C
PREFILL_SLOTS = 8  # P
MAX_STOP_TOKENS = 4


@dataclasses.dataclass
class _Request:
    """One call of `generate` and what was sampled for it so far."""

    context: np.ndarray  # int32 [T]
    max_tokens: int
    temperature: float
    key: np.ndarray  # uint32 [2], the seed as a threefry key
    stop: np.ndarray  # int32 [MAX_STOP_TOKENS]; -1, which is no token, fills the rest
    future: asyncio.Future[None]  # done when finish_reason is set
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    finish_reason: str = ''
    version: int = -1  # of the weights that sample it, once it has a slot


@dataclasses.dataclass
class _Slot:
    """One row of the cache, and whose it is."""

    cached: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))
    request: _Request | None = None  # None while the slot is idle
    last_used: int = 0  # the policy's clock when the slot was last given away


_Busy = tuple[int, _Slot, _Request]  # a slot's number, the slot and its request


class JaxPolicy:
    """Implements `Policy` over a model of any family; `load` gives it weights."""

    def __init__(
        self, config: ModelConfig, graphdef: nnx.GraphDef, *, slots: int, cache_tokens: int
    ):
        """Makes `slots` slots, each with a cache for `cache_tokens` tokens, sampled ones included.

        `graphdef` is the model without its parameters.
        """
        self._cache_tokens = cache_tokens
        self._slots = [_Slot() for _ in range(slots)]
        # A prefill always writes C tokens. Without room for one more piece, dynamic_update_slice
        # would move the last piece of a full slot back, over tokens that are needed.
        self._cache = config.init_cache(slots, cache_tokens + PREFILL_TOKENS)
        self._prefill = functools.partial(_prefill, graphdef)
        self._decode = functools.partial(_decode, graphdef)
        self._params: nnx.State | None = None
        self._version = -1
        self._next_weights: tuple[nnx.State, int] | None = None
        self._waiting: list[_Request] = []
        self._runner: asyncio.Task | None = None
        self._clock = 0  # counts admitted requests
        self.meter = Meter()

    async def load(self, params: nnx.State, version: int) -> None:
        """Takes new weights once the running generations have ended, and drops every cache."""
        self._next_weights = (params, version)
        while self._next_weights is not None:
            await self._running()

    async def generate(
        self,
        token_ids: np.ndarray,
        *,
        max_tokens: int,
        temperature: float,
        seed: int,
        stop_token_ids: tuple[int, ...],
    ) -> Generation:
        """Samples until a stop token, which is in the result, or until `max_tokens`.

        Temperature 0 is greedy, with the log-probabilities of temperature 1. Raises ValueError for
        an empty context, one that cannot fit the cache, and too many stop tokens. Raises
        RuntimeError if the sampler failed, for whichever request.
        """
        context = np.asarray(token_ids, np.int32)
        if not 0 < len(context) <= len(context) + max_tokens <= self._cache_tokens:
            raise ValueError(
                f'a context of {len(context)} tokens and max_tokens={max_tokens} do not fit the '
                f'cache of {self._cache_tokens} tokens; raise protocol.max_total_tokens'
            )
        if len(stop_token_ids) > MAX_STOP_TOKENS:
            raise ValueError(
                f'{len(stop_token_ids)} stop tokens, expected at most {MAX_STOP_TOKENS}; '
                'raise MAX_STOP_TOKENS'
            )
        stop = np.full(MAX_STOP_TOKENS, -1, np.int32)
        stop[: len(stop_token_ids)] = stop_token_ids
        key = np.array([seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF], np.uint32)
        future = asyncio.get_running_loop().create_future()
        request = _Request(context, max_tokens, temperature, key, stop, future)
        self._waiting.append(request)
        self._running()
        with self.meter.turn():
            await future
        self.meter.sampled(len(request.tokens))
        return Generation(
            np.array(request.tokens, np.int32),
            np.array(request.logprobs, np.float32),
            np.full(len(request.tokens), request.version, np.int32),
            request.finish_reason,
        )

    def _running(self) -> asyncio.Task[None]:
        """The task that serves requests, started if it has ended."""
        if self._runner is None or self._runner.done():
            self._runner = asyncio.get_running_loop().create_task(self._run())
        return self._runner

    async def _run(self) -> None:
        """Serves requests until none is left. If it fails, every request gets an error."""
        try:
            while True:
                self._admit()
                busy = self._busy()
                if not busy:
                    return
                await asyncio.to_thread(self._advance)
                for _, slot, request in busy:
                    if request.finish_reason and not request.future.done():
                        request.future.set_result(None)
                    if request.future.done():  # delivered now, or cancelled by its episode
                        slot.request = None
        except BaseException as error:
            # Nothing else would wake the waiting episodes, and what a call that failed midway left
            # in the cache is not to be trusted.
            failed = [request for _, _, request in self._busy()] + self._waiting
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

    def _busy(self) -> list[_Busy]:
        return [(i, slot, slot.request) for i, slot in enumerate(self._slots) if slot.request]

    def _admit(self) -> None:
        """Gives idle slots to waiting requests; new weights first, once every slot is idle."""
        if self._next_weights is not None:
            if self._busy():
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
            # Takes the slot with most of this context cached, which is its episode's own if nobody
            # took it. Among equals it is the one that was idle longest: its episode has most likely
            # ended.
            slot = max(idle, key=lambda s: (_usable(s.cached, request.context), -s.last_used))
            slot.cached = slot.cached[: _usable(slot.cached, request.context)]
            self._clock += 1
            request.version = self._version
            slot.request, slot.last_used = request, self._clock

    def _advance(self) -> None:
        """Prefills what is missing, then decodes a few tokens in every busy slot."""
        pending = self._pending()
        while pending:
            self._prefill_piece(pending[:PREFILL_SLOTS])
            pending = self._pending()
        self._decode_some()

    def _pending(self) -> list[_Busy]:
        """The slots that lack keys and values of their context.

        They need all tokens but the last, which is decode's first input: its logits are wanted.
        """
        return [busy for busy in self._busy() if len(busy[1].cached) < len(busy[2].context) - 1]

    def _prefill_piece(self, pending: list[_Busy]) -> None:
        """Prefills the next piece of at most P slots.

        Pieces are cut by the slot's own tokens alone, never to fill the batch: the sums of another
        cut would round differently, and the same seed could give another sample.
        """
        # A lane without a request names a slot that does not exist, so that its write is dropped.
        index = np.full(PREFILL_SLOTS, len(self._slots), np.int32)
        tokens = np.zeros((PREFILL_SLOTS, PREFILL_TOKENS), np.int32)
        start = np.zeros(PREFILL_SLOTS, np.int32)
        for lane, (i, slot, request) in enumerate(pending):
            piece = request.context[:-1][len(slot.cached) :][:PREFILL_TOKENS]
            index[lane], start[lane] = i, len(slot.cached)
            # A short piece is followed by zeros. Their keys and values lie past `cached`, where
            # causal attention does not reach before the real tokens overwrite them.
            tokens[lane, : len(piece)] = piece
            slot.cached = request.context[: len(slot.cached) + len(piece)]
        self._cache = self._prefill(self._params, self._cache, index, tokens, start)

    def _decode_some(self) -> None:
        """Decodes up to DECODE_TOKENS tokens in every busy slot.

        Idle slots are computed too, since the batch has one shape. They have no tokens remaining,
        and write at their first free position, where no cached token is lost.
        """
        size = len(self._slots)
        tokens, remaining = np.zeros(size, np.int32), np.zeros(size, np.int32)
        temperature, keys = np.ones(size, np.float32), np.zeros((size, 2), np.uint32)
        stop = np.full((size, MAX_STOP_TOKENS), -1, np.int32)
        positions = np.array([len(slot.cached) for slot in self._slots], np.int32)
        busy = self._busy()
        for i, _, request in busy:
            tokens[i] = request.tokens[-1] if request.tokens else request.context[-1]
            remaining[i] = request.max_tokens - len(request.tokens)
            temperature[i], keys[i], stop[i] = request.temperature, request.key, request.stop
        self._cache, out_tokens, out_logprobs = self._decode(
            self._params, self._cache, tokens, positions, remaining, temperature, keys, stop
        )
        out_tokens, out_logprobs = np.asarray(out_tokens), np.asarray(out_logprobs)
        for i, slot, request in busy:
            count = int((out_tokens[:, i] >= 0).sum())
            # What was fed is cached: the input token and all that was sampled but the last token.
            fed = [tokens[i], *out_tokens[: count - 1, i]] if count else []
            slot.cached = np.concatenate([slot.cached, np.array(fed, np.int32)])
            request.tokens += out_tokens[:count, i].tolist()
            request.logprobs += out_logprobs[:count, i].tolist()
            if request.tokens and request.tokens[-1] in request.stop:
                request.finish_reason = 'stop'
            elif len(request.tokens) == request.max_tokens:
                request.finish_reason = 'length'


def _usable(cached: np.ndarray, context: np.ndarray) -> int:
    """How many cached tokens the context can use: all if it goes on from them, else 0.

    A shorter common beginning is not used. It depends on whose episode had the slot before, and so
    would the pieces that the rest is cut into. One token has to be left as decode's first input.
    """
    n = len(cached)
    return n if n < len(context) and np.array_equal(context[:n], cached) else 0


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _prefill(graphdef, params, cache: Cache, index_P, tokens_PC, start_P) -> Cache:
    """The cache with the keys and values of C tokens more in P of its B slots, from `start_P` on.

    The cache is donated, so that the largest array of all is never in memory twice.
    """
    model = nnx.merge(graphdef, params)
    # An index past the last slot reads some slot (clip) but writes none (drop).
    rows = jax.tree.map(lambda x: x.at[index_P].get(mode='clip'), cache)
    positions_PC = start_P[:, None] + jnp.arange(tokens_PC.shape[1])
    _, rows = model.extend(tokens_PC, positions_PC, rows)
    return jax.tree.map(lambda x, new: x.at[index_P].set(new, mode='drop'), cache, rows)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _decode(graphdef, params, cache, tokens_B, positions_B, remaining_B, temperature_B, keys, stop):
    """Up to DECODE_TOKENS tokens a slot, at most `remaining_B`, until one of its `stop` tokens.

    tokens_B, int32, is fed first, at positions_B. keys is uint32 [B, 2], stop int32 [B, stops].
    Returns (cache, tokens int32 [DECODE_TOKENS, B] with -1 after a slot's end, logprobs float32 of
    the same shape, in nats).
    """
    model = nnx.merge(graphdef, params)
    greedy_B = temperature_B == 0
    scale_B = jnp.where(greedy_B, 1.0, temperature_B)
    size = tokens_B.shape[0]

    def going_on(carry):
        count, *_, remaining_B = carry
        return (count < DECODE_TOKENS) & (remaining_B > 0).any()

    def advance(carry):
        count, cache, out_tokens, out_logprobs, tokens_B, positions_B, remaining_B = carry
        hidden, cache = model.extend(tokens_B[:, None], positions_B[:, None], cache)
        # float32 whatever the model computes in: the learner's log-probabilities are compared with
        # these, and in bfloat16 rounding alone would move their ratio away from 1.
        logits_BV = hidden[:, 0].astype(jnp.float32) @ model.unembedding.T / scale_B[:, None]
        # The Gumbel-max trick: the argmax of logits plus Gumbel noise is a sample of their softmax.
        noise_BV = jax.vmap(_gumbel, (0, 0, None))(keys, positions_B, logits_BV.shape[1])
        noise_BV = jnp.where(greedy_B[:, None], 0.0, noise_BV)
        sampled_B = jnp.argmax(logits_BV + noise_BV, axis=-1).astype(jnp.int32)
        logprobs_B = jnp.take_along_axis(jax.nn.log_softmax(logits_BV), sampled_B[:, None], 1)[:, 0]
        # A slot that has ended goes on being computed with the others. Its position and its input
        # stand still, so what it writes stays past its last token.
        active_B = remaining_B > 0
        out_tokens = out_tokens.at[count].set(jnp.where(active_B, sampled_B, -1))
        out_logprobs = out_logprobs.at[count].set(jnp.where(active_B, logprobs_B, 0.0))
        stopped_B = (sampled_B[:, None] == stop).any(-1)
        return (
            count + 1,
            cache,
            out_tokens,
            out_logprobs,
            jnp.where(active_B, sampled_B, tokens_B),
            positions_B + active_B,
            jnp.where(stopped_B, 0, remaining_B - active_B),
        )

    out_tokens = jnp.full((DECODE_TOKENS, size), -1, jnp.int32)
    out_logprobs = jnp.zeros((DECODE_TOKENS, size), jnp.float32)
    carry = (0, cache, out_tokens, out_logprobs, tokens_B, positions_B, remaining_B)
    _, cache, out_tokens, out_logprobs, *_ = jax.lax.while_loop(going_on, advance, carry)
    return cache, out_tokens, out_logprobs


def _gumbel(key, position, size: int):
    """Noise float32 [V] of one position: a function of the request's seed and the position alone.

    A running random state would make a sample depend on how often its slot was decoded, and so on
    what else ran.
    """
    key = jax.random.wrap_key_data(key, impl='threefry2x32')
    return jax.random.gumbel(jax.random.fold_in(key, position), (size,))
